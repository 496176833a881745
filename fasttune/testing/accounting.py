"""Counts what a function does to memory, without a clock: calls, bytes moved, bytes saved for
backward.

A GPU is not needed to say how many kernels a layer launches, how many bytes it moves and how many
it keeps for backward: all three follow from the operators that autograd dispatches. ``count`` runs
a function once, on real, meta or fake tensors, and adds them up, so a Llama-3-8B sized block is
counted in milliseconds on meta tensors.

The model of an operator:

- It reads each tensor argument once and writes each result once. What a kernel reads twice is
  counted once: the numbers are the least traffic of that operator sequence, and the same for every
  device.
- The bytes of a tensor are the distinct elements it addresses: an expanded dimension costs one
  element, a column slice its own columns only. Two arguments that address the same elements
  (``mm(x, x.t())``) are read once.
- Operators that only return aliases (view, t, expand, detach, slice, ...) and allocations
  (``empty``) cost nothing, not even a call. In-place operators read and write; ``zero_``,
  ``fill_``, ``copy_`` and ``out=`` only write.
- Operators that read through indices (``embedding``, ``gather``, ``nll_loss``, ...) read what they
  fetch, not the table.
- A custom operator is one opaque call with its own arguments and results, a lower bound, unless
  ``register_cost`` says what it launches.

Where torch itself dispatches differently per device, so do the numbers: dropout is three calls on
CPU and meta and one ``native_dropout`` on a GPU, and attention picks its kernel by device. Layer
norm's fp32 statistics of a bf16 input are bf16 on CPU and fp32 on meta.
"""

from __future__ import annotations

import io
import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Counts", "Launch", "Part", "Traffic", "count", "register_cost", "tensor_bytes"]

TABLE_WIDTH = 120  # characters; fits the longest operator names of torch


@dataclass(frozen=True)
class Launch:
    """One operator call: its name (``namespace::op``), the bytes it reads and writes, whether it is
    a GEMM, and whether it is opaque: a custom operator whose inner launches nobody declared.
    """

    name: str
    bytes_read: int
    bytes_written: int
    gemm: bool = False
    opaque: bool = False


@dataclass(frozen=True)
class Traffic:
    """The sum over the launches of one operator; all bytes."""

    calls: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes read plus bytes written."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Part:
    """A sequence of launches, in the order of the calls: the forward, the backward, or both."""

    launches: tuple[Launch, ...] = ()

    @property
    def calls(self) -> int:
        """Number of launches."""
        return len(self.launches)

    @property
    def bytes_read(self) -> int:
        """Bytes read, each argument of each launch once."""
        return sum(launch.bytes_read for launch in self.launches)

    @property
    def bytes_written(self) -> int:
        """Bytes written, each result of each launch once."""
        return sum(launch.bytes_written for launch in self.launches)

    @property
    def bytes_moved(self) -> int:
        """Bytes read plus bytes written."""
        return self.bytes_read + self.bytes_written

    @property
    def gemm(self) -> Part:
        """Only the matrix products (mm, addmm, bmm, linear, ... and launches declared as GEMM)."""
        return Part(tuple(launch for launch in self.launches if launch.gemm))

    @property
    def outside_gemm(self) -> Part:
        """Everything but the matrix products: what fusion can remove."""
        return Part(tuple(launch for launch in self.launches if not launch.gemm))

    @property
    def opaque(self) -> Part:
        """Custom operators without a registered cost: the least they can move. A comparison with
        operators counted one by one is fair only where this is empty.
        """
        return Part(tuple(launch for launch in self.launches if launch.opaque))

    @property
    def by_op(self) -> dict[str, Traffic]:
        """Operator name -> traffic, the largest mover first."""
        sums: dict[str, Traffic] = {}
        for launch in self.launches:
            before = sums.get(launch.name, Traffic())
            sums[launch.name] = Traffic(
                before.calls + 1,
                before.bytes_read + launch.bytes_read,
                before.bytes_written + launch.bytes_written,
            )
        return dict(sorted(sums.items(), key=lambda item: -item[1].bytes_moved))

    def __add__(self, other: Part) -> Part:
        return Part(self.launches + other.launches)


