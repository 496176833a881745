"""LinearCrossEntropyLoss: the head and the loss of a language model without its logits."""

from __future__ import annotations

from torch import Tensor, nn

from fasttune.ops import CrossEntropy, TokenStats, linear_cross_entropy


class LinearCrossEntropyLoss(nn.Module):
    """Cross-entropy of ``hidden @ weight.T + bias``; stands for a head and ``nn.CrossEntropyLoss``.

    It owns no parameters: the head's weight is an argument, so that tied heads stay tied.

    Args:
        ignore_index: rows with this target count for nothing.
        reduction: "mean" over the other rows, or "sum".
        label_smoothing: in [0, 1], as ``torch.nn.CrossEntropyLoss``.
        logit_scale: multiplies the logits (Cohere, Granite).
        softcap: softcap tanh(logits / softcap), 0 for none (Gemma 2).
        z_loss: weight of the squared log-sum-exp (PaLM).
        return_stats: return (loss, TokenStats).

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float = 0.0,
        z_loss: float = 0.0,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        self.row_loss = CrossEntropy(ignore_index, logit_scale, softcap, label_smoothing, z_loss)
        self.reduction, self.return_stats = reduction, return_stats

    def forward(
        self,
        hidden: Tensor,  # [*, H]
        weight: Tensor,  # [V, H]
        targets: Tensor,  # [*] int64
        bias: Tensor | None = None,  # [V]
    ) -> Tensor | tuple[Tensor, TokenStats]:
        """The 0-d loss; dtypes and errors as :func:`fasttune.ops.linear_cross_entropy`."""
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            row_loss=self.row_loss,
            reduction=self.reduction,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        return f"{self.row_loss}, reduction={self.reduction!r}"
