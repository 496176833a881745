"""Products with LoRA on a stack of experts, without the stack of updated weights.

The weight of expert e is W_e + sum_j s_j L_ej R_ej, with W [E, K, N], L_j [E, K, r_j] and
R_j [E, r_j, N] (or, transposed, [E, N, K]). A row x of expert e gets

    y = x W_e + sum_j (s_j x L_ej) R_ej

so that a forward reads W and writes nothing of its size, and a backward with W frozen makes no
gradient of its size: dL_e = x^T (s dy R_e^T), dR_e = (s x L_e)^T dy over the rows of expert e, dx =
dy W_e^T + (s dy R_e^T) L_e^T.

Three forms, by how a module multiplies: one expert at a time (``lora_linear``), all experts in one
grouped product, or a weight gathered for every row. The last two are the vendor's products, three
instead of one: a launch for all experts, no read of the offsets on the host. ``lora_segmented``
would make a handful of launches an expert and needs the offsets on the host.

Precision: one expert at a time as lora_linear (docs/precision.md). The other two round s x L_e and
the sum to the dtype of the product, where stock rounds the whole updated weight.

Semantics: ``ParamWrapper`` in peft/tuners/lora/layer.py (PEFT 0.21), which forms the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fasttune import _torch
from fasttune.ops.lora_linear import LoraBranch, LoraProjection, apply_group

_ALIGNMENT_BYTES = 16  # of the strides that a grouped product takes


@dataclass(frozen=True)
class LowRank:
    """One adapter's update s L R of a weight.

    Attributes:
        left: L, [K, r] of one expert, or [*, K, r] of several.
        right: R, [r, N] or [*, r, N].
        scaling: s, a float or a 0-d tensor on the device.
    """

    left: Tensor
    right: Tensor
    scaling: float | Tensor

    @property
    def mT(self) -> LowRank:
        """The update of the transposed weight."""
        return LowRank(self.right.mT, self.left.mT, self.scaling)

    def map(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        """The update with both factors changed."""
        return LowRank(change(self.left), change(self.right), self.scaling)

    def product(self) -> Tensor:
        """s L R itself."""
        return self.scaling * (self.left @ self.right)


def expert_linear(
    x: Tensor,  # [*, K]
    weight: Tensor,  # [N, K]
    updates: Sequence[LowRank],  # of the weight [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """x (W + sum_j s_j L_j R_j)^T + bias, [*, N], of one expert, by ``lora_linear``."""
    branches = tuple(
        LoraBranch(own.right.contiguous(), own.left.contiguous(), own.scaling) for own in updates
    )
    compute_dtype = _torch.autocast_dtype(x.device.type) or x.dtype
    (y,) = apply_group(x, [LoraProjection(weight, bias, branches)], compute_dtype)
    return y


def grouped_product(
    grouped_mm: Callable[..., Tensor],
    x: Tensor,  # [M, K], rows sorted by expert
    weight: Tensor,  # [E, K, N]
    updates: Sequence[LowRank],
    offs: Tensor,  # [E] int32
) -> Tensor:
    """Rows of x times the updated weight of their expert, [M, N].

    Args:
        grouped_mm: the grouped product of torch, ``(x, weight, offs=)``.
        offs: where the rows of each expert end. Rows from offs[-1] on are undefined in y.
    """
    y = grouped_mm(x, weight, offs=offs)
    for own in updates:
        padded = _padded(own)
        t = grouped_mm(x, padded.left, offs=offs) * padded.scaling
        y = y.add_(grouped_mm(t, padded.right, offs=offs))
    return y


def _padded(own: LowRank) -> LowRank:
    """The same update with a rank whose rows have aligned strides."""
    unit = max(1, _ALIGNMENT_BYTES // own.left.element_size())
    missing = -own.left.shape[-1] % unit
    if not missing:
        return own
    left = functional.pad(own.left, (0, missing))
    return LowRank(left, functional.pad(own.right, (0, 0, 0, missing)), own.scaling)


def batched_product(
    x: Tensor,  # [S, M, K]
    weight: Tensor,  # [S, K, N]
    updates: Sequence[LowRank],
) -> Tensor:
    """x_i (W_i + sum_j s_j L_ij R_ij) for every i, [S, M, N]."""
    y = torch.bmm(x, weight)
    for own in updates:
        t: Any = torch.bmm(x, own.left) * own.scaling
        y = y + torch.bmm(t, own.right)
    return y
