"""PEFT's LoRA on the weights of experts without the updated weights: stock against patched."""

from __future__ import annotations

import copy
import importlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from steps_compared import assert_close, exact_copy, in_double, step
from tiny_models import relative
from torch import Tensor, nn

import fasttune
from fasttune.errors import PatchError, VerificationError
from fasttune.ops import policy
from fasttune.patching import experts as patching
from fasttune.patching import guard
from fasttune.testing import accounting
from fasttune.testing.families import FAMILIES
from fasttune.testing.numerics import check

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FAMILY = {family.name: family for family in FAMILIES}
NAMES = ["mixtral", "qwen3_moe", "gpt_oss"]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
TOLERANCE = 2e-5  # fp32, another order of sums; as in test_lora_layers


def build(
    name: str = "mixtral",
    dtype: torch.dtype = torch.float32,
    implementation: str = "grouped_mm",
    autocast_adapter_dtype: bool = True,
    **changes: Any,
) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    options["target_parameters"] = PARAMETERS
    base: Any = FAMILY[name].build(dtype)
    base.set_experts_implementation(implementation)
    torch.manual_seed(1)
    config = LoraConfig(**{**options, **changes})
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    return away_from_zero(model).train()


def away_from_zero(model: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def batch_of(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return FAMILY["mixtral"].batch(dtype)


def wrapper(model: Any) -> Any:
    """The outermost wrapper of the experts of the first layer."""
    return model.base_model.model.model.layers[0].mlp.experts


def counted(model: nn.Module) -> Any:
    return fasttune.report(model)["experts"]


def assert_same(model: nn.Module, stock: nn.Module, batch: dict[str, Any] | None = None) -> None:
    batch = batch_of() if batch is None else batch
    ours, expected = step(model, batch), step(stock, batch)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert relative(ours[name], value) <= TOLERANCE, name


# ---------------------------------------------------------------------------- results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_of_a_model_equal_stock(
    name: str, implementation: str, dtype: torch.dtype
) -> None:
    model = build(name, dtype, implementation)
    batch = FAMILY[name].batch(dtype)
    truth = step(exact_copy(model), in_double(batch))
    stock = step(model, batch)
    keys = list(model.state_dict())  # a forward of PEFT changes their order
    fasttune.patch(model, strict=True)
    ours = step(model, batch)
    assert sum("experts" in gradient for gradient in ours) == 8  # A and B, twice in two layers
    assert_close(ours, stock, truth, dtype)
    assert (counted(model).fused, counted(model).original) == (2, {})
    assert list(model.state_dict()) == keys
    fasttune.unpatch(model)
    again = step(model, batch)
    assert all(torch.equal(again[gradient], value) for gradient, value in stock.items())
    assert not any("_fasttune" in name for m in model.modules() for name in m.__dict__)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_as_near_to_the_truth_as_stock(
    name: str, implementation: str, dtype: torch.dtype, rank: int, adapters: int
) -> None:
    model = build(name, dtype, implementation, r=rank, autocast_adapter_dtype=False)
    if adapters == 2:
        config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=PARAMETERS)
        model.add_adapter("other", config, autocast_adapter_dtype=False)
        away_from_zero(model)
        model.base_model.set_adapter(["default", "other"])
    exact = exact_copy(model)
    stock, truth = (layer_step(wrapper(each)) for each in (model, exact))
    fasttune.patch(model, kinds={"experts"}, strict=True)
    ours = layer_step(wrapper(model))
    assert len(ours) == 3 + 4 * adapters
    for tensor, value in truth.items():
        assert float(value.abs().max()) > 0, tensor
        # fp32 sums of up to 128 terms in another order; stock's own error may be small by luck.
        sums = torch.finfo(torch.float32).eps * 128**0.5 * float(value.abs().max())
        check(tensor, ours[tensor], stock[tensor], value, floor=sums)
    assert fasttune.explain(model)["0.mlp.experts"].fused_calls == 1


