"""LazyLogits: what the head returns while a loss is about to consume its logits.

It is no tensor, so output walkers (accelerate, DDP) leave it alone. The arithmetic that models do
between head and loss (scale, divide, tanh) is recorded, so that one mechanism covers every causal
language model; anything else that touches the object gets the real logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fasttune import _torch

_Number = float  # inside the class, ``float`` is the tensor method
_SWITCH = "fasttune.patch(model, fused_loss=False)"


@dataclass(frozen=True)
class Snapshot:
    """What a head computed with: its tensors at their versions, and the state of its adapters.

    Two snapshots are equal if the head would compute the same. Writes through ``.data`` do not move
    a version and are not seen.
    """

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    facts: tuple[object, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot) or len(self.tensors) != len(other.tensors):
            return False
        same = all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
        return same and self.versions == other.versions and self.facts == other.facts

    __hash__ = None  # type: ignore[assignment]


class LazyLogits:
    """The logits [*, V] of a head that has not run yet.

    Args:
        hidden: [*, H], the head's input.
        head: the module whose output the logits are.
        snapshot: ``snapshot(head)``, what its result depends on beside the input.
        project: ``project(head, hidden)``, the head's own forward; a module-level function, so that
            deepcopy of the model does not drag another head along.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: nn.Module,
        project: Callable[[nn.Module, Tensor], Tensor],
        snapshot: Callable[[nn.Module], Snapshot],
        chain: tuple[tuple[str, float], ...] = (),
        parent: LazyLogits | None = None,
    ) -> None:
        self._hidden, self._head, self._chain = hidden, head, chain
        self._project, self._snapshot = project, snapshot
        self._values: list[Tensor] = []  # the real logits, once somebody asked
        self._before: Snapshot
        self._version: int
        self._autocast: torch.dtype | None
        self._grad: bool
        if parent is not None:
            self._before, self._version = parent._before, parent._version
            self._autocast, self._grad = parent._autocast, parent._grad
            self._touched: list[str] = parent._touched
            return
        self._before, self._version = snapshot(head), hidden._version
        self._autocast = _torch.autocast_dtype(hidden.device.type)
        self._grad = torch.is_grad_enabled()
        self._touched = []

    @property
    def hidden(self) -> Tensor:
        """The head's input [*, H]."""
        return self._hidden

    @property
    def head(self) -> nn.Module:
        return self._head

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The autocast dtype in force when the head was called."""
        return self._autocast

    @property
    def touched(self) -> list[str]:
        """What asked for the real logits so far."""
        return self._touched

    def scale_and_softcap(self) -> tuple[float, float] | None:
        """(logit_scale, softcap) of the recorded arithmetic, or None if it has another form."""
        scale, outer, capped = 1.0, 1.0, False
        for operation, value in self._chain:
            if operation == "tanh" and capped:
                return None
            if operation == "tanh":
                capped = True
            elif capped:
                outer *= value
            else:
                scale *= value
        if not capped:
            return scale, 0.0
        return (scale * outer, outer) if outer > 0 else None

    def materialize(self, why: str = "materialize()") -> Tensor:
        """The real logits, computed once; under no_grad a detached alias of the same memory.

        Raises:
            RuntimeError: the head or its input changed since the head was called (a parameter was
                updated, adapters were switched), so that they can no longer be computed.
        """
        if not self._values:
            self._touched.append(why)
            if self._hidden._version != self._version or self._snapshot(self._head) != self._before:
                raise RuntimeError(
                    "the logits of this forward were not computed, because the loss did not need "
                    "them, and the head has been updated or changed since; read them before "
                    f"optimizer.step() or use {_SWITCH}"
                )
            # With the graph of the forward, also where they are first read under no_grad.
            with torch.set_grad_enabled(self._grad), self._autocast_again():
                value = self._project(self._head, self._hidden)
                for operation, factor in self._chain:
                    value = torch.tanh(value) if operation == "tanh" else value * factor
            self._values.append(value)
        value = self._values[0]
        return value if torch.is_grad_enabled() else value.detach()

    def _autocast_again(self) -> torch.autocast:
        dtype = self._autocast
        kind = self._hidden.device.type
        return torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    # ------------------------------------------------------------------ looks like a tensor

    dtype = torch.float32  # accelerate upcasts outputs that say they are 16-bit

    @property
    def requires_grad(self) -> bool:
        return self._grad

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], head_width(self._head)))

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def ndim(self) -> int:
        return self._hidden.dim()

    def dim(self) -> int:
        return self._hidden.dim()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def float(self) -> LazyLogits:
        return self

    def contiguous(self) -> LazyLogits:
        return self

    def tanh(self) -> LazyLogits | Tensor:
        return self._record("tanh", 0.0)

    def _record(self, operation: str, value: _Number) -> LazyLogits | Tensor:
        if self._values:  # somebody holds the real logits and may have written into them
            real = self.materialize()
            return torch.tanh(real) if operation == "tanh" else real * value
        chain = (*self._chain, (operation, value))
        return LazyLogits(
            self._hidden, self._head, self._project, self._snapshot, chain, parent=self
        )

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (int, float)):
            return self._record("mul", float(other))
        return self.materialize("multiplication") * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, (int, float)) and other != 0:
            return self._record("mul", 1.0 / other)
        return self.materialize("division") / other

    def __abs__(self) -> Tensor:
        return self.materialize("abs").abs()

    def __contains__(self, value: Any) -> bool:
        return value in self.materialize("a search")

    def __neg__(self) -> Tensor:
        return -self.materialize("negation")

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialize("indexing")[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.materialize("an in-place write")[index] = value

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return iter(self.materialize("iteration"))

    def __repr__(self) -> str:
        return f"LazyLogits(shape={tuple(self.shape)}, not computed)"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.materialize(f".{name}"), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function in (torch.tanh, Tensor.tanh) and len(args) == 1 and not kwargs:
            return args[0].tanh()
        name = getattr(function, "__name__", str(function))

        def real(value: Any) -> Any:
            return value.materialize(f"torch.{name}") if isinstance(value, LazyLogits) else value

        args, kwargs = pytree.tree_map(real, (args, kwargs or {}))
        return function(*args, **kwargs)


def _binary(name: str) -> Callable[[LazyLogits, Any], Any]:
    def method(self: LazyLogits, other: Any) -> Any:
        return getattr(self.materialize(name), name)(other)

    return method


def _in_place(name: str) -> Callable[[LazyLogits, Any], LazyLogits]:
    def method(self: LazyLogits, other: Any) -> LazyLogits:
        getattr(self.materialize(name), name)(other)
        return self

    return method


for _name in (
    *("add", "radd", "sub", "rsub", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod"),
    *("pow", "rpow", "matmul", "rmatmul", "eq", "ne", "lt", "le", "gt", "ge"),
):
    setattr(LazyLogits, f"__{_name}__", _binary(f"__{_name}__"))
for _name in ("iadd", "isub", "imul", "itruediv"):
    setattr(LazyLogits, f"__{_name}__", _in_place(f"__{_name}__"))
# Comparisons are elementwise, as a tensor's; hashing stays by identity, as a tensor's.
LazyLogits.__hash__ = object.__hash__  # type: ignore[method-assign]


def head_width(head: Any) -> int:
    """V, the number of logits that a head makes: nn.Linear, or PEFT's wrappers of one."""
    while not isinstance(getattr(head, "out_features", None), int):
        head = getattr(head, "base_layer", None) or head.original_module
    width: int = head.out_features
    return width
