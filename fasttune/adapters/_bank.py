"""The adapters behind one linear layer, applied to its output by a forward hook.

The hook is a function of this module and finds the adapters as a child of the layer: deepcopy,
pickle and checkpointing keep both, and the state_dict names them ``<layer>.adapters.<name>``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CHILD = "adapters"


class AdapterBank(nn.ModuleDict):
    """Bottleneck adapters by name; those in ``active`` are applied in that order."""

    active: tuple[str, ...] = ()


def attach(layer: nn.Module) -> AdapterBank:
    """The bank of ``layer``, made if it has none."""
    bank = getattr(layer, CHILD, None)
    if isinstance(bank, AdapterBank):
        return bank
    bank = AdapterBank()
    layer.add_module(CHILD, bank)
    layer.register_forward_hook(_apply)
    return bank


def detach(layer: nn.Module) -> None:
    """Undo :func:`attach`."""
    delattr(layer, CHILD)
    for key in [key for key, hook in layer._forward_hooks.items() if hook is _apply]:
        del layer._forward_hooks[key]


def _apply(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    bank = getattr(layer, CHILD)
    for name in bank.active:
        output = bank[name](output)
    return output
