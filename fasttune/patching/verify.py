"""verify: proves on the user's own batch that a patched model computes what stock computes.

1. Every fused LoRA or (IA)^3 layer, norm and activation is replayed on the input and the output
   gradient that it had in a real step, with its dropout, in fp64 (one layer at a time: a whole fp64
   copy of a large model does not fit). Its error may be at most twice that of stock's formula in
   the same dtype with the same mask, plus a floor of two roundings (replay.py).
2. The whole step, with LoRA dropout off, is compared with the stock step: the loss and the gradient
   of every parameter. What counts as equal is measured: stock runs again with one rounding error
   added to the output of each patched layer, and fasttune may differ from stock by at most
   _NOISE_FACTOR times what that changes. The loss is one number, which may change little by luck:
   for it counts the standard deviation of what those errors change it by, to first order. A
   gradient that is exactly zero where stock's is not is an error whatever its size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from fasttune import _torch
from fasttune.errors import PatchError, VerificationError
from fasttune.integrations import peft_lowrank
from fasttune.ops.policy import no_limits
from fasttune.patching import (
    activation,
    attention,
    experts,
    ia3,
    lora,
    loss,
    lowrank,
    mlp,
    norm,
    prefix,
    swap,
    tokens,
)
from fasttune.patching.engine import is_patched
from fasttune.patching.replay import LayerCheck, check_layers
from fasttune.patching.report import render
from fasttune.patching.step import LossFn, preserved, run_loss

# One perturbation per layer stands for the several roundings inside it (base, branch, sum; forward
# and backward).
_NOISE_FACTOR = 3.0


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

    Layers that take the original path only because the batch is small are fused here all the same.
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
    with preserved(model), no_limits():
        model.train()
        _refuse_a_batch_without_a_finite_loss(model, batch, loss_fn)
        layers = check_layers(model, batch, loss_fn)
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


# ---------------------------------------------------------------------------- the whole step


def _check_step(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> list[LayerCheck]:
    # The masks of stock's dropout and of ours cannot be the same bits; the replay above covers
    # ours.
    for module in model.modules():
        kinds = swap.kinds_of(module)
        if lora.KIND in kinds:
            module.lora_dropout.eval()  # type: ignore[union-attr]
        if lowrank.KIND in kinds:
            peft_lowrank.dropouts(module).eval()
    fused = _step(model, batch, loss_fn)
    with swap.stock():
        stock = _step(model, batch, loss_fn)
        with _rounding_noise(model) as deviation_of_loss:
            noisy = _step(model, batch, loss_fn)
    checks = []
    for name, theirs in stock.items():
        ours = fused.get(name)
        size = float(theirs.double().norm())
        if ours is None or (size > 0 and not bool(ours.any())):
            raise VerificationError("", f"{name} (zero or missing, stock's is not)", size, 0.0)
        error = float((ours.double() - theirs.double()).norm())
        noise = float((noisy[name].double() - theirs.double()).norm())
        if name == "loss":
            noise = max(noise, deviation_of_loss())
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
def _rounding_noise(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Adds one rounding error to the output and to the output gradient of every patched layer.

    Yields a function that gives, after a step, the standard deviation of the loss under such errors
    of the outputs: the root of the sum of (gradient of an element times the size of its error)^2.
    """
    generators: dict[torch.device, torch.Generator] = {}
    variances: list[Tensor] = []

    def widened(value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, torch.float32))

    def size_of_error(value: Tensor, depth: int, rounded_to: torch.dtype) -> Tensor:
        """Rounding of the result, and accumulation in fp32 over ``depth`` terms of its typical
        size.
        """
        wide = widened(value)
        unit, accumulated = (
            torch.finfo(rounded_to).eps / 2,
            torch.finfo(torch.float32).eps / 2 * depth**0.5,
        )
        typical = wide.square().mean().sqrt() if wide.numel() else wide.sum()
        size: Tensor = unit * wide.abs() + accumulated * typical
        return size

    def perturb(value: Tensor, depth: int, rounded_to: torch.dtype) -> Tensor:
        generator = generators.setdefault(
            value.device, torch.Generator(value.device).manual_seed(len(generators))
        )
        sign = torch.randint(0, 2, value.shape, generator=generator, device=value.device) * 2 - 1
        return (widened(value) + sign * size_of_error(value, depth, rounded_to)).to(value.dtype)

    def after(layer: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention modules return (output, weights)
            noisy = after(layer, args, output[0]) if output else None
            return None if noisy is None else (noisy, *output[1:])
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        width = args[0].shape[-1] if args and isinstance(args[0], Tensor) else output.shape[-1]
        dtype = _rounded_to(layer, output)
        noisy = output + (perturb(output.detach(), width, dtype) - output.detach())
        if noisy.requires_grad:
            value = noisy.detach()

            def backward(gradient: Tensor) -> Tensor:
                change = widened(gradient) * size_of_error(value, width, dtype)
                variances.append(change.square().sum(dtype=torch.float64))
                return perturb(gradient, gradient.shape[-1], dtype)

            noisy.register_hook(backward)
        return noisy

    patched = (
        lora.KIND,
        lowrank.KIND,
        ia3.KIND,
        loss.HEAD,
        norm.KIND,
        mlp.KIND,
        activation.KIND,
        attention.KIND,
        tokens.KIND,
        prefix.KIND,
        experts.KIND,
    )
    handles = [
        module.register_forward_hook(after)
        for module in model.modules()
        if any(kind in patched for kind in swap.kinds_of(module))
    ]
    try:
        yield lambda: float(sum(float(variance) for variance in variances)) ** 0.5
    finally:
        for handle in handles:
            handle.remove()


def _rounded_to(layer: nn.Module, output: Tensor) -> torch.dtype:
    """The dtype that an output's values were rounded to: some layers return autocast's in x's."""
    autocast = _torch.autocast_dtype(output.device.type)
    wider = lowrank.KIND in swap.kinds_of(layer) and peft_lowrank.returns_input_dtype(layer)
    return autocast if wider and autocast is not None else output.dtype
