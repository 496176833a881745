"""Refuses models whose parameters are already sharded: class swaps must come before sharding."""

from __future__ import annotations

from torch import nn

from fasttune.errors import PatchError


def refuse_sharded(model: nn.Module) -> None:
    """Raises PatchError if a parameter is sharded by FSDP, FSDP2, tensor parallelism or ZeRO-3."""
    for name, parameter in model.named_parameters():
        kind = type(parameter).__name__
        if kind == "DTensor" or type(parameter.data).__name__ == "DTensor":
            how = "a DTensor (FSDP2 or tensor parallelism)"
        elif kind == "FlatParameter":
            how = "a FlatParameter (FSDP)"
        elif hasattr(parameter, "ds_id"):
            how = "partitioned by DeepSpeed ZeRO-3"
        else:
            continue
        raise PatchError(f"{name} is {how}: call fasttune.patch before sharding the model")
