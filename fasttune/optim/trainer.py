"""fasttune's AdamW in Hugging Face's Trainer, which clips gradients of its own accord."""

from __future__ import annotations

import logging
from typing import Any

from fasttune.optim.adamw import AdamW

logger = logging.getLogger("fasttune")


def trainer_args(args: Any, **options: Any) -> dict[str, Any]:
    """Keyword arguments of a Trainer (TRL's too) that make it step with :class:`AdamW`.

    Use it once, right before the Trainer: ``Trainer(model, args, **trainer_args(args))``. Learning
    rate, betas and epsilon come from ``args``, weight decay through the Trainer's own groups. The
    limit ``args.max_grad_norm`` moves into the optimizer, whose first kernel computes the norm
    anyway: ``args.max_grad_norm`` becomes 0, so gradients are clipped exactly once. (The Trainer
    still computes the norm that it logs.)

    Args:
        args: TrainingArguments, SFTConfig, ...; changed as said.
        options: further arguments of AdamW. A ``max_grad_norm`` given here wins over that of
            ``args``, with a warning if both are set and differ; None or 0 clips nowhere.

    Returns:
        ``{"optimizer_cls_and_kwargs": (AdamW, {...})}``.

    Raises:
        TypeError: args is no TrainingArguments.
    """
    missing = [n for n in ("learning_rate", "adam_beta1", "max_grad_norm") if not hasattr(args, n)]
    if missing:
        raise TypeError(
            f"args: expected transformers.TrainingArguments, got {type(args).__name__} "
            f"without {missing[0]}"
        )
    theirs = args.max_grad_norm or None
    limit = options.pop("max_grad_norm", theirs) or None
    if theirs is not None and limit != theirs:
        logger.warning(
            "trainer_args: max_grad_norm=%s is used in place of args.max_grad_norm=%s",
            limit,
            theirs,
        )
    args.max_grad_norm = 0.0
    arguments = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "max_grad_norm": limit,
        **options,
    }
    return {"optimizer_cls_and_kwargs": (AdamW, arguments)}
