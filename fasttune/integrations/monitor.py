"""Health of a training run in a Trainer's logs: norms of gradients and updates, and the gap between
training and evaluation loss."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from fasttune.optim import AdamW, TensorNorms

logger = logging.getLogger("fasttune")


@dataclass
class Monitor:
    """What is healthy, and what was seen; ``FasttuneCallback(monitor=Monitor(gap=0.5))``.

    Attributes:
        gradient_norm: range of the gradient norm of a single tensor.
        gap: largest evaluation loss minus training loss.
        last: norms by parameter name at the last log.
    """

    gradient_norm: tuple[float, float] = (1e-3, 1e-1)
    gap: float = 0.2
    last: dict[str, TensorNorms] = field(default_factory=dict, repr=False)
    _train_loss: float | None = field(default=None, repr=False)
    _warned: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        low, high = self.gradient_norm
        if not 0 <= low < high:
            raise ValueError(f"gradient_norm: expected 0 <= low < high, got {self.gradient_norm}")
        if not self.gap > 0:
            raise ValueError(f"gap: expected a positive number, got {self.gap}")

    def begin(self, optimizer: Any, model: Any) -> None:
        """Name the parameters.

        Raises:
            TypeError: the optimizer is not fasttune's, which measures the norms while it steps.
        """
        unwrapped = _unwrapped(optimizer)
        if not isinstance(unwrapped, AdamW):
            raise TypeError(
                "monitor: expected fasttune.optim.AdamW as optimizer (see trainer_args), "
                f"got {type(unwrapped).__name__}"
            )
        unwrapped.name_parameters(model.named_parameters())

    def measure(self, optimizer: Any, logs: dict[str, float]) -> dict[str, float]:
        """New entries for a log, and warnings, one of each kind a run."""
        found: dict[str, float] = {}
        if "loss" in logs:
            self._train_loss = float(logs["loss"])
            found.update(self._norms(_unwrapped(optimizer).monitor()))
        if "eval_loss" in logs and self._train_loss is not None:
            gap = float(logs["eval_loss"]) - self._train_loss
            found["fasttune/loss_gap"] = gap
            if gap > self.gap:
                self._warn("gap", f"evaluation loss is {gap:.3g} above training loss")
        return found

    def _norms(self, norms: dict[str, TensorNorms]) -> dict[str, float]:
        if not norms:
            return {}
        self.last = norms
        low, high = self.gradient_norm
        gradients = {name: own.gradient for name, own in norms.items()}
        largest, smallest = max(gradients, key=gradients.get), min(gradients, key=gradients.get)  # type: ignore[arg-type]
        if not gradients[largest] <= high:
            self._warn("high", f"gradient norm {gradients[largest]:.3g} of {largest}")
        if gradients[smallest] < low:
            count = sum(value < low for value in gradients.values())
            what = f"gradient norm {gradients[smallest]:.3g} of {smallest}"
            self._warn("low", f"{what} ({count} of {len(gradients)} tensors below {low:g})")
        ratios = [own.update_ratio for own in norms.values() if own.weight]
        return {
            "fasttune/gradient_norm_max": gradients[largest],
            "fasttune/gradient_norm_min": gradients[smallest],
            "fasttune/update_ratio_max": max(ratios, default=0.0),
        }

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            low, high = self.gradient_norm
            healthy = f"healthy: gradient norm {low:g} to {high:g} a tensor, gap up to {self.gap:g}"
            logger.warning("monitor: %s (%s)", message, healthy)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