@dataclass(frozen=True)
class Counts:
    """What ``count`` found. ``calls``, ``bytes_*``, ``by_op`` and ``outside_gemm`` are those of
    ``total``.

    ``saved_bytes`` is what the autograd graph alone keeps alive between forward and backward, each
    storage once.
    """

    forward: Part
    backward: Part
    saved_bytes: int

    @property
    def total(self) -> Part:
        """Forward and backward together."""
        return self.forward + self.backward

    @property
    def calls(self) -> int:
        """Number of launches, forward and backward."""
        return self.total.calls

    @property
    def bytes_read(self) -> int:
        """Bytes read, forward and backward."""
        return self.total.bytes_read

    @property
    def bytes_written(self) -> int:
        """Bytes written, forward and backward."""
        return self.total.bytes_written

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written, forward and backward."""
        return self.total.bytes_moved

    @property
    def by_op(self) -> dict[str, Traffic]:
        """Operator name -> traffic, forward and backward."""
        return self.total.by_op

    @property
    def outside_gemm(self) -> Part:
        """Forward and backward without the matrix products."""
        return self.total.outside_gemm

    def __str__(self) -> str:
        table = Table(
            "operator",
            *(f"{part} {what}" for part in ("forward", "backward") for what in ("calls", "MiB")),
            caption=f"saved for backward: {_mib(self.saved_bytes)} MiB",
        )
        for column in table.columns[1:]:
            column.justify = "right"
        forward, backward = self.forward.by_op, self.backward.by_op
        opaque = self.total.opaque.by_op
        for name in self.by_op:
            label = f"{name} (opaque)" if name in opaque else name
            table.add_row(label, *_cells(forward.get(name)), *_cells(backward.get(name)))
        table.add_section()
        table.add_row("total", *_cells(self.forward), *_cells(self.backward))
        table.add_row(
            "outside GEMM",
            *_cells(self.forward.outside_gemm),
            *_cells(self.backward.outside_gemm),
        )
        console = Console(file=io.StringIO(), width=TABLE_WIDTH)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()


def _mib(number_of_bytes: int) -> str:
    return f"{number_of_bytes / 2**20:,.3f}"


def _cells(traffic: Traffic | Part | None) -> tuple[str, str]:
    return ("", "") if traffic is None else (str(traffic.calls), _mib(traffic.bytes_moved))


# --- bytes of a tensor ---------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements that a strided tensor of any shape, dtype and device
    addresses.
    """
    return _footprint(tensor)[1]


def _footprint(tensor: Tensor) -> tuple[Hashable, int]:
    """(identity, bytes) of the elements a tensor addresses; equal identities address the same
    elements.
    """
    itemsize = tensor.element_size()
    if tensor.layout is not torch.strided:
        return id(tensor), tensor.numel() * itemsize
    merged: list[tuple[int, int]] = []  # (stride, size), innermost first
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1 or stride == 0:
            continue
        if merged and merged[-1][0] * merged[-1][1] == stride:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((stride, size))
    span = 1 + sum(stride * (size - 1) for stride, size in merged)
    # Overlapping windows (unfold) address fewer elements than they have.
    elements = min(span, math.prod(size for _, size in merged)) if tensor.numel() else 0
    identity = (_storage_id(tensor), tensor.storage_offset() * itemsize, itemsize, tuple(merged))
    return identity, elements * itemsize


def _storage_id(tensor: Tensor) -> int:
    # data_ptr() is 0 for every meta storage; the storage object's address is unique while it
    # lives.
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(dict(map(_footprint, tensors)).values())


# --- cost of an operator -------------------------------------------------------------------------

