"""Products with the base weight: the vendor's, in the precision that is fast and exact.

On some CPUs bf16 and fp16 matrix products of the vendor library are slower than fp32 ones
(docs/design.md has the measurements). There the operands are converted into fp32 buffers, block by
block, multiplied in fp32 and rounded once: faster, and exacter than a 16-bit product.
"""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from fasttune import _native

# fp32 copy of a block of weight rows: large enough for the GEMM to run at full speed, small enough
# that the
# copies of a 128k x 4096 head do not show in the peak memory.
_BLOCK_BYTES = 4 << 20

# Values of ONEDNN_MAX_CPU_ISA that leave oneDNN its AMX or its AVX-512 bf16 products.
_AMX_LEVELS = (
    *("", "DEFAULT", "ALL", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16"),
    *("AVX10_1_512_AMX", "AVX10_1_512_AMX_FP16"),
)
_BF16_LEVELS = (*_AMX_LEVELS, "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")


def _onednn_limit() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()


@lru_cache(maxsize=1)
def cpu_has_amx() -> bool:
    """True if bf16 matrix products run on AMX tiles (and oneDNN was not told otherwise)."""
    return torch.cpu._is_amx_tile_supported() and _onednn_limit() in _AMX_LEVELS


@lru_cache(maxsize=1)
def bf16_products_are_fast() -> bool:
    """True if this CPU's bf16 matrix products are faster than its fp32 ones: AMX, or Zen 4 on."""
    if cpu_has_amx():
        return True
    if _native.cpu_missing() is not None or _onednn_limit() not in _BF16_LEVELS:
        return False
    return bool(_native.cpu().has_fast_bf16_dot())


def through_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """True if products in ``dtype`` on ``device`` are done in fp32 buffers."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (dtype == torch.bfloat16 and bf16_products_are_fast())


def as_fp32(x: Tensor, name: str) -> Tensor:
    """x, or its fp32 copy in this thread's scratch buffer ``name``."""
    if x.dtype == torch.float32:
        return x
    x = x.resolve_neg()
    if x.stride(1) != 1 and x.stride(0) == 1:  # a weight stored [K, N]
        return as_fp32(x.t(), name).t()
    if x.stride(1) != 1:
        x = x.contiguous()
    return _native.convert(x, _native.scratch(name, x.shape[0], x.shape[1]))


def block_rows(cols: int) -> int:
    """Rows of a weight [N, cols] that are converted to fp32 at a time."""
    return max(1, _BLOCK_BYTES // (4 * max(cols, 1)))


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in fp32.

    Args:
        x: [M, K], any float dtype, unit column stride.
        weight: [N, K], likewise.

    Returns:
        [M, N] fp32 in a scratch buffer of this thread: valid until the next call.
    """
    out = _native.scratch("linear", x.shape[0], weight.shape[0])
    x = as_fp32(x, "rows")
    step = block_rows(weight.shape[1])
    if weight.dtype == torch.float32 or weight.shape[0] <= step:
        return torch.mm(x, as_fp32(weight, "weight").t(), out=out)
    for start in range(0, weight.shape[0], step):
        block = as_fp32(weight[start : start + step], "weight")
        out[:, start : start + step] = x @ block.t()
    return out


def linear_backward_fp32(dy: Tensor, weight: Tensor) -> Tensor:
    """dy W in fp32, dy [M, N], weight [N, K] -> [M, K] in a scratch buffer of this thread."""
    out = _native.scratch("linear", dy.shape[0], weight.shape[1])
    step = block_rows(weight.shape[1])
    if weight.dtype == torch.float32 or weight.shape[0] <= step:
        return torch.mm(as_fp32(dy, "rows"), as_fp32(weight, "weight"), out=out)
    out.zero_()
    for start in range(0, weight.shape[0], step):
        rows = as_fp32(dy[:, start : start + step], "rows")
        out.addmm_(rows, as_fp32(weight[start : start + step], "weight"))
    return out


def weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dW [N, K] = dy^T x in ``dtype``, accumulated in fp32; dy [M, N], x [M, K]."""
    if through_fp32(dy.device, dy.dtype):
        return torch.mm(as_fp32(dy, "rows").t(), as_fp32(x, "weight")).to(dtype)
    return torch.mm(dy.t(), x.to(dy.dtype)).to(dtype)
