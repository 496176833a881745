"""The loss of one row of logits: the replaceable part of the fused head.

A row loss names a primitive ``<name>_rows_`` that every backend implements (docs/design.md): it
turns a chunk of logits into one loss a row and, in place, into its gradient. Another loss (focal,
KL, ...) is another subclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy over z = softcap tanh(logit_scale x logits / softcap), softcap 0 meaning none.

    loss = (1 - label_smoothing) (lse - z_target) + label_smoothing (lse - mean z) + z_loss lse^2;
    label smoothing as ``torch.nn.functional.cross_entropy``, z-loss as PaLM (Chowdhery et al.,
    2022), softcap as Gemma 2.
    """

    # Raises ValueError if a value is out of range.
    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            got = self.label_smoothing
            raise ValueError(f"label_smoothing: expected a value in [0, 1], got {got}")
        if self.softcap < 0:
            raise ValueError(f"softcap: expected 0 (none) or more, got {self.softcap}")

    def rows_(
        self, prims: ModuleType, logits: Tensor, targets: Tensor, need_grad: bool, need_stats: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, correctness and entropy [C] of logits [C, V], which become the gradient if
        asked."""
        rows: tuple[Tensor, Tensor | None, Tensor | None] = prims.cross_entropy_rows_(
            logits,
            targets,
            ignore_index=self.ignore_index,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            need_grad=need_grad,
            need_stats=need_stats,
        )
        return rows

    def reference(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, correctness and entropy [C] of logits [C, V], in plain differentiable torch."""
        z = logits * self.logit_scale
        if self.softcap > 0:
            z = self.softcap * torch.tanh(z / self.softcap)
        valid = targets != self.ignore_index
        lse = torch.logsumexp(z, dim=-1)
        z_target = z.gather(-1, targets.where(valid, 0)[:, None])[:, 0]
        smooth = self.label_smoothing
        loss = (1 - smooth) * (lse - z_target) + self.z_loss * lse.square()
        if smooth:
            loss = loss + smooth * (lse - z.mean(-1))
        correct = (z.argmax(-1) == targets).to(lse.dtype)
        probability = torch.softmax(z, dim=-1)
        entropy = lse - torch.where(probability > 0, probability * z, 0.0).sum(-1)
        return loss.where(valid, 0.0), correct.where(valid, 0.0), entropy.where(valid, 0.0)