_GEMM_OPS = frozenset(
    (
        *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "matmul", "_addmm_activation"),
        *("_int_mm", "_scaled_mm", "_scaled_grouped_mm", "_grouped_mm"),
        *("linear", "linear_backward", "mkldnn_linear", "mkldnn_linear_backward_input"),
        *("mkldnn_linear_backward_weights", "_linear_pointwise"),
    )
)
# Torch's own operators: one kernel or vendor call each. Every other operator is a custom one.
_TORCH_NAMESPACES = frozenset(("aten", "prims", "mkldnn", "mkldnn_prepacked", "quantized"))
# The first argument is overwritten without being read.
_WRITE_ONLY_OPS = frozenset(
    (
        *("zero_", "fill_", "copy_", "_foreach_zero_", "_foreach_copy_"),
        *("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "geometric_"),
        *("log_normal_", "cauchy_"),
    )
)
# Schemas that annotate a write but touch no element.
_FREE_OPS = frozenset(("record_stream", "_efficientzerotensor"))
# Results that are no tensors, and still the elements are read (and a device waits for it).
_READING_OPS = frozenset(("_local_scalar_dense", "equal", "is_nonzero"))

Cost = Callable[[tuple[Any, ...], Mapping[str, Any], Any], Sequence[Launch]]
_costs: dict[str, Cost] = {}


def register_cost(op_name: str, cost: Cost) -> None:
    """Declares what an operator launches inside, for operators that dispatch does not look into.

    ``op_name`` is ``namespace::op``, without overload. ``cost(args, kwargs, result)`` receives the
    call as dispatched and returns the launches, for instance one fused kernel and one vendor GEMM
    (``Launch(..., gemm=True)``); ``tensor_bytes`` gives the bytes of a tensor. The arguments may be
    meta tensors: only shapes, strides and dtypes may be used.

    Raises ValueError for a name without a namespace and for an operator that has a cost already.
    """
    namespace, separator, op = op_name.partition("::")
    if not (namespace and separator and op) or "." in op:
        raise ValueError(f"op_name must be 'namespace::op' without overload, got {op_name!r}")
    if op_name in _costs:
        raise ValueError(f"op_name {op_name!r} has a cost already")
    _costs[op_name] = cost


def _reads_by_index(name: str, unread: int) -> Cost:
    """Cost of an operator that fetches as many bytes as it returns from argument ``unread``."""

    def cost(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Sequence[Launch]:
        rest = [*args[:unread], *args[unread + 1 :], *kwargs.values()]
        written = _distinct_bytes(_tensors(result))
        return [Launch(name, _distinct_bytes(_tensors(rest)) + written, written)]

    return cost


def _nll_loss_forward(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> Sequence[Launch]:
    log_probabilities, target, *rest = args
    picked = target.numel() * log_probabilities.element_size()
    read = picked + _distinct_bytes(_tensors([target, *rest, *kwargs.values()]))
    return [Launch("aten::nll_loss_forward", read, _distinct_bytes(_tensors(result)))]


def _nll_loss_backward(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> Sequence[Launch]:
    grad, _log_probabilities, *rest = args  # passed for their shape only
    read = _distinct_bytes(_tensors([grad, *rest, *kwargs.values()]))
    return [Launch("aten::nll_loss_backward", read, _distinct_bytes(_tensors(result)))]


for _op in ("embedding", "gather", "index", "index_select"):
    register_cost(f"aten::{_op}", _reads_by_index(f"aten::{_op}", unread=0))
register_cost("aten::nll_loss_forward", _nll_loss_forward)
register_cost("aten::nll_loss_backward", _nll_loss_backward)


def _launches(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Sequence[Launch]:
    name = func._schema.name
    if name in _costs:
        return _costs[name](args, kwargs, result)
    op = name.rpartition("::")[2]
    if op in _FREE_OPS or op.startswith(("empty", "new_empty")):
        return ()
    if torch.Tag.inplace_view in func.tags:
        return ()
    read: list[Tensor] = []
    written: list[Tensor] = []
    storages: set[int] = set()
    creates = op.endswith("_like") or op.startswith("new_")  # take shape and dtype from an argument
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        tensors = list(_tensors(value))
        storages.update(map(_storage_id, tensors))
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        if mutated:
            written += tensors
        overwritten = mutated and (argument.is_out or (position == 0 and op in _WRITE_ONLY_OPS))
        if not overwritten and not (creates and position == 0):
            read += tensors
    # A result that aliases an argument was either mutated (and is in the list) or is a view.
    written += [tensor for tensor in _tensors(result) if _storage_id(tensor) not in storages]
    if not written and op not in _READING_OPS:
        return ()
    return [
        Launch(
            name,
            _distinct_bytes(read),
            _distinct_bytes(written),
            gemm=op in _GEMM_OPS,
            opaque=func.namespace not in _TORCH_NAMESPACES,
        )
    ]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.launches.extend(_launches(func, args, kwargs, result))
        return result


# --- what autograd keeps -------------------------------------------------------------------------


class _Saved:
    """What autograd holds instead of a saved tensor; it lives as long as the node that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        # Not the tensor itself: a node that saves its own result would keep itself alive.
        self.tensor = tensor.detach()


def _nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    pending: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            yield node


def _saved_bytes(saved: Iterable[_Saved], nodes: Iterable[Any], excluded: set[int]) -> int:
    tensors = [handle.tensor for handle in saved]
    for node in nodes:
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            # Attributes that a custom Function put on its ctx, past save_for_backward.
            tensors += [leaf for leaf in tree_leaves(vars(node)) if isinstance(leaf, Tensor)]
    storages = {_storage_id(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(nbytes for storage, nbytes in storages.items() if storage not in excluded)


def _modules(fn: Callable[..., Any], leaves: Iterable[Any]) -> list[nn.Module]:
    candidates = [fn, getattr(fn, "__self__", None), *leaves]
    return [candidate for candidate in candidates if isinstance(candidate, nn.Module)]


def count(
    fn: Callable[..., Any],
    /,
    *args: Any,
    backward: bool = True,
    include_inputs: bool = False,
    include_parameters: bool = False,
    **kwargs: Any,
) -> Counts:
    """Runs ``fn(*args, **kwargs)`` once, and backward from all its outputs, and counts both.

    ``fn`` is a module or a function; it should return only what backward starts from (of a model
    with labels: the loss). The outputs' gradients are ones, made outside the count. Inputs and
    parameters get a gradient exactly where they require one; their ``.grad`` is None during the
    backward, as after ``zero_grad``, and is put back afterwards. Tensors may be real, meta or fake.
    On real tensors ``fn`` really runs: it draws random numbers and moves buffers.

    ``backward=False`` counts the forward alone, with the grad mode of the caller: ``saved_bytes``
    is still what it would keep for a backward. ``include_inputs`` adds tensors found in the
    arguments to ``saved_bytes``, ``include_parameters`` the parameters and buffers of the modules
    found in ``fn`` and the arguments, and every ``nn.Parameter`` that gets a gradient; both are
    alive anyway and are left out by default. Tensors saved under a ``saved_tensors_hooks`` context
    that ``fn`` itself opens belong to that context and are not seen.

    Raises ValueError if ``backward`` is asked for and no output requires a gradient.
    """
    from fasttune.testing import costs  # noqa: F401  registers what our own ops launch inside

    leaves = tree_leaves((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    modules = _modules(fn, leaves)
    parameters = [p for module in modules for p in module.parameters()]
    buffers = [b for module in modules for b in module.buffers()]

    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        handle = _Saved(tensor)
        alive.add(handle)
        return handle

    forward = _Recorder()
    with forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        result = fn(*args, **kwargs)
    outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    nodes = list(_nodes(outputs))
    graph_leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    parameters += [leaf for leaf in graph_leaves if isinstance(leaf, nn.Parameter)]

    excluded: set[int] = set()
    if not include_inputs:
        excluded.update(map(_storage_id, inputs))
    if not include_parameters:
        excluded.update(map(_storage_id, parameters + buffers))
    saved_bytes = _saved_bytes(list(alive), nodes, excluded)

    recorder = _Recorder()
    if backward:
        if not outputs:
            raise ValueError("backward=True needs an output that requires a gradient, got none")
        _run_backward(recorder, outputs, [*parameters, *graph_leaves, *inputs])
    return Counts(Part(tuple(forward.launches)), Part(tuple(recorder.launches)), saved_bytes)


def _run_backward(
    recorder: _Recorder, outputs: Sequence[Tensor], candidates: Iterable[Tensor]
) -> None:
    gradients = [torch.ones_like(output) for output in outputs]
    leaves = {id(t): t for t in candidates if t.is_leaf and t.requires_grad}.values()
    kept = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf, _ in kept:
            leaf.grad = None
        with recorder:
            torch.autograd.backward(outputs, gradients)
    finally:
        for leaf, gradient in kept:
            leaf.grad = gradient
