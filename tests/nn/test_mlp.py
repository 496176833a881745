"""GatedMLP and MLP against transformers' own modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttune.nn import MLP, GatedMLP
from fasttune.ops import _recipe
from fasttune.testing import numerics

HIDDEN, INTERMEDIATE = 32, 56
# fasttune's name -> that of transformers' ACT2FN
NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}


def llama(activation: str, bias: bool) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP(
        LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            hidden_act=NAMES[activation],
            mlp_bias=bias,
        )
    )


def phi(activation: str, bias: bool) -> nn.Module:
    from transformers import PhiConfig
    from transformers.models.phi.modeling_phi import PhiMLP

    assert bias
    return PhiMLP(
        PhiConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, hidden_act=NAMES[activation])
    )


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients by x and every parameter, for one fixed incoming gradient."""
    x = x.clone().requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy.to(y.dtype))]


CASES = [
    *(("GatedMLP", name, False) for name in NAMES),
    ("GatedMLP", "silu", True),
    *(("MLP", name, True) for name in NAMES),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "activation", "bias"), CASES)
def test_keys_and_numbers_are_those_of_transformers(
    kind: str, activation: str, bias: bool, dtype: torch.dtype
) -> None:
    stock = (llama if kind == "GatedMLP" else phi)(activation, bias).to(dtype)
    make: Any = GatedMLP if kind == "GatedMLP" else MLP
    ours = make(HIDDEN, INTERMEDIATE, activation=activation, bias=bias, dtype=dtype)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 7, HIDDEN).to(dtype)
    truth = gradients(copy.deepcopy(stock).double(), x.double())
    names = ["output", "x", *dict(ours.named_parameters())]
    for name, mine, theirs, exact in zip(
        names, gradients(ours, x), gradients(stock, x), truth, strict=True
    ):
        assert mine.dtype == theirs.dtype
        numerics.check(name, mine, theirs, exact)


def test_defaults() -> None:
    gated, plain = GatedMLP(4, 8), MLP(4, 8)
    assert gated.activation == "silu" and gated.down_proj.bias is None
    assert plain.activation == "gelu_tanh" and plain.fc1.bias is not None
    assert "activation='silu'" in repr(gated) and "activation='gelu_tanh'" in repr(plain)


@pytest.mark.parametrize("make", [GatedMLP, MLP])
def test_device_and_dtype(make: Any) -> None:
    module = make(4, 8, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(3, 4, device="meta", dtype=torch.bfloat16)).shape == (3, 4)


@pytest.mark.parametrize("make", [GatedMLP, MLP])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_are_independent(make: Any, copied: Any) -> None:
    module = make(HIDDEN, INTERMEDIATE, activation="relu2")
    x = torch.randn(3, HIDDEN)
    expected = module(x)
    twin = copied(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected) and twin.activation == "relu2"


@pytest.mark.parametrize("make", [GatedMLP, MLP])
def test_wrong_activation_lists_the_names(make: Any) -> None:
    message = (
        "activation: expected one of silu, gelu, gelu_tanh, quick_gelu, relu, relu2, tanh, "
        "sigmoid, leaky_relu, got 'swish'"
    )
    with pytest.raises(ValueError, match=message):
        make(4, 8, activation="swish")
    with pytest.raises(TypeError, match="activation: expected a name, got type"):
        make(4, 8, activation=nn.SiLU)


@pytest.mark.parametrize("make", [GatedMLP, MLP])
def test_hooks_and_replaced_projections_run(make: Any) -> None:
    """What PEFT puts in the place of a projection is called, and its input is a recipe."""
    module = make(HIDDEN, INTERMEDIATE)
    seen = []
    last = "down_proj" if make is GatedMLP else "fc2"
    for name, child in module.named_children():
        child.register_forward_hook(
            lambda m, args, out, name=name: seen.append((name, _recipe.available(args[0])))
        )
    module(torch.randn(3, HIDDEN)).sum().backward()
    assert [name for name, _ in seen] == list(dict(module.named_children()))
    assert dict(seen)[last]


@pytest.mark.parametrize("make", [GatedMLP, MLP])
def test_compiles_to_the_same_numbers(make: Any) -> None:
    module = make(HIDDEN, INTERMEDIATE)
    x = torch.randn(3, HIDDEN)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled, x), gradients(module, x), strict=True):
        assert torch.equal(ours, theirs)
