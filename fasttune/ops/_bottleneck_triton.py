"""bottleneck on a GPU: fused kernels in 16 bits, and products around kernels otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _bottleneck_products, _dropout, _triton
from fasttune.ops._arguments import KERNEL_DTYPES


class _Primitives:
    """The Triton launchers that the products need, loaded at the first call."""

    def __getattr__(self, name: str) -> Any:
        op = "scaled_sum" if name == "scaled_sum" else "bias_activation"
        return getattr(_triton.kernels(op), name)


_PRIMITIVES: Any = _Primitives()
_DTYPES = (torch.bfloat16, torch.float16)  # fp32 products are the vendor's
# h of a block of rows stays in one program. At 256 the vendor's products are faster, 0.4 against
# 0.6 ms (H200, 8192 x 4096).
MAX_WIDTH = 128


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The arguments of ``_bottleneck_products.forward_with`` but for the primitives."""
    x, residual, down, down_bias, up, up_bias, scale, factor, *facts = args
    activation, threshold, seed, dtype, out_dtype = facts
    if not _fused(x, down, up, dtype):
        return _bottleneck_products.forward_with(_PRIMITIVES, *args)
    found: tuple[Tensor, Tensor] = _triton.kernels("bottleneck").bottleneck_forward(
        x, residual, down, down_bias, up, up_bias, scale,
        factor * _dropout.keep_scale(threshold), activation, seed=seed, threshold=threshold,
        dtype=dtype, out_dtype=out_dtype,
    )  # fmt: skip
    return found


def backward(*args: Any) -> list[Tensor]:
    """The arguments of ``_bottleneck_products.backward_with`` but for the primitives."""
    dy, x, z, down, down_bias, up, up_bias, scale, factor, *facts = args
    activation, threshold, seed, dtype, residual_is_x, needs = facts
    if not _fused(x, down, up, dtype):
        return _bottleneck_products.backward_with(_PRIMITIVES, *args)
    need_x, need_down, need_down_bias, need_up, need_up_bias, need_scale = needs
    whole = factor * _dropout.keep_scale(threshold)
    found = _triton.kernels("bottleneck").bottleneck_backward(
        dy, x, z, down, up, scale, whole, activation, seed=seed, threshold=threshold,
        residual_is_x=residual_is_x,
        # A trained scale needs the sums without it.
        outer_factor=whole if scale is None else 1.0,
        outer_dtype=up.dtype if scale is None else torch.float32,
        bias_dtypes=(_dtype_of(down_bias), _dtype_of(up_bias if scale is None else None)),
        needs=(
            need_x, need_down, need_down_bias, need_up or need_scale,
            need_up_bias or (need_scale and up_bias is not None),
        ),
    )  # fmt: skip
    grads = [grad for grad, need in zip(found, needs[:3], strict=False) if need]
    left = 1.0 if scale is None else whole
    return grads + _bottleneck_products.up_gradients(
        found[3], found[4], up, up_bias, scale, left, needs[3:]
    )


def _dtype_of(bias: Tensor | None) -> torch.dtype:
    return torch.float32 if bias is None else bias.dtype


def _fits(down: Tensor, dtype: torch.dtype) -> bool:
    return dtype in _DTYPES and down.shape[0] <= MAX_WIDTH


def _fused(x: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype) -> bool:
    if not _fits(down, dtype) or 0 in (*x.shape, *down.shape, *up.shape):
        return False
    gpu = _triton.kernels("tables").gpu_of(x)
    return bool(_triton.kernels("lora_tables").has_tensor_cores(gpu))


def fused_on_gpu(x: Tensor, down: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused kernels take the CUDA tensor x and weights like ``down`` [R, K], computed
    in ``dtype``; torch.compile can trace it.
    """
    if not _fits(down, dtype) or {x.dtype, down.dtype} - set(KERNEL_DTYPES):
        return False
    if _triton.why_not((x,)) is not None:
        return False
    return torch.cuda.get_device_properties(x.device).major >= 8
