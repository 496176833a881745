"""HF Trainer checkpoints of a model with bottleneck adapters hold the adapters alone.

Read from transformers 5.24 (``trainer.py``): ``_save``, ``_load_from_checkpoint`` and
``_load_best_model``; tests/integrations/test_private_names.py fails loudly when they move.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from fasttune import adapters
from fasttune.adapters._frozen_norms import is_frozen
from fasttune.integrations import peft

FOLDER = "adapters"  # in a checkpoint; two levels deep, where Trainer does not look for PEFT's
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

logger = logging.getLogger("fasttune")


class AdapterCheckpoints:
    """A mixin before any Trainer class: ``class MyTrainer(AdapterCheckpoints, SFTTrainer)``.

    A checkpoint, and what ``save_model`` writes, has a folder ``adapters/<name>`` of every adapter
    of the model, as :func:`fasttune.adapters.save` writes it, and no file of the model. Resuming
    and ``load_best_model_at_end`` read them back into the adapters that the model has. On a
    model with PEFT's layers, PEFT's own files are beside them and decide about everything else.

    The whole model is written instead, with a warning that says why, if something else is trained
    too, if batch norms of the model keep statistics, and under FSDP and DeepSpeed.

    Raises:
        ValueError: a checkpoint's adapters are not those of the model, or a model with PEFT's
            layers is sharded.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        model: nn.Module = trainer.model
        if not adapters.names(model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        tuned = peft.has_layers(model)
        reason = self._whole_model_needed(tuned)
        if reason is not None and tuned:
            raise ValueError(f"model: expected adapters and PEFT's layers unsharded, but {reason}")
        if reason is not None:
            logger.warning("the checkpoint holds the whole model: %s", reason)
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
        if tuned:  # PEFT filters its own
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        elif trainer.args.should_save:
            self._save_all_but_weights(folder)
        if not trainer.args.should_save:
            return
        for name in adapters.names(model):
            adapters.save(model, name, folder / FOLDER / name)

    def _save_all_but_weights(self, folder: Path) -> None:
        """What Trainer writes beside the weights; a model that lies in ``folder`` stays there."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            super()._save(scratch, {})  # type: ignore[misc]
            without_weights = shutil.ignore_patterns(*_WEIGHTS)
            shutil.copytree(scratch, folder, dirs_exist_ok=True, ignore=without_weights)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        trainer: Any = self
        model = trainer.model if model is None else model
        found = self._restore(model, resume_from_checkpoint)
        if not found or peft.has_layers(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        trainer: Any = self
        found = self._restore(trainer.model, trainer.state.best_model_checkpoint)
        if not found or peft.has_layers(trainer.model):
            super()._load_best_model()  # type: ignore[misc]

    def _restore(self, model: nn.Module, checkpoint: str) -> bool:
        folder = Path(checkpoint) / FOLDER
        if not folder.is_dir():
            return False
        saved, own = sorted(path.name for path in folder.iterdir()), sorted(adapters.names(model))
        if saved != own:
            raise ValueError(
                f"resume_from_checkpoint: expected the adapters {', '.join(own) or 'none'}, got "
                f"{', '.join(saved)} in {folder}"
            )
        adapters.restore(model, {name: folder / name for name in own})
        return True

    def _whole_model_needed(self, tuned: bool) -> str | None:
        """Why the adapters alone are not enough; what PEFT saves of ``tuned`` models is its own."""
        trainer: Any = self
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return "its parameters are sharded"
        if tuned:
            return None
        model: nn.Module = trainer.model
        for name, parameter in adapters.trained_besides(model):
            return f"{name} {tuple(parameter.shape)} is trained and of no adapter"
        for name, module in model.named_modules():
            keeps = isinstance(module, nn.modules.batchnorm._BatchNorm) and not is_frozen(module)
            if keeps and module.track_running_stats:
                return f"{name} keeps statistics"
        return None


class AdapterTrainer(AdapterCheckpoints, Trainer):  # type: ignore[misc]
    """HF Trainer whose checkpoints hold the adapters alone: :class:`AdapterCheckpoints`."""
