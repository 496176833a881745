"""rope: rotary position embedding of queries and keys, both in one pass.

Maths, for the row x [D] of a head and cos, sin [R] of its position. The first R features turn in
pairs (i, j): (i, i + R / 2) for i < R / 2 or, interleaved, (i, i + 1) for even i < R.

    y_i = x_i cos_i - x_j sin_i,    y_j = x_j cos_j + x_i sin_j,    y_n = x_n for n >= R
    dx_i = dy_i cos_i + dy_j sin_j, dx_j = dy_j cos_j - dy_i sin_i, dx_n = dy_n for n >= R

The backward is the exact transpose, also where cos and sin differ within a pair. Saved for
backward: cos and sin, which all layers of a model share. Arithmetic is fp32, rounded once to the
dtype of x (stock rounds both products to it first).

Memory: queries and keys usually are transposed views of [B, S, H, D]. They are read where they lie,
and the outputs have the memory order of their inputs; so have the gradients, whatever the order of
the incoming ones, so that the transpose and the view before this op cost nothing in backward.

Semantics: transformers 5.23, apply_rotary_pos_emb of llama and gpt_neox (halves), of cohere and
glm4 (interleaved); RoFormer (Su et al., 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _support, _triton
from fasttune.ops._arguments import accumulator, check_float

# Legend: q [B, Hq, S, D], k [B, Hk, S, D], cos and sin [B or 1, S, R].


def _rotate_half(x: Tensor, interleaved: bool) -> Tensor:
    """(-x_j, x_i) for every pair (i, j)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = accumulator(torch.promote_types(x.dtype, cos.dtype))
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    turned, cos, sin = turned.to(wide), cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    y = turned * cos + _rotate_half(turned, interleaved) * sin
    return torch.cat((y.to(x.dtype), rest), dim=-1)


def _rotate_back(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = accumulator(torch.promote_types(dy.dtype, cos.dtype))
    turned, rest = dy.split((cos.shape[-1], dy.shape[-1] - cos.shape[-1]), dim=-1)
    turned, cos, sin = turned.to(wide), cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    dx = turned * cos - _rotate_half(turned * sin, interleaved)
    return torch.cat((dx.to(dy.dtype), rest), dim=-1)


# ---------------------------------------------------------------------------- backends


def _empty_in_order(x: Tensor) -> Tensor:
    """Empty, shaped as x, in x's memory order where that leaves the features contiguous."""
    y = torch.empty_like(x)
    if y.stride(-1) == 1:
        return y
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_fake(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool
) -> list[Tensor]:
    return [_empty_in_order(x) for x in (q, k) if x is not None]


def _backward_fake(
    dq: Tensor | None,
    dk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_strides: Sequence[int],
    k_strides: Sequence[int],
) -> list[Tensor]:
    return [
        dy.new_empty_strided(dy.shape, strides)
        for dy, strides in ((dq, q_strides), (dk, k_strides))
        if dy is not None
    ]


FORWARD = _registry.define(
    "rope_fwd",
    "(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved) -> Tensor[]",
    _forward_fake,
)
BACKWARD = _registry.define(
    "rope_bwd",
    "(Tensor? dq, Tensor? dk, Tensor cos, Tensor sin, bool interleaved, "
    "SymInt[] q_strides, SymInt[] k_strides) -> Tensor[]",
    _backward_fake,
)


@FORWARD.backend("reference", _support.never)
def _fwd_reference(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool
) -> list[Tensor]:
    return [
        _empty_in_order(x).copy_(_rotate(x, cos, sin, interleaved)) for x in (q, k) if x is not None
    ]


@BACKWARD.backend("reference", _support.never)
def _bwd_reference(*args: Any) -> list[Tensor]:
    dq, dk, cos, sin, interleaved = args[:5]
    return [
        out.copy_(_rotate_back(dy, cos, sin, interleaved))
        for dy, out in zip(_given(dq, dk), _backward_fake(*args), strict=True)
    ]


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _rows(x: Tensor) -> Tensor:
    """x with contiguous features; what has them elsewhere (an expanded gradient) is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _optional_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x)


def _forward_with(primitives: ModuleType, *args: Any) -> list[Tensor]:
    q, k, cos, sin, interleaved = args
    outs = _forward_fake(*args)
    primitives.rope_forward(
        _rows(q),
        _optional_rows(k),
        _rows(cos),
        _rows(sin),
        interleaved=interleaved,
        q_out=outs[0],
        k_out=None if k is None else outs[1],
    )
    return outs


def _backward_with(primitives: ModuleType, *args: Any) -> list[Tensor]:
    dq, dk, cos, sin, interleaved = args[:5]
    outs = _backward_fake(*args)
    if not outs:
        return outs
    primitives.rope_backward(
        _optional_rows(dq),
        _optional_rows(dk),
        _rows(cos),
        _rows(sin),
        interleaved=interleaved,
        dq_out=None if dq is None else outs[0],
        dk_out=None if dk is None else outs[-1],
    )
    return outs


def _cpu_supports(*args: Any) -> str | None:
    return _support.why_not_cpu(args, ())


def _triton_supports(*args: Any) -> str | None:
    return _support.why_not_triton(args, ())


@FORWARD.backend("cpu", _cpu_supports)
def _fwd_cpu(*args: Any) -> list[Tensor]:
    return _forward_with(_native, *args)


@BACKWARD.backend("cpu", _cpu_supports)
def _bwd_cpu(*args: Any) -> list[Tensor]:
    return _backward_with(_native, *args)


@FORWARD.backend("triton", _triton_supports)
@_support.Repeated
def _fwd_triton(*args: Any) -> list[Tensor]:
    return _forward_with(_triton.kernels("rope"), *args)


@BACKWARD.backend("triton", _triton_supports)
@_support.Repeated
def _bwd_triton(*args: Any) -> list[Tensor]:
    return _backward_with(_triton.kernels("rope"), *args)


# ---------------------------------------------------------------------------- autograd


class _Rope(torch.autograd.Function):
    """q, k, cos and sin to the rotated q and k (None without k)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> Any:
        args = (q, k, cos, sin, interleaved)
        if _registry.must_dispatch((q, k, cos, sin)):
            ctx.backend = None
            outs = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            outs = ctx.backend.run(*args)
        q_out, k_out = outs[0], None if k is None else outs[1]
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        frozen = [out for out, need in zip(outs, ctx.needs_input_grad, strict=False) if not need]
        ctx.mark_non_differentiable(*frozen)
        ctx.interleaved = interleaved
        ctx.strides = [[] if out is None else list(out.stride()) for out in (q_out, k_out)]
        ctx.saved_bytes = 0  # cos and sin are held by the model's forward for all of its layers
        return q_out, k_out

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dq: Tensor | None, dk: Tensor | None) -> Any:
        cos, sin = ctx.saved_tensors
        if dq is None and dk is None:
            return None, None, None, None, None
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        grads = iter(run(dq, dk, cos, sin, ctx.interleaved, *ctx.strides))
        return (
            None if dq is None else next(grads),
            None if dk is None else next(grads),
            None,
            None,
            None,
        )


