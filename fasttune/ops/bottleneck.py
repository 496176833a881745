"""bottleneck: an adapter that squeezes, activates and widens its input, added to a residual.

Maths, for x [M, K], R wide inside:

    z = x D^T + b_D                              [M, R], saved
    h = act(z),  u = h U^T + b_U                 [M, H]
    y = residual + keep * u scale factor / (1 - p)

    g = keep * dy factor / (1 - p)
    dz = ((g scale) U) act'(z),   dx = dz D (+ dy where the residual is x itself)
    dD = dz^T x,  db_D = sum_m dz,  dU = (g scale)^T h,  db_U = sum_m g scale
    dscale = sum_m g u = rows of (g^T h) U + (sum_m g) b_U, so that u is never needed again

Saved for backward: x as it came and z; the mask is drawn again from the seed (docs/design.md states
its format; the row and column of u are its element, branch 0).

Products: six, in the compute dtype C, the autocast dtype or, outside autocast, what the dtypes of x
and of the parameters promote to; accumulated in fp32. On a GPU in 16 bits they are kernels with
everything around them (fasttune_kernels.bottleneck), and on a CPU one call each way: on tiles
(csrc/cpu/amx/bottleneck.cpp), or in fp32 up to a width of 48 (csrc/cpu/bottleneck.cpp). Else, and
in backend cuda, they are the vendor's, and around them one pass each way at most: the sum with
mask, scale and residual forward, the mask backward.

Rounding: z and h to C, as torch does; u to C where a product of the vendor writes it; y once, to
what C and the residual's dtype promote to; each gradient once, to the dtype of its tensor.

Semantics: the adapter of Houlsby et al. (2019) and Pfeiffer et al. (2020); AdapterPlus (Steitz and
Roth, 2024) has a scale for each channel. A layer norm in front, a gate and an activation after the
up-projection are the module's (fasttune.nn.BottleneckAdapter), in ops of their own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasttune import _registry, _torch
from fasttune._native import elementwise_cuda
from fasttune.ops import (
    _bottleneck_cpu,
    _bottleneck_products,
    _bottleneck_reference,
    _bottleneck_triton,
    _dropout,
    _support,
)
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops._arguments import accumulator, check_float, check_shape, output_shaped, rows_first

BOTTLENECK_ACTIVATIONS = (*ACTIVATIONS, "identity")

_TENSORS = "Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? scale, float factor"
_FACTS = "str activation, int threshold, Tensor? seed, ScalarType dtype"


def _forward_fake(x: Tensor, residual: Tensor | None, down: Tensor, *rest: Any) -> Any:
    up, dtype, out_dtype = rest[1], rest[-2], rest[-1]
    y = x.new_empty(x.shape[0], up.shape[0], dtype=out_dtype)
    return y, x.new_empty(x.shape[0], down.shape[0], dtype=dtype)


def _backward_fake(
    dy: Tensor, x: Tensor, z: Tensor, down: Tensor, down_bias: Any, up: Tensor, up_bias: Any,
    scale: Any, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    found = [
        tensor.new_empty(tensor.shape)
        for tensor, flag in zip((x, down, down_bias, up, up_bias), rest[-1], strict=False)
        if flag
    ]
    if rest[-1][-1]:
        found.append(scale.new_empty(scale.shape, dtype=accumulator(rest[4])))
    return found


FORWARD = _registry.define(
    "bottleneck_fwd",
    f"(Tensor x, Tensor? residual, {_TENSORS}, {_FACTS}, ScalarType out_dtype) -> (Tensor, Tensor)",
    _forward_fake,
)
BACKWARD = _registry.define(
    "bottleneck_bwd",
    f"(Tensor dy, Tensor x, Tensor z, {_TENSORS}, {_FACTS}, bool residual_is_x, "
    "bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _on_cpu(*args: Any) -> str | None:
    return _support.why_not_cpu(args, ())


def _on_triton(*args: Any) -> str | None:
    return _support.why_not_triton(args, ())


def _on_cuda(*args: Any) -> str | None:
    return _support.why_not_cuda(args)


for _op, _in_cpp, _in_triton, _with_primitives, _plain in (
    (
        FORWARD,
        _bottleneck_cpu.forward,
        _bottleneck_triton.forward,
        _bottleneck_products.forward_with,
        _bottleneck_reference.forward,
    ),
    (
        BACKWARD,
        _bottleneck_cpu.backward,
        _bottleneck_triton.backward,
        _bottleneck_products.backward_with,
        _bottleneck_reference.backward,
    ),
):
    _op.backend("cpu", _on_cpu)(_in_cpp)
    _op.backend("triton", _on_triton)(_support.Repeated(_in_triton))
    _op.backend("cuda", _on_cuda)(partial(_with_primitives, elementwise_cuda))
    _op.backend("reference", _support.never)(_plain)


class _Bottleneck(torch.autograd.Function):
    """Tensors and facts (factor, activation, threshold, compute dtype, residual is x) to y."""

    @staticmethod
    def forward(ctx: Any, facts: Any, seed: Tensor | None, x: Tensor, *tensors: Any) -> Tensor:
        residual, down, down_bias, up, up_bias, scale = tensors
        factor, activation, threshold, dtype, residual_is_x, backend = facts
        # Slices of a shape are slow: they are left out where nothing is folded.
        folded = x.dim() != 2
        rows = rows_first(x, math.prod(x.shape[:-1]) if folded else x.shape[0], x.shape[-1])
        addend = rows if residual_is_x else None
        if residual is not None:
            addend = rows_first(residual, rows.shape[0], up.shape[0])
        out_dtype = dtype
        if addend is not None and addend.dtype != dtype:
            out_dtype = torch.promote_types(dtype, addend.dtype)
        args = (
            rows, addend, down, down_bias, up, up_bias, scale, factor, activation, threshold, seed,
            dtype, out_dtype,
        )  # fmt: skip
        if _registry.must_dispatch((x, *tensors) if backend is None else ()):
            ctx.backend, run = None, FORWARD.registered
        else:
            ctx.backend = FORWARD.select(*args) if backend is None else backend
            run = ctx.backend.run
        y, z = run(*args)
        ctx.save_for_backward(x, z, seed, down, down_bias, up, up_bias, scale)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = x.nbytes + z.nbytes
        ctx.facts, ctx.needs = facts, ctx.needs_input_grad[2:]
        ctx.residual_dtype = None if residual is None else residual.dtype
        return output_shaped(y, (*x.shape[:-1], up.shape[0])) if folded else y

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        if dy is None:
            return (None,) * 9
        x, z, seed, *tensors = ctx.saved_tensors
        factor, activation, threshold, dtype, residual_is_x, _ = ctx.facts
        need_x, need_residual, *rest = ctx.needs
        needs = [need_x, *rest]
        rows = rows_first(x, z.shape[0], x.shape[-1])
        args = (
            rows_first(dy, z.shape[0], tensors[2].shape[0]), rows, z, *tensors,
            factor, activation, threshold, seed, dtype, residual_is_x, needs,
        )  # fmt: skip
        run = BACKWARD.registered
        if ctx.backend is not None:
            run = BACKWARD.backends[ctx.backend.name].run
        grads = iter(run(*args))
        dx, *others = [next(grads) if flag else None for flag in needs]
        for i, (grad, tensor) in enumerate(zip(others, tensors, strict=True)):
            if grad is not None and grad.dtype != tensor.dtype:
                others[i] = grad.to(tensor.dtype)
        if dx is not None and dx.shape != x.shape:
            dx = dx.view(x.shape)
        dresidual = dy.to(ctx.residual_dtype) if need_residual else None
        return None, None, dx, dresidual, *others


def bottleneck(
    x: Tensor,  # [*, K]
    down: Tensor,  # [R, K]
    up: Tensor,  # [H, R]
    *,
    down_bias: Tensor | None = None,  # [R]
    up_bias: Tensor | None = None,  # [H]
    residual: Tensor | None = None,  # [*, H]
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """residual + scale dropout(act(x down^T + down_bias) up^T + up_bias), [*, H].

    Args:
        x: [*, K], fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
        down, up, down_bias, up_bias: the adapter, of any float dtypes.
        residual: [*, H] of any float dtype; x itself, the same object, costs nothing in backward.
            None adds nothing.
        activation: one of silu, gelu, gelu_tanh, quick_gelu, relu, relu2, tanh, sigmoid,
            leaky_relu, identity.
        scale: a float, or a tensor [1] or [H] that may be trained.
        dropout_p: probability in [0, 1) to drop an element of the up-projection; rounded to
            1 / 65536.
        seed: 0-d int64 tensor on the device of x that fixes the mask; drawn from torch's generator
            of the device if None.

    Returns:
        [*, H] in the dtype that the compute dtype (autocast's, else what x and the adapter promote
        to) and the residual's promote to.

    Raises:
        TypeError: an argument is no tensor or has no float dtype.
        ValueError: shapes or devices do not fit, an unknown activation, or a dropout probability
            outside [0, 1).

    Source: Houlsby et al. (2019), Parameter-efficient transfer learning for NLP.
    """
    factor, columns = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    same = residual is x
    tensors = (None if same else residual, down, down_bias, up, up_bias, columns)
    dtype, backend = _checked(x, tensors, residual, activation, scale)
    threshold = _dropout.threshold(dropout_p)
    if threshold and seed is None:
        seed = _dropout.draw_seed(x.device)
    if _torch.in_functorch():
        return _in_functorch(
            x, residual, down, down_bias, up, up_bias, columns, float(factor), activation,
            threshold, seed, dtype,
        )  # fmt: skip
    facts = (float(factor), activation, threshold, dtype, same, backend)
    y: Tensor = _Bottleneck.apply(facts, seed, x, *tensors)  # type: ignore[no-untyped-call]
    return y


_known: dict[tuple[Any, ...], tuple[torch.dtype, _registry.Backend | None]] = {}
_MOST_KNOWN = 1024


def _checked(
    x: Tensor,
    tensors: tuple[Tensor | None, ...],
    residual: Tensor | None,
    activation: str,
    scale: float | Tensor,
) -> tuple[torch.dtype, _registry.Backend | None]:
    """The compute dtype and, for a CPU, the backend. Remembered by all that they and the checks
    depend on: for a small adapter these take as long as its kernels.
    """
    key = None
    if not torch.compiler.is_compiling() and _torch.all_plain((x, *tensors)):
        key = _key(x, tensors, residual is x, activation, scale)
        found = _known.get(key)
        if found is not None:
            return found
    _, down, down_bias, up, up_bias, _ = tensors
    _validate(x, down, up, down_bias, up_bias, residual, activation, scale)
    dtype = compute_dtype(x, down, up)  # type: ignore[arg-type]
    if key is None:
        return dtype, None
    backend = None
    if x.is_cpu and _registry.forced_backend() is None:
        backend = FORWARD.select(x, *tensors)  # what these are decides, not their order
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[key] = dtype, backend
    return dtype, backend


def _key(
    x: Tensor, tensors: tuple[Tensor | None, ...], same: bool, activation: Any, scale: Any
) -> tuple[Any, ...]:
    autocast = _torch.autocast_dtype(x.device.type)
    name = activation if isinstance(activation, str) else None
    key: list[Any] = [name, type(scale), same, _registry.forced_backend(), autocast]
    for tensor in (x, *tensors):
        if tensor is None:
            key.append(None)
        else:
            key += (tensor.shape, tensor.dtype, tensor.device)
    return tuple(key)


def compute_dtype(x: Tensor, down: Tensor, up: Tensor) -> torch.dtype:
    """The autocast dtype, or what the dtypes of the operands promote to."""
    dtype = _torch.autocast_dtype(x.device.type)
    if dtype is not None:
        return dtype
    if x.dtype == down.dtype == up.dtype:
        return x.dtype
    return torch.promote_types(torch.promote_types(x.dtype, down.dtype), up.dtype)


def _in_functorch(x: Tensor, residual: Tensor | None, down: Tensor, *rest: Any) -> Tensor:
    """Plain torch operations compose with vmap and grad."""
    up, dtype = rest[1], rest[-1]
    rows = x.reshape(-1, x.shape[-1])
    addend = None if residual is None else residual.reshape(-1, up.shape[0])
    out = dtype if addend is None else torch.promote_types(dtype, addend.dtype)
    facts: Any = (rows, addend, down, *rest, out)
    y, _ = _bottleneck_reference.forward(*facts)
    return y.reshape(*x.shape[:-1], up.shape[0])


def _validate(
    x: Any,
    down: Any,
    up: Any,
    down_bias: Any,
    up_bias: Any,
    residual: Any,
    activation: Any,
    scale: Any,
) -> None:
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got none")
    check_shape("down", down, (None, x.shape[-1]), x.device)
    check_shape("up", up, (None, down.shape[0]), x.device)
    if down_bias is not None:
        check_shape("down_bias", down_bias, (down.shape[0],), x.device)
    if up_bias is not None:
        check_shape("up_bias", up_bias, (up.shape[0],), x.device)
    if residual is not None:
        check_shape("residual", residual, (*x.shape[:-1], up.shape[0]), x.device)
    if activation not in BOTTLENECK_ACTIVATIONS:
        names = ", ".join(BOTTLENECK_ACTIVATIONS)
        raise ValueError(f"activation: expected one of {names}, got {activation!r}")
    if isinstance(scale, Tensor):
        size = scale.shape[0] if scale.dim() == 1 else 0
        check_shape("scale", scale, (up.shape[0] if size != 1 else 1,), x.device)
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or a tensor, got {type(scale).__name__}")
