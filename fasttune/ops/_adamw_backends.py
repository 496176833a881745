"""The registered ops of AdamW: schema, fake and one implementation per backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry
from fasttune._native import adamw_cuda
from fasttune.ops import _adamw_reference, _support, _triton
from fasttune.ops._arguments import KERNEL_DTYPES

SUM_OF_SQUARES = _registry.define(
    "sum_of_squares",
    "(Tensor[] grads) -> Tensor",
    lambda grads: grads[0].new_empty((), dtype=torch.float64),
)
STEP = _registry.define(
    "adamw_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] residues, Tensor(f!)[] scales, Tensor facts, "
    "Tensor[] lrs, Tensor[] decays, Tensor[] steps, Tensor? squares, Tensor? grad_scale, "
    "Tensor? found_inf, float max_grad_norm, bool skip_nonfinite, str rounding, bool maximize, "
    "int seed) -> Tensor",
    lambda params, *rest: params[0].new_empty((len(params), 3), dtype=torch.float32),
)

_MOMENTS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "8bit"}


# A list is of one device and dtype: adamw.py checks it, the optimizer sorts by it.


def _why_not(args: Sequence[Any]) -> str | None:
    for tensors in args[:2]:
        dtype = tensors[0].dtype
        if dtype not in KERNEL_DTYPES:
            return f"it takes fp32, bf16 and fp16, got {dtype}"
    return None


def _on_cpu(*args: Any) -> str | None:
    missing = _native.cpu_missing()
    if missing is not None:
        return missing
    if args[0][0].device.type != "cpu":
        return "it takes CPU tensors"
    return _why_not(args)


def _on_triton(*args: Any) -> str | None:
    return _triton.why_not(args[0][:1]) or _why_not(args)


def _squares_on_cuda(grads: Sequence[Tensor]) -> str | None:
    return _support.why_not_cuda(grads[:1])


def _step_on_cuda(*args: Any) -> str | None:
    """Why the CUDA C++ kernels cannot take the arguments of a step, or None."""
    params, grads, moments, tops = (args[i][:1] for i in (0, 1, 2, 4))
    reason = _support.why_not_cuda((*params, *grads))
    if reason is not None:
        return reason
    if grads[0].dtype not in (params[0].dtype, torch.float32):
        return f"it takes grads in params' {params[0].dtype} or fp32, got {grads[0].dtype}"
    if tops and moments[0].dtype == torch.uint8:
        return "it takes max_exp_avg_sqs with fp32 or bf16 moments, got 8-bit ones"
    return None


@SUM_OF_SQUARES.backend("reference", lambda *args: None)
def _squares_reference(grads: Sequence[Tensor]) -> Tensor:
    return _adamw_reference.sum_of_squares(grads)


@SUM_OF_SQUARES.backend("cpu", _on_cpu)
def _squares_cpu(grads: Sequence[Tensor]) -> Tensor:
    return _native.sums_of_squares(grads).sum()


@SUM_OF_SQUARES.backend("triton", _on_triton)
def _squares_triton(grads: Sequence[Tensor]) -> Tensor:
    squares: Tensor = _triton.kernels("adamw").sum_of_squares(grads)
    return squares


@SUM_OF_SQUARES.backend("cuda", _squares_on_cuda)
def _squares_cuda(grads: Sequence[Tensor]) -> Tensor:
    return adamw_cuda.sum_of_squares(grads)


@STEP.backend("reference", lambda *args: None)
def _step_reference(*args: Any) -> Tensor:
    return _adamw_reference.step(*args)


@STEP.backend("cpu", _on_cpu)
def _step_cpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    residues: Sequence[Tensor],
    scales: Sequence[Tensor],
    facts: Tensor,
    lrs: Sequence[Tensor],
    decays: Sequence[Tensor],
    steps: Sequence[Tensor],
    squares: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float,
    skip_nonfinite: bool,
    rounding: str,
    maximize: bool,
    seed: int,
) -> Tensor:
    control = (squares, grad_scale, found_inf, max_grad_norm, skip_nonfinite)
    unscale, clip, skip = _adamw_reference.control(*control)
    if skip:
        return torch.full((len(params), 3), float("nan"))
    squared = _native.adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residues, scales,
        with_device_scalars(facts, lrs, decays, steps),
        moments=_MOMENTS[exp_avgs[0].dtype],
        rounding=rounding,
        grad_factor=unscale * clip * (-1 if maximize else 1),
        seed=seed,
    )  # fmt: skip
    norms = squared.sqrt_().to(torch.float32)
    return norms if unscale == 1 else norms * torch.tensor([unscale, 1.0, 1.0])


def with_device_scalars(
    facts: Tensor, lrs: Sequence[Tensor], decays: Sequence[Tensor], steps: Sequence[Tensor]
) -> Tensor:
    """The table of facts with the values of scalar tensors, read here."""
    if not (lrs or decays or steps):
        return facts
    facts = facts.clone()
    for column, given in ((0, lrs), (4, decays), (5, steps)):
        if given:
            facts[:, column] = torch.stack([t.detach().double() for t in given])
    return facts


@STEP.backend("triton", _on_triton)
def _step_triton(*args: Any) -> Tensor:
    exp_avgs = args[2]
    norms: Tensor = _triton.kernels("adamw").adamw_step(*args, moments=_MOMENTS[exp_avgs[0].dtype])
    return norms


@STEP.backend("cuda", _step_on_cuda)
def _step_cuda(*args: Any) -> Tensor:
    exp_avgs = args[2]
    return adamw_cuda.adamw_step(*args, moments=_MOMENTS[exp_avgs[0].dtype])
