"""adamw_step: one step of AdamW with decoupled weight decay over any number of tensors, in place.

Maths, for each parameter p with gradient g, all in fp32 (fp64 for fp64):

    g = g clip / grad_scale,  clip = min(1, max_grad_norm / (norm + 1e-6))    norm over all tensors
    m = m + (1 - beta1) (g - m)
    v = v + (1 - beta2) (g^2 - v)
    u = lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps) + lr decay p
    p = p - u

With amsgrad the largest v so far takes v's place in u; with maximize the gradient changes its sign.
The factors of m, v and u are rounded once, from double. With beta2 below 0.5, v is formed
from the other end, g^2 + beta2 (v - g^2): the rounding of a far larger v would hide g.

Rounding: p - u is rounded once. torch multiplies p by a rounded 1 - lr decay first, an error of the
whole weight at each step. A 16-bit p loses updates below half its last place; ``rounding`` says
what is kept beside it (_adamw_storage.py), moments likewise.

By-product: the norms of g before clipping, of u, and of p after the step, of each tensor.

Two launches a step and no host synchronisation on a GPU: sum_of_squares, which reads gradients
only, and adamw_step, which reads 16 and writes 12 bytes per fp32 element. limit_norms, for
parameters with a limit, is one more, and touches those above it.

Semantics: torch.optim.AdamW, torch.nn.utils.clip_grad_norm_ (torch 2.13); Decoupled weight decay
regularization (Loshchilov and Hutter, 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune import _registry
from fasttune._registry import Op
from fasttune.ops import _adamw_backends
from fasttune.ops._adamw_backends import LIMIT_NORMS, STEP, SUM_OF_SQUARES
from fasttune_kernels.adamw_tables import FACTS, QUANTISED, ROUNDINGS, StepArguments


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all elements of ``tensors``: 0-d float64 on their device.

    Not finite if an element is not, or if a square overflows fp32. The same for any number of
    threads. 0 for an empty list (on the CPU).

    Raises:
        TypeError: no float tensor, or a sparse one.
        ValueError: tensors on several devices.
    """
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        _check_dense("tensors", tensor)
        if tensor.device != tensors[0].device:
            raise ValueError(f"tensors: expected one device, got {tensor.device} too")
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(flat(tensor))
    sums = [apply_sum_of_squares(own) for own in by_dtype.values()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    facts: Tensor,  # [n, 7]
    *,
    max_exp_avg_sqs: Sequence[Tensor] = (),
    residues: Sequence[Tensor] = (),
    scales: Sequence[Tensor] = (),
    lrs: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    squares: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float = math.inf,
    skip_nonfinite: bool = False,
    rounding: str = "nearest",
    maximize: bool = False,
    seed: int = 0,
) -> Tensor:
    """One step of AdamW, in place, and the norms [n, 3] fp32 of gradient, update and parameter.

    Args:
        params: n dense tensors of one dtype and device, each fp32, bf16, fp16 (fp64: reference).
        grads: of the shapes and strides of params, of one dtype.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: the moments, fp32 or bf16, or uint8 codes with
            ``scales``; the last for amsgrad only.
        facts: [n, 7] float64 on the CPU, a row per tensor: lr, beta1, beta2, eps, weight decay,
            step (from 1), and the number of the parameter's random stream.
        residues: with rounding "master" int16, with "kahan" of the parameters' dtype.
        scales: fp32 [2, ceil(numel / 256)] each, for 8-bit moments.
        lrs, decays, steps: 0-d fp32 tensors on the device of params, one each, in place of those in
            facts; nothing on the host waits for them.
        squares: 0-d float64, :func:`sum_of_squares` of the gradients whose norm is limited.
        grad_scale, found_inf: 0-d fp32 tensors of a GradScaler; with found_inf != 0 nothing
            changes.
        max_grad_norm: the largest norm; needs squares.
        skip_nonfinite: nothing changes if squares is not finite.
        rounding: "nearest", "master", "stochastic" (both bf16 only) or "kahan".
        maximize: climb instead of descend.
        seed: of the random bits of stochastic rounding and small moments.

    Returns:
        [n, 3] fp32: the norms of the unscaled gradient before clipping, of the update and of the
        updated parameter; NaN if the step was skipped.

    Raises:
        TypeError: no float tensor, or a sparse one.
        ValueError: lengths, shapes, strides, dtypes or devices do not fit, or an unknown rounding.

    Semantics: ``torch.optim.AdamW`` (torch 2.13).
    """
    lists = {
        "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs,
        "max_exp_avg_sqs": max_exp_avg_sqs, "residues": residues, "scales": scales,
        "lrs": lrs, "decays": decays, "steps": steps,
    }  # fmt: skip
    _validate(lists, facts, rounding)
    if not params:
        return torch.empty(0, 3)
    tensors = [[flat(t) for t in given] for given in list(lists.values())[:6]]
    return apply_adamw_step(StepArguments(
        *tensors, list(scales), facts, list(lrs), list(decays), list(steps), squares, grad_scale,
        found_inf, max_grad_norm, skip_nonfinite, rounding, maximize, seed,
    ))  # fmt: skip


