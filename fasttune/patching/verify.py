"""verify: proves on the user's own batch that a patched model computes what stock computes.

1. Every fused layer is replayed on the input and the output gradient that it had in a real step,
   with its dropout, in fp64 (one layer at a time: a whole fp64 copy of a large model does not fit).
   Its error may be at most _FACTOR times that of stock's formula in the same dtype with the same
   mask, plus a floor of two roundings.
2. The whole step, with LoRA dropout off, is compared with the stock step: the loss and the gradient
   of every parameter. What counts as equal is measured: stock runs again with one rounding error
   added to the output of each patched layer, and fasttune may differ from stock by at most
   _NOISE_FACTOR times what that changes. A gradient that is exactly zero where stock's is not is an
   error whatever its size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from fasttune import _torch
from fasttune.errors import PatchError, VerificationError
from fasttune.integrations import peft
from fasttune.ops import LoraProjection, _dropout
from fasttune.ops.lora_linear import apply_group
from fasttune.patching import lora, loss, state, swap
from fasttune.patching.engine import is_patched
from fasttune.patching.report import render
from fasttune.patching.step import LossFn, preserved, run_loss

# Both sides make the same number of roundings, in another order: the maximum over many elements of
# two samples of the
# same error distribution differs by less than a factor of two.
_FACTOR = 2.0
# One perturbation per layer stands for the several roundings inside it (base, branch, sum; forward
# and backward).
_NOISE_FACTOR = 3.0


@dataclass(frozen=True)
class LayerCheck:
    """One replayed tensor: error and what was allowed, both absolute."""

    layer: str
    tensor: str
    error: float
    allowed: float


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` checked; ``str()`` is a summary.

    Attributes:
        layers: the replayed tensors of every fused layer.
        step: the loss and every gradient of the whole step (errors are norms, relative to stock's).
    """

    layers: tuple[LayerCheck, ...]
    step: tuple[LayerCheck, ...]

    def __str__(self) -> str:
        table = Table(
            "check", "tensors", "largest error / allowed", title="fasttune verify: passed"
        )
        for name, checks in (
            ("layers against fp64", self.layers),
            ("step against stock", self.step),
        ):
            worst = max(
                (check.error / check.allowed for check in checks if check.allowed), default=0.0
            )
            table.add_row(name, str(len(checks)), f"{worst:.2f}")
        return render(table)


def verify(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> Verification:
    """Raise if the patched model's step on ``batch`` is not the stock model's.

    Random state, ``.grad``, buffers and train / eval mode are as before afterwards; no parameter
    changes.

    Args:
        model: a patched model.
        batch: a mapping of the model's arguments with labels, or anything that ``loss_fn`` takes.
        loss_fn: ``loss_fn(model, batch)`` returns a 0-d loss; None takes ``model(**batch).loss``.

    Returns:
        What was checked.

    Raises:
        PatchError: the model is not patched.
        VerificationError: a layer or the step deviates, or a gradient is zero where stock's is not.
        ValueError: the model returns no loss, or stock's loss is not finite.
    """
    if not is_patched(model):
        raise PatchError("verify: the model is not patched; call fasttune.patch first")
    with preserved(model):
        model.train()
        _refuse_a_batch_without_a_finite_loss(model, batch, loss_fn)
        layers = _check_layers(model, batch, loss_fn)
        step = _check_step(model, batch, loss_fn)
    return Verification(tuple(layers), tuple(step))


def _refuse_a_batch_without_a_finite_loss(model: nn.Module, batch: Any, loss_fn: Any) -> None:
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), swap.stock():
        value = run_loss(model, batch, loss_fn).detach()
    if not bool(torch.isfinite(value)):
        raise ValueError(
            f"batch: the stock loss is {float(value)}, so that nothing can be compared"
        )


# ---------------------------------------------------------------------------- layer by layer


