"""What mixed batches read of PEFT: ``adapter_names``, and modules that an adapter replaces whole.

Read from PEFT 0.21 (``peft/tuners/lora/layer.py`` and ``peft/utils/other.py``);
tests/integrations/test_private_names.py fails loudly when it moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttune import _torch
from fasttune.integrations import peft, peft_linear
from fasttune.ops import LoraProjection
from fasttune.reason import Reason

BASE = "__base__"  # PEFT's name for samples without an adapter


def check_forward_args(layer: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """PEFT's own errors about ``adapter_names``."""
    layer._check_forward_args(x, *args, **kwargs)


def adapters_of(layer: Any) -> set[str]:
    """The adapters that a LoRA layer of any type has."""
    return {*layer.lora_A, *layer.lora_embedding_A}


def trains(layer: Any, adapter: str) -> bool:
    """True if a parameter of the adapter's factors requires a gradient."""
    factors = [group[adapter] for group in (layer.lora_A, layer.lora_B) if adapter in group]
    return any(p.requires_grad for factor in factors for p in factor.parameters())


def copies_of_modules(model: nn.Module) -> Iterator[tuple[str, set[str]]]:
    """(name, adapters) of modules_to_save and trainable tokens: modules that an adapter replaces
    for the whole batch.
    """
    if not peft.loaded():
        return
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield name, set(module._adapters)


def why_not(layer: Any, x: Any, adapters: Sequence[str]) -> Reason | None:
    """Why a call of a LoRA Linear cannot give each sample one of ``adapters``, or None."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return Reason(f"input is {type(x).__name__}, not a plain tensor")
    if x.dim() < 2:
        return Reason(f"input has no samples: its shape is {tuple(x.shape)}")
    if torch_module._has_any_global_hook():
        return Reason("a global module hook is registered")
    if _torch.in_functorch():
        return Reason("called inside torch.func")
    reason = peft_linear.why_base(layer, x)
    if peft.plain_weight(layer) is None:
        reason = reason or Reason("its base layer's own forward must run: quantised or hooked")
    for adapter in adapters:
        reason = reason or peft_linear.why_adapters(layer, x, [adapter])
    return reason


def projection(layer: Any, names: Sequence[str]) -> tuple[LoraProjection, list[str], list[int]]:
    """The base layer with a branch for each adapter in ``names`` that the layer has, the names of
    the branches, and for each entry of ``names`` its branch or -1.
    """
    own = [name for name in dict.fromkeys(names) if name != BASE and name in layer.lora_A]
    branches = tuple(peft_linear.branch(layer, adapter) for adapter in own)
    place = {adapter: index for index, adapter in enumerate(own)}
    rows_of = [place.get(name, -1) for name in names]
    return LoraProjection(peft.plain_weight(layer), layer.base_layer.bias, branches), own, rows_of
