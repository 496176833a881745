"""One forward of a model without its weights: what is called, with which tensors, and what attends.

A twin of the model, of the same classes and attributes but with fake parameters and no hooks, runs
on fake tensors: no weight is read, no memory taken and nothing of the model changed, whatever is
patched, quantised, sharded, hooked or on another device. Where a forward asks for values, the twin
has zeros, one in memory for each parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fasttune import _torch
from fasttune.adapters._bank import AdapterBank
from fasttune.integrations import transformers
from fasttune.patching.swap import original_class

# An instance's forward is another library's; Module.compile leaves the other one.
_LEFT_OUT = ("forward", "_compiled_call_impl")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ATTENTION = ("_softmax", "_safe_softmax", "_scaled_dot_product")


@dataclass(eq=False)
class Call:
    """The first call of a module.

    Attributes:
        inputs, outputs: its tensors, in order. What one module returns and another one takes
            unchanged is the same object.
        attends: a softmax or an attention ran inside.
        chooses: a top-k ran inside, as in a router of experts.
        adds: its own forward added two images of one shape, [N, C, H, W].
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    attends: bool = False
    chooses: bool = False
    adds: bool = False


@dataclass
class Trace:
    """What ran.

    Attributes:
        calls: the first call of every module by its name, in the order in which they began.
        failures: why the model, or a part of it that should have run on its own, did not.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def trace(model: nn.Module, example: Mapping[str, Any] | None = None) -> Trace:
    """Run ``model`` on ``example``, or on inputs as a model of transformers takes them.

    What the whole leaves out, a vision tower where there is only text, runs on its own where it is
    a model of transformers too.
    """
    if example is not None and not isinstance(example, Mapping):
        raise TypeError(f"example: expected a mapping, got {type(example).__name__}")
    found = _trace(model, example, _Twins(model))
    if found.failures and not found.calls:
        found = _trace(model, example, _Zeros(model))
    return found


def _trace(model: nn.Module, example: Mapping[str, Any] | None, twins: _Twins) -> Trace:
    found = Trace()
    if example is not None:
        twins.run("", [dict(example)], found)
        return found
    for name, module in walk(model):
        attempts = transformers.example_inputs(module)
        if attempts and name not in found.calls:
            twins.run(name, attempts, found)
    if not found.calls and not found.failures:
        found.failures.append(f"{type(model).__name__} is no model of transformers")
    return found


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules without what was added to the model: adapters, and what PEFT wraps."""
    yield prefix, module
    if is_wrapper(module):
        return
    for name, child in module.named_children():
        if not isinstance(child, AdapterBank):
            yield from walk(child, f"{prefix}.{name}" if prefix else name)