def _check_layers(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> list[LayerCheck]:
    checks: list[LayerCheck] = []
    seen: set[str] = set()
    failures: list[VerificationError] = []

    def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name = state.of(layer, lora.KIND).name
        if name in seen or not isinstance(output, Tensor) or type(output.grad_fn).__name__ != _NODE:
            return
        seen.add(name)
        x, projection = args[0].detach(), peft.projection(layer)
        dtype = _torch.autocast_dtype(x.device.type)

        def replay(dy: Tensor) -> None:
            try:
                checks.extend(_replay(name, x, projection, dy, dtype))
            except VerificationError as error:  # raised outside the autograd engine, with its type
                failures.append(error)

        output.register_hook(replay)

    handles = [
        module.register_forward_hook(after)
        for module in model.modules()
        # A hook on the head would send the loss down the original path; the step below covers it.
        if lora.KIND in (kinds := swap.kinds_of(module)) and loss.HEAD not in kinds
    ]
    try:
        run_loss(model, batch, loss_fn).backward()
    finally:
        for handle in handles:
            handle.remove()
    if failures:
        raise failures[0]
    model.zero_grad(set_to_none=True)
    return checks


_NODE = "_LoraLinearBackward"


def _replay(
    name: str, x: Tensor, projection: LoraProjection, dy: Tensor, autocast: torch.dtype | None
) -> list[LayerCheck]:
    seed = _dropout.draw_seed(x.device)
    depth = max(*projection.weight.shape, x.numel() // max(x.shape[-1], 1))
    names = ["output", "input gradient", *_gradient_names(projection)]
    with torch.enable_grad(), _autocast(x.device.type, None):
        truth = _gradients(
            _Formula(seed, torch.float64), x.double(), _cast(projection, torch.float64), dy.double()
        )
    with torch.enable_grad(), _autocast(x.device.type, autocast):
        stock = _gradients(_Formula(seed, None), x, projection, dy)
        dtype = autocast or x.dtype
        fused = _gradients(
            lambda a, p: apply_group(a, (p,), dtype, seed=seed)[0], x, projection, dy
        )
    checks = []
    for what, exact, theirs, ours in zip(names, truth, stock, fused, strict=True):
        error, theirs_error = _distance(ours, exact), _distance(theirs, exact)
        # The floor: two roundings of the largest value to the dtype of the result, and fp32 sums of
        # `depth` terms in another order than stock's, whose own error may be small by luck.
        units = 2 * torch.finfo(ours.dtype).eps + torch.finfo(torch.float32).eps * depth**0.5
        floor = units * float(exact.abs().max()) if exact.numel() else 0.0
        allowed = _FACTOR * theirs_error + floor
        if not error <= allowed:  # also when the error is NaN
            raise VerificationError(name, what, error, allowed)
        checks.append(LayerCheck(name, what, error, allowed))
    return checks


class _Formula:
    """PEFT's formula in plain torch, with the mask of a seed instead of its own dropout."""

    def __init__(self, seed: Tensor, dtype: torch.dtype | None) -> None:
        self.seed, self.dtype = seed, dtype

    def __call__(self, x: Tensor, projection: LoraProjection) -> Tensor:
        result = nn.functional.linear(x, projection.weight, projection.bias)
        dtype = result.dtype
        for j, branch in enumerate(projection.branches):
            threshold = _dropout.threshold(branch.dropout_p)
            x2 = x.reshape(-1, x.shape[-1])
            keep = _dropout.keep_mask(self.seed, threshold, *x2.shape, branch=j)
            cast = x.to(branch.a.dtype)
            dropped = cast * (keep * _dropout.keep_scale(threshold)).to(cast.dtype).expand_as(
                x2
            ).view_as(x)
            up = nn.functional.linear(
                nn.functional.linear(dropped, branch.a), branch.b, branch.bias
            )
            result = result + up * branch.scaling
        return result.to(dtype)


def _cast(projection: LoraProjection, dtype: torch.dtype) -> LoraProjection:
    def to(value: Any) -> Any:
        return (
            value.detach().to(dtype).requires_grad_(value.requires_grad)
            if isinstance(value, Tensor)
            else value
        )

    branches = tuple(
        type(branch)(
            to(branch.a), to(branch.b), to(branch.scaling), to(branch.bias), branch.dropout_p
        )
        for branch in projection.branches
    )
    return LoraProjection(to(projection.weight), to(projection.bias), branches)


def _trained(projection: LoraProjection) -> list[tuple[str, Tensor]]:
    named = [("weight", projection.weight), ("bias", projection.bias)]
    for j, branch in enumerate(projection.branches):
        named += [
            (f"lora_A[{j}]", branch.a),
            (f"lora_B[{j}]", branch.b),
            (f"lora_B[{j}].bias", branch.bias),
        ]
    return [(name, tensor) for name, tensor in named if tensor is not None and tensor.requires_grad]


def _gradient_names(projection: LoraProjection) -> list[str]:
    return [f"gradient of {name}" for name, _ in _trained(projection)]


def _gradients(forward: Any, x: Tensor, projection: LoraProjection, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = forward(x, projection)
    leaves = [x, *(tensor for _, tensor in _trained(projection))]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def _distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).abs().max()) if exact.numel() else 0.0


@contextlib.contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


# ---------------------------------------------------------------------------- the whole step


def _check_step(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> list[LayerCheck]:
    # The masks of stock's dropout and of ours cannot be the same bits; the replay above covers
    # ours.
    for module in model.modules():
        if lora.KIND in swap.kinds_of(module):
            module.lora_dropout.eval()  # type: ignore[union-attr]
    fused = _step(model, batch, loss_fn)
    with swap.stock():
        stock = _step(model, batch, loss_fn)
        with _rounding_noise(model):
            noisy = _step(model, batch, loss_fn)
    checks = []
    for name, theirs in stock.items():
        ours = fused.get(name)
        size = float(theirs.double().norm())
        if ours is None or (size > 0 and not bool(ours.any())):
            raise VerificationError("", f"{name} (zero or missing, stock's is not)", size, 0.0)
        error = float((ours.double() - theirs.double()).norm())
        noise = float((noisy[name].double() - theirs.double()).norm())
        allowed = _NOISE_FACTOR * noise + 4 * torch.finfo(theirs.dtype).eps * size
        if not error <= allowed:
            raise VerificationError("", name, error, allowed)
        checks.append(LayerCheck("", name, error, allowed))
    return checks


def _step(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> dict[str, Tensor]:
    """The loss and every gradient, from the same random state each time."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        value = run_loss(model, batch, loss_fn)
        value.backward()
    result = {"loss": value.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[f"gradient of {name}"] = parameter.grad
            parameter.grad = None
    return result


@contextlib.contextmanager
def _rounding_noise(model: nn.Module) -> Iterator[None]:
    """Adds one rounding error to the output and to the output gradient of every patched layer."""
    generators: dict[torch.device, torch.Generator] = {}

    def perturb(value: Tensor, depth: int) -> Tensor:
        generator = generators.setdefault(
            value.device, torch.Generator(value.device).manual_seed(len(generators))
        )
        sign = torch.randint(0, 2, value.shape, generator=generator, device=value.device) * 2 - 1
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        # Rounding of the result, and accumulation in fp32 over `depth` terms of its typical size.
        unit, accumulated = (
            torch.finfo(value.dtype).eps / 2,
            torch.finfo(torch.float32).eps / 2 * depth**0.5,
        )
        typical = wide.square().mean().sqrt() if wide.numel() else wide.sum()
        noise: Tensor = sign * (unit * wide.abs() + accumulated * typical)
        return (wide + noise).to(value.dtype)

    def after(layer: Any, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        width = args[0].shape[-1] if args and isinstance(args[0], Tensor) else output.shape[-1]
        noisy = output + (perturb(output.detach(), width) - output.detach())
        if noisy.requires_grad:
            noisy.register_hook(lambda gradient: perturb(gradient, gradient.shape[-1]))
        return noisy

    patched = (lora.KIND, loss.HEAD)
    handles = [
        module.register_forward_hook(after)
        for module in model.modules()
        if any(kind in patched for kind in swap.kinds_of(module))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
