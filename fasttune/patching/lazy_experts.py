"""LazyExperts: the updated weights of a stack of experts that are not formed.

A module's own forward runs with these in place of its parameters. What it does to them is a choice
of experts, a transposition, and a product with rows; products go to fasttune.ops.lora_experts.
Anything else gets the real weights, as PEFT would have formed them, and is recorded, so that the
result never depends on what is covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import functional

from fasttune import _torch
from fasttune.ops.lora_experts import LowRank, batched_product, expert_linear, grouped_product
from fasttune.patching import state


@dataclass
class Use:
    """What one forward did with its weights.

    Attributes:
        touched: what asked for the real weights.
        backends: what computed products without them; "" where there is no graph to tell.
    """

    touched: list[str] = field(default_factory=list)
    backends: set[str] = field(default_factory=set)


class LazyExperts:
    """W + sum_j s_j L_j R_j: [E, *, *] of a stack, [*, *] of one expert, or gathered [S, *, *].

    Args:
        weight: W.
        updates: the s_j L_j R_j, with the leading dimensions of the weight.
        use: shared by everything that comes from one stack.
    """

    def __init__(self, weight: Tensor, updates: Sequence[LowRank], use: Use) -> None:
        self._weight, self._updates, self._use = weight, tuple(updates), use
        self._real: Tensor | None = None
        self._experts: list[LazyExperts] = []

    def materialize(self, why: str) -> Tensor:
        """The real weight, formed once."""
        if self._real is None:
            self._use.touched.append(why)
            with torch.autocast(self._weight.device.type, enabled=False):
                updates = [own.product().to(self._weight.dtype) for own in self._updates]
                self._real = self._weight + sum(updates[1:], start=updates[0])
        return self._real

    # ------------------------------------------------------------------ looks like a tensor

    @property
    def shape(self) -> torch.Size:
        return self._weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def ndim(self) -> int:
        return self._weight.ndim

    def dim(self) -> int:
        return self._weight.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self._weight.numel()

    def __len__(self) -> int:
        return len(self._weight)

    # ------------------------------------------------------------------ choice, transposition

    def __getitem__(self, index: Any) -> Any:
        if self.ndim == 3 and _is_integer(index):
            if not self._experts:  # their gradients are stacked once, not added up E times
                self._experts = self._unbound()
            return self._experts[int(index)]
        if self.ndim == 3 and _are_integers(index):
            updates = [own.map(lambda factor: factor[index]) for own in self._updates]
            return LazyExperts(self._weight[index], updates, self._use)
        return self.materialize("indexing")[index]

    def _unbound(self) -> list[LazyExperts]:
        updates = [
            [
                LowRank(left, right, own.scaling)
                for left, right in zip(own.left.unbind(), own.right.unbind(), strict=True)
            ]
            for own in self._updates
        ]
        experts = zip(self._weight.unbind(), zip(*updates, strict=True), strict=True)
        return [LazyExperts(weight, own, self._use) for weight, own in experts]

    @property
    def mT(self) -> LazyExperts:
        return LazyExperts(self._weight.mT, [own.mT for own in self._updates], self._use)

    @property
    def T(self) -> Any:
        return self.mT if self.ndim == 2 else self.materialize("T").T

    def t(self) -> Any:
        return self.T

    def transpose(self, first: int, second: int) -> Any:
        if {first % self.ndim, second % self.ndim} == {self.ndim - 2, self.ndim - 1}:
            return self.mT
        return self.materialize("transpose").transpose(first, second)

    # ------------------------------------------------------------------ products

    def linear(self, x: Any, bias: Tensor | None = None) -> Tensor | None:
        """x times the transposed weight of one expert, or None if the call is not covered."""
        if self.ndim != 2 or not _is_plain(x) or x.dim() == 0 or x.shape[-1] != self.shape[1]:
            return None
        autocast = _torch.autocast_dtype(x.device.type)
        if x.device != self.device or (autocast is None and x.dtype != self.dtype):
            return None
        y = expert_linear(x, self._weight, self._updates, bias)
        self._use.backends.add(state.backend_of(y))
        return y

    def after(self, x: Any) -> Tensor | None:
        """x times the weight, or None if the call is not covered."""
        if self.ndim == 2:
            return self.mT.linear(x)
        if not _is_plain(x) or x.dim() != 3:
            return None
        self._use.backends.add("torch")
        return batched_product(x, self._weight, self._updates)

    def before(self, x: Any) -> Tensor | None:
        """The weight times x, or None if the call is not covered."""
        if not _is_plain(x) or x.dim() not in (1, self.ndim):
            return None
        if x.dim() == 1:
            return self.linear(x)
        y = self.mT.after(x.mT)
        return None if y is None else y.mT

    def grouped(self, grouped_mm: Any, x: Any, offs: Any) -> Tensor | None:
        """Rows of x by the weights of their experts, or None if the call is not covered."""
        if self.ndim != 3 or not _is_plain(x) or x.dim() != 2 or not isinstance(offs, Tensor):
            return None
        self._use.backends.add("torch")
        return grouped_product(grouped_mm, x, self._weight, self._updates, offs)

    # ------------------------------------------------------------------ anything else

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

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
        kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
        y = _product(function, args, kwargs)
        if y is not None:
            return y
        name = getattr(function, "__name__", str(function))

        def real(value: Any) -> Any:
            return value.materialize(f"torch.{name}") if isinstance(value, LazyExperts) else value

        args, kwargs = pytree.tree_map(real, (args, kwargs))
        return function(*args, **kwargs)


_MATMUL = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm,
           Tensor.__matmul__}  # fmt: skip


def _product(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a product of torch with lazy weights gives, or None if it is not covered."""
    if len(args) < 2 or isinstance(args[0], LazyExperts) is isinstance(args[1], LazyExperts):
        return None
    first, second, *more = args
    if function in _MATMUL and not more and not kwargs:
        return second.after(first) if isinstance(second, LazyExperts) else first.before(second)
    if not isinstance(second, LazyExperts):
        return None
    if function is functional.linear and kwargs.keys() <= {"bias"} and len(more) <= 1:
        return second.linear(first, *more, **kwargs)
    if function is _torch.grouped_mm and kwargs.keys() == {"offs"} and not more:
        return second.grouped(function, first, kwargs["offs"])
    return None


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor and x.is_floating_point()


def _is_integer(index: Any) -> bool:
    return type(index) is int or (_are_whole(index) and index.dim() == 0)


def _are_integers(index: Any) -> bool:
    return _are_whole(index) and index.dim() == 1


def _are_whole(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
