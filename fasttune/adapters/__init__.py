"""Bottleneck adapters on a whole model: add, activate, stack, save, load, remove.

Adapters follow the linear layers that end the MLP (``seq_bn``; Pfeiffer et al., 2020) and, with
``double_seq_bn``, the attention (Houlsby et al., 2019) of every block: before the dropout, the
residual and the norm that come after; ``par_bn`` runs beside the MLP (He et al., 2022), and
``adapter_plus`` follows the whole block (Steitz and Roth, 2024). ``conv_parallel`` and
``conv_sequential`` are for convolutional models (Chen et al., 2022). The blocks are found by what a
forward does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasttune.adapters._files import load, restore, save
from fasttune.adapters._placing import (
    activate,
    add,
    deactivate,
    print_trainable_parameters,
    remove,
    stack,
)
from fasttune.adapters._state import names, trained_besides
from fasttune.adapters.reft import activate_reft, add_reft, load_reft, remove_reft, save_reft

if TYPE_CHECKING:
    from fasttune.integrations.adapter_trainer import AdapterCheckpoints, AdapterTrainer

__all__ = [
    "AdapterCheckpoints",
    "AdapterTrainer",
    "activate",
    "activate_reft",
    "add",
    "add_reft",
    "deactivate",
    "load",
    "load_reft",
    "names",
    "print_trainable_parameters",
    "remove",
    "remove_reft",
    "restore",
    "save",
    "save_reft",
    "stack",
    "trained_besides",
]


def __getattr__(name: str) -> Any:
    if name in ("AdapterCheckpoints", "AdapterTrainer"):  # importing them imports transformers
        from fasttune.integrations import adapter_trainer

        return getattr(adapter_trainer, name)
    raise AttributeError(f"module 'fasttune.adapters' has no attribute {name!r}")
