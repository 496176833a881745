"""reft: edits hidden states within a low-rank subspace, at chosen positions, and leaves the others.

Maths, for the listed rows x [P, H] of h [M, H], with R and W [R, H]:

    z = x W^T + b,   d = act(z) - x R^T  (the last term with ``difference``)      [P, R], saved
    y = keep * (x + d R) / (1 - p);  y = h in the rows that are not listed

    g = keep * dy / (1 - p),   dd = g R^T,   dz = dd act'(z)
    dh = g + dz W - dd R in the listed rows, dy in the others
    dW = dz^T x,  db = sum_p dz,  dR = d^T g - dd^T x

Saved for backward: the listed rows of h (h itself where all are), z and d; the mask is drawn again
from the seed (docs/design.md states its format; element (p, k) of the list is its element, branch
0).

One kernel each way gathers, works in the R-dimensional subspace and scatters; the other rows are
a copy by the vendor. The gradients of the parameters are sums over the P rows in fixed order.

Rounding: no operand is rounded before a product, sums and z and d are fp32 (fp64 for fp64), with
and without autocast; y is rounded once, to the dtype of h; each gradient once, to the dtype of its
tensor.

Semantics: Wu et al. (2024), ReFT: Representation Finetuning for Language Models; pyreft's
LoreftIntervention, whose dropout drops elements of the edited rows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _dropout, _reft_reference, _support, _triton
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops._arguments import accumulator, check_float, check_shape, output_shaped, rows_first
from fasttune.ops._reft_products import backward_with, forward_with

REFT_ACTIVATIONS = (*ACTIVATIONS, "identity")

# A wider tile of R and W beside each other spills.
_TRITON_MAX_RANK = 128

_FACTS = "bool difference, str activation, int threshold, Tensor? seed"


def _forward_fake(h: Tensor, rows: Tensor | None, rotation: Tensor, *rest: Any) -> Any:
    listed = h.shape[0] if rows is None else rows.shape[0]
    wide = accumulator(h.dtype)
    return (
        h.new_empty(0 if rows is None else listed, h.shape[1]),
        h.new_empty(listed, rotation.shape[0], dtype=wide),
        h.new_empty(listed, rotation.shape[0], dtype=wide),
    )


def _backward_fake(
    dy: Tensor, x: Tensor, rows: Any, rotation: Tensor, source: Tensor, z: Tensor, *rest: Any
) -> list[Tensor]:
    wanted = (
        (rotation.shape, rotation.dtype),
        (source.shape, source.dtype),
        (z.shape[1:], z.dtype),
    )
    return [
        dy.new_empty(shape if flag else 0, dtype=dtype)
        for (shape, dtype), flag in zip(wanted, rest[-1], strict=True)
    ]


FORWARD = _registry.define(
    "reft_fwd",
    "(Tensor h, Tensor? rows, Tensor rotation, Tensor source, Tensor? bias, "
    f"{_FACTS}, Tensor(a!) y) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
BACKWARD = _registry.define(
    "reft_bwd",
    "(Tensor dy, Tensor x, Tensor? rows, Tensor rotation, Tensor source, Tensor z, Tensor d, "
    f"{_FACTS}, Tensor(a!)? dh, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
)


class _TritonPrimitives:
    """The Triton launchers that the products need, loaded at the first call."""

    def __getattr__(self, name: str) -> Any:
        ops = {"lora_down_backward": "lora_linear", "column_sum": "bias_activation"}
        return getattr(_triton.kernels(ops.get(name, "reft")), name)


def _on_cpu(index: int, *args: Any) -> str | None:
    return _support.why_not_cpu(args, [args[index]])


def _on_triton(index: int, *args: Any) -> str | None:
    rank = args[index].shape[0]
    reason = _support.why_not_triton(args, ())
    if reason is None and rank > _TRITON_MAX_RANK:
        return f"it takes ranks up to {_TRITON_MAX_RANK}, got {rank}"
    return reason


for _op, _run, _plain, _index in (  # the place of R among the arguments
    (FORWARD, forward_with, _reft_reference.forward, 2),
    (BACKWARD, backward_with, _reft_reference.backward, 3),
):
    _op.backend("cpu", partial(_on_cpu, _index))(partial(_run, _native))
    _op.backend("triton", partial(_on_triton, _index))(
        partial(_run, _TritonPrimitives())  # type: ignore[arg-type]
    )
    _op.backend("reference", _support.never)(_plain)


class _Reft(torch.autograd.Function):
    """h, rows, the parameters and facts (difference, activation, threshold, in place) to y."""

    @staticmethod
    def forward(
        ctx: Any,
        facts: Any,
        seed: Tensor | None,
        rows: Tensor | None,
        h: Tensor,
        rotation: Tensor,
        source: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        *options, inplace = facts
        flat = rows_first(h, math.prod(h.shape[:-1]), h.shape[-1])
        dispatched = _registry.must_dispatch((h, rotation, source, bias))
        # A view of h, not a copy of it, is what may be written to.
        inplace = inplace and rows is not None and not dispatched and h.is_contiguous()
        if inplace:
            y = flat
            ctx.mark_dirty(h)
        else:
            y = torch.empty_like(flat) if rows is None else flat.clone()
        args = (flat, rows, rotation, source, bias, *options, seed, y)
        ctx.backend = None if dispatched else FORWARD.select(*args)
        run = FORWARD.registered if ctx.backend is None else ctx.backend.run
        x, z, d = run(*args)
        x = flat if rows is None else x
        ctx.save_for_backward(x, rows, seed, rotation, source, z, d)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = x.nbytes + z.nbytes + d.nbytes
        ctx.options, ctx.needs = options, ctx.needs_input_grad[3:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return h if inplace else output_shaped(y, h.shape)

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 7
        x, rows, seed, rotation, source, z, d = ctx.saved_tensors
        need_h, *needs = ctx.needs
        flat = rows_first(dy, math.prod(dy.shape[:-1]), dy.shape[-1])
        dh = None
        if need_h:
            dh = torch.empty_like(flat) if rows is None else flat.clone()
        args = (flat, x, rows, rotation, source, z, d, *ctx.options, seed, dh, needs)
        run = BACKWARD.registered
        if ctx.backend is not None:
            run = BACKWARD.backends[ctx.backend.name].run
        drotation, dsource, dbias = (
            grad if flag else None for grad, flag in zip(run(*args), needs, strict=True)
        )
        dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
        return (
            None,
            None,
            None,
            None if dh is None else dh.view(dy.shape),
            drotation,
            dsource,
            dbias,
        )


def reft(
    h: Tensor,  # [*, H]
    rotation: Tensor,  # [R, H]
    source: Tensor,  # [R, H]
    bias: Tensor | None = None,  # [R]
    *,
    rows: Tensor | None = None,  # [P] int64
    difference: bool = True,
    activation: str = "identity",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """h + (act(h source^T + bias) - h rotation^T) rotation in the listed rows, [*, H].

    Args:
        h: [*, H], fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
        rotation: R, whose rows LoReFT keeps orthonormal; the op does not ask for it. Any float
            dtype, as ``source`` and ``bias``.
        source, bias: W and b.
        rows: [P] int64, numbers of rows of h as [M, H], in any order, each at most once; negative
            entries name none. None: all rows. What is out of range or named twice is an error on a
            CPU; on a GPU, where a check would wait for the device, rows out of range are left alone
            and a row that is named twice counts twice in the gradients of the parameters.
        difference: subtract h rotation^T: LoReFT and NoReFT do, DiReFT does not.
        activation: one of silu, gelu, gelu_tanh, quick_gelu, relu, relu2, tanh, sigmoid,
            leaky_relu, identity.
        dropout_p: probability in [0, 1) to drop an element of the edited rows; rounded to
            1 / 65536.
        seed: 0-d int64 tensor on the device of h that fixes the mask; drawn from torch's generator
            of the device if None.
        inplace: h may be overwritten, as far as autograd allows it: its untouched rows are then not
            copied. A copy is made where rows is None, h is not contiguous, or torch traces.

    Returns:
        [*, H] in the dtype of h; h itself where it was edited in place.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit, rows are out of range or named twice, an unknown
            activation, or a dropout probability outside [0, 1).

    Source: Wu et al. (2024), ReFT: Representation Finetuning for Language Models.
    """
    _validate(h, rotation, source, bias, rows, activation)
    threshold = _dropout.threshold(dropout_p)
    if threshold and seed is None:
        seed = _dropout.draw_seed(h.device)
    if _torch.in_functorch():
        return _in_functorch(
            h, rows, rotation, source, bias, difference, activation, threshold, seed
        )
    facts = (difference, activation, threshold, inplace)
    y: Tensor = _Reft.apply(facts, seed, rows, h, rotation, source, bias)  # type: ignore[no-untyped-call]
    return y


def _in_functorch(h: Tensor, rows: Tensor | None, *rest: Any) -> Tensor:
    """Plain torch operations compose with vmap and grad."""
    flat = h.reshape(-1, h.shape[-1])
    if rows is None:
        return _reft_reference.edited(flat, *rest)[0].to(h.dtype).reshape(h.shape)
    x = flat.index_select(0, rows.clamp(min=0))
    change = _reft_reference.edited(x, *rest)[0] - x
    change = torch.where((rows >= 0).unsqueeze(1), change, 0.0)
    return flat.index_add(0, rows.clamp(min=0), change.to(h.dtype)).reshape(h.shape)


def _validate(h: Any, rotation: Any, source: Any, bias: Any, rows: Any, activation: Any) -> None:
    check_float("h", h)
    if h.dim() == 0:
        raise ValueError("h: expected at least one dimension, got none")
    check_shape("rotation", rotation, (None, h.shape[-1]), h.device, like="h")
    check_shape("source", source, tuple(rotation.shape), h.device, like="h")
    if bias is not None:
        check_shape("bias", bias, (rotation.shape[0],), h.device, like="h")
    if activation not in REFT_ACTIVATIONS:
        names = ", ".join(REFT_ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}")
    if rows is not None:
        _check_rows(rows, h)


# The last list that fits, and how many rows it needs: the interventions of a model mostly share
# one.
_fitting: tuple[Tensor, int] = torch.empty(0, dtype=torch.int64, device="cpu"), 0


def _check_rows(rows: Any, h: Tensor) -> None:
    global _fitting
    if not isinstance(rows, Tensor):
        raise TypeError(f"rows: expected a tensor, got {type(rows).__name__}")
    if rows.dtype != torch.int64:
        raise TypeError(f"rows: expected int64, got {rows.dtype}")
    if rows.dim() != 1:
        raise ValueError(f"rows: expected one dimension, got shape {list(rows.shape)}")
    if rows.device != h.device:
        raise ValueError(f"rows: expected device {h.device} as h, got {rows.device}")
    if rows.device.type != "cpu" or _registry.must_dispatch((rows,)) or _torch.in_functorch():
        return
    count = math.prod(h.shape[:-1])
    fit, most = _fitting
    if count >= most and torch.equal(rows, fit):  # as the layer before, by value
        return
    _check_numbers(rows, count)
    _fitting = rows.detach().clone(), count


def _check_numbers(rows: Tensor, count: int) -> None:
    named = rows[rows >= 0]
    if named.numel() and int(named.max()) >= count:
        raise ValueError(f"rows: expected numbers below {count}, got {int(named.max())}")
    if named.unique().numel() != named.numel():
        raise ValueError("rows: expected each row at most once")
