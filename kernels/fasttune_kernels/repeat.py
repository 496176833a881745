"""Repeating what a launcher did, without its Python.

A launcher's Python (tiles, splits, lists of branches) depends on the facts about its arguments, not
on what lies in them, and takes longer on the host than its kernels take on a GPU if the input is
small. So its launches and torch calls are recorded as straight code once, and done again whenever
the same facts come back: dtypes, shapes, strides and alignments of tensors, and all that is no
tensor by value.

What cannot be repeated is noticed while it is recorded and runs as it was written: a value read
from a tensor, a tensor that is neither an argument nor was made on the way, an unknown function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from . import launch as launching
from .launch import PreparedLaunch
from .tables import launch_device

# The number of rows differs from batch to batch: a table must not grow forever.
_MAX_ENTRIES = 4096
# Tests set it while the interpreter or a dry run takes CPU tensors.
takes_cpu_tensors = False

_MEMBERS = vars(torch._C.TensorBase)
_METHODS = {id(member): name for name, member in _MEMBERS.items() if not name.startswith("__")}
_SAFE_METHODS = (
    *("size", "stride", "dim", "numel", "element_size", "is_contiguous", "storage_offset"),
    *("get_device", "is_floating_point"),
)
_SAFE_PROPERTIES = ("shape", "dtype", "device", "is_cuda", "ndim", "is_cpu", "requires_grad")
# What they return is known from the facts, so it may become part of the code.
_READS = {
    *(_MEMBERS[name] for name in _SAFE_METHODS),
    *(getattr(Tensor, name).__get__ for name in _SAFE_PROPERTIES),
    torch.promote_types,
}
# Of these, a result that is their argument tells that there was nothing to do.
_CONVERSIONS = ("to", "contiguous", "detach", "float")
# The shapes of what they return follow from values.
_SHAPED_BY_VALUES = ("nonzero", "argwhere", "unique", "unique_consecutive", "masked_select")
_SHAPED_BY_VALUES += ("bincount", "repeat_interleave", "where")


class _CannotRepeatError(Exception):
    pass


def _add_facts(args: Sequence[Any], facts: list[Any], tensors: list[Tensor]) -> None:
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            facts.append((arg.dtype, arg.shape, arg.stride(), arg.data_ptr() & 15))
            tensors.append(arg)
        elif kind is list or kind is tuple:
            facts.append(len(arg))
            _add_facts(arg, facts, tensors)
        elif kind is float or kind is bool:  # neither is the integer that it may equal
            facts.append((kind, arg))
        elif isinstance(arg, Tensor):
            raise _CannotRepeatError
        else:
            facts.append(arg)


class _Recorder(TorchFunctionMode):
    """Writes down the launches and the torch calls that make or change tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.possible = True
        self._nodes: dict[int, fx.Node] = {}
        self._seen: list[Tensor] = []  # kept, so that no two of them have one id

    def arguments(self, args: Any) -> Any:
        """The arguments with another object for each tensor: one may be passed twice, and need not
        next time.
        """
        if isinstance(args, tuple | list):
            return type(args)(self.arguments(arg) for arg in args)
        if not isinstance(args, Tensor):
            return args
        alias = args.detach()
        self._note(alias, self.graph.placeholder(f"tensor{len(self._seen)}"))
        return alias

    def launch(self, prepared: PreparedLaunch, args: tuple[Any, ...]) -> None:
        try:
            nodes = self._with_nodes(args)
        except _CannotRepeatError:
            self.possible = False
            return
        tensors: list[fx.Node] = []

        def address_of(node: fx.Node) -> fx.Node:
            tensors.append(node)
            return self.graph.call_method("data_ptr", (node,))

        if prepared.by_address:
            nodes = fx.map_arg(nodes, address_of)
        self.graph.call_function(prepared, (nodes, tuple(tensors)))

    def finish(self, result: Any) -> Callable[..., Any] | None:
        """The code, or None if it would not do the same."""
        try:
            self.graph.output(self._with_nodes(result))
            return fx.GraphModule({}, self.graph).forward if self.possible else None
        except _CannotRepeatError:
            return None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _READS:
            try:
                self._record(func, args, kwargs or {}, result)
            except _CannotRepeatError:
                self.possible = False
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if args and result is args[0] and _METHODS.get(id(func)) in _CONVERSIONS:
            return  # nothing was to convert
        parts = result if isinstance(result, tuple | list) else (result,)
        if not all(isinstance(part, Tensor) for part in parts):
            raise _CannotRepeatError  # a value, which may be another the next time
        if getattr(func, "__name__", "") in _SHAPED_BY_VALUES or _by_mask(func, args):
            raise _CannotRepeatError
        node = self._call(func, args, kwargs)
        if parts is not result:
            self._note(result, node)
            return
        for i, part in enumerate(parts):
            self._note(part, self.graph.call_function(_item, (node, i)))

    def _call(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        args, kwargs = self._with_nodes(tuple(args)), self._with_nodes(kwargs)
        name = _METHODS.get(id(func))
        if name is not None:
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)

    def _with_nodes(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            node = self._nodes.get(id(arg))
            if node is None:
                raise _CannotRepeatError  # made before or elsewhere: its values may change
            return node
        if isinstance(arg, tuple | list):
            return type(arg)(self._with_nodes(item) for item in arg)
        if isinstance(arg, dict):
            return {key: self._with_nodes(item) for key, item in arg.items()}
        return arg

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        self._seen.append(tensor)
        self._nodes[id(tensor)] = node


def _by_mask(func: Any, args: Any) -> bool:
    """Whether elements are chosen by a mask: how many follows from its values."""
    if getattr(func, "__name__", "") != "__getitem__":
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)


class Repeated:
    """A function of tensors, lists of tensors and other arguments, that launches kernels.

    The first call with new facts runs it as it is, the second writes it down, the others repeat it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._known: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        self._once: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        facts: list[Any] = []
        tensors: list[Tensor] = []
        try:
            _add_facts(args, facts, tensors)
            first = tensors[0]
        except (_CannotRepeatError, IndexError):
            return self._function(*args)
        if not (first.is_cuda or takes_cpu_tensors) or launching.recording.note is not None:
            return self._function(*args)
        facts.append(first.get_device())
        key = tuple(facts)
        code = self._known.get(key, _UNKNOWN)
        if code is None:
            return self._function(*args)
        if code is not _UNKNOWN:
            with launch_device(first):
                return code(*tensors)
        if key not in self._once:
            if len(self._once) >= _MAX_ENTRIES:
                self._once.clear()
            self._once.add(key)
            return self._function(*args)
        if len(self._known) >= _MAX_ENTRIES:
            self._known.clear()
        result, self._known[key] = self._write_down(args)
        return result

    def _write_down(self, args: Any) -> tuple[Any, Callable[..., Any] | None]:
        recorder = _Recorder()
        own = recorder.arguments(args)
        launching.recording.note = recorder.launch
        try:
            with recorder:
                result = self._function(*own)
        finally:
            launching.recording.note = None
        return result, recorder.finish(result)


def _unknown() -> None: ...


_UNKNOWN = _unknown


def _item(items: Sequence[Tensor], i: int) -> Tensor:
    return items[i]
