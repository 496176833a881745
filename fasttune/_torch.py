"""The private names of torch that fasttune reads, in one place;
tests/integrations/test_private_names.py guards them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.nn import Parameter

_PLAIN_TYPES = (Tensor, Parameter)
# Attributes of a module: dictionaries, empty without a hook.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MPS = torch.backends.mps.is_available()


# torch.nn.functional.grouped_mm calls it and does not look at its arguments itself.
grouped_mm = torch._grouped_mm


def in_functorch() -> bool:
    """True inside vmap, grad, jvp, ...: types still say Tensor there, so only the stack tells.

    False while torch.compile traces: its own functionalisation uses the same stack.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def under_dispatch_mode() -> bool:
    """True if a TorchDispatchMode (FakeTensorMode, accounting, ...) is active."""
    return torch._C._len_torch_dispatch_stack() > 0


@contextlib.contextmanager
def fake_tensors(mode: FakeTensorMode) -> Iterator[None]:
    """Run with tensors that have no memory. What cannot run without raises, and is not logged."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        with mode:
            yield
    finally:
        logger.disabled = disabled


def profiling() -> bool:
    """True while the autograd profiler records."""
    return bool(torch._C._autograd._profiler_enabled())


def cuda_generator(device: torch.device) -> torch.Generator:
    """torch's generator of a GPU, the current one if ``device`` has no index."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def current_stream(index: int) -> int:
    """The handle of the current stream of a GPU."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def capturing() -> bool:
    """True while a CUDA graph is captured."""
    return torch.cuda.is_current_stream_capturing()


def inside_backward() -> bool:
    """True on a thread that runs a backward pass (checkpoint recomputation included)."""
    return torch._C._current_graph_task_id() != -1


def after_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now is complete."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def acts_on_gradient(parameter: Tensor) -> bool:
    """True if something runs as soon as the parameter's gradient is complete, inside backward."""
    return bool(parameter._post_accumulate_grad_hooks)


def hooked(module: nn.Module) -> bool:
    """True if a call of the module does more than its class's forward."""
    state = module.__dict__
    if "forward" in state or "_hf_hook" in state:
        return True
    for name in HOOKS:  # noqa: SIM110, at every call of a layer: no generator
        if state.get(name):
            return True
    return False


def all_plain(tensors: Iterable[Tensor | None]) -> bool:
    """True if every tensor is a plain Tensor or Parameter with real storage."""
    for tensor in tensors:  # at every call of an op: no generator
        if tensor is not None and (type(tensor) not in _PLAIN_TYPES or tensor.is_meta):
            return False
    return True


def all_plain_or_meta(tensors: Iterable[Tensor | None]) -> bool:
    """True if every tensor is a plain Tensor or Parameter, with or without storage."""
    for tensor in tensors:  # noqa: SIM110, at every call of a layer: no generator
        if tensor is not None and type(tensor) not in _PLAIN_TYPES:
            return False
    return True


def any_autocast() -> bool:
    """True within autocast of any device."""
    if torch._C._is_any_autocast_enabled():
        return True
    return _MPS and torch.is_autocast_enabled("mps")  # which that does not count


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The autocast dtype in force for ``device_type``, or None outside autocast."""
    if device_type in ("cpu", "cuda") and not any_autocast():
        return None
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a Function's backward: differentiating through its result raises.

    torch's ``once_differentiable`` raises only if the incoming gradient requires one; with a
    constant incoming gradient a second derivative would silently be zero.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # no create_graph=True
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if torch.compiler.is_compiling():
            return outputs
        raises: Any = torch._C._functions.DelayedError(
            b"fasttune ops are differentiable once; "
            b"for second derivatives call fasttune.unpatch(model)",
            len(outputs),
        )
        return raises(*(None if out is None else out.detach().requires_grad_() for out in outputs))

    return wrapper
