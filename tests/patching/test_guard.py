"""Small inputs: asked once, remembered as long as it stays true, and always counted."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tiny_models import gradients, relative
from torch import nn

import fasttune
from fasttune import _registry
from fasttune.ops import policy
from fasttune.patching import guard, state, swap
from fasttune.patching.state import ModuleState
from fasttune.testing.families import FAMILIES

KIND = "test_guard"


class Doubled(nn.Module):
    def forward(self, hidden: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return hidden * factor


class Asked:
    """An answer that counts how often it is asked for."""

    def __init__(self, below: int) -> None:
        self.below, self.times = below, 0

    def __call__(self, x: torch.Tensor, *facts: object) -> bool:
        self.times += 1
        return x.numel() < self.below


def _forward(module: Any, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    guard.is_small(state.of(module, KIND), x, module.ask)
    return original(module, x, *args, **kwargs)


swap.register_kind(KIND, _forward, of_tensor=True)


@pytest.fixture
def record() -> ModuleState:
    return ModuleState("layer", KIND)


@pytest.fixture
def module(record: ModuleState) -> Doubled:
    """Swapped; asks at each call whether its input has less than 100 elements."""
    made = Doubled()
    made.ask = Asked(below=100)
    swap.swap(made, KIND)
    state.attach(made, record)
    return made


def test_a_small_input_is_asked_for_once_and_counted_always(module, record):
    for n in (64, 64, 32):
        x = torch.randn(n)
        assert torch.equal(module(x), 2 * x)
    assert module.ask.times == 1
    assert record.fallbacks == {guard.TOO_SMALL.text: 3}
    assert not record.unexpected


def test_a_larger_input_is_asked_for_again(module, record):
    for n in (64, 99, 100, 99):
        module(torch.zeros(n))
    assert module.ask.times == 3
    assert record.calls == 3


def test_what_was_small_is_forgotten_where_the_limits_change(module, monkeypatch):
    monkeypatch.setattr(policy, "limits", policy.Limits())  # in tests there are none
    x = torch.zeros(4)

    def asks(x: torch.Tensor) -> bool:
        """Whether the module asks again, and is told that x is not small."""
        module.ask = Asked(below=0)
        module(x)
        return bool(module.ask.times)

    module(x)
    assert not asks(x)
    with policy.no_limits():
        assert asks(x)
        assert not guard.was_small(state.of(module, KIND), x, 4)
    with _registry.use_backend("reference"):
        assert asks(x)
    with monkeypatch.context() as here:
        here.setattr(_registry, "forced_by_environment", "reference")
        assert asks(x)
    assert asks(x.to("meta"))
    assert not asks(x)  # on the CPU it still is


def test_what_was_small_on_another_device_is_not_for_the_cpu(module):
    module(torch.zeros(4, device="meta"))
    module(torch.zeros(4))
    assert module.ask.times == 2


def test_further_arguments_reach_the_forward(module, record):
    x = torch.randn(4)
    module(x)
    assert torch.equal(module(x, 3.0), 3 * x)
    assert torch.equal(module(x, factor=3.0), 3 * x)
    assert torch.equal(module(hidden=x, factor=3.0), 3 * x)
    assert torch.equal(module(hidden=x), 2 * x)
    assert module.ask.times == 4  # all but the last, whose only argument is the tensor
    with pytest.raises(TypeError, match="'hidden'"):  # as the module's own forward has it
        module(factor=3.0)


def test_a_forward_that_hides_its_signature_takes_its_input_by_name(record) -> None:
    class Hidden(Doubled):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(*args, **kwargs)

    made = Hidden()
    made.ask = Asked(below=100)
    swap.swap(made, KIND)
    state.attach(made, record)
    x = torch.randn(4)
    assert torch.equal(made(hidden=x), 2 * x)
    assert record.fallbacks == {guard.EXTRA.text: 1}
    assert torch.equal(made(x), 2 * x)


def test_another_dtype_is_asked_for_again(module):
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32):
        module(torch.zeros(4, dtype=dtype))
    assert module.ask.times == 3


def test_what_another_thread_forgets_meanwhile_is_read_once(module):
    class Forgetful(ModuleState):
        """Forgets when it is read: between two reads of one call, as another thread may."""

        @property
        def small(self) -> Any:
            return self.__dict__.pop("kept", None)

        @small.setter
        def small(self, value: Any) -> None:
            self.__dict__["kept"] = value

    state.attach(module, Forgetful("layer", KIND))
    x = torch.randn(4)
    for _ in range(3):
        assert torch.equal(module(x), 2 * x)


def test_the_stock_model_and_traces_count_nothing(module, record):
    x = torch.randn(4)
    module(x)
    with swap.stock():
        assert torch.equal(module(hidden=x), 2 * x)
    traced = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(traced(x), 2 * x)
    assert record.calls == 1


def test_a_size_is_compared_as_it_was_given(record: ModuleState):
    x = torch.zeros(2, 3)
    guard.remember_small(record, x, x.shape)
    assert guard.was_small(record, x, x.shape)
    assert not guard.was_small(record, x, x.t().shape)
    assert record.fallbacks == {guard.TOO_SMALL.text: 1}


@pytest.mark.parametrize("x", [None, [1.0], nn.Parameter(torch.zeros(2))])
def test_other_than_a_plain_tensor_is_never_small(record: ModuleState, x: object):
    assert not guard.is_small(record, x, Asked(below=100))


@pytest.mark.limits
def test_a_lora_layer_that_drops_nothing_is_small_for_longer():
    """Asked before anything is read of the layer but its dropouts, and those at every call."""
    model = nn.Sequential(nn.Linear(512, 512))
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
    model = fasttune.patch(peft.get_peft_model(model, config).train())
    (layer,) = (m for m in model.modules() if hasattr(m, "lora_A"))
    x = torch.randn(512, 512)

    def runs_fused() -> bool:
        before = fasttune.explain(model).layers[0].fallbacks.get(guard.TOO_SMALL.text, 0)
        model(x)
        after = fasttune.explain(model).layers[0].fallbacks.get(guard.TOO_SMALL.text, 0)
        return after == before

    assert policy.limits.lora_dropout <= 2 * x.numel() < policy.limits.lora_fp32
    assert not runs_fused()
    layer.lora_dropout["default"] = nn.Dropout(0.1)
    assert runs_fused()
    model.eval()
    assert not runs_fused()
    layer.lora_dropout["default"] = nn.Identity()
    model.train()
    assert not runs_fused()
    x = torch.randn(1024, 512)
    assert runs_fused()


@pytest.mark.limits
def test_a_layer_without_an_active_adapter_is_not_called_small():
    """Its group may compute it, so that it must not be turned away before it is asked for."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"]))
    model.add_adapter("other", peft.LoraConfig(target_modules=["1"]))
    model.set_adapter("other")
    model = fasttune.patch(model.train())
    model(torch.randn(512, 512))
    first, second = (layer for layer in fasttune.explain(model).layers if layer.kind == "lora")
    assert guard.TOO_SMALL.text not in first.fallbacks and first.fallbacks
    assert guard.TOO_SMALL.text in second.fallbacks


