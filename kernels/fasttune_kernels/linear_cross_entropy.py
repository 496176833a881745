"""Row-wise cross-entropy with its gradient written over the logits.

Legend: C rows of a chunk, V vocabulary size. The maths is in the docstring of the launcher.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import tanh
from .launch import launch
from .tables import MAX_REGISTERS, launch_device, next_power_of_2

# A finite start for running maxima: the difference to any logit is finite or +-inf, never NaN, so a
# logit of -inf (a masked vocabulary entry) needs no special case. Below it nothing is representable
# as a probability next to an ordinary logit.
_LOWEST = tl.constexpr(-1.0e38)


# Floor per row: read V logits for the statistics and, with the gradient, read them again and write
# them (6 V bytes in 16 bits; the second read of a row of 256 KB hits L2 for as many rows as fit).
# One exponential per logit and sweep. Tiling: one row per program, because rows are independent and
# V is long; every lane keeps its own running maximum and sum, so that no barrier is needed until
# the row ends. 256 threads of 8 logits, because 512 leave one program per multiprocessor once the
# statistics take 76 registers; loads run several blocks ahead, and only of addresses not yet
# overwritten.
@triton.jit
def _cross_entropy_rows_kernel(
    logits_ptr,  # [C, V], overwritten by the gradient if NEED_GRAD
    targets_ptr,  # [C] int64
    loss_ptr,  # [C] fp32
    correct_ptr,  # [C] fp32 or None
    entropy_ptr,  # [C] fp32 or None
    ignore_index: tl.int64,
    logit_scale,
    softcap,
    label_smoothing,
    z_loss,
    V,
    stride_c,
    NEED_GRAD: tl.constexpr,
    NEED_STATS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_c
    target = tl.load(targets_ptr + row)
    lanes = tl.arange(0, BLOCK_V)
    if target == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        if NEED_STATS:
            tl.store(correct_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
        if NEED_GRAD:
            for v0 in range(0, V, BLOCK_V):
                v = v0 + lanes
                zero = tl.zeros((BLOCK_V,), dtype=logits_ptr.dtype.element_ty)
                tl.store(row_ptr + v, zero, mask=v < V)
    else:
        # Read before the second sweep overwrites it; the reductions in between are barriers.
        z_target = logit_scale * tl.load(row_ptr + target).to(tl.float32)
        if HAS_SOFTCAP:
            z_target = softcap * tanh(z_target / softcap)

        top = tl.full((BLOCK_V,), _LOWEST, dtype=tl.float32)
        total = tl.zeros((BLOCK_V,), dtype=tl.float32)  # sum of exp(z - top)
        plain = tl.zeros((BLOCK_V,), dtype=tl.float32)  # sum of z
        moment = tl.zeros((BLOCK_V,), dtype=tl.float32)  # sum of (z - top) exp(z - top)
        top_at = tl.zeros((BLOCK_V,), dtype=tl.int32)
        for v0 in tl.range(0, V, BLOCK_V, num_stages=STAGES):
            v = v0 + lanes
            inside = v < V
            z0 = tl.load(row_ptr + v, mask=inside, other=float("-inf")).to(tl.float32)
            z = logit_scale * z0
            if HAS_SOFTCAP:
                z = softcap * tanh(z / softcap)
            z = tl.where(inside, z, float("-inf"))
            difference = z - top
            decay = tl.exp(-tl.abs(difference))
            higher = difference > 0
            if NEED_STATS:
                # exp(-inf) * -inf would be NaN where it stands for zero; NaN itself must survive.
                bounded = tl.where(difference < _LOWEST, _LOWEST, difference)
                moment = tl.where(
                    higher, decay * (moment - bounded * total), moment + bounded * decay
                )
                top_at = tl.where(higher, v, top_at)
            total = tl.where(higher, total * decay + 1.0, total + decay)
            top = tl.where(higher, z, top)
            if HAS_SMOOTHING:
                plain += tl.where(inside, z, 0.0)

        row_top = tl.max(top, 0)
        offset = top - row_top
        weight = tl.exp(offset)
        row_total = tl.sum(total * weight, 0)
        log_total = tl.log(row_total)
        lse = row_top + log_total
        loss = lse - z_target
        if HAS_SMOOTHING:
            mean = tl.sum(plain, 0) / V
            loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - mean)
        tl.store(loss_ptr + row, loss + z_loss * lse * lse)
        if NEED_STATS:
            row_moment = tl.sum(weight * (moment + offset * total), 0)
            tl.store(entropy_ptr + row, log_total - row_moment / row_total)
            first = tl.min(tl.where(top == row_top, top_at, V), 0)
            tl.store(correct_ptr + row, (first == target).to(tl.float32))

        if NEED_GRAD:
            slope = 1.0 + 2.0 * z_loss * lse
            for v0 in tl.range(0, V, BLOCK_V, num_stages=STAGES):
                v = v0 + lanes
                inside = v < V
                z0 = tl.load(row_ptr + v, mask=inside, other=0.0).to(tl.float32)
                z = logit_scale * z0
                chain = logit_scale
                if HAS_SOFTCAP:
                    bent = tanh(z / softcap)
                    z = softcap * bent
                    chain = logit_scale * (1.0 - bent * bent)
                dz = slope * tl.exp(z - lse)
                if HAS_SMOOTHING:
                    dz -= label_smoothing / V
                    dz -= tl.where(v == target, 1.0 - label_smoothing, 0.0)
                else:
                    dz -= tl.where(v == target, 1.0, 0.0)
                dz0 = chain * dz
                tl.store(row_ptr + v, dz0.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_rows_(
    logits: Tensor,  # [C, V] fp32 / bf16 / fp16, unit column stride
    targets: Tensor,  # [C] int64
    *,
    ignore_index: int,
    logit_scale: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    need_grad: bool,
    need_stats: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> loss [C] fp32, and correct [C] fp32, entropy [C] fp32 (None without `need_stats`).

    z = softcap * tanh(logit_scale * logits / softcap) if softcap > 0 else logit_scale * logits;
    loss = (1 - eps) (lse - z_target) + eps (lse - mean(z)) + z_loss * lse^2, all in fp32. With
    `need_grad` the logits are overwritten by d loss / d logits; rows whose target is `ignore_index`
    get zero loss and zero gradient. Other targets outside 0 .. V - 1 are the caller's to refuse.
    """
    rows, vocabulary = logits.shape
    loss = logits.new_empty(rows, dtype=torch.float32)
    correct = torch.empty_like(loss) if need_stats else None
    entropy = torch.empty_like(loss) if need_stats else None
    if rows == 0:
        return loss, correct, entropy
    # 8 logits per thread; a short row takes fewer warps.
    block = min(max(next_power_of_2(vocabulary), 256), 2048)
    with launch_device(logits):
        launch(
            _cross_entropy_rows_kernel,
            (rows,),
            logits,
            targets,
            loss,
            correct,
            entropy,
            ignore_index,
            float(logit_scale),
            float(softcap),
            float(label_smoothing),
            float(z_loss),
            vocabulary,
            logits.stride(0),
            NEED_GRAD=need_grad,
            NEED_STATS=need_stats,
            HAS_SOFTCAP=softcap > 0,
            HAS_SMOOTHING=label_smoothing != 0,
            BLOCK_V=block,
            # 24 KB of logits in flight per program, whatever their size.
            STAGES=4 if logits.element_size() == 4 else 7,
            num_warps=block // 256,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return loss, correct, entropy