def limit_norms(
    params: Sequence[Tensor],
    norms: Tensor,  # [n, 3]
    limits: Tensor,  # [n]
    *,
    residues: Sequence[Tensor] = (),
    rounding: str = "nearest",
) -> None:
    """Scale each parameter whose norm is above its limit down to it, in place, in one launch.

    Computed in fp32 (fp64 for fp64) as factor = limit / norm; a parameter that is not above its
    limit, or whose norm is not finite, keeps its bits. Nothing on the host waits for the norms.

    Args:
        params: n dense tensors as those of :func:`adamw_step`.
        norms: fp32 on the device of params, as :func:`adamw_step` returns them; the last column is
            read.
        limits: float64 on the CPU; infinite for a parameter without one.
        residues, rounding: as in :func:`adamw_step`; "stochastic" rounds to nearest here.

    Raises:
        TypeError: no float tensor, or a sparse one.
        ValueError: lengths, shapes, strides, dtypes or devices do not fit, or an unknown rounding.
    """
    _check_list("params", params)
    _check_rounding(rounding, params)
    _check_residues(params, residues, rounding)
    count = len(params)
    for name, table, dtype, shape, device in (
        ("norms", norms, torch.float32, (count, 3), params[0].device if params else norms.device),
        ("limits", limits, torch.float64, (count,), torch.device("cpu")),
    ):
        if (tuple(table.shape), table.dtype, table.device) != (shape, dtype, device):
            raise ValueError(
                f"{name}: expected {list(shape)} {dtype} on {device}, "
                f"got {list(table.shape)} {table.dtype} on {table.device}"
            )
    if params:
        own, beside = ([flat(tensor) for tensor in given] for given in (params, residues))
        apply_limit_norms(own, beside, norms, limits, rounding)


def with_table(arguments: StepArguments) -> StepArguments:
    """What the kernels of :func:`apply_sum_of_squares` and :func:`apply_adamw_step` both read, in
    one copy to the device; the arguments as they are where nothing is copied, or each copies.
    """
    if _registry.is_traced(arguments.params[:1]):
        return arguments
    return _adamw_backends.with_table(arguments)


def apply_sum_of_squares(tensors: list[Tensor], table: Tensor | None = None) -> Tensor:
    """:func:`sum_of_squares` without validation; contiguous, of one device and dtype. ``table``:
    that of a step whose gradients they are.
    """
    squares: Tensor = _implementation(SUM_OF_SQUARES, tensors)(tensors, table)
    return squares


def apply_adamw_step(arguments: StepArguments) -> Tensor:
    """:func:`adamw_step` without validation; all tensors contiguous, in lists."""
    run = _implementation(STEP, *arguments)
    norms: Tensor = run(*arguments)
    if run is not STEP.registered:  # torch's dispatcher would have counted the change
        torch.autograd.graph.increment_version(arguments.params)  # no graph holds the state
    return norms


def apply_limit_norms(
    params: list[Tensor], residues: list[Tensor], norms: Tensor, limits: Tensor, rounding: str
) -> None:
    """:func:`limit_norms` without validation; all tensors contiguous."""
    run = _implementation(LIMIT_NORMS, params, residues, norms, limits, rounding)
    run(params, residues, norms, limits, rounding)
    if run is not LIMIT_NORMS.registered:
        torch.autograd.graph.increment_version(params)


def _implementation(op: Op, tensors: Sequence[Tensor], *rest: Any) -> Callable[..., Any]:
    if _registry.must_dispatch(tensors[:1]):  # a list is of one kind
        dispatched: Callable[..., Any] = op.registered
        return dispatched
    return op.select(tensors, *rest).run


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as it lies in memory: itself if contiguous, else [numel].

    Raises:
        ValueError: the tensor overlaps itself or has gaps.
    """
    if tensor.is_contiguous():
        return tensor
    if not _is_dense(tensor):
        raise ValueError(
            f"params: expected dense tensors without gaps, got strides {tensor.stride()} "
            f"of shape {tuple(tensor.shape)}"
        )
    return tensor.as_strided((tensor.numel(),), (1,))


def _is_dense(tensor: Tensor) -> bool:
    """True if the elements fill a stretch of memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _check_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected tensors, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected dense tensors, got layout {tensor.layout}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected float tensors, got {tensor.dtype}")