def is_wrapper(module: nn.Module) -> bool:
    """True for a layer around another one, as PEFT's tuners are: one site, the outer layer."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def base(module: Any) -> Any:
    """The innermost layer of a wrapper, or the layer itself."""
    while is_wrapper(module):
        module = module.base_layer
    return module


def width(module: Any) -> int | None:
    """Output features of a linear layer, None for another one."""
    module = base(module)
    if isinstance(module, nn.Linear):
        return module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.nf)
    return None


class _Twins:
    """The twin of every module of a model, and what they record."""

    def __init__(self, model: nn.Module) -> None:
        self.fake = _torch.FakeTensorMode(allow_non_fake_inputs=True)
        self.configs: dict[int, Any] = {}
        self.open: list[Call] = []
        self.calls: dict[str, Call] = {}
        self.by_id: dict[int, nn.Module] = {}
        self.by_name: dict[str, nn.Module] = {}
        floats = (p.dtype for p in model.parameters() if p.dtype in _FLOATS)
        self.dtype = next(floats, torch.get_default_dtype())
        with self.mode():
            self._twin(model, "")

    def mode(self) -> contextlib.AbstractContextManager[None]:
        return _torch.fake_tensors(self.fake)

    def parameter(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu")

    def value(self, tensor: Tensor) -> Tensor:
        """For a buffer, an input or a tensor among the attributes."""
        return self.parameter(tensor.shape, tensor.dtype)

    def run(self, name: str, attempts: list[dict[str, Any]], found: Trace) -> None:
        """Add the calls of the first of the ``attempts`` that the module can run on."""
        failure = ""
        for inputs in attempts:
            self.open, self.calls = [], {}
            try:
                with (
                    torch.no_grad(),
                    torch.random.fork_rng(devices=[]),
                    torch.device("cpu"),  # not the user's default
                    self.mode(),
                    _Watch(self),
                ):
                    self.by_name[name](**_pytree.tree_map_only(Tensor, self.value, inputs))
            except Exception as error:  # arbitrary code, on inputs that it may not expect
                failure = f"{name or 'the model'} raised {type(error).__name__}: {error}"
                continue
            found.calls.update({k: c for k, c in self.calls.items() if k not in found.calls})
            return
        found.failures.append(failure)

    def _twin(self, module: nn.Module, name: str) -> nn.Module:
        inner = base(module)
        if id(inner) in self.by_id:
            return self.by_name.setdefault(name, self.by_id[id(inner)])
        linear = width(inner) is not None and isinstance(inner, nn.Linear)
        twin: nn.Module = object.__new__(nn.Linear if linear else original_class(inner))
        own = {k: self._attribute(v) for k, v in inner.__dict__.items() if k not in _LEFT_OUT}
        twin.__dict__.update(own | nn.Module().__dict__ | {"training": False})
        twin._non_persistent_buffers_set = inner._non_persistent_buffers_set
        self.by_id[id(inner)] = self.by_name[name] = twin
        if "config" in own:
            twin.__dict__["config"] = transformers.eager(own["config"], self.configs)
        for key, parameter in inner._parameters.items():
            if parameter is not None:
                shape, dtype = parameter.shape, parameter.dtype
                parameter = nn.Parameter(self.parameter(shape, dtype), False)
            twin._parameters[key] = parameter
        weight = inner._parameters.get("weight")
        if linear and (weight is None or weight.dtype not in _FLOATS):  # parametrised, packed
            size = (inner.out_features, inner.in_features)
            twin._parameters["weight"] = nn.Parameter(self.parameter(size, self.dtype), False)
        for key, buffer in inner._buffers.items():
            twin._buffers[key] = None if buffer is None else self.value(buffer)
        for key, child in inner._modules.items():
            inside = f"{name}.{key}" if name else key
            skip = child is None or isinstance(child, AdapterBank)
            twin._modules[key] = None if skip else self._twin(child, inside)
        self._record(twin, name)
        return twin

    def _attribute(self, value: Any) -> Any:
        """What a forward may change in place is not the model's own."""
        if isinstance(value, Tensor):
            return self.value(value)
        return value.copy() if type(value) in (list, dict, set) else value

    def _record(self, twin: nn.Module, name: str) -> None:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = Call(_tensors((args, kwargs)))
            self.calls.setdefault(name, call)
            self.open.append(call)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.open.pop().outputs = _tensors(output)

        twin.register_forward_pre_hook(before, with_kwargs=True)
        twin.register_forward_hook(after)


class _Zeros(_Twins):
    """Twins that run on values: zeros for the parameters, copies for the rest."""

    def mode(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def parameter(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros((), dtype=dtype, device="cpu").expand(tuple(shape))

    def value(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        return tensor.detach().to("cpu", copy=True)


class _Watch(TorchDispatchMode):
    """Marks the open calls in which something attends or chooses."""

    def __init__(self, twins: _Twins) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.twins = twins

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        for call in self.twins.open:
            call.attends |= name.startswith(_ATTENTION)
            call.chooses |= name == "topk"
        if self.twins.open and name in ("add", "add_"):
            a, b = args[:2]
            self.twins.open[-1].adds |= (
                isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
                and a.dim() == 4
            )  # fmt: skip
        return function(*args, **(kwargs or {}))


def _tensors(values: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, Tensor))
