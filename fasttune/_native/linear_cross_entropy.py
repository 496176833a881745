"""The row loss of a fused head, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune._native._extension import cpu, room, threads


def cross_entropy_rows_(
    logits: Tensor,  # [C, V], overwritten if need_grad
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
    """Loss, correctness and entropy of each row; docs/design.md states the formulas."""
    rows = logits.shape[0]
    loss = torch.empty(rows, dtype=torch.float32)
    correct = torch.empty_like(loss) if need_stats else None
    entropy = torch.empty_like(loss) if need_stats else None
    targets = targets.contiguous()
    exponentials = room("exponentials", threads() * logits.shape[1]) if need_grad else 0
    cpu().cross_entropy_rows(
        logits,
        targets.data_ptr(),
        ignore_index,
        logit_scale,
        softcap,
        label_smoothing,
        z_loss,
        need_grad,
        loss.data_ptr(),
        0 if correct is None else correct.data_ptr(),
        0 if entropy is None else entropy.data_ptr(),
        exponentials,
        threads(),
    )
    return loss, correct, entropy
