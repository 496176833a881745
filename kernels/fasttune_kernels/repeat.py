"""Repeating what a launcher did, without its Python.

A launcher's Python (tiles, splits, lists of branches) depends on the facts about its arguments, not
on what lies in them, and takes longer on the host than its kernels take on a GPU if the input is
small. So its launches and torch calls are recorded as straight code once, and done again whenever
the same facts come back: dtypes, shapes, strides, devices and alignments of tensors, and all that
is no tensor by value.

Only known functions are recorded, on arguments and on what was made of them. Anything else that a
launcher does (a value read from a tensor, a tensor from elsewhere, another mode) leaves it to run
as it was written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Parameter, functional
from torch.overrides import TorchFunctionMode

from . import launch as launching
from .launch import PreparedLaunch
from .tables import launch_device

# The number of rows differs from batch to batch: tables must not grow forever. Facts take about 1
# KB, code 10.
_MOST_FACTS, _MOST_CODE = 4096, 512
# Tests set it while the interpreter or a dry run takes CPU tensors.
takes_cpu_tensors = False
# How often kernels were put in the place of others, for which nothing recorded before is right.
_epoch = 0


def forget() -> None:
    """Repeat nothing that was recorded so far: other kernels are launched from now on."""
    global _epoch
    _epoch += 1


_READS = {  # what they return is among the facts, or follows from them
    *(getattr(Tensor, name) for name in ("size", "stride", "dim", "numel", "element_size")),
    *(getattr(Tensor, name) for name in ("is_contiguous", "get_device", "is_floating_point")),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    *(Tensor.is_cuda.__get__, Tensor.is_cpu.__get__),
    torch.promote_types,
}
# Of these, a result that is their argument tells that there was nothing to do.
_CONVERSIONS = ("to", "contiguous")
_METHODS = {
    getattr(Tensor, name): name
    for name in (
        *("new_empty", "new_empty_strided", "new_zeros", "zero_", "copy_", "view", "reshape", "t"),
        *("expand", "unsqueeze", "chunk", "split_with_sizes", "unbind", "sum", "cumsum", "sort"),
        *("add", "add_", "sub", "mul", "mul_", "div", "ne", "addmm_", "masked_fill", "scatter_"),
        *("square", "sqrt_", "clamp_", "div_"),
        *_CONVERSIONS,
    )
}
_INDEXED = Tensor.__getitem__
_FUNCTIONS = {
    *(torch.empty, torch.empty_like, torch.zeros, torch.zeros_like, torch.cat, torch.mul),
    *(torch.mm, torch.addmm, functional.linear, functional.pad, Tensor.split),
    *(torch.linalg.vector_norm, torch.ops.aten.embedding_dense_backward),
}
# Values that generated code can hold.
_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format)


class _CannotRepeatError(Exception):
    pass


def _add_facts(args: Sequence[Any], facts: list[Any], tensors: list[Tensor]) -> None:
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            facts.append(
                (arg.dtype, arg.shape, arg.stride(), arg.get_device(), arg.data_ptr() & 15)
            )
            tensors.append(arg)
        elif kind is list or kind is tuple:
            facts.append(len(arg))
            _add_facts(arg, facts, tensors)
        elif kind is float:  # not the integer that it may equal, and 0.0 is not -0.0
            facts.append((kind, arg or str(arg)))
        elif kind is bool:
            facts.append((kind, arg))
        elif isinstance(arg, Tensor):
            raise _CannotRepeatError
        else:
            facts.append(arg)


def _modes() -> tuple[bool, ...]:
    """What code that is repeated would find otherwise than it was recorded."""
    autocast = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class _Recorder(TorchFunctionMode):
    """Writes down the launches and the torch calls that make or change tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.listens = False  # has heard of a call
        self._graph = fx.Graph()
        self._possible = True
        self._started_in = _modes()
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
        self._note(alias, self._graph.placeholder(f"tensor{len(self._seen)}"))
        return alias

    def launch(self, prepared: PreparedLaunch, args: tuple[Any, ...]) -> None:
        self._try(self._record_launch, prepared, args)

    def finish(self, result: Any) -> Callable[..., Any] | None:
        """The code, a function of None and the tensors; None if it would not do the same."""
        self._try(lambda: self._graph.output(self._with_nodes(result)))
        if not self._possible:
            return None
        # Not as a module of torch.fx, which keeps the source of every one forever.
        code = self._graph.python_code("self")
        names = dict(code.globals)
        exec(compile(code.src, "<repeated>", "exec"), names)
        return names["forward"]  # type: ignore[no-any-return]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.listens = True
        result = func(*args, **(kwargs or {}))
        if func not in _READS:
            self._try(self._record, func, args, kwargs or {}, result)
        return result

    def _try(self, record: Callable[..., None], *args: Any) -> None:
        """Whatever cannot be recorded must not stop what is recorded."""
        try:
            if _modes() != self._started_in:
                raise _CannotRepeatError
            record(*args)
        except Exception:
            self._possible = False

    def _record_launch(self, prepared: PreparedLaunch, args: tuple[Any, ...]) -> None:
        nodes = self._with_nodes(args)
        tensors: list[fx.Node] = []

        def address_of(node: fx.Node) -> fx.Node:
            tensors.append(node)
            return self._graph.call_method("data_ptr", (node,))

        if prepared.by_address:
            nodes = fx.map_arg(nodes, address_of)
        self._graph.call_function(prepared, (nodes, tuple(tensors)))

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = _METHODS.get(func)
        if name in _CONVERSIONS and result is args[0]:
            return
        if func is _INDEXED:
            _check_index(args[1])
        elif name is None and func not in _FUNCTIONS:
            raise _CannotRepeatError
        args, kwargs = self._with_nodes(tuple(args)), self._with_nodes(kwargs)
        if name is not None:
            node = self._graph.call_method(name, args, kwargs)
        else:
            node = self._graph.call_function(func, args, kwargs)
        if isinstance(result, Tensor):
            self._note(result, node)
            return
        for i, part in enumerate(result):
            self._note(part, self._graph.call_function(_item, (node, i)))

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
        if isinstance(arg, slice):
            return slice(*self._with_nodes((arg.start, arg.stop, arg.step)))
        if arg is not Ellipsis and type(arg) not in _CONSTANTS:
            raise _CannotRepeatError
        return arg

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        self._seen.append(tensor)
        self._nodes[id(tensor)] = node


