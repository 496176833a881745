"""lora_linear: projections of one input with any number of LoRA branches each.

Maths, for projection i with branches j (an active adapter each), products accumulated in fp32:

    t_ij = s_ij / (1 - p_ij) (x * keep_ij) A_ij^T                             [M, R], fp32, saved
    y_i = x W_i^T + bias_i + sum_j s_ij lora_bias_ij + sum_j t_ij B_ij^T      [M, N_i]

    d_ij = s_ij / (1 - p_ij) dy_i B_ij                                        [M, R], fp32
    dx = sum_i (dy_i W_i + sum_j keep_ij * (d_ij A_ij))                       [M, K]
    dA_ij = d_ij^T (x * keep_ij),  dB_ij = dy_i^T t_ij,  dW_i = dy_i^T x
    dbias_i = sum_m dy_i,  dlora_bias_ij = s_ij dbias_i

Saved for backward: x as it came (only if A or W trains), t and parameters. The dropout mask is
drawn again from the seed (docs/design.md states the format).

Precision: C is the compute dtype, the autocast dtype under autocast, else the dtype of x, which
then must be that of W. y has dtype C, dx that of x, a parameter's gradient that of the parameter.
The LoRA branch uses x, dy, A and B as stored, whatever their dtypes, and keeps t and d in fp32: an
fp32 adapter on a bf16 base is never rounded. docs/precision.md has the table of all combinations.

- Vendor product in C (GPU, AMX, fp32): y0 = bias + t B^T is rounded to C, then addmm adds x W^T in
  fp32 and rounds; under autocast x and W are rounded to C first, as torch does. dx likewise.
- Products through fp32 (other CPUs): x W^T stays in fp32 until branch and bias are added, one
  rounding.

Semantics: peft.tuners.lora.layer.Linear.forward (PEFT 0.21); LoRA (Hu et al., 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _dropout, _gemm, _triton

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoraBranch:
    """One adapter on one projection.

    Attributes:
        a: [R, K].
        b: [N, R].
        scaling: a float, or a 0-d tensor on the device of ``a`` (read without synchronisation).
        bias: [N] or None: PEFT's ``lora_bias``, scaled like the branch.
        dropout_p: probability in [0, 1) to drop an element of the branch's input; rounded to 1 /
            65536.
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = 1.0
    bias: Tensor | None = None
    dropout_p: float = 0.0


@dataclass(frozen=True)
class LoraProjection:
    """A base weight [N, K], its bias [N] or None, and the branches added to it, in order."""

    weight: Tensor
    bias: Tensor | None = None
    branches: tuple[LoraBranch, ...] = ()


@dataclass(frozen=True)
class _Spec:
    """Everything about a call that is no tensor."""

    counts: tuple[int, ...]  # branches of each projection
    scalings: tuple[float, ...]
    thresholds: tuple[int, ...]
    compute_dtype: torch.dtype


# ---------------------------------------------------------------------------- forward and backward


def _branch_scale(scaling: float, threshold: int) -> float:
    return scaling * _dropout.keep_scale(threshold)


def _ranges(counts: Sequence[int]) -> list[range]:
    """The branch indices of each projection."""
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    return [range(start, end) for start, end in pairwise(ends)]


def _total_bias(
    bias: Tensor | None,
    lora_biases: Sequence[Tensor | None],
    scalings: Sequence[float],
    scaling_tensors: Sequence[Tensor | None],
) -> Tensor | None:
    total = bias
    for lora_bias, scaling, scaling_tensor in zip(
        lora_biases, scalings, scaling_tensors, strict=True
    ):
        if lora_bias is None:
            continue
        term = lora_bias.to(_accumulator(lora_bias.dtype)) * scaling
        if scaling_tensor is not None:
            term = term * scaling_tensor
        total = term if total is None else total.to(term.dtype) + term
    return total


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _concatenate(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.to(torch.float32) for part in parts], dim=1)


