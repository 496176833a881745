"""The interventions behind one layer, applied to its output by a forward hook.

The hook is a function of this module and finds what it needs on the layer: deepcopy and pickle keep
all of it, and the state_dict names the interventions ``<layer>.reft.<name>.<part>``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttune.adapters import _prompt
from fasttune.adapters._positions import Positions
from fasttune.nn import LoReft

CHILD = "reft"


class Intervention(nn.ModuleDict):
    """What one name does behind a layer: a LoReft for each part of its positions."""

    def __init__(self, positions: Positions, parts: dict[str, LoReft]) -> None:
        super().__init__(parts)
        self.positions = positions


class ReftBank(nn.ModuleDict):
    """Interventions by name; those in ``active`` are applied in that order."""

    active: tuple[str, ...] = ()


def attach(layer: nn.Module) -> ReftBank:
    """The bank of ``layer``, made if it has none."""
    bank = getattr(layer, CHILD, None)
    if isinstance(bank, ReftBank):
        return bank
    bank = ReftBank()
    layer.add_module(CHILD, bank)
    layer.register_forward_hook(_edit)
    return bank


def detach(layer: nn.Module) -> None:
    """Undo :func:`attach`."""
    delattr(layer, CHILD)
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _edit]:
        del layer._forward_hooks[key]


def _edit(layer: nn.Module, args: Any, output: Any) -> Any:
    bank: ReftBank = getattr(layer, CHILD)
    if not bank.active:
        return None
    prompt = _prompt.current()
    if prompt.absent:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"reft: expected hidden states [batch, tokens, features], got {got}")
    edited = hidden
    for name in bank.active:
        intervention: Any = bank[name]
        for part, module in intervention.items():
            rows = prompt.rows(intervention.positions, part, hidden)
            # Nothing needs the output of a layer but the next one, where no gradient is recorded.
            own = edited is not hidden or not any(hidden is arg for arg in args)
            edited = module(edited, rows, inplace=own and not torch.is_grad_enabled())
    return (edited, *output[1:]) if isinstance(output, tuple) else edited
