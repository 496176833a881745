"""Batch norms of a frozen model keep their statistics, also in training mode.

Otherwise training an adapter would change the model that it is saved without. The hook is a
function of this module: deepcopy and pickle keep it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_BatchNorm = nn.modules.batchnorm._BatchNorm


def freeze(model: nn.Module, trained: Iterable[str]) -> None:
    """Let every batch norm use its statistics as they are, but for those in modules ``trained``."""
    inside = tuple(f"{name}." for name in trained)
    for name, module in model.named_modules():
        own = isinstance(module, _BatchNorm) and not f"{name}.".startswith(inside)
        if own and not is_frozen(module):
            module.register_forward_pre_hook(_evaluate)


def unfreeze(model: nn.Module) -> None:
    """Undo :func:`freeze`."""
    for module in model.modules():
        if is_frozen(module):
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _evaluate]:
                del hooks[key]
            module.training = model.training


def is_frozen(module: nn.Module) -> bool:
    """True if the statistics of the module, a batch norm, do not change."""
    return _evaluate in module._forward_pre_hooks.values()


def _evaluate(module: nn.Module, args: Any) -> None:
    module.training = False
