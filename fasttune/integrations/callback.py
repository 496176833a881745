"""FasttuneCallback: patches in on_train_begin, so that adapters that a trainer adds are seen."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fasttune.errors import PatchError
from fasttune.patching import patch, report, state


class FasttuneCallback(TrainerCallback):  # type: ignore[misc]
    """For HF Trainer and TRL: ``Trainer(..., callbacks=[FasttuneCallback()])``.

    Args:
        verbose: print the report after the first step, when every path is decided (rank 0 only).
        **options: passed to :func:`fasttune.patch`.
    """

    def __init__(self, *, verbose: bool = True, **options: Any) -> None:
        self.verbose, self.options = verbose, options
        self._reported = False

    def on_train_begin(self, args: Any, control_state: Any, control: Any, **kwargs: Any) -> None:
        """Patch the model that the trainer is about to train.

        Raises:
            PatchError: ``use_liger_kernel=True``: Liger has replaced the same forwards.
        """
        if getattr(args, "use_liger_kernel", False):
            raise PatchError(
                "use_liger_kernel=True and FasttuneCallback replace the same forwards: set one of "
                "them only"
            )
        model = kwargs.get("model")
        if model is not None:
            patch(model, **self.options)

    def on_step_end(self, args: Any, control_state: Any, control: Any, **kwargs: Any) -> None:
        """Print the report once the first step has decided every path."""
        if self.verbose and not self._reported and state.on_first_rank():
            self._reported = True
            print(report(kwargs["model"]))