def _forward_with(prims: ModuleType, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The forward in terms of the primitives of a backend."""
    (
        x,
        weights,
        biases,
        a,
        b,
        lora_biases,
        scaling_tensors,
        scalings,
        thresholds,
        counts,
        seed,
        dtype,
    ) = args
    ys, ts = [], []
    for i, branches in enumerate(_ranges(counts)):
        own = [
            prims.lora_down(
                x,
                a[j],
                _branch_scale(scalings[j], thresholds[j]),
                scaling_tensors[j],
                seed=seed,
                threshold=thresholds[j],
                branch=j,
            )
            for j in branches
        ]
        ts += own
        bias = _total_bias(
            biases[i],
            [lora_biases[j] for j in branches],
            [scalings[j] for j in branches],
            [scaling_tensors[j] for j in branches],
        )
        ys.append(_add_base(prims, x, weights[i], bias, own, [b[j] for j in branches], dtype))
    return ys, ts


def _add_base(
    prims: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ts: list[Tensor],
    bs: list[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """x W^T + bias + sum_j t_j B_j^T in ``dtype``."""
    if not ts:
        return torch.nn.functional.linear(
            x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )
    t, b = _concatenate(ts), _concatenate(bs)
    if prims is _native and _gemm.through_fp32(x.device, dtype):
        base = _gemm.linear_fp32(x, weight)
        return _native.lora_up(t, b, bias, out_dtype=dtype, addend=base)
    y: Tensor = prims.lora_up(t, b, bias, out_dtype=dtype)
    return y.addmm_(x.to(dtype), weight.to(dtype).t())


def _backward_with(prims: ModuleType, *args: Any) -> list[Tensor]:
    """The backward in terms of the primitives of a backend; `needs` states the order of
    gradients.
    """
    (
        dys,
        x,
        weights,
        a,
        b,
        ts,
        scaling_tensors,
        scalings,
        thresholds,
        counts,
        seed,
        x_dtype,
        needs,
    ) = args
    need = _Needs.unpack(needs, len(weights), len(a))
    dbs: list[Tensor | None] = [None] * len(a)
    ds: dict[int, Tensor] = {}
    for i, branches in enumerate(_ranges(counts)):
        for j in branches:
            d, dbs[j] = prims.lora_up_backward(
                dys[i],
                ts[j],
                b[j],
                _branch_scale(scalings[j], thresholds[j]),
                scaling_tensors[j],
                need_d=need.x or need.a[j],
                need_db=need.b[j],
            )
            if d is not None:
                ds[j] = d
    dws = [
        _gemm.weight_gradient(dy, x, weight.dtype) if flag and x is not None else None
        for dy, weight, flag in zip(dys, weights, need.w, strict=True)
    ]
    dbiases, dlora_biases = _bias_gradients(dys, scaling_tensors, scalings, counts, need)
    draw = {"seed": seed, "thresholds": thresholds}
    dx, das = _input_side(prims, dys, x, weights, a, ds, need, dtype=x_dtype, **draw)
    wanted = [dx, *dws, *dbiases, *das, *dbs, *dlora_biases]
    return [grad for grad, flag in zip(wanted, needs, strict=True) if flag and grad is not None]


def _bias_gradients(
    dys: Sequence[Tensor],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    counts: Sequence[int],
    need: _Needs,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    dbiases: list[Tensor | None] = [None] * len(dys)
    dlora_biases: list[Tensor | None] = [None] * len(scalings)
    for i, branches in enumerate(_ranges(counts)):
        if not need.bias[i] and not any(need.lora_bias[j] for j in branches):
            continue
        dbiases[i] = column_sum = dys[i].sum(0, dtype=_accumulator(dys[i].dtype))
        for j in branches:
            scaled, scale = column_sum * scalings[j], scaling_tensors[j]
            dlora_biases[j] = scaled if scale is None else scaled * scale
    return dbiases, dlora_biases


def _input_side(
    prims: ModuleType,
    dys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    ds: dict[int, Tensor],
    need: _Needs,
    *,
    seed: Tensor | None,
    thresholds: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and every dA.

    Through fp32, the sum travels in an fp32 addend and only the last branch rounds. With vendor
    products the branches are written first and addmm adds dy W on top, which hides a read of dx.
    """
    fp32 = prims is _native and _gemm.through_fp32(dys[0].device, dys[0].dtype)
    total: Tensor | None = None
    if need.x and fp32:
        for dy, weight in zip(dys, weights, strict=True):
            product = _gemm.linear_backward_fp32(dy, weight)
            if len(dys) > 1:  # the product lies in a scratch buffer that the next one reuses
                product = product.clone() if total is None else total.add_(product)
            total = product
    das: list[Tensor | None] = [None] * len(a)
    for position, (j, d) in enumerate(ds.items(), start=1):
        rounds = position == len(ds) or not fp32
        part, das[j] = prims.lora_down_backward(
            d,
            a[j],
            x,
            seed=seed,
            threshold=thresholds[j],
            branch=j,
            dx_dtype=dtype if rounds else torch.float32,
            need_dx=need.x,
            need_da=need.a[j],
            **({"addend": total} if fp32 else {}),
        )
        if part is not None:
            total = part if fp32 or total is None else total.add_(part)
    if not need.x:
        return None, das
    if fp32:
        assert total is not None
        return (total if ds else total.to(dtype, copy=True)), das
    for dy, weight in zip(dys, weights, strict=True):
        total = _add_product(total, dy, weight.to(dy.dtype), dtype)
    return total, das


def _add_product(total: Tensor | None, dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    if total is None:
        return torch.mm(dy, weight).to(dtype)
    if total.dtype == dy.dtype:
        return total.addmm_(dy, weight)
    return total.add_(torch.mm(dy, weight))


@dataclass(frozen=True)
class _Needs:
    """Which gradients are wanted."""

    x: bool
    w: Sequence[bool]
    bias: Sequence[bool]
    a: Sequence[bool]
    b: Sequence[bool]
    lora_bias: Sequence[bool]

    @staticmethod
    def unpack(flags: Sequence[bool], projections: int, branches: int) -> _Needs:
        sizes = (projections, projections, branches, branches, branches)
        parts, at = [], 1
        for size in sizes:
            parts.append(flags[at : at + size])
            at += size
        return _Needs(flags[0], *parts)


# ---------------------------------------------------------------------------- the ops and their
# backends

_TENSORS = "Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, Tensor?[] lora_biases"
_FACTS = "Tensor?[] scaling_tensors, float[] scalings, int[] thresholds, int[] counts, Tensor? seed"


def _forward_fake(
    x: Tensor, weights: Sequence[Tensor], biases: Any, a: Sequence[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    dtype = rest[-1]
    ys = [x.new_empty(x.shape[0], w.shape[0], dtype=dtype) for w in weights]
    ts = [x.new_empty(x.shape[0], f.shape[0], dtype=_accumulator(dtype)) for f in a]
    return ys, ts


def _backward_fake(
    dys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *rest: Any,
) -> list[Tensor]:
    x_dtype, needs = rest[-2], rest[-1]
    need = _Needs.unpack(needs, len(weights), len(a))
    dy = dys[0]
    grads = []
    if need.x:
        assert weights[0] is not None
        grads.append(dy.new_empty(dy.shape[0], weights[0].shape[1], dtype=x_dtype))
    sum_dtype = _accumulator(dy.dtype)
    trained = [w for w, flag in zip(weights, need.w, strict=True) if flag and w is not None]
    grads += [torch.empty_like(w) for w in trained]
    grads += [
        dy.new_empty(g.shape[1], dtype=sum_dtype)
        for g, flag in zip(dys, need.bias, strict=True)
        if flag
    ]
    grads += [torch.empty_like(f) for f, flag in zip(a, need.a, strict=True) if flag]
    grads += [torch.empty_like(f) for f, flag in zip(b, need.b, strict=True) if flag]
    grads += [
        dy.new_empty(f.shape[0], dtype=sum_dtype)
        for f, flag in zip(b, need.lora_bias, strict=True)
        if flag
    ]
    return grads


FORWARD = _registry.define(
    "lora_linear_fwd",
    f"(Tensor x, {_TENSORS}, {_FACTS}, ScalarType compute_dtype) -> (Tensor[], Tensor[])",
    _forward_fake,
)
BACKWARD = _registry.define(
    "lora_linear_bwd",
    "(Tensor[] dys, Tensor? x, Tensor?[] weights, Tensor[] a, Tensor[] b, Tensor?[] ts, "
    f"{_FACTS}, ScalarType x_dtype, bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _flatten(args: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            flat.append(arg)
        elif isinstance(arg, (list, tuple)):
            flat += _flatten(arg)
    return flat


def _unsupported_dtype_or_rank(args: Sequence[Any], max_rank: int) -> str | None:
    a = args[3]
    for tensor in _flatten(args):
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            return f"it takes fp32, bf16 and fp16, got {tensor.dtype}"
    for factor in a:
        if factor.shape[0] > max_rank:
            return f"it takes ranks up to {max_rank}, got {factor.shape[0]}"
    return None


def _cpu_supports(*args: Any) -> str | None:
    missing = _native.cpu_missing()
    if missing is not None:
        return missing
    if any(tensor.device.type != "cpu" for tensor in _flatten(args)):
        return "it takes CPU tensors"
    return _unsupported_dtype_or_rank(args, _native.MAX_RANK)


def _triton_supports(*args: Any) -> str | None:
    return _triton.why_not(_flatten(args)) or _unsupported_dtype_or_rank(args, _triton.MAX_RANK)


def _always(*args: Any) -> str | None:
    return None


# Where fused is not faster than PEFT's own forward on the CPU (bench/results, lora_linear): below
# these rows the fixed cost of a call is not paid back; below _SMALL_LAYER all is fixed cost.
_MIN_ROWS = 64
_MIN_ROWS_FP32_WITHOUT_DROPOUT = 1024
_SMALL_LAYER = 1 << 18


def too_few_rows(x: Tensor, weight: Tensor) -> str | None:
    """Why PEFT's own forward is faster for an input this small, or None. Cheap enough to ask first."""
    if x.device.type != "cpu" or weight.numel() < _SMALL_LAYER:
        return None
    rows = x.numel() // max(x.shape[-1], 1)
    if rows >= _MIN_ROWS or _registry.forced_backend() is not None:
        return None
    return f"below {_MIN_ROWS} rows the fused path is not faster"


def slower_than_stock(x: Tensor, projection: LoraProjection) -> str | None:
    """Why PEFT's own forward is faster for this call, or None.

    From CPU measurements with rank 16: with dropout or a 16-bit base the fused path wins from a few
    dozen rows; in fp32 without dropout it only draws level at about 1024 rows.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return None
    if projection.weight.numel() < _SMALL_LAYER or _torch.autocast_dtype("cpu") is not None:
        return None
    rows = x.numel() // max(x.shape[-1], 1)
    limit = _MIN_ROWS_FP32_WITHOUT_DROPOUT
    if rows >= limit or any(branch.dropout_p > 0 for branch in projection.branches):
        return None
    if _registry.forced_backend() is not None:
        return None
    return f"in fp32 without dropout the fused path is not faster below {limit} rows"


def fast_backend_missing(device_type: str) -> str | None:
    """Why no backend faster than plain torch serves this device, or None if one does."""
    if _registry.forced_backend() is not None:
        return None
    if device_type == "cpu":
        return _native.cpu_missing()
    if device_type == "cuda":
        return _triton.why_not(())
    if device_type == "meta":  # shapes only: no backend runs
        return None
    return f"no kernels for device {device_type}"


@FORWARD.backend("cpu", _cpu_supports)
def _fwd_cpu(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    return _forward_with(_native, *args)


@BACKWARD.backend("cpu", _cpu_supports)
def _bwd_cpu(*args: Any) -> list[Tensor]:
    return _backward_with(_native, *args)


@FORWARD.backend("triton", _triton_supports)
def _fwd_triton(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    return _forward_with(_triton.kernels("lora_linear"), *args)


@BACKWARD.backend("triton", _triton_supports)
def _bwd_triton(*args: Any) -> list[Tensor]:
    return _backward_with(_triton.kernels("lora_linear"), *args)


@FORWARD.backend("reference", _always)
def _fwd_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    lora_biases: Sequence[Tensor | None],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    thresholds: Sequence[int],
    counts: Sequence[int],
    seed: Tensor | None,
    compute_dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor]]:
    wide = _accumulator(compute_dtype)
    ys, ts = [], []
    for i, branches in enumerate(_ranges(counts)):
        y = x.to(compute_dtype).to(wide) @ weights[i].to(compute_dtype).to(wide).t()
        bias = biases[i]
        if bias is not None:
            y = y + bias.to(wide)
        for j in branches:
            keep = _dropout.keep_mask(seed, thresholds[j], x.shape[0], x.shape[1], branch=j)
            scale: float | Tensor = scalings[j]
            scale_tensor = scaling_tensors[j]
            if scale_tensor is not None:
                scale = scale * scale_tensor.to(wide)
            t = (
                (x.to(wide) * keep)
                @ a[j].to(wide).t()
                * (_dropout.keep_scale(thresholds[j]) * scale)
            )
            y = y + t @ b[j].to(wide).t()
            lora_bias = lora_biases[j]
            if lora_bias is not None:
                y = y + scale * lora_bias.to(wide)
            ts.append(t)
        ys.append(y.to(compute_dtype))
    return ys, ts


@BACKWARD.backend("reference", _always)
def _bwd_reference(
    dys: Sequence[Tensor],
    x: Tensor | None,
    weights: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ts: Sequence[Tensor],
    scaling_tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    thresholds: Sequence[int],
    counts: Sequence[int],
    seed: Tensor | None,
    x_dtype: torch.dtype,
    needs: Sequence[bool],
) -> list[Tensor]:
    need = _Needs.unpack(needs, len(weights), len(a))
    wide = _accumulator(dys[0].dtype)
    rows = dys[0].shape[0]
    dx = dys[0].new_zeros((), dtype=wide)
    das: list[Tensor | None] = [None] * len(a)
    dbs: list[Tensor | None] = [None] * len(a)
    dws: list[Tensor | None] = [None] * len(weights)
    for i, branches in enumerate(_ranges(counts)):
        dy, weight = dys[i].to(wide), weights[i]
        if need.x and weight is not None:
            dx = dx + dy @ weight.to(dys[i].dtype).to(wide)
        if need.w[i] and weight is not None and x is not None:
            dws[i] = (dy.t() @ x.to(dys[i].dtype).to(wide)).to(weight.dtype)
        for j in branches:
            keep = _dropout.keep_mask(
                seed, thresholds[j], rows, a[j].shape[1], branch=j, device=dy.device
            )
            scale: float | Tensor = scalings[j] * _dropout.keep_scale(thresholds[j])
            scale_tensor = scaling_tensors[j]
            if scale_tensor is not None:
                scale = scale * scale_tensor.to(wide)
            d = dy @ b[j].to(wide) * scale
            if need.x:
                dx = dx + keep * (d @ a[j].to(wide))
            if need.a[j] and x is not None:
                das[j] = (d.t() @ (x.to(wide) * keep)).to(a[j].dtype)
            if need.b[j]:
                dbs[j] = (dy.t() @ ts[j]).to(b[j].dtype)
    dbiases, dlora_biases = _bias_gradients(dys, scaling_tensors, scalings, counts, need)
    wanted = [dx.to(x_dtype), *dws, *dbiases, *das, *dbs, *dlora_biases]
    return [grad for grad, flag in zip(wanted, needs, strict=True) if flag and grad is not None]


# ---------------------------------------------------------------------------- autograd


class _LoraLinear(torch.autograd.Function):
    """x, seed and the tensors of _pack to the outputs of all projections."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, x: Tensor, seed: Tensor | None, *flat: Any) -> Any:
        weights, biases, a, b, lora_biases, scaling_tensors = _unpack(spec, flat)
        rows = _rows_first(x, math.prod(x.shape[:-1]), x.shape[-1])
        args = (
            rows, weights, biases, a, b, lora_biases, scaling_tensors,
            list(spec.scalings), list(spec.thresholds), list(spec.counts), seed, spec.compute_dtype,
        )  # fmt: skip
        if _registry.must_dispatch((x, *flat)):
            ctx.backend = None
            ys, ts = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            ys, ts = ctx.backend.run(*args)
        need_x, _, *rest = ctx.needs_input_grad[1:]
        needs = [need_x, *rest[: len(rest) - len(scaling_tensors)]]
        need = _Needs.unpack(needs, len(weights), len(a))
        # Keep only what this combination of frozen and trained tensors needs; parameters cost
        # nothing.
        ctx.save_for_backward(
            x if any(need.a) or any(need.w) else None,
            seed,
            *(w if need_x or flag else None for w, flag in zip(weights, need.w, strict=True)),
            *a,
            *b,
            *(t if flag else None for t, flag in zip(ts, need.b, strict=True)),
            *scaling_tensors,
        )
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = sum(t.numel() * t.element_size() for t in ts) if any(need.b) else 0
        ctx.saved_bytes += x.numel() * x.element_size() if any(need.a) or any(need.w) else 0
        ctx.spec, ctx.needs, ctx.shape, ctx.x_dtype = spec, needs, x.shape, x.dtype
        ctx.widths = [w.shape[0] for w in weights]
        ctx.bias_dtypes = [None if f is None else f.dtype for f in (*biases, *lora_biases)]
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        spec: _Spec = ctx.spec
        n, k = len(spec.counts), len(spec.scalings)
        nothing = (None,) * (3 + 2 * n + 4 * k)
        given = next((dy for dy in dys if dy is not None), None)
        if given is None:
            return nothing
        x, seed, *saved = ctx.saved_tensors
        weights = list(saved[:n])
        a, b, ts, scaling_tensors = (list(saved[n + i * k : n + (i + 1) * k]) for i in range(4))
        rows = math.prod(ctx.shape[:-1])
        args = (
            [
                given.new_zeros(rows, width) if dy is None else _rows_first(dy, rows, width)
                for dy, width in zip(dys, ctx.widths, strict=True)
            ],
            None if x is None else _rows_first(x, rows, ctx.shape[-1]),
            weights, a, b, ts, scaling_tensors,
            list(spec.scalings), list(spec.thresholds), list(spec.counts), seed, ctx.x_dtype,
            ctx.needs,
        )  # fmt: skip
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        grads = iter(run(*args))
        dx, *rest = [next(grads) if flag else None for flag in ctx.needs]
        if dx is not None:
            dx = dx.view(ctx.shape)
        dws, dbiases, das, dbs, dlora_biases = _split(rest, (n, n, k, k, k))
        dtypes = iter(ctx.bias_dtypes)
        dbiases = [g if g is None else g.to(t) for g, t in zip(dbiases, dtypes, strict=False)]
        dlora_biases = [
            g if g is None else g.to(t)
            for g, t in zip(dlora_biases, ctx.bias_dtypes[n:], strict=True)
        ]
        return None, dx, None, *dws, *dbiases, *das, *dbs, *dlora_biases, *(None,) * k


def _rows_first(x: Tensor, rows: int, width: int) -> Tensor:
    """x as [rows, width] with unit column stride; a transposed or expanded one is copied."""
    x = x.reshape(rows, width)
    return x if width == 1 or x.stride(1) == 1 else x.contiguous()


def _split(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    parts, at = [], 0
    for size in sizes:
        parts.append(list(items[at : at + size]))
        at += size
    return parts


def _pack(
    projections: Sequence[LoraProjection],
) -> tuple[list[Any], list[float], list[float], list[int]]:
    """Flat tensors (weights, biases, a, b, lora biases, scaling tensors), scalings, dropouts,
    counts.
    """
    branches = [branch for projection in projections for branch in projection.branches]
    scales = [branch.scaling for branch in branches]
    flat: list[Any] = [projection.weight for projection in projections]
    flat += [projection.bias for projection in projections]
    flat += [branch.a for branch in branches]
    flat += [branch.b for branch in branches]
    flat += [branch.bias for branch in branches]
    flat += [scale if isinstance(scale, Tensor) else None for scale in scales]
    scalings = [1.0 if isinstance(scale, Tensor) else float(scale) for scale in scales]
    dropouts = [branch.dropout_p for branch in branches]
    return flat, scalings, dropouts, [len(projection.branches) for projection in projections]


def _unpack(spec: _Spec, flat: Sequence[Any]) -> list[list[Any]]:
    n, k = len(spec.counts), len(spec.scalings)
    return _split(flat, (n, n, k, k, k, k))


# ---------------------------------------------------------------------------- public functions


def lora_linear_group(
    x: Tensor,  # [*, K]
    projections: Sequence[LoraProjection],
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [*, N_i] of every projection of x, LoRA branches included.

    Args:
        x: [*, K], fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
        projections: weights [N_i, K] of one dtype and device with x; outside autocast also of x's
            dtype. Adapters may have another float dtype.
        seed: 0-d int64 tensor on the device of x that fixes the dropout masks; drawn from torch's
            generator of the device if None and a branch has dropout.

    Returns:
        One tensor [*, N_i] a projection, in x's dtype or, under autocast, in autocast's.

    Raises:
        TypeError: an argument is no tensor, has no float dtype, or x and weight differ in dtype
            outside autocast.
        ValueError: shapes or devices do not fit, or a dropout probability is outside [0, 1).

    Semantics of each projection: ``peft.tuners.lora.layer.Linear.forward`` (PEFT 0.21).
    """
    compute_dtype = _validate(x, projections, seed)
    return apply_group(x, projections, compute_dtype, seed=seed)


def lora_linear(
    x: Tensor,  # [*, K]
    weight: Tensor,  # [N, K]
    a: Tensor,  # [R, K]
    b: Tensor,  # [N, R]
    *,
    bias: Tensor | None = None,  # [N]
    scaling: float | Tensor = 1.0,
    lora_bias: Tensor | None = None,  # [N]
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + scaling (dropout(x) A^T B^T + lora_bias), [*, N].

    One projection with one branch of :func:`lora_linear_group`, which states dtypes and errors.
    """
    branch = LoraBranch(a, b, scaling, lora_bias, dropout_p)
    return lora_linear_group(x, [LoraProjection(weight, bias, (branch,))], seed=seed)[0]


def apply_group(
    x: Tensor,
    projections: Sequence[LoraProjection],
    compute_dtype: torch.dtype,
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_linear_group` without validation, for callers that know their arguments."""
    flat, scalings, dropouts, counts = _pack(projections)
    thresholds = [_dropout.threshold(p) for p in dropouts]
    if seed is None and any(thresholds):
        seed = _dropout.draw_seed(x.device)
    spec = _Spec(tuple(counts), tuple(scalings), tuple(thresholds), compute_dtype)
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        x2 = x.reshape(-1, x.shape[-1])
        args = (*_unpack(spec, flat), scalings, thresholds, counts, seed, compute_dtype)
        ys, _ = _fwd_reference(x2, *args)
        return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys)
    outputs: tuple[Tensor, ...] = _LoraLinear.apply(spec, x, seed, *flat)  # type: ignore[no-untyped-call]
    return outputs


def _validate(x: Tensor, projections: Sequence[LoraProjection], seed: Tensor | None) -> torch.dtype:
    _check_float("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected at least one dimension [*, K], got shape {tuple(x.shape)}")
    if not projections:
        raise ValueError("projections: expected at least one, got none")
    features = x.shape[-1]
    compute_dtype = _torch.autocast_dtype(x.device.type) or x.dtype
    for projection in projections:
        _check_shape("weight", projection.weight, (None, features), x.device)
        outputs = projection.weight.shape[0]
        if _torch.autocast_dtype(x.device.type) is None and projection.weight.dtype != x.dtype:
            raise TypeError(f"weight: expected x's dtype {x.dtype}, got {projection.weight.dtype}")
        if projection.bias is not None:
            _check_shape("bias", projection.bias, (outputs,), x.device)
        for branch in projection.branches:
            _check_shape("a", branch.a, (None, features), x.device)
            _check_shape("b", branch.b, (outputs, branch.a.shape[0]), x.device)
            if branch.bias is not None:
                _check_shape("lora_bias", branch.bias, (outputs,), x.device)
            if isinstance(branch.scaling, Tensor):
                _check_shape("scaling", branch.scaling, (), x.device)
                if branch.scaling.requires_grad:
                    raise ValueError(
                        "scaling: expected a tensor without requires_grad, got a trained one"
                    )
            _dropout.threshold(branch.dropout_p)
    if seed is not None and (
        seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device
    ):
        raise ValueError(
            f"seed: expected a 0-d int64 tensor on {x.device}, "
            f"got shape {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    return compute_dtype


def _check_float(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (*_FLOATS, torch.float64):
        raise TypeError(f"{name}: expected fp32, bf16, fp16 or fp64, got {tensor.dtype}")


def _check_shape(
    name: str, tensor: Any, shape: tuple[int | None, ...], device: torch.device
) -> None:
    _check_float(name, tensor)
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} as x, got {tensor.device}")
