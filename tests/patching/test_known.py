"""What a LoRA layer is known to compute is forgotten as soon as anything it depends on changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import relative
from torch import Tensor, nn

import fasttune
from fasttune.integrations import peft_known
from fasttune.patching import state


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def config(rank: int = 4) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=8, lora_dropout=0.0, target_modules=["layer"], init_lora_weights=False
    )


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    made: Any = get_peft_model(Layers(), config())
    made.add_adapter("other", config(2))
    made.set_adapter("default")
    return fasttune.patch(made.train())


def layer_of(model: Any) -> Any:
    return model.base_model.model.layer


def known_of(model: Any) -> Any:
    return state.of(layer_of(model), "lora").known


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def truth(layer: Any, x: Tensor) -> Tensor:
    """PEFT's own forward."""
    with fasttune.patching.swap.stock():
        y: Tensor = layer(x)
    return y


def set_data(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value


class Variant:
    """As PEFT's LoRA variants."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **more: Any) -> Tensor:
        return result + 1


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def as_louder(holder: nn.Module, name: str) -> None:
    holder.get_submodule(name).__class__ = Louder


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 2 * output)


def instance_forward(module: nn.Module) -> None:
    module.forward = lambda x: 5 * nn.functional.linear(x, module.weight)  # type: ignore[assignment]


def replace(parameters: dict[str, Any], name: str) -> None:
    parameters[name] = nn.Parameter(torch.randn_like(parameters[name]))


def own_attributes(module: nn.Module, **changes: Any) -> None:
    module.__dict__ = {**module.__dict__, **changes}


class OtherTable(nn.ModuleDict):
    def __getitem__(self, key: str) -> nn.Module:
        return self._modules["spare"]  # type: ignore[return-value]


def another_table(layer: Any) -> None:
    layer.lora_B.add_module("spare", nn.Linear(4, 12, bias=False))
    layer.lora_B.__class__ = OtherTable


def wider(layer: Any) -> None:
    set_data(layer.lora_A["default"].weight, torch.randn(6, 8))
    set_data(layer.lora_B["default"].weight, torch.randn(12, 6))


def in_bf16(layer: Any) -> None:
    for factor in (layer.lora_A["default"], layer.lora_B["default"]):
        factor.to(torch.bfloat16)


def dropout_of_everything(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)


CHANGES: dict[str, Callable[[Any], object]] = {
    "adapter": lambda layer: layer.set_adapter("other"),
    "two-adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "scaling": lambda layer: layer.scale_layer(3.0),
    "scaling-replaced": lambda layer: layer.scaling.update(default=0.5),
    "scaling-table": lambda layer: setattr(layer, "scaling", {"default": 7.0, "other": 1.0}),
    "new-a": lambda layer: replace(layer.lora_A["default"]._parameters, "weight"),
    "new-b": lambda layer: replace(layer.lora_B["default"]._parameters, "weight"),
    "new-module": lambda layer: layer.lora_A.update({"default": nn.Linear(8, 4, bias=False)}),
    "lora-bias": lambda layer: setattr(
        layer.lora_B["default"], "bias", nn.Parameter(torch.randn(12))
    ),
    "new-base-weight": lambda layer: replace(layer.base_layer._parameters, "weight"),
    "base-bias": lambda layer: setattr(layer.base_layer, "bias", nn.Parameter(torch.randn(12))),
    "new-base": lambda layer: setattr(layer, "base_layer", nn.Linear(8, 12)),
    "rank": wider,
    "dtype": in_bf16,
    "hook-on-a": lambda layer: hook(layer.lora_A["default"]),
    "hook-on-b": lambda layer: hook(layer.lora_B["default"]),
    "hook-on-base": lambda layer: hook(layer.base_layer),
    "hook-on-dropout": lambda layer: hook(layer.lora_dropout["default"]),
    "forward-of-a": lambda layer: instance_forward(layer.lora_A["default"]),
    "forward-of-base": lambda layer: instance_forward(layer.base_layer),
    "class-of-base": lambda layer: as_louder(layer, "base_layer"),
    "class-of-b": lambda layer: as_louder(layer.lora_B, "default"),
    "variant": lambda layer: layer.lora_variant.update(default=Variant()),
    "dropout": dropout_of_everything,
    "hidden-a": lambda layer: object.__setattr__(
        layer.lora_A["default"], "weight", torch.randn(4, 8)
    ),
    "attributes-of-a": lambda layer: own_attributes(
        layer.lora_A["default"],
        _parameters={"weight": nn.Parameter(torch.randn(4, 8)), "bias": None},
    ),
    "class-of-the-table": another_table,
    "bias-of-a": lambda layer: setattr(
        layer.lora_A["default"], "bias", nn.Parameter(torch.randn(4))
    ),
    "negated": lambda layer: set_data(
        layer.lora_A["default"].weight, torch._neg_view(torch.randn(4, 8))
    ),
    "parameters": lambda layer: layer.lora_A["default"].__dict__.update(
        _parameters={"weight": nn.Parameter(torch.randn(4, 8)), "bias": None}
    ),
    "new-table": lambda layer: setattr(
        layer, "lora_B", nn.ModuleDict({"default": nn.Linear(4, 12, bias=False)})
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_call(model: Any, change: str) -> None:
    layer, x = layer_of(model), x_of()
    model(x)
    known = known_of(model)
    assert known is not None and known.holds(layer, x)
    CHANGES[change](layer)
    assert change == "negated" or not known.holds(layer, x)
    # PEFT rounds x to the dtype of the adapter, fasttune does not.
    assert relative(model(x).detach(), truth(layer, x).detach()) < (
        1e-2 if change == "dtype" else 1e-6
    )


def test_nothing_changed_is_seen_too(model: Any) -> None:
    """Steps of an optimizer, modes and other inputs leave what is known as it is."""
    layer, x = layer_of(model), x_of()
    model(x).sum().backward()
    known = known_of(model)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    layer.lora_A["default"].weight.requires_grad_(False)
    model.eval()
    model(x_of()[:1])
    model.train()
    assert known_of(model) is known and known.holds(layer, x)
    assert relative(model(x).detach(), truth(layer, x).detach()) < 1e-6


def test_an_adapter_that_comes_later_is_seen(model: Any) -> None:
    layer, x = layer_of(model), x_of()
    layer.set_adapter(["default", "third"])
    model(x)
    known = known_of(model)
    assert known.holds(layer, x)
    model.add_adapter("third", config())
    layer.set_adapter(["default", "third"])
    assert not known.holds(layer, x)
    assert relative(model(x).detach(), truth(layer, x).detach()) < 1e-6


def test_dropout_is_that_of_the_moment() -> None:
    torch.manual_seed(0)
    made: Any = get_peft_model(Layers(), config())
    layer = layer_of(made)
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    model = fasttune.patch(made.train())
    x = x_of()
    model(x)
    known = known_of(model)
    assert known.projection.branches[0].dropout_p == 0.5
    layer.lora_dropout["default"].p = 0.25
    model(x)
    assert known_of(model).projection.branches[0].dropout_p == 0.25
    layer.lora_dropout["default"].eval()
    assert relative(model(x).detach(), truth(layer, x).detach()) < 1e-6


@pytest.mark.parametrize(
    "x", [torch.randn(3, 8).bfloat16(), torch.randn(3, 8).double(), torch.randn(3, 8).to("meta")]
)
def test_an_input_that_does_not_fit_is_no_fast_yes(model: Any, x: Tensor) -> None:
    model(x_of())
    assert not known_of(model).holds(layer_of(model), x)


def test_casting_that_is_off_is_seen(model: Any) -> None:
    layer = layer_of(model)
    in_bf16(layer)
    model(x_of())
    known = known_of(model)
    assert known.holds(layer, x_of())
    layer.cast_input_dtype_enabled = False
    assert not known.holds(layer, x_of())
    assert peft_known.of(layer, known.projection).holds(layer, x_of()) is False  # type: ignore[union-attr]


def test_the_class_of_the_layer_is_seen(model: Any) -> None:
    layer, x = layer_of(model), x_of()
    model(x)
    known = known_of(model)
    layer.__class__ = type("Other", (type(layer),), {"active_adapters": ["other"]})
    assert not known.holds(layer, x)
    assert relative(model(x).detach(), truth(layer, x).detach()) < 1e-6


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_what_is_known_keeps_no_model_alive(model: Any, no_collector: None) -> None:
    layer, x = layer_of(model), x_of()
    model(x)
    assert known_of(model) is not None
    record = weakref.ref(state.of(layer, "lora"))
    kept = weakref.ref(layer)
    layer.__dict__["_modules"].clear()  # PEFT's own modules refer to each other
    for module in model.modules():
        module.__dict__.get("_modules", {}).pop("layer", None)
    del layer
    assert kept() is None and record() is None


def test_what_a_layer_parted_with_goes_at_the_next_call(model: Any, no_collector: None) -> None:
    layer, x = layer_of(model), x_of()
    model(x)
    old = weakref.ref(layer.base_layer.weight)
    layer.base_layer = nn.Linear(8, 12)
    with torch.no_grad():
        model.eval()(x)
    assert old() is None


def test_tensors_that_are_put_in_place_for_a_call_are_not_kept(model: Any) -> None:
    fast = {name: 2 * value for name, value in model.named_parameters()}
    kept = [weakref.ref(value) for name, value in fast.items() if "default" in name]
    torch.func.functional_call(model, fast, (x_of(),))
    del fast
    assert kept and all(value() is None for value in kept)


def test_what_is_known_is_that_of_one_module(model: Any) -> None:
    """Copies read their own tensors: a replica of DataParallel shares the record."""
    x = x_of()
    model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert known_of(copied) is None
        with torch.no_grad():
            layer_of(copied).lora_B["default"].weight.zero_()
        assert relative(copied(x), truth(layer_of(copied), x)) < 1e-6
    replica = layer_of(model)._replicate_for_data_parallel()
    assert state.of(replica, "lora").known is known_of(model)
    assert not known_of(model).holds(replica, x)
