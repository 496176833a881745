"""MultipleChoiceLoss: the loss of T-Few, without the logits of any choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fasttune.ops import CrossEntropy, linear_log_probs

# 1 - p of a token of a wrong choice is taken to be at least half a unit in the last place of fp32
# below 1: the logarithm of what fp32 cannot tell from 0 stays finite.
_LARGEST_LOG_PROB = -(2.0**-24)


class MultipleChoiceLoss(nn.Module):
    """Language modelling, unlikelihood and length-normalised loss of one right choice among wrong.

    With p_{c,t} the probability of token t of choice c, T_c its tokens and beta_c the mean of
    log p_{c,t} over them, for the right choice y and the wrong ones n:

        L_LM = -beta_y
        L_UL = -sum_n sum_t log(1 - p_{n,t}) / sum_n T_n
        L_LN = -log(exp(beta_y) / (exp(beta_y) + sum_n exp(beta_n)))

    The loss is L_LM + L_UL + L_LN, and the mean over the examples of a batch. It owns no
    parameters: the head's weight is an argument, as of :class:`LinearCrossEntropyLoss`. The logits
    are never held (:func:`fasttune.ops.linear_log_probs`).

    Args:
        ignore_index: tokens with this target count for nothing; a choice of none but those does not
            exist, so that examples may have fewer choices than the batch is wide.
        logit_scale: multiplies the logits (T5 with a tied head: d_model ** -0.5).
        softcap: softcap tanh(logits / softcap), 0 for none.

    Raises:
        ValueError: an option is out of range.

    Source: equations 1 to 3 and section 3.2 of Liu et al. (2022), Few-Shot Parameter-Efficient
    Fine-Tuning is Better and Cheaper than In-Context Learning.
    """

    def __init__(
        self, *, ignore_index: int = -100, logit_scale: float = 1.0, softcap: float = 0.0
    ) -> None:
        super().__init__()
        self.row_loss = CrossEntropy(ignore_index, logit_scale, softcap)

    def forward(
        self,
        hidden: Tensor,  # [*, C, T, H]
        weight: Tensor,  # [V, H]
        targets: Tensor,  # [*, C, T] int64
        correct: Tensor,  # [*] int64
        bias: Tensor | None = None,  # [V]
    ) -> Tensor:
        """The 0-d loss in fp32 (fp64 for fp64).

        Args:
            hidden: of T tokens of C choices of each example, each aligned with its target.
            weight, bias: the head; dtypes as of :func:`fasttune.ops.linear_log_probs`.
            targets: in [0, V), or ``ignore_index``.
            correct: in [0, C), the right choice of each example; it has a token.

        Raises:
            TypeError: a dtype does not fit.
            ValueError: shapes, devices or (on the CPU) a target or a right choice do not fit; on
                CUDA these trip a device-side assertion, without synchronisation.
        """
        index = self.row_loss.ignore_index
        log_probs = linear_log_probs(
            hidden,
            weight,
            targets,
            bias=bias,
            ignore_index=index,
            logit_scale=self.row_loss.logit_scale,
            softcap=self.row_loss.softcap,
        )
        counted = targets != index  # [*, C, T]
        lengths = counted.sum(-1)  # [*, C]
        _check_correct(correct, lengths)
        scores = log_probs.sum(-1) / lengths.clamp(min=1)  # beta
        scores = scores.masked_fill(lengths == 0, -math.inf)
        right = correct[..., None]
        language = -scores.gather(-1, right)[..., 0]
        normalised = -torch.log_softmax(scores, -1).gather(-1, right)[..., 0]
        choices = torch.arange(targets.shape[-2], device=targets.device)
        wrong = counted & (choices != right)[..., None]
        unlikely = torch.where(wrong, _log_of_complement(log_probs), 0.0).sum((-2, -1))
        unlikelihood = -unlikely / wrong.sum((-2, -1)).clamp(min=1)
        return (language + unlikelihood + normalised).mean()

    def extra_repr(self) -> str:
        loss = self.row_loss
        return (
            f"ignore_index={loss.ignore_index}, logit_scale={loss.logit_scale}, "
            f"softcap={loss.softcap}"
        )


def _log_of_complement(log_p: Tensor) -> Tensor:
    """log(1 - p) of log p, exact near p = 0 and near p = 1."""
    log_p = log_p.clamp(max=_LARGEST_LOG_PROB)
    return torch.where(
        log_p > -math.log(2.0), torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p))
    )


def _check_correct(correct: Tensor, lengths: Tensor) -> None:
    """Raises unless ``correct`` [*] names a choice with tokens of every example, [*, C]."""
    if not isinstance(correct, Tensor) or correct.dtype != torch.int64:
        kind = correct.dtype if isinstance(correct, Tensor) else type(correct).__name__
        raise TypeError(f"correct: expected an int64 tensor, got {kind}")
    if lengths.dim() == 0 or correct.shape != lengths.shape[:-1]:
        raise ValueError(
            f"correct: expected shape {list(lengths.shape[:-1])}, that of targets without choices "
            f"and tokens, got {list(correct.shape)}"
        )
    if correct.device != lengths.device:
        raise ValueError(f"correct: expected device {lengths.device}, got {correct.device}")
    if correct.numel() == 0 or correct.device.type == "meta" or torch.compiler.is_compiling():
        return
    choices = lengths.shape[-1]
    inside = (correct >= 0) & (correct < choices)
    tokens = lengths.gather(-1, correct.clamp(0, choices - 1)[..., None])[..., 0]
    message = f"correct: expected a choice in [0, {choices}) that has tokens"
    fits = inside & (tokens > 0)
    if correct.device.type != "cpu":
        torch._assert_async(fits.all(), message)
    elif not bool(fits.all()):
        raise ValueError(f"{message}, got {int(correct[~fits][0])}")
