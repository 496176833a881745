"""What a patched PEFT model must still do: the same calls on a stock and a patched model.

docs/peft.md has the table; its rows name the tests here and elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from tiny_models import gradients, relative, tiny_llama, with_lora
from torch import Tensor, nn

import fasttune

TOLERANCE = 2e-5  # as in test_lora_layers
SMALL = 1e-4  # a gradient this much smaller than the largest is what cancelled terms left over
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Action = Callable[[Any], Any]


def away_from_zero(model: nn.Module) -> nn.Module:
    """lora_B random, so that every gradient counts; the same in every model."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    output = model(**batch)
    if output.loss.requires_grad:
        output.loss.backward()
    return {"loss": output.loss.detach(), **gradients(model)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(expected.double().norm()) for expected in theirs.values())
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert float((ours[name].double() - expected.double()).norm()) <= TOLERANCE * max(
            float(expected.double().norm()), SMALL * largest
        ), name


def assert_path(model: nn.Module, reason: str) -> None:
    """Every LoRA layer was fused, or took the original path for this reason."""
    report = fasttune.report(model)["lora"]
    others = [text for text in report.original if text != "no active adapter on this layer"]
    if not reason:
        assert report.fused and not others, str(report)
        return
    assert any(reason in text for text in others), str(report)


def build(**changes: Any) -> Any:
    return away_from_zero(with_lora(tiny_llama(), **changes)).train()


# ---------------------------------------------------------------------------- actions


def add_and_activate(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "up_proj"]))
    away_from_zero(model)
    model.set_adapter("second")


def add_and_delete(model: Any) -> None:
    add_and_activate(model)
    model.delete_adapter("default")


def combine(model: Any) -> None:
    add_and_activate(model)
    model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "sum", combination_type="cat")
    model.set_adapter("sum")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".sum." in name)


def merge_and_unmerge(model: Any) -> None:
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()


def train_a_step_after_unmerge(model: Any) -> None:
    merge_and_unmerge(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.9)


def scale_layers(model: Any) -> None:
    for layer in lora_layers(model):
        layer.scale_layer(3.0)
        layer.unscale_layer(2.0)


def set_scale(model: Any) -> None:
    for layer in lora_layers(model):
        layer.set_scale("default", 0.5)


def tensor_scaling(model: Any) -> None:
    for layer in lora_layers(model):
        layer.scaling["default"] = torch.tensor(0.75)


def frozen(part: str) -> Action:
    def freeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(False)

    return freeze


def train_the_base(model: Any) -> None:
    for layer in lora_layers(model):
        layer.base_layer.weight.requires_grad_(True)


def tied_views(model: Any) -> None:
    """Two layers share A and B as views of one storage, not contiguous."""
    first, second = lora_layers(model)[:2]
    shared_a = torch.randn(64, 4)
    for layer in (first, second):
        layer.lora_A["default"].weight = nn.Parameter(shared_a.t())


def no_input_casting(model: Any) -> None:
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False


