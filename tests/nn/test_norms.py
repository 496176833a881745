"""fasttune.nn's norms: keys and numbers of torch's and transformers'."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fasttune.nn import LayerNorm, RMSNorm

WIDTH = 40


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = module(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])]


def assert_same(ours: nn.Module, theirs: nn.Module, **options) -> None:
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    for a, b in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_layer_norm_is_torchs(options) -> None:
    assert_same(LayerNorm(WIDTH, **options), nn.LayerNorm(WIDTH, **options))


def test_rms_norms_are_those_of_llama_gemma_and_torch() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert_same(RMSNorm(WIDTH, 1e-6, round_first=True), LlamaRMSNorm(WIDTH, 1e-6))
    assert_same(RMSNorm(WIDTH, 1e-6, weight_offset=1.0), GemmaRMSNorm(WIDTH, 1e-6))
    assert_same(RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6))
    gemma = RMSNorm(WIDTH, weight_offset=1.0)
    assert torch.equal(gemma.weight, torch.zeros(WIDTH))  # it starts as the identity


def test_copies_compute_the_same() -> None:
    x = torch.randn(3, WIDTH)
    for module in (RMSNorm(WIDTH), LayerNorm([WIDTH])):
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))


def test_several_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="normalized_shape: expected one dimension"):
        LayerNorm((4, WIDTH))