def _validate(lists: dict[str, Sequence[Tensor]], facts: Tensor, rounding: str) -> None:
    params = lists["params"]
    count = len(params)
    for name, given in lists.items():
        if len(given) not in (count, *(() if name in _ALWAYS else (0,))):
            raise ValueError(f"{name}: expected {count} tensors as params, got {len(given)}")
    if facts.shape != (count, len(FACTS)) or facts.dtype != torch.float64 or facts.is_cuda:
        raise ValueError(
            f"facts: expected [{count}, {len(FACTS)}] float64 on the CPU, "
            f"got {list(facts.shape)} {facts.dtype} on {facts.device}"
        )
    for name in ("params", "grads"):
        _check_list(name, lists[name])
    _check_rounding(rounding, params)
    for name, dtypes in _dtypes(params, lists["exp_avgs"]).items():
        _check_beside(name, lists[name], params, dtypes)
    _check_residues(params, lists["residues"], rounding)
    _check_scales(params, lists["exp_avgs"], lists["scales"])


def _check_rounding(rounding: str, params: Sequence[Tensor]) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if not params or rounding not in ("master", "stochastic"):
        return
    if params[0].dtype != torch.bfloat16:
        raise ValueError(f"rounding: {rounding!r} takes bf16 parameters, got {params[0].dtype}")


def _check_list(name: str, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        _check_dense(name, tensor)
        if tensor.dtype != tensors[0].dtype:
            raise ValueError(f"{name}: expected one dtype, got {tensor.dtype} too")


def _check_beside(
    name: str,
    tensors: Sequence[Tensor],
    params: Sequence[Tensor],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """What lies beside each parameter has its shape, strides and device, and one of ``dtypes``."""
    for param, tensor in zip(params, tensors, strict=bool(tensors)):
        if tensor.shape != param.shape or tensor.stride() != param.stride():
            raise ValueError(
                f"{name}: expected shape {tuple(param.shape)} and strides {param.stride()} "
                f"of its parameter, got {tuple(tensor.shape)} and {tensor.stride()}"
            )
        if tensor.device != param.device:
            raise ValueError(f"{name}: expected device {param.device}, got {tensor.device}")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: expected {dtypes[0]}, got {tensor.dtype}")


def _check_residues(params: Sequence[Tensor], residues: Sequence[Tensor], rounding: str) -> None:
    count = len(params)
    if len(residues) not in (0, count):
        raise ValueError(f"residues: expected {count} tensors as params, got {len(residues)}")
    if rounding in ("master", "kahan") and count and not residues:
        raise ValueError(f"residues: expected {count} tensors for rounding {rounding!r}, got none")
    if params:
        own = torch.int16 if rounding == "master" else params[0].dtype
        _check_beside("residues", residues, params, (own,))


_ALWAYS = ("params", "grads", "exp_avgs", "exp_avg_sqs")


def _dtypes(
    params: Sequence[Tensor], exp_avgs: Sequence[Tensor]
) -> dict[str, tuple[torch.dtype, ...]]:
    """The dtypes that gradients and moments may have."""
    if not params:
        return {}
    first = (torch.float32, torch.bfloat16, torch.uint8)
    if params[0].dtype == torch.float64:
        first = (torch.float64, torch.float64, torch.float64)
    moments = (exp_avgs[0].dtype,) if exp_avgs[0].dtype in first else first
    anything = (*first, torch.float16, torch.float64)
    return {
        "grads": anything,
        "exp_avgs": moments,
        "exp_avg_sqs": moments,
        "max_exp_avg_sqs": moments,
    }


def _check_scales(
    params: Sequence[Tensor], exp_avgs: Sequence[Tensor], scales: Sequence[Tensor]
) -> None:
    if not params or (exp_avgs[0].dtype == torch.uint8) != bool(scales):
        if params:
            raise ValueError("scales: expected with 8-bit moments, and only with them")
        return
    for param, scale in zip(params, scales, strict=bool(scales)):
        shape = (2, -(-param.numel() // QUANTISED))
        if scale.shape != shape or scale.dtype != torch.float32:
            raise ValueError(
                f"scales: expected {list(shape)} fp32, got {list(scale.shape)} {scale.dtype}"
            )
