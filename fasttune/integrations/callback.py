"""FasttuneCallback: patches in on_train_begin, so that adapters that a trainer adds are seen."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fasttune.errors import PatchError
from fasttune.integrations.monitor import Monitor
from fasttune.patching import patch, report, state


class FasttuneCallback(TrainerCallback):  # type: ignore[misc]
    """For HF Trainer and TRL: ``Trainer(..., callbacks=[FasttuneCallback()])``.

    Args:
        verbose: print the report after the first step, when every path is decided (rank 0 only).
        monitor: log norms of gradients and updates and the gap between the losses, and warn where
            they are not healthy; True for the usual ranges, or a
            :class:`fasttune.integrations.monitor.Monitor`. Needs fasttune.optim.AdamW.
        **options: passed to :func:`fasttune.patch`.
    """

    def __init__(
        self, *, verbose: bool = True, monitor: bool | Monitor = False, **options: Any
    ) -> None:
        self.verbose, self.options = verbose, options
        self.monitor = Monitor() if monitor is True else monitor or None
        self._reported = False

    def on_train_begin(self, args: Any, control_state: Any, control: Any, **kwargs: Any) -> None:
        """Patch the model that the trainer is about to train.

        Raises:
            PatchError: ``use_liger_kernel=True``: Liger has replaced the same forwards.
            TypeError: ``monitor`` and another optimizer.
        """
        if getattr(args, "use_liger_kernel", False):
            raise PatchError(
                "use_liger_kernel=True and FasttuneCallback replace the same forwards: set one of "
                "them only"
            )
        model = kwargs.get("model")
        if model is not None:
            if self.monitor is not None:
                self.monitor.begin(kwargs.get("optimizer"), model)
            patch(model, **self.options)

    def on_step_end(self, args: Any, control_state: Any, control: Any, **kwargs: Any) -> None:
        """Print the report once the first step has decided every path."""
        if self.verbose and not self._reported and state.on_first_rank():
            self._reported = True
            print(report(kwargs["model"]))

    def on_log(self, args: Any, control_state: Any, control: Any, **kwargs: Any) -> None:
        """Add what the monitor measured to the log and to the trainer's history."""
        if self.monitor is None:
            return
        measured = self.monitor.measure(kwargs.get("optimizer"), kwargs["logs"])
        kwargs["logs"].update(measured)
        if control_state.log_history:
            control_state.log_history[-1].update(measured)