def _item(items: Sequence[Tensor], i: int) -> Tensor:
    return items[i]


def _check_index(index: Any) -> None:
    """Raises for a mask, of which the values say how many elements it takes."""
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, Tensor):
            if item.dtype in (torch.bool, torch.uint8):
                raise _CannotRepeatError
        elif item is not None and item is not Ellipsis and type(item) not in (int, slice):
            raise _CannotRepeatError


class Repeated:
    """A function of tensors, lists of tensors and other arguments, that launches kernels.

    The first call with new facts runs it as it is, the second writes it down, the others repeat it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._code: OrderedDict[tuple[Any, ...], Callable[..., Any] | None] = OrderedDict()
        self._once: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        facts: list[Any] = [_epoch]
        tensors: list[Tensor] = []
        try:
            _add_facts(args, facts, tensors)
            first = tensors[0]
        except (_CannotRepeatError, IndexError):
            return self._function(*args)
        if not (first.is_cuda or takes_cpu_tensors) or launching.recording.note is not None:
            return self._function(*args)
        key = tuple(facts)
        code = self._code.get(key, _unknown)
        if code is None:
            return self._function(*args)
        if code is not _unknown:
            with launch_device(first):
                return code(None, *tensors)
        if key not in self._once:
            if len(self._once) >= _MOST_FACTS:
                self._once.clear()
            self._once.add(key)
            return self._function(*args)
        result, heard, code = self._write_down(args)
        if heard:
            self._code[key] = code
            while len(self._code) > _MOST_CODE:
                self._code.popitem(last=False)
        return result

    def _write_down(self, args: Any) -> tuple[Any, bool, Callable[..., Any] | None]:
        """The result, whether torch's calls were heard (modes may be disabled), and the code."""
        recorder = _Recorder()
        own = recorder.arguments(args)
        launching.recording.note = recorder.launch
        try:
            with recorder:
                result = self._function(*own)
        finally:
            launching.recording.note = None
        return result, recorder.listens, recorder.finish(result)


def _unknown(*tensors: Any) -> Any:
    """In the place of code that was not looked for yet."""
