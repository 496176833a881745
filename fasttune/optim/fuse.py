"""The optimizer's step inside the backward pass: each gradient is used and freed at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fasttune.optim.adamw import AdamW


class FusedBackward:
    """What :func:`fuse_into_backward` installed."""

    def __init__(self, optimizer: AdamW, handles: list[RemovableHandle]) -> None:
        self._optimizer, self._handles = optimizer, handles

    def remove(self) -> None:
        """Back to gradients that stay until ``optimizer.step()``."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._optimizer.fused_steps = None


def fuse_into_backward(model: nn.Module, optimizer: AdamW) -> FusedBackward:
    """Make ``loss.backward()`` step each parameter as soon as its gradient is complete.

    No two gradients have to exist at once: the memory of all gradients is saved. Still call
    ``optimizer.step()`` after each backward; it steps nothing and starts the next step.

    Args:
        model: owns the parameters of the optimizer.
        optimizer: a :class:`fasttune.optim.AdamW`.

    Returns:
        A handle; ``remove()`` undoes it.

    Raises:
        TypeError: another optimizer.
        ValueError: a global norm is asked for (max_grad_norm, skip_nonfinite), which needs all
            gradients at once; the model averages gradients after they are complete
            (DistributedDataParallel); a parameter of the optimizer is not the model's.
        RuntimeError: in a backward: a second gradient for a parameter before ``optimizer.step()``
            (gradient accumulation), or a GradScaler, which looks at all gradients first.
    """
    if not isinstance(optimizer, AdamW):
        raise TypeError(f"optimizer: expected fasttune.optim.AdamW, got {type(optimizer).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "model: DistributedDataParallel averages gradients after the parameters' hooks ran; "
            "use FSDP2 or an ordinary step"
        )
    for name, idle in (("max_grad_norm", None), ("skip_nonfinite", False)):
        if any(group[name] != idle for group in optimizer.param_groups):
            raise ValueError(f"{name}: expected {idle}: a global norm needs all gradients at once")
    if optimizer.fused_steps is not None:
        raise ValueError("optimizer: fuse_into_backward was called for it already")
    owned = {id(param) for param in model.parameters()}
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    if any(id(param) not in owned for param in params):
        raise ValueError("optimizer: has parameters that model does not own")
    optimizer.fused_steps = set()

    def hook_for(index: int) -> Any:
        def hook(param: Tensor) -> None:
            optimizer.step_one(index)
            param.grad = None

        return hook

    handles = [
        param.register_post_accumulate_grad_hook(hook_for(index))
        for index, param in enumerate(params)
        if param.requires_grad
    ]
    return FusedBackward(optimizer, handles)