@pytest.mark.limits
def test_a_recomputation_takes_the_path_of_its_forward() -> None:
    """One hidden size, keys of two lengths: what is small for one is not for the other."""
    bart = next(family for family in FAMILIES if family.name == "bart")
    model = fasttune.patch(bart.build().train())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    generator = torch.Generator().manual_seed(0)
    labels, long, short = (
        torch.randint(3, 99, (2, tokens), generator=generator) for tokens in (32, 300, 20)
    )

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = sum(model(input_ids=ids, labels=labels).loss for ids in (long, short))
        loss.backward()
        return gradients(model)

    ours = step()
    attention = fasttune.report(model)["attention"]
    assert attention.fused and attention.original == {guard.TOO_SMALL.text: 2}
    with swap.stock():
        stock = step()
    assert ours.keys() == stock.keys()
    for name, gradient in stock.items():
        if float(gradient.norm()) > 1e-4:  # keys' biases have none
            assert relative(ours[name], gradient) < 1e-4, name


@pytest.mark.limits
def test_dora_that_is_added_to_a_small_layer_is_fused():
    """Nothing is too small to gain there."""
    model = nn.Sequential(nn.Linear(64, 64))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    model = fasttune.patch(model.train())
    x = torch.randn(8, 64)
    model(x), model(x)
    (record,) = fasttune.explain(model).layers
    assert record.fallbacks == {guard.TOO_SMALL.text: 2}
    model.add_adapter("dora", peft.LoraConfig(target_modules=["0"], use_dora=True))
    model.set_adapter("dora")
    model(x)
    assert fasttune.explain(model).layers[0].fused_calls == 1


@pytest.mark.limits
def test_a_small_layer_is_traced_whole():
    model = nn.Sequential(nn.Linear(64, 64))
    model = fasttune.patch(peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"])))
    x = torch.randn(8, 64)
    expected = model(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.limits
def test_the_fewer_kernels_torch_has_the_longer_it_is_left_alone():
    sizes = {operations: 2**bits for operations, bits in ((6, 15), (3, 15), (2, 19), (1, 18))}
    for operations, size in sizes.items():
        x = torch.empty(size, dtype=torch.bfloat16)
        assert not policy.row_wise_too_small(x, operations)
        assert policy.row_wise_too_small(x[1:], operations)
