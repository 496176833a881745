"""Limits on the norms of parameters after a step of AdamW: one launch over many tensors.

Legend: n tensors, each in blocks of BLOCK elements; a program takes a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw_storage import load_param, store_param
from .adamw_tables import BLOCK, LIMITS
from .launch import launch
from .multi_tensor import ELEMENT, pointer_to
from .multi_tensor_tables import aligned, blocks_of, limit_table, uploaded
from .tables import MAX_REGISTERS, launch_device

_STEP_BYTES = 4096  # of a parameter at a time: 16 bytes a thread and more in flight
_COLUMNS = tl.constexpr(len(LIMITS))


@triton.jit
def _scale(param, residue, start, numel, factor, MASKED: tl.constexpr, ROUNDING: tl.constexpr,
           STEP: tl.constexpr):  # fmt: skip
    i = start + tl.arange(0, STEP)
    value = load_param(param, residue, i, numel, MASKED, ROUNDING) * factor
    store_param(param, residue, i, numel, value, MASKED, ROUNDING)


# Floor: a parameter above its limit is read and written, 8 bytes an fp32 element; the others are
# not touched.
@triton.jit
def _limit_norms_kernel(
    table_ptr,  # [n, 4] int64
    blocks_ptr,  # [blocks, 3] int32
    norms_ptr,  # [n, 3] fp32: of gradient, update and parameter
    PARAM: tl.constexpr,
    RESIDUE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(blocks_ptr + program * 3).to(tl.int64)
    first = tl.load(blocks_ptr + program * 3 + 1).to(tl.int64) * BLOCK
    row = table_ptr + tensor * _COLUMNS
    limit = tl.load(row + 3).to(tl.float64, bitcast=True).to(tl.float32)
    norm = tl.load(norms_ptr + tensor * 3 + 2)
    if (norm > limit) & (norm - norm == 0):
        factor = tl.div_rn(limit, norm)
        param = pointer_to(tl.load(row), PARAM, ALIGNED)
        residue = pointer_to(tl.load(row + 1), RESIDUE, ALIGNED)
        numel = tl.load(row + 2)
        for offset in range(0, BLOCK, STEP):
            start = first + offset
            if start + STEP <= numel:
                _scale(param, residue, start, numel, factor, False, ROUNDING, STEP)
            elif start < numel:
                _scale(param, residue, start, numel, factor, True, ROUNDING, STEP)


def limit_norms(
    params: Sequence[Tensor],
    residues: Sequence[Tensor],
    norms: Tensor,  # [n, 3] fp32
    limits: Tensor,  # [n] float64 on the host
    rounding: str,
) -> None:
    """Scale each parameter whose norm is above its limit down to it, in place. All tensors
    contiguous, each list of one dtype; what would be rounded stochastically is rounded to nearest.
    """
    device = params[0].device
    sizes = tuple(map(Tensor.numel, params))
    blocks = blocks_of(sizes, device)
    if not len(blocks):
        return
    with launch_device(params[0]):
        launch(
            _limit_norms_kernel,
            (len(blocks),),
            uploaded(limit_table(params, residues, sizes, limits), device),
            blocks,
            norms.contiguous(),
            PARAM=ELEMENT[params[0].dtype],
            RESIDUE=ELEMENT[residues[0].dtype if residues else torch.int16],
            ROUNDING="nearest" if rounding == "stochastic" else rounding,
            ALIGNED=aligned([*params, *residues]),
            BLOCK=BLOCK,
            STEP=_STEP_BYTES // params[0].element_size(),
            num_warps=4,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=False,  # a product that is rounded later, on the others' bits
        )
