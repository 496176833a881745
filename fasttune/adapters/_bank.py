"""The adapters behind one layer or block, applied to its output by a forward hook.

The hooks are functions of this module and find what they need on the layer: deepcopy, pickle and
checkpointing keep all of it, and the state_dict names the adapters ``<layer>.adapters.<name>``.

A parallel adapter takes the input of another layer, the first of the MLP whose last one this is or
the norm before. A hook before that layer keeps its input for this thread under a slot that both
layers know.

An adapter before a norm takes the norm's output and is added to its input: the norm runs again.
"""

from __future__ import annotations

import threading
import uuid
from typing import Any

from torch import Tensor, nn

CHILD = "adapters"
_SLOT = "_fasttune_slot"  # on the layer whose input a parallel adapter takes


class _Held(threading.local):
    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}


_held = _Held()


class AdapterBank(nn.ModuleDict):
    """Bottleneck adapters by name; those in ``active`` are applied in that order.

    Attributes:
        active: names, in order.
        slots: of those that take the input of another layer, where it is kept.
        before: they are added to the input of the layer, a norm.
    """

    active: tuple[str, ...] = ()
    before: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[str, str] = {}


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


def make_parallel(bank: AdapterBank, name: str, source: nn.Module) -> None:
    """Let the adapter ``name`` of a bank take the input of ``source``."""
    if _SLOT not in source.__dict__:
        source.__dict__[_SLOT] = uuid.uuid4().hex
        source.register_forward_pre_hook(_hold)
    bank.slots[name] = source.__dict__[_SLOT]


def end_parallel(bank: AdapterBank, name: str, model: nn.Module) -> None:
    """Undo :func:`make_parallel`."""
    slot = bank.slots.pop(name, None)
    if slot is None or slot in bank.slots.values():
        return
    for source in model.modules():
        if source.__dict__.get(_SLOT) == slot:
            del source.__dict__[_SLOT]
            hooks = source._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _hold]:
                del hooks[key]


def _hold(layer: nn.Module, args: Any) -> None:
    _held.inputs[layer.__dict__[_SLOT]] = args[0]


def _apply(layer: nn.Module, args: Any, output: Any) -> Any:
    bank: AdapterBank = getattr(layer, CHILD)
    if bank.before:
        return _before(layer, bank, args[0], output)
    held = {slot: _held.inputs.pop(slot, None) for slot in set(bank.slots.values())}
    if isinstance(output, tuple):  # a block that returns its attention weights or cache too
        return (_through(bank, held, output[0]), *output[1:])
    return _through(bank, held, output)


def _before(norm: nn.Module, bank: AdapterBank, x: Tensor, y: Tensor) -> Tensor:
    for name in bank.active:
        x = bank[name](y, x)
        y = norm.forward(x)  # the hooks have run
    return y


def _through(bank: AdapterBank, held: dict[str, Any], hidden: Tensor) -> Tensor:
    for name in bank.active:
        slot = bank.slots.get(name)
        hidden = bank[name](hidden) if slot is None else bank[name](held[slot], hidden)
    return hidden
