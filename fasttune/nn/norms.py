"""RMSNorm and LayerNorm over the last dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fasttune.ops import layer_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight) over the last dimension.

    Args:
        hidden_size: features H.
        eps: added to the mean square.
        weight_offset: added to the weight; 1 for Gemma, whose weights start at 0.
        round_first: round the normalised x to x's dtype before the weight multiplies, as Llama.
        elementwise_affine: whether there is a weight.
        device, dtype: of the weight.

    The state_dict key is ``weight`` [H], as in ``LlamaRMSNorm`` of transformers (5.24) and
    ``torch.nn.RMSNorm``. Dtypes and errors as :func:`fasttune.ops.rms_norm`.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        weight_offset: float = 0.0,
        round_first: bool = False,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.weight_offset, self.round_first = weight_offset, round_first
        start = torch.full((hidden_size,), 1.0 - weight_offset, device=device, dtype=dtype)
        self.weight = nn.Parameter(start) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x [*, H] to [*, H]."""
        return rms_norm(
            x,
            self.weight,
            eps=self.eps,
            weight_offset=self.weight_offset,
            round_first=self.round_first,
        )

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension.

    Args:
        normalized_shape: features H; a sequence of one number is taken as torch does.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and, with ``bias``, a bias.
        bias: whether there is one beside the weight.
        device, dtype: of the parameters.

    The state_dict keys are ``weight`` and ``bias`` [H], as in ``torch.nn.LayerNorm``. Dtypes and
    errors as :func:`fasttune.ops.layer_norm`.

    Raises:
        ValueError: normalized_shape has more than one dimension.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (
            (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        )
        if len(shape) != 1:
            raise ValueError(f"normalized_shape: expected one dimension, got {shape}")
        self.normalized_shape, self.eps = shape, eps
        ones = torch.ones(shape, device=device, dtype=dtype)
        self.weight = nn.Parameter(ones) if elementwise_affine else None
        affine = elementwise_affine and bias
        self.bias = nn.Parameter(torch.zeros_like(ones)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """x [*, H] to [*, H]."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}"