def layer_step(layer: Any, rows: int = 23) -> dict[str, Tensor]:
    """The output and every gradient of a module of experts."""
    dtype = layer.get_param().dtype
    random = torch.Generator().manual_seed(7)
    # bf16 values, so that every dtype starts from the same ones.
    x, weights, dy = (
        torch.randn(rows, size, generator=random).bfloat16().to(dtype) for size in (32, 2, 32)
    )
    chosen = torch.rand(rows, 4, generator=random).argsort(1)[:, :2]
    x.requires_grad_()
    weights.requires_grad_()
    y = layer(x, chosen, weights)
    y.backward(dy)
    result = {"output": y.detach(), "x": x.grad, "weights": weights.grad}
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            result[name] = parameter.grad
            parameter.grad = None
    return result


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_autocast_and_fp32_adapters_on_a_16_bit_base(name: str, implementation: str) -> None:
    batch = FAMILY[name].batch(torch.float32)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model = build(name, dtype, implementation)
        assert wrapper(model).lora_A["default"].weight.dtype == torch.float32
        truth = step(exact_copy(model), in_double(batch))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            stock = step(model, batch)
            ours = step(fasttune.patch(model), batch)
        assert {n: g.dtype for n, g in ours.items()} == {n: g.dtype for n, g in stock.items()}
        assert_close(ours, stock, truth, torch.bfloat16)
        assert (counted(model).fused, counted(model).original) == (2, {})


def test_an_expert_without_rows_has_gradient_zero() -> None:
    stock, model = build(implementation="eager"), build(implementation="eager")
    fasttune.patch(model, strict=True)
    ours, expected = (layer_step(wrapper(each), 1) for each in (model, stock))
    for name, value in expected.items():
        assert relative(ours[name], value) <= TOLERANCE, name
    a = ours["lora_A.default.weight"].view(4, 4, -1)
    assert [bool(expert.any()) for expert in a].count(True) == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_batch_without_rows(name: str, implementation: str) -> None:
    model = build(name, implementation=implementation)
    empty = torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    expected = wrapper(model)(*empty)
    fasttune.patch(model)
    y = wrapper(model)(*empty)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)


# ---------------------------------------------------------------------------- control


def test_disabled_merged_switched_and_frozen_adapters() -> None:
    stock, model = build(), fasttune.patch(build())
    other = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=PARAMETERS)
    for each in (stock, model):
        torch.manual_seed(5)
        each.add_adapter("other", other)
        away_from_zero(each)
    assert_same(model, stock)

    def both(change: Any) -> None:
        for each in (stock, model):
            change(each)
        assert_same(model, stock)

    both(lambda m: m.set_adapter("other"))
    both(lambda m: m.base_model.set_adapter(["other", "default"]))
    both(lambda m: m.set_adapter("default"))
    both(lambda m: wrapper(m).set_scale("default", 3.0))
    assert not counted(model).original
    both(lambda m: wrapper(m).lora_A["default"].weight.requires_grad_(False))
    both(lambda m: wrapper(m).lora_A["default"].weight.requires_grad_(True))
    both(lambda m: wrapper(m).get_param().requires_grad_(True))  # the base trains too
    assert not counted(model).original
    calls = fasttune.explain(model)["0.mlp.experts"].fused_calls
    with stock.disable_adapter(), model.disable_adapter():
        ours, expected = (each(**batch_of()).loss for each in (model, stock))
        assert torch.equal(ours, expected)
    both(lambda m: m.merge_adapter())
    explained = fasttune.explain(model)["0.mlp.experts"]
    assert explained.fused_calls == calls
    assert {"adapters are disabled", "adapters are merged"} <= explained.fallbacks.keys()
    both(lambda m: m.unmerge_adapter())
    assert fasttune.explain(model)["0.mlp.experts"].fused_calls == calls + 1
    assert counted(model).fused == 2  # what the user asked for is no failure