# ---------------------------------------------------------------------------- public function


def rope(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor | None,  # [B, Hk, S, D]
    cos: Tensor,  # [S, R] or [B or 1, S, R]
    sin: Tensor,  # [S, R] or [B or 1, S, R]
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate queries and keys by the angles of their positions.

    Args:
        q: [B, Hq, S, D], fp32, bf16, fp16 (fp64 on the reference backend), any strides; unit stride
            in D is read in place. [B, S, H, D] memory is passed as a transposed view.
        k: [B, Hk, S, D] of any float dtype, or None.
        cos: [B or 1, S, R] or [S, R] of any float dtype, R even and at most D; the last D - R
            features are copied. As wide as the features that turn: transformers repeats the R / 2
            angles ([a, b, .., a, b, ..] for halves, [a, a, b, b, ..] interleaved).
        sin: as cos.
        interleaved: pairs are neighbours (2i, 2i + 1) instead of (i, i + R / 2).

    Returns:
        (q', k'): in the dtype and the memory order of q and k; k' is None if k is. Unlike torch's
        promotion, a wider cos does not widen them.

    Raises:
        TypeError: an argument is no tensor or has no float dtype, or cos and sin differ in dtype.
        ValueError: shapes or devices do not fit, R is odd or above D, or cos or sin require a
            gradient.

    Semantics: ``apply_rotary_pos_emb`` of transformers 5.23: llama and gpt_neox (halves), cohere
    and glm4 (interleaved, cos and sin after their ``repeat_interleave``).
    """
    _validate(q, k, cos, sin)
    if cos.dim() == 2:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)
    return apply_rope(q, k, cos, sin, interleaved=interleaved)


def apply_rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,  # [B or 1, S, R]
    sin: Tensor,  # [B or 1, S, R]
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`rope` without validation, for callers that know their arguments."""
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        rotated = [_rotate(x, cos, sin, interleaved) for x in _given(q, k)]
        return rotated[0], None if k is None else rotated[1]
    outputs: tuple[Tensor, Tensor | None] = _Rope.apply(q, k, cos, sin, interleaved)  # type: ignore[no-untyped-call]
    return outputs


def _validate(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    check_float("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: expected shape [B, H, S, D], got {list(q.shape)}")
    batch, _, positions, features = q.shape
    if k is not None:
        check_float("k", k)
        if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, positions, features):
            raise ValueError(
                f"k: expected shape [{batch}, any, {positions}, {features}], got {list(k.shape)}"
            )
    for name, table in (("cos", cos), ("sin", sin)):
        check_float(name, table)
        leading = table.shape[:-2]
        if (
            table.dim() not in (2, 3)
            or table.shape[-2] != positions
            or any(size not in (1, batch) for size in leading)
        ):
            raise ValueError(
                f"{name}: expected shape [{batch} or 1, {positions}, R] or [{positions}, R], "
                f"got {list(table.shape)}"
            )
        if table.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor without requires_grad, got one that requires a gradient"
            )
    rotary = cos.shape[-1]
    if rotary % 2 or not 2 <= rotary <= features:
        raise ValueError(f"cos: expected an even width R in [2, {features}], got {rotary}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin: expected the shape of cos {list(cos.shape)}, got {list(sin.shape)}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"sin: expected the dtype of cos {cos.dtype}, got {sin.dtype}")
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q, got {tensor.device}")
