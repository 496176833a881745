"""Parameter groups whose learning rate falls from the head to the embeddings."""

from __future__ import annotations

from typing import Any

from torch import nn

_LORA_B = (".lora_B.", ".lora_embedding_B.")  # parts of PEFT's parameter names


def layerwise_lr_groups(
    model: nn.Module,
    lr: float,
    decay: float,
    *,
    weight_decay: float = 0.01,
    lora_plus_ratio: float | None = None,
    trainable_only: bool = False,
) -> list[dict[str, Any]]:
    """Groups of named parameters for an optimizer: lr at the head, lr * decay^d below.

    d counts blocks from the head; embeddings are lowest. The stacks of blocks are found by
    structure: the outermost module lists of two or more modules of one class, in the model's order
    (encoder before decoder). What stands before the first stack counts as embeddings, and so does
    every nn.Embedding outside of them; what stands behind a stack belongs to the level above its
    last block.

    Args:
        model: any model of blocks; PEFT's wrappers are looked through.
        lr: of the head, positive.
        decay: factor from a block to the one below, in (0, 1].
        weight_decay: of parameters with two or more dimensions; biases and norms get none.
        lora_plus_ratio: factor on the learning rate of LoRA's B (LoRA+, Hayou et al., 2024).
        trainable_only: leave out what is frozen now; False keeps it, so that blocks may be unfrozen
            later (parameters without a gradient are not stepped).

    Returns:
        Groups with ``params`` as (name, parameter), ``lr``, ``weight_decay`` and ``level``, 0 for
        embeddings; lowest first.

    Raises:
        TypeError: model is no module.
        ValueError: lr, decay or ratio out of range, or no stack of blocks was found.

    Source: layer-wise decay as in ELECTRA (Clark et al., 2020).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not lr > 0:
        raise ValueError(f"lr: expected a positive number, got {lr}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a number in (0, 1], got {decay}")
    if lora_plus_ratio is not None and not lora_plus_ratio > 0:
        raise ValueError(f"lora_plus_ratio: expected a positive number, got {lora_plus_ratio}")
    levels, top = _levels(model)
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if trainable_only and not param.requires_grad:
            continue
        level, decays = levels[id(param)], param.dim() > 1
        faster = lora_plus_ratio is not None and any(part in name for part in _LORA_B)
        key = (level, decays, faster)
        if key not in groups:
            groups[key] = {
                "params": [],
                "lr": lr * decay ** (top - level) * (lora_plus_ratio if faster else 1.0),  # type: ignore[operator]
                "weight_decay": weight_decay if decays else 0.0,
                "level": level,
            }
        groups[key]["params"].append((name, param))
    return [groups[key] for key in sorted(groups)]


def _levels(model: nn.Module) -> tuple[dict[int, int], int]:
    """The level of each parameter by id, and that of the head."""
    stacks = _stacks(model)
    if not stacks:
        raise ValueError(
            f"model: expected a list of two or more blocks of one class, "
            f"found none in {type(model).__name__}"
        )
    block_of: dict[str, int] = {}
    for stack, modules in stacks.items():
        for index in range(len(modules)):
            block_of[f"{stack}.{index}."] = len(block_of) + 1
    top = len(block_of) + 1
    embedded = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for param in module.parameters()
    }
    levels: dict[int, int] = {}
    reached = 0
    for name, param in model.named_parameters():
        block = next((b for prefix, b in block_of.items() if name.startswith(prefix)), None)
        reached = reached if block is None else block
        if block is not None:
            levels[id(param)] = block
        elif id(param) in embedded or ".lora_embedding_" in name:
            levels[id(param)] = 0
        else:
            levels[id(param)] = min(reached + 1, top) if reached else 0
    return levels, top


def _stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of two or more blocks of one class that hold parameters, by name."""
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if inside or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        classes = {type(block) for block in module}
        if len(classes) == 1 and all(any(True for _ in b.parameters()) for b in module):
            stacks[name] = module
    return stacks
