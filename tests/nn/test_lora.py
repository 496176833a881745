"""fasttune.nn.LoraLinear: PEFT's keys and numbers, without PEFT."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fasttune.nn import LoraLinear


def peft_layer(**options) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(48, 40))
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, **options)
    return get_peft_model(model, config).base_model.model[0]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_keys_and_numbers_of_peft(use_rslora: bool) -> None:
    options = {"r": 4, "lora_alpha": 16, "use_rslora": use_rslora}
    theirs = peft_layer(**options)
    ours = LoraLinear(48, 40, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [
        n for n, p in theirs.named_parameters() if p.requires_grad
    ]
    x = torch.randn(3, 5, 48, requires_grad=True)
    for a, b in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


def results(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *trained])]


def test_it_starts_as_its_base_and_merges_into_one() -> None:
    linear = nn.Linear(16, 12)
    layer = LoraLinear.from_linear(linear, r=2, lora_alpha=4)
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.base_layer is linear and not linear.weight.requires_grad
    nn.init.normal_(layer.lora_B["default"].weight)
    torch.testing.assert_close(layer.merged()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_in_training_only() -> None:
    layer = LoraLinear(64, 32, r=4, lora_dropout=0.5)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(70, 64)
    torch.manual_seed(1)
    first = layer(x)
    torch.manual_seed(1)
    assert torch.equal(first, layer(x)) and not torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_copies_compute_the_same() -> None:
    layer = LoraLinear(8, 8, r=2)
    x = torch.randn(3, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"r": 0}, "r: expected"), ({"lora_dropout": 1.0}, "dropout_p: expected")],
)
def test_options_out_of_range(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraLinear(8, 8, **options)
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear"):
        LoraLinear.from_linear(nn.Identity())