def load_state(model: Any) -> None:
    state = {name: value * 1.25 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def to_and_back(model: Any) -> None:
    model.to(torch.bfloat16)
    model.to(torch.float32)


ACTIONS: dict[str, tuple[dict[str, Any], Action]] = {
    "add-and-set-adapter": ({}, add_and_activate),
    "add-and-delete-adapter": ({}, add_and_delete),
    "add-weighted-adapter": ({}, combine),
    "merge-and-unmerge": ({}, merge_and_unmerge),
    "train-after-unmerge": ({}, train_a_step_after_unmerge),
    "scale-and-unscale": ({}, scale_layers),
    "set-scale": ({}, set_scale),
    "tensor-scaling": ({}, tensor_scaling),
    "frozen-a": ({}, frozen("lora_A")),
    "frozen-b": ({}, frozen("lora_B")),
    "trained-base": ({"target_modules": ["q_proj", "down_proj"]}, train_the_base),
    "tied-views": ({"target_modules": ["q_proj", "o_proj"]}, tied_views),
    "input-casting-off": ({}, no_input_casting),
    "load-state-dict": ({}, load_state),
    "dtype-round-trip": ({}, to_and_back),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_before_patch(batch: dict[str, Tensor], name: str) -> None:
    changes, action = ACTIONS[name]
    stock, model = build(**changes), build(**changes)
    for each in (stock, model):
        torch.manual_seed(7)
        action(each)
    fasttune.patch(model)
    assert_same(step(model, batch), step(stock, batch))
    assert_path(model, "")


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_after_patch(batch: dict[str, Tensor], name: str) -> None:
    changes, action = ACTIONS[name]
    stock, model = build(**changes), build(**changes)
    fasttune.patch(model)
    step(model, batch)
    for each in (stock, model):
        torch.manual_seed(7)
        action(each)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_same(step(model, batch), step(stock, batch))
    assert_path(model, "")


# ---------------------------------------------------------------------------- configurations

# Reason of the original path, or "" where every LoRA layer is fused.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "rslora": ({"use_rslora": True}, ""),
    "patterns": ({"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}}, ""),
    "lora-bias": ({"lora_bias": True}, ""),
    "bias-all": ({"bias": "all"}, ""),
    "layers-to-transform": ({"layers_to_transform": [1], "target_modules": PROJECTIONS}, ""),
    "layer-replication": (
        {"layer_replication": [(0, 2), (0, 1)], "target_modules": PROJECTIONS},
        "",
    ),
    "pissa": ({"init_lora_weights": "pissa"}, ""),
    "pissa-niter": ({"init_lora_weights": "pissa_niter_4"}, ""),
    "olora": ({"init_lora_weights": "olora"}, ""),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, ""),
    "gaussian": ({"init_lora_weights": "gaussian"}, ""),
    "modules-to-save": ({"modules_to_save": ["lm_head"], "target_modules": PROJECTIONS}, ""),
    "lora-on-the-head": ({"target_modules": [*PROJECTIONS, "lm_head"]}, ""),
    "embedding": (
        {"target_modules": [*PROJECTIONS, "embed_tokens"]},
        "",
    ),
    "trainable-tokens": (
        {"trainable_token_indices": [5, 17], "target_modules": PROJECTIONS},
        "",
    ),
    "kasa": ({"kasa_config": "default"}, "LoRA variant KasaLinearVariant"),
    "mica": ({"init_lora_weights": "mica"}, "LoRA variant MiCALinearVariant"),
    "alora": ({"alora_invocation_tokens": [7, 8]}, "LoRA variant ALoraLinearVariant"),
    "bdlora": ({"use_bdlora": "default"}, "LoRA variant BdLoraLinearVariant"),
    "velora": ({"velora_config": "default"}, "LoRA variant VeloraLinearVariant"),
    "monteclora": ({"monteclora_config": "default"}, "LoRA variant MontecloraLinearVariant"),
}


def configured(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with PEFT's own configuration objects."""
    objects = {
        "kasa_config": lambda: peft.KasaConfig(),
        "velora_config": lambda: peft.VeloraConfig(num_groups=4),
        "monteclora_config": lambda: peft.MontecloraConfig(),
        "use_bdlora": lambda: peft.tuners.lora.BdLoraConfig(
            target_modules_bd_a=["q_proj"],
            target_modules_bd_b=["o_proj"],
            nblocks=2,
            match_strict=False,
        ),
    }
    made = {key: objects[key]() for key, value in changes.items() if value == "default"}
    return {**changes, **made}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration(batch: dict[str, Tensor], name: str) -> None:
    changes, reason = CONFIGURATIONS[name]
    stock, model = (build(**configured(changes)) for _ in range(2))
    fasttune.patch(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]
    assert_same(step(model, batch), step(stock, batch))
    assert_path(model, reason)


# ---------------------------------------------------------------------------- state


def trained(model: Any, batch: dict[str, Tensor]) -> Any:
    for _ in range(2):
        step(model, batch)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
    return model


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=batch["input_ids"]).logits
    return out


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("patched_first", [False, True])
def test_save_and_load(
    batch: dict[str, Tensor], tmp_path: Path, patched_first: bool, low_cpu_mem_usage: bool
) -> None:
    """patched -> unpatched and back."""
    model = build()
    if patched_first:
        fasttune.patch(model)
    expected = logits(trained(model, batch), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    if not patched_first:
        fasttune.patch(loaded)
    assert torch.equal(logits(loaded, batch), expected)
    assert_same(step(loaded.train(), batch), step(model.train(), batch))


@pytest.mark.parametrize("merge", [True, False])
def test_unload(batch: dict[str, Tensor], merge: bool) -> None:
    stock, model = build(), fasttune.patch(build())
    trained(model, batch)
    stock.load_state_dict(model.state_dict())
    results = [each.merge_and_unload() if merge else each.unload() for each in (stock, model)]
    assert torch.equal(logits(results[1], batch), logits(results[0], batch))
    assert not lora_layers(results[1])
    assert list(results[1].state_dict()) == list(results[0].state_dict())
    fasttune.unpatch(results[1])
    assert type(results[1].model.layers[0].self_attn.q_proj) is nn.Linear


def test_hotswap_pads_ranks_and_makes_scalings_tensors(
    batch: dict[str, Tensor], tmp_path: Path
) -> None:
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    build(r=6, lora_alpha=3).save_pretrained(tmp_path)
    stock, model = build(), build()
    for each in (stock, model):
        prepare_model_for_compiled_hotswap(each, target_rank=8)
    fasttune.patch(model)
    for each in (stock, model):
        hotswap_adapter(each, str(tmp_path), adapter_name="default")
    assert isinstance(lora_layers(model)[0].scaling["default"], Tensor)
    assert_same(step(model, batch), step(stock, batch))
    assert_path(model, "")


def test_rescaled_adapters(batch: dict[str, Tensor]) -> None:
    from peft.helpers import rescale_adapter_scale

    stock, model = build().eval(), fasttune.patch(build()).eval()
    before = logits(stock, batch)
    with rescale_adapter_scale(stock, 0.5), rescale_adapter_scale(model, 0.5):
        inside = step(stock, batch)
        assert_same(step(model, batch), inside)
        assert not torch.equal(logits(stock, batch), before)
    assert_same(step(model, batch), step(stock, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapter_dtypes(
    batch: dict[str, Tensor], dtype: torch.dtype, autocast_adapter_dtype: bool
) -> None:
    def made() -> Any:
        config = LoraConfig(r=4, target_modules=PROJECTIONS)
        torch.manual_seed(1)
        model = get_peft_model(
            tiny_llama().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype
        )
        return away_from_zero(model).train()

    stock, model = made(), fasttune.patch(made())
    truth = made().double()
    exact, ours, theirs = step(truth, batch), step(model, batch), step(stock, batch)
    assert {n: g.dtype for n, g in ours.items()} == {n: g.dtype for n, g in theirs.items()}
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert ours["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"].dtype == (
        expected
    )

    def error(of: dict[str, Tensor]) -> float:
        parts = [(of[n].double() - exact[n].double()).square().sum() for n in exact]
        return float(torch.stack(parts).sum().sqrt())

    assert error(ours) <= 1.5 * error(theirs)  # many independent roundings: the sum hardly varies
    assert_path(model, "")


def test_disabled_input_casting_context(batch: dict[str, Tensor]) -> None:
    from peft.helpers import disable_input_dtype_casting

    stock, model = build(), fasttune.patch(build())
    with disable_input_dtype_casting(stock), disable_input_dtype_casting(model):
        assert_same(step(model, batch), step(stock, batch))


def test_inference_mode(batch: dict[str, Tensor]) -> None:
    stock, model = build().eval(), fasttune.patch(build()).eval()
    with torch.inference_mode():
        ours = model(input_ids=batch["input_ids"]).logits
        assert torch.equal(ours, stock(input_ids=batch["input_ids"]).logits)


def test_copies_after_an_added_adapter(batch: dict[str, Tensor]) -> None:
    model = fasttune.patch(build())
    add_and_activate(model)
    twin = copy.deepcopy(model)
    assert_same(step(twin, batch), step(model, batch))
    with torch.no_grad():
        lora_layers(twin)[0].lora_B["second"].weight.zero_()
    assert lora_layers(model)[0].lora_B["second"].weight.any()


# ---------------------------------------------------------------------------- neighbours


def test_layers_injected_without_a_peft_model(batch: dict[str, Tensor]) -> None:
    from peft import inject_adapter_in_model

    config = LoraConfig(r=4, target_modules=PROJECTIONS)

    def injected() -> Any:
        torch.manual_seed(1)
        return away_from_zero(inject_adapter_in_model(config, tiny_llama())).train()

    stock, model = injected(), fasttune.patch(injected())
    assert not isinstance(model, PeftModel)
    assert_same(step(model, batch), step(stock, batch))
    assert_path(model, "")


def test_a_mixed_model(batch: dict[str, Tensor]) -> None:
    from peft import LoHaConfig, PeftMixedModel

    def made() -> Any:
        torch.manual_seed(1)
        model = PeftMixedModel(
            tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), "lora"
        )
        model.add_adapter("loha", LoHaConfig(r=4, target_modules=["v_proj"], init_weights=False))
        model.set_adapter(["lora", "loha"])
        return away_from_zero(model).train()

    stock, model = made(), fasttune.patch(made())
    assert_same(step(model, batch), step(stock, batch))
    report = fasttune.report(model)["lora"]
    assert report.fused == 4
    assert "PEFT's loha is not fused" in report.original


def test_xlora_s_instance_level_forwards_are_left_alone(
    batch: dict[str, Tensor], tmp_path: Path
) -> None:
    from peft import XLoraConfig

    build(target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)

    def made() -> Any:
        base = tiny_llama()
        base.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=64, adapters={"0": str(tmp_path)}, xlora_depth=1
        )
        torch.manual_seed(4)
        return get_peft_model(base, config).train()

    stock, model = made(), fasttune.patch(made())
    expected, ours = stock(**batch).loss, model(**batch).loss
    assert relative(ours, expected) <= TOLERANCE
    assert "an instance-level forward is installed" in str(fasttune.report(model)["lora"].original)


def test_optimizers_of_peft(batch: dict[str, Tensor]) -> None:
    from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

    def made(create: Any, patched: bool) -> dict[str, Tensor]:
        model = build()
        if patched:
            fasttune.patch(model)
        optimizer = create(model)
        for _ in range(3):
            step(model, batch)
            optimizer.step()
        return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

    for create in (
        lambda m: create_loraplus_optimizer(m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4),
        lambda m: create_lorafa_optimizer(m, r=4, lora_alpha=8, lr=1e-3),
    ):
        ours, theirs = made(create, True), made(create, False)
        # Adam divides by the gradient's own size: where that is noise, the step is too.
        difference = torch.cat([(ours[n] - theirs[n]).flatten() for n in theirs])
        moved = torch.cat([p.flatten() for p in theirs.values()])
        assert float(difference.norm() / moved.norm()) < 1e-3


def test_every_row_of_the_table_names_a_test() -> None:
    root = Path(__file__).parents[2]
    tests = "\n".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))
    rows = [line for line in (root / "docs" / "peft.md").read_text().splitlines() if "| `" in line]
    assert len(rows) > 40
    for row in rows:
        names = [part.strip(" `") for part in row.rsplit("|", 2)[1].split(",")]
        for name in names:
            test, _, case = name.partition("[")
            assert f"def {test}(" in tests, row
            assert not case or f'"{case.rstrip("]")}"' in tests, row
