"""The registered ops of AdamW: schema, fake and one implementation per backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry
from fasttune._native import adamw_cuda
from fasttune.ops import _adamw_reference, _support, _triton
from fasttune.ops._arguments import KERNEL_DTYPES
from fasttune_kernels.adamw_tables import StepArguments
from fasttune_kernels.multi_tensor_tables import uploaded

SUM_OF_SQUARES = _registry.define(
    "sum_of_squares",
    "(Tensor[] grads, Tensor? table=None) -> Tensor",
    lambda grads, table=None: grads[0].new_empty((), dtype=torch.float64),
)
STEP = _registry.define(
    "adamw_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] residues, Tensor(f!)[] scales, Tensor facts, "
    "Tensor[] lrs, Tensor[] decays, Tensor[] steps, Tensor? squares, Tensor? grad_scale, "
    "Tensor? found_inf, float max_grad_norm, bool skip_nonfinite, str rounding, bool maximize, "
    "int seed, Tensor? table=None) -> Tensor",
    lambda params, *rest: params[0].new_empty((len(params), 3), dtype=torch.float32),
)

LIMIT_NORMS = _registry.define(
    "limit_norms",
    "(Tensor(a!)[] params, Tensor(b!)[] residues, Tensor norms, Tensor limits, str rounding) -> ()",
    lambda *args: None,
)


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


def _on_cuda(tensors: Sequence[Tensor]) -> str | None:
    return _support.why_not_cuda(tensors[:1])


def _by_first(why_not: Callable[..., str | None]) -> Callable[..., str | None]:
    """For the ops whose first list decides."""
    return lambda tensors, *rest: why_not(tensors)


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
def _squares_reference(grads: Sequence[Tensor], *rest: Any) -> Tensor:
    return _adamw_reference.sum_of_squares(grads)


@SUM_OF_SQUARES.backend("cpu", _by_first(_on_cpu))
def _squares_cpu(grads: Sequence[Tensor], *rest: Any) -> Tensor:
    return _native.sums_of_squares(grads).sum()


@SUM_OF_SQUARES.backend("triton", _by_first(_on_triton))
def _squares_triton(*args: Any) -> Tensor:
    squares: Tensor = _triton.kernels("adamw").sum_of_squares(*args)
    return squares


@SUM_OF_SQUARES.backend("cuda", _by_first(_on_cuda))
def _squares_cuda(*args: Any) -> Tensor:
    return adamw_cuda.sum_of_squares(*args)


@STEP.backend("reference", lambda *args: None)
def _step_reference(*args: Any) -> Tensor:
    return _adamw_reference.step(StepArguments(*args))


@STEP.backend("cpu", _on_cpu)
def _step_cpu(*args: Any) -> Tensor:
    arguments = StepArguments(*args)
    unscale, clip, skip = _adamw_reference.control(arguments)
    if skip:
        return torch.full((len(arguments.params), 3), float("nan"))
    facts = with_device_scalars(arguments.facts, *arguments.scalars)
    sign = -1 if arguments.maximize else 1
    squared = _native.adamw_step(arguments._replace(facts=facts), grad_factor=unscale * clip * sign)
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
    norms: Tensor = _triton.kernels("adamw").adamw_step(StepArguments(*args))
    return norms


@STEP.backend("cuda", _step_on_cuda)
def _step_cuda(*args: Any) -> Tensor:
    return adamw_cuda.adamw_step(StepArguments(*args))


def with_table(arguments: StepArguments) -> StepArguments:
    """The arguments with their table on the device, by one copy, where one backend makes the sum of
    squares and the step.
    """
    name = STEP.select(*arguments).name
    if name != SUM_OF_SQUARES.select(arguments.grads).name or name not in ("triton", "cuda"):
        return arguments
    tier = _triton.kernels("adamw") if name == "triton" else adamw_cuda
    table = uploaded(tier.step_table(arguments), arguments.params[0].device)
    return arguments._replace(table=table)


@LIMIT_NORMS.backend("reference", lambda *args: None)
def _limit_reference(*args: Any) -> None:
    _adamw_reference.limit_norms(*args)


@LIMIT_NORMS.backend("cpu", _by_first(_on_cpu))
def _limit_cpu(*args: Any) -> None:
    _native.limit_norms(*args)


@LIMIT_NORMS.backend("triton", _by_first(_on_triton))
def _limit_triton(*args: Any) -> None:
    _triton.kernels("adamw_limit").limit_norms(*args)


@LIMIT_NORMS.backend("cuda", _by_first(_on_cuda))
def _limit_cuda(*args: Any) -> None:
    adamw_cuda.limit_norms(*args)