def test_eval_without_gradients_is_bit_equal() -> None:
    stock, model = build().eval(), fasttune.patch(build()).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch_of()).logits, stock(**batch_of()).logits)
    assert "inference" in fasttune.explain(model)["0.mlp.experts"].fallbacks


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(implementation: str, reentrant: bool) -> None:
    stock, model = (build(implementation=implementation) for _ in range(2))
    for each in (stock, model):
        each.enable_input_require_grads()
        each.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fasttune.patch(model)
    assert_same(model, stock)
    # The recomputation that is not reentrant stops at the last tensor that backward needs.
    assert fasttune.explain(model)["0.mlp.experts"].fused_calls == 1 + reentrant
    assert not counted(model).original


def test_one_of_the_parameters_adapted() -> None:
    for parameter in PARAMETERS:
        stock, model = (build(target_parameters=[parameter]) for _ in range(2))
        fasttune.patch(model, strict=True)
        assert_same(model, stock)
        assert counted(model).fused == 2


def test_copies_saving_and_unloading(tmp_path: Path) -> None:
    stock, model = build(), fasttune.patch(build())
    assert type(wrapper(model)).__name__ == type(wrapper(stock)).__name__
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        wrapper(model).lora_A["default"].weight.data.add_(0)
        assert wrapper(twin).lora_A["default"].weight is not wrapper(model).lora_A["default"].weight
        assert_same(twin, stock)
        assert counted(twin).fused == 2
    model.save_pretrained(tmp_path)
    base: Any = FAMILY["mixtral"].build(torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    assert_same(fasttune.patch(loaded, strict=True), stock)
    ours, expected = (each.merge_and_unload() for each in (model, stock))
    assert list(ours.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_another_implementation_chosen_after_patch() -> None:
    stock, model = build(implementation="eager"), fasttune.patch(build(implementation="eager"))
    for implementation in IMPLEMENTATIONS:
        for each in (stock, model):
            each.base_model.model.set_experts_implementation(implementation)
        assert_same(model, stock)
    assert (counted(model).fused, counted(model).original) == (2, {})


def test_every_linear_layer_and_the_router_of_a_converted_configuration() -> None:
    stock, model = (build(target_modules="all-linear", target_parameters=None) for _ in range(2))
    fasttune.patch(model)
    assert_same(model, stock)
    report = counted(model)
    assert report.fused == 2
    assert report.original == {"MixtralTopKRouter: weight is no stack of matrices": 2}


def test_selection_and_kinds() -> None:
    model = fasttune.patch(build(), kinds={"lora"})
    assert counted(model).fused == counted(model).pending == 0
    fasttune.patch(model, exclude=["0.mlp.experts"])
    assert (counted(model).pending, sum(counted(model).original.values())) == (1, 1)


# ---------------------------------------------------------------------------- what is not covered


class Experts(nn.Module):
    """Four experts of one matrix each; ``how`` the rows meet it."""

    def __init__(self, how: str = "loop") -> None:
        super().__init__()
        torch.manual_seed(4)
        self.weight = nn.Parameter(torch.randn(4, 16, 32) / 6)
        self.how = how

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        if self.how == "norm":
            x = x / self.weight.norm()
        if self.how == "attribute":
            self.seen = len(x)
        if self.how == "wrong":
            return x.new_zeros(1)
        y = x.new_zeros(len(x), self.weight.shape[1])
        for row, experts in enumerate(chosen.tolist()):
            for place, expert in enumerate(experts):
                y[row] += weights[row, place] * (self.weight[expert] @ x[row])
        return y


class Sorted(nn.Module):
    """Rows sorted by expert, as many for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.weight = nn.Parameter(torch.randn(4, 32, 16) / 6)
        self.features = 32

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.view(len(self.weight), -1, self.features), self.weight)


def adapted(module: nn.Module) -> Any:
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.weight"])
    torch.manual_seed(1)
    return away_from_zero(get_peft_model(nn.ModuleDict({"experts": module}), config)).train()


def run(model: Any, *arguments: Tensor) -> list[Tensor]:
    layer = model.base_model.model["experts"]
    y = layer(*arguments)
    y.square().sum().backward()
    gradients = [p.grad for p in layer.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), *gradients]


def some_rows() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 32), torch.tensor([[0, 2], [3, 1], [2, 0]]), torch.rand(3, 2)


def test_rows_sorted_by_expert() -> None:
    stock, model, x = adapted(Sorted()), adapted(Sorted()), torch.randn(20, 32)
    fasttune.patch(model, strict=True)
    for ours, expected in zip(run(model, x), run(stock, x), strict=True):
        assert relative(ours, expected) <= TOLERANCE
    assert counted(model).fused == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("norm", r"needs the updated weight itself \(\.norm\)"),
        ("attribute", "sets attributes"),
        ("wrong", "does not use its adapted parameters"),
    ],
)
def test_a_forward_that_is_not_proven_is_left_alone(how: str, reason: str) -> None:
    model = adapted(Experts(how))
    with pytest.raises(PatchError, match=reason):
        fasttune.patch(model, strict=True)
    assert not fasttune.is_patched(model)


def test_weights_asked_for_after_the_proof_are_those_of_stock() -> None:
    stock, model, rows = adapted(Experts()), adapted(Experts()), some_rows()
    fasttune.patch(model)
    for each in (stock, model):
        each.base_model.model["experts"].get_base_layer().how = "norm"
    for ours, expected in zip(run(model, *rows), run(stock, *rows), strict=True):
        assert relative(ours, expected) <= TOLERANCE
    reason = "its forward needs the updated weight itself (.norm)"
    assert counted(model).original == {reason: 1}
    fasttune.patch(model, strict=True)
    with pytest.raises(PatchError, match="needs the updated weight itself"):
        run(model, *rows)


def test_reasons_at_a_call() -> None:
    def hook(model: Any) -> None:
        wrapper(model).get_base_layer().register_forward_hook(lambda m, args, y: y * 2)

    def inner_forward(model: Any) -> None:
        inner = wrapper(model).base_layer
        inner.forward = inner.forward

    def parametrized(model: Any) -> None:
        module = wrapper(model).get_base_layer()
        nn.utils.parametrize.register_parametrization(module, "down_proj_bias", nn.Identity())

    def in_double_precision(model: Any) -> None:
        adapter = wrapper(model).lora_A["default"]
        assert patching.peft_experts.why_original(wrapper(model)) is None
        adapter.weight.data = adapter.weight.data.double()

    for change, reason in (
        (hook, "a hook on base_layer"),
        (inner_forward, "a hook on base_layer"),
        (parametrized, "the experts are parametrized: quantised or changed by another library"),
        (in_double_precision, "adapter is torch.float64"),
    ):
        stock, model = build("gpt_oss"), fasttune.patch(build("gpt_oss"))
        for each in (stock, model):
            change(each)
        assert_same(model, stock)
        assert fasttune.explain(model)["0.mlp.experts"].fallbacks == {reason: 1}
        assert counted(model).fused == 1  # the other layer


@pytest.mark.limits
def test_small_stacks_of_weights_take_peft_s_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fasttune.patch(build(), strict=True)
    experts = wrapper(model).get_base_layer()
    elements = experts.gate_up_proj.numel() + experts.down_proj.numel()
    for limit, fused in ((elements + 1, 0), (elements, 1)):
        monkeypatch.setattr(policy, "limits", replace(policy.NO_LIMITS, experts_fp32=limit))
        step(model, batch_of())
        explained = fasttune.explain(model)["0.mlp.experts"]
        assert explained.fused_calls == fused
        assert explained.fallbacks == {guard.TOO_SMALL.text: 1}


def test_a_tensor_as_scaling() -> None:
    stock, model = build(), fasttune.patch(build(), strict=True)
    for each in (stock, model):
        wrapper(each).scaling["default"] = torch.tensor(0.5)
    assert_same(model, stock)
    assert counted(model).fused == 2


def test_errors_are_those_of_stock() -> None:
    stock, model = build(), fasttune.patch(build())
    messages = []
    for each in (stock, model):
        with pytest.raises(ValueError, match="mixed adapter batches") as error:
            wrapper(each)(torch.randn(3, 32), None, None, adapter_names=["default"])
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_compiling_traces_the_original() -> None:
    model = adapted(Sorted())
    fasttune.patch(model)
    x = torch.randn(20, 32)
    eager = run(model, x)[0]
    layer = model.base_model.model["experts"]
    compiled = torch.compile(lambda x: layer(x), backend="eager")
    assert relative(compiled(x).detach(), eager) <= TOLERANCE
    assert fasttune.explain(model)["experts"].fused_calls == 1


# ---------------------------------------------------------------------------- proof, verify, costs


def test_a_proof_leaves_the_random_state_and_the_module_alone() -> None:
    model = build()
    module, before = wrapper(model).get_base_layer(), torch.get_rng_state()
    attributes = dict(module.__dict__)
    assert patching.why_not_lazy(module, ("down_proj", "gate_up_proj")) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert module.__dict__ == attributes


def test_a_proof_reads_no_weight() -> None:
    with torch.device("meta"):
        module = Experts()
    assert patching.why_not_lazy(module, ("weight",)) is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("llama4", "Llama4TextExperts"),  # rows sorted by expert
        ("nemotron_h", "NemotronHExperts"),  # no gate
        ("deepseek_v2", "DeepseekV2Experts"),  # sizes without a common factor
        ("olmoe", "OlmoeExperts"),
        ("glm4_moe", "Glm4MoeExperts"),
        ("qwen3_next", "Qwen3NextExperts"),
    ],
)
def test_experts_of_other_families_are_proven(name: str, experts: str, implementation: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(name).get_text_config()
    config._experts_implementation = implementation
    source = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    with torch.device("meta"):
        module = getattr(source, experts)(config)
    names = tuple(n for n, p in module.named_parameters() if p.dim() == 3)
    assert len(names) == 2
    assert patching.why_not_lazy(module, names) is None


@pytest.mark.parametrize("name", NAMES)
def test_verify_passes_and_notices_a_wrong_update(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fasttune.patch(build(name))
    fasttune.verify(model, batch_of())
    right = patching.peft_experts.updates

    def wrong(layer: nn.Module) -> Any:
        return {n: [own.map(lambda f: f * 1.01) for own in u] for n, u in right(layer).items()}

    monkeypatch.setattr(patching.peft_experts, "updates", wrong)
    with pytest.raises(VerificationError):
        fasttune.verify(model, batch_of())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_size_of_the_stack_is_made(name: str, implementation: str) -> None:
    """Proportions of a real layer: few rows an expert, a rank far below the features."""
    config = {"num_local_experts": 16, "num_experts": 16, "num_experts_per_tok": 2}
    config |= {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256}
    layer = whole_layer(name, implementation, config)
    parameters = dict(layer.get_base_layer().named_parameters())
    stack = sum(p.numel() * p.element_size() for n, p in parameters.items() if p.dim() == 3)
    random = torch.Generator().manual_seed(5)
    x = torch.randn(32, 128, generator=random, requires_grad=True)
    chosen = torch.rand(32, 16, generator=random).argsort(1)[:, :2]
    weights = torch.rand(32, 2, generator=random)

    def run() -> Tensor:
        y: Tensor = layer(x, chosen, weights)
        return y

    stock = accounting.count(run)
    fasttune.patch(layer, strict=True)
    ours = accounting.count(run)
    # Stock writes the updated stack and its gradient; ours reads the weights, once a direction.
    assert stock.bytes_written - ours.bytes_written > 1.8 * stack
    assert ours.bytes_written < stack
    assert ours.bytes_moved < stock.bytes_moved / 2
    # What ours saves of that size is the parameters themselves.
    assert stock.saved_bytes > stack
    assert ours.saved_bytes - stack < stock.saved_bytes / 8


def whole_layer(name: str, implementation: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, **options)
    config._experts_implementation = implementation
    model = build(name)
    cls = type(wrapper(model).get_base_layer())
    torch.manual_seed(3)
    experts = cls(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=[], target_parameters=names)
    adapted = get_peft_model(nn.ModuleDict({"experts": experts}), lora)
    return away_from_zero(adapted).train().base_model.model["experts"]
