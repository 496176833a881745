"""LoReft against pyreft's module, written anew in plain torch."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny_models import relative
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from fasttune.nn import LoReft
from fasttune.nn._orthonormal import (
    Orthonormal,
    factors_of,
    original_of,
    orthonormal_backward,
    orthonormal_rows,
)

H, R = 24, 4
VARIANTS = ("loreft", "direft", "noreft", "nodireft")


class Rotation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(H, R)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Pyreft(nn.Module):
    """The forward and the parameters of pyreft's interventions, from their formulas."""

    def __init__(self, variant: str, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.difference = variant in ("loreft", "noreft")
        if variant in ("loreft", "direft"):
            self.rotate_layer = orthogonal(Rotation())
        else:
            self.proj_layer = nn.Linear(H, R, bias=False)
        self.learned_source = nn.Linear(H, R)
        self.activation = nn.Identity() if activation is None else activation

    def forward(self, h: Tensor) -> Tensor:
        rotated = hasattr(self, "rotate_layer")
        columns = self.rotate_layer.weight if rotated else self.proj_layer.weight.t()
        inner = self.activation(self.learned_source(h))
        if self.difference:
            inner = inner - h @ columns
        return h + inner @ columns.t()

    def short(self) -> dict[str, Tensor]:
        """What pyreft's LoreftIntervention saves."""
        return {
            **self.learned_source.state_dict(), "rotate_layer": self.rotate_layer.weight.detach()
        }  # fmt: skip


def perturbed(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            # torch truncates the diagonal of an orthogonal parameter to integers.
            parameter.add_(noise.tril(-1) if key.endswith("original") else noise)
    return module


def ours_of(theirs: Pyreft, variant: str, **options: Any) -> LoReft:
    ours = LoReft(H, R, variant=variant, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours


@pytest.mark.parametrize("activation", ["linear", "silu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_pyrefts_in_fp64(variant: str, activation: str) -> None:
    torch.manual_seed(0)
    act = nn.SiLU() if activation == "silu" else None
    theirs = perturbed(Pyreft(variant, act))
    ours = ours_of(theirs, variant, activation=activation)
    theirs.double()
    h = torch.randn(3, 5, H, requires_grad=True)
    wide = h.detach().double().requires_grad_()
    weights = torch.randn(3, 5, H)
    (ours(h) * weights).sum().backward()
    (theirs(wide) * weights.double()).sum().backward()
    assert relative(ours(h).detach(), theirs(wide).detach()) < 1e-6
    assert relative(h.grad, wide.grad) < 1e-6
    for key in ("weight", "bias"):
        mine = getattr(ours.learned_source, key).grad
        assert relative(mine, getattr(theirs.learned_source, key).grad) < 1e-6, key
    if variant in ("noreft", "nodireft"):
        assert relative(ours.proj_layer.weight.grad, theirs.proj_layer.weight.grad) < 1e-6


@pytest.mark.parametrize("rank", [1, 4, H])
def test_the_orthonormal_map_and_its_gradient_are_those_of_torch(rank: int) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(rank, H, bias=False).double()
    orthogonal(layer, orthogonal_map="householder", use_trivialization=False)
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.add_(torch.randn(H, rank).double().tril(-1))
    rows = orthonormal_rows(original.detach())
    assert relative(rows, layer.weight.detach().t()) < 1e-12
    assert relative(rows @ rows.t(), torch.eye(rank).double()) < 1e-12
    drows = torch.randn(rank, H).double()
    (layer.weight.t() * drows).sum().backward()
    gradient = orthonormal_backward(factors_of(original.detach()), drows)
    assert relative(gradient, original.grad) < 1e-12
    again = orthonormal_rows(original_of(rows.t()))
    assert relative(again, rows) < 1e-12


def test_weight_decay_does_not_undo_the_rotation() -> None:
    layer = Orthonormal(H, R)
    before = layer.rows().detach().clone()
    with torch.no_grad():
        layer.original.diagonal().mul_(0.99)
    assert torch.equal(layer.rows(), before)


def test_one_orthogonalisation_a_step_and_one_gradient_through_it_a_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fasttune.nn import _orthonormal

    calls = []
    original = orthonormal_backward
    monkeypatch.setattr(
        _orthonormal, "orthonormal_backward", lambda *args: calls.append(1) or original(*args)
    )
    module = LoReft(H, R)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    h = torch.randn(6, H)
    count = module.rotate_layer.orthogonalisations
    for step in range(3):
        for backward in range(2):  # gradient accumulation
            loss = module(h).square().sum() + module(h * 2).sum() + module(h).sum()
            loss.backward()
            assert len(calls) == 2 * step + backward + 1
        assert module.rotate_layer.orthogonalisations == count + step + 1
        optimizer.step()
        optimizer.zero_grad()
    rows = module.rotation.detach()
    assert relative(rows @ rows.t(), torch.eye(R)) < 1e-5


def test_accumulated_gradients_are_those_of_no_cache() -> None:
    module = perturbed(LoReft(H, R))
    twin = copy.deepcopy(module)
    h = torch.randn(5, H)
    for _ in range(2):
        module(h).square().sum().backward()
        twin.rotate_layer._cache.alias = None
        twin(h).square().sum().backward()
    for mine, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("write", ["add_", "data", "storage", "load_state_dict", "copy"])
def test_every_change_of_the_parameter_is_seen(write: str) -> None:
    module, other = LoReft(H, R), LoReft(H, R)
    h = torch.randn(3, H)
    module(h), other(h)
    source = other.rotate_layer.original.detach()
    if write == "add_":
        with torch.no_grad():
            module.rotate_layer.original.add_(source - module.rotate_layer.original)
    elif write == "data":
        module.rotate_layer.original.data.copy_(source)
    elif write == "storage":
        module.rotate_layer.original.data = source.clone()
    elif write == "copy":
        module = copy.deepcopy(other)
    else:
        module.load_state_dict(other.state_dict())
    assert relative(module.rotation.detach(), other.rotation.detach()) < 1e-6


def test_modes_share_no_wrong_value() -> None:
    module = LoReft(H, R)
    h = torch.randn(3, H)
    with torch.inference_mode():
        first = module(h)
    assert first.is_inference()
    module(h).sum().backward()  # R from inference mode would refuse to be saved
    with torch.no_grad():
        assert not module(h).requires_grad
    assert torch.equal(first, module(h))
    module.rotate_layer.original.requires_grad_(False)
    module.zero_grad()
    module(h).sum().backward()
    assert module.rotate_layer.original.grad is None


def test_dropout_drops_elements_of_the_edited_rows_only_in_training() -> None:
    module = LoReft(H, R, dropout=0.25)
    h = torch.randn(400, H)
    rows = torch.arange(0, 400, 2)
    y = module(h, rows)
    assert torch.equal(y[1::2], h[1::2])
    share = (y[::2] == 0).float().mean()
    assert abs(float(share) - 0.25) < 0.02
    exact = module.eval()(h, rows)[::2]
    kept = y[::2] != 0
    assert torch.allclose(y[::2][kept], (exact / 0.75)[kept], atol=1e-5)


def test_names_copies_and_pickles() -> None:
    module = LoReft(H, R)
    assert set(module.state_dict()) == {
        "rotate_layer.parametrizations.weight.original",
        "learned_source.weight",
        "learned_source.bias",
    }
    h = torch.randn(3, H)
    expected = module(h)
    assert torch.equal(copy.deepcopy(module)(h), expected)
    assert torch.equal(pickle.loads(pickle.dumps(module))(h), expected)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(h), expected)
    assert torch.equal(module.rotate_layer(h), h @ module.rotate_layer.weight)


def test_pyrefts_short_checkpoint_loads() -> None:
    theirs = perturbed(Pyreft("loreft"))
    ours = LoReft(H, R)
    ours.load_state_dict(theirs.short())
    h = torch.randn(3, H)
    assert relative(ours(h).detach(), theirs(h).detach()) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_for_pyreft_is_read_by_it(variant: str) -> None:
    ours, theirs = perturbed(LoReft(H, R, variant=variant)), Pyreft(variant)
    written = ours.pyreft_state_dict()
    if variant == "loreft":
        assert set(written) == {"weight", "bias", "rotate_layer"}
        theirs.learned_source.load_state_dict({key: written[key] for key in ("weight", "bias")})
        theirs.rotate_layer.weight = written["rotate_layer"]
    else:
        theirs.load_state_dict(written)
    h = torch.randn(3, H)
    assert relative(theirs(h).detach(), ours(h).detach()) < 1e-6
    again = LoReft(H, R, variant=variant)
    again.load_state_dict(written)
    assert relative(again(h).detach(), ours(h).detach()) < 1e-6


def test_a_checkpoint_that_is_not_orthonormal_is_refused() -> None:
    state = {**Pyreft("loreft").short(), "rotate_layer": torch.randn(H, R)}
    with pytest.raises(RuntimeError, match="rotate_layer: expected orthonormal columns"):
        LoReft(H, R).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 0), {}, "rank: expected 1 to 4, got 0"),
        ((4, 5), {}, "rank: expected 1 to 4, got 5"),
        ((4, 2), {"variant": "reft"}, "variant: expected one of loreft, .*got 'reft'"),
        ((4, 2), {"activation": "softmax"}, "activation: expected one of silu, .*'softmax'"),
        ((4, 2), {"dropout": 1.0}, "dropout_p: expected a probability"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoReft(*arguments, **options)


def test_autocast_and_half_precision_leave_the_rotation_orthonormal() -> None:
    module = LoReft(H, R)
    exact = module.rotation.detach().clone()
    module.rotate_layer._cache.alias = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.rotation, exact)
        assert module(torch.randn(2, H)).dtype == torch.float32
    rows = module.to(torch.bfloat16).rotation.detach()
    assert rows.dtype == torch.float32
    assert relative(rows @ rows.t(), torch.eye(R)) < 1e-5
    module(torch.randn(2, H).bfloat16()).sum().backward()
    assert module.rotate_layer.original.grad.dtype == torch.bfloat16


def test_a_parameter_that_changed_before_backward_is_told() -> None:
    module = LoReft(H, R)
    y = module(torch.randn(2, H))
    with torch.no_grad():
        module.rotate_layer.original.mul_(1.5)
    with pytest.raises(RuntimeError, match="rotate_layer: expected the parameter of the forward"):
        y.sum().backward()


def test_second_derivatives_are_refused() -> None:
    module = LoReft(H, R)
    loss = module(torch.randn(2, H)).square().sum()
    (gradient,) = torch.autograd.grad(loss, module.rotate_layer.original, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_it_compiles_to_the_same_numbers() -> None:
    module = perturbed(LoReft(H, R, activation="silu"))
    h, rows = torch.randn(2, 5, H), torch.tensor([0, 9, -1])
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected, traced = module(h, rows), compiled(h, rows)
    assert relative(traced.detach(), expected.detach()) < 1e-6
    grads = [
        torch.autograd.grad(y.square().sum(), list(module.parameters())) for y in (expected, traced)
    ]
    for mine, other in zip(*grads, strict=True):
        assert relative(other, mine) < 1e-5


def test_a_backward_within_autocast_rounds_nothing() -> None:
    torch.manual_seed(0)
    module, h = LoReft(H, R), torch.randn(6, H)
    grads = []
    for inside in (False, True):
        module.zero_grad()
        loss = module(h).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            loss.backward()
        grads.append(module.rotate_layer.original.grad.clone())
    assert torch.equal(*grads)


def test_rows_that_change_in_place_are_checked_again() -> None:
    """Also where no version tells: through numpy."""
    module, h = LoReft(H, R), torch.randn(6, H)
    rows = torch.tensor([0, 5])
    module(h, rows)
    rows.numpy()[1] = 6
    with pytest.raises(ValueError, match="numbers below 6"):
        module(h, rows)
    rows.numpy()[1] = 0
    with pytest.raises(ValueError, match="at most once"):
        module(h, rows)
    rows.numpy()[1] = 5
    module(h, rows)
    with pytest.raises(ValueError, match="numbers below 5"):
        module(h[:5], rows)


def test_a_gradient_keeps_no_memory_but_its_own() -> None:
    module = LoReft(H, R)
    module(torch.randn(6, H)).sum().backward()
    gradient = module.learned_source.weight.grad
    assert gradient.untyped_storage().nbytes() == gradient.nbytes


def test_the_default_device_of_the_import_does_not_matter() -> None:
    code = (
        "import torch; torch.set_default_device('meta'); from fasttune.ops import reft; "
        "torch.set_default_device('cpu'); h, r = torch.ones(4, 8), torch.zeros(2, 8); "
        "assert torch.equal(reft(h, r, r, rows=torch.tensor([0, 1])), h)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
