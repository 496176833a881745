"""A matrix with orthonormal rows, orthogonalised once for each value of its parameter.

It is the Householder map of ``torch.nn.utils.parametrizations.orthogonal`` without trivialisation,
with the same parameter, so the names in a state_dict and the values are torch's. With the
reflectors V [H, R], the part of the parameter below the diagonal and ones on it, the product of
the reflections applied to E, the first R columns of the identity, is

    Q = E - V S^-1 V_top^T,   S = the part of V^T V above its diagonal + half of that diagonal

(V_top: the first R rows of V), two thin products and a triangular solve, where torch calls LAPACK.
The signs on the parameter's diagonal multiply the columns of Q. torch truncates that diagonal to
integers: there, one step of weight decay makes 0 of 1. Here only the sign counts.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttune import _torch


class _Weight(nn.Module):
    """Holds the parameter under the name that torch's parametrisation gives it."""

    def __init__(self, original: Tensor) -> None:
        super().__init__()
        self.original = nn.Parameter(original)


class _Cache:
    """The last orthogonalised value, with what it was computed from; never copied or pickled."""

    def __init__(self) -> None:
        self.alias: Tensor | None = None  # of the parameter's memory
        self.version: int | None = None
        self.copy: Tensor | None = None  # of the parameter, on the CPU
        self.factors: Factors | None = None
        self.value: Tensor | None = None  # [R, H]
        self.differentiable: Tensor | None = None  # the same, with its place in autograd's graph

    def holds(self, original: Tensor, version: int) -> bool:
        """True if the value is that of ``original`` as it is now."""
        if self.alias is None or self.version != version or not self.alias.is_set_to(original):
            return False
        return self.copy is None or torch.equal(self.copy, original.detach())

    def __deepcopy__(self, memo: Any) -> _Cache:
        return _Cache()

    def __reduce__(self) -> Any:
        return _Cache, ()


class Orthonormal(nn.Module):
    """``weight`` [H, R] with orthonormal columns, the parameter of a rotation into R dimensions.

    Args:
        features: H.
        rank: R, at most H.
        device: of the parameter, which is fp32.
    """

    def __init__(
        self, features: int, rank: int, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        original = torch.empty(features, rank, device=device, dtype=torch.float32)
        if not original.is_meta:
            original = original_of(nn.init.orthogonal_(original))
        self.parametrizations = nn.ModuleDict({"weight": _Weight(original)})
        self._cache = _Cache()
        self.orthogonalisations = 0

    @property
    def original(self) -> nn.Parameter:
        holder: Any = self.parametrizations["weight"]
        parameter: nn.Parameter = holder.original
        return parameter

    @property
    def weight(self) -> Tensor:
        """[H, R]."""
        return self.rows().t()

    def rows(self) -> Tensor:
        """R [R, H], the same tensor until the parameter changes.

        So all of its uses in a forward, or in several before a backward, add up their gradients
        before these go through the orthogonalisation, once a backward. A change is seen by the
        version of the parameter; on a CPU by its values too, which optimizers that write to
        ``.data`` change without a new version. On a GPU every backward drops the value for their
        sake.
        """
        original, cache = self.original, self._cache
        if (
            original.is_meta
            or torch.compiler.is_compiling()
            or _torch.under_dispatch_mode()
            or _torch.in_functorch()
        ):
            return orthonormal_rows(original)  # traced: nothing to remember
        version = _version(original)
        if not (version is not None and cache.holds(original, version)):
            with torch.inference_mode(False), torch.no_grad():
                detached = original.detach().clone()
                cache.factors = factors_of(detached)
                cache.value, cache.differentiable = rows_from(cache.factors), None
                cache.copy = detached if original.device.type == "cpu" else None
            cache.alias, cache.version = original.detach(), version
            self.orthogonalisations += 1
        assert cache.value is not None
        if not (torch.is_grad_enabled() and original.requires_grad):
            return cache.value
        if cache.differentiable is None:
            cache.differentiable = _Orthogonalised.apply(original, cache)  # type: ignore[no-untyped-call]
        rows: Tensor = cache.differentiable
        return rows

    def forward(self, x: Tensor) -> Tensor:
        """x weight, [*, R]."""
        weight = self.weight
        y: Tensor = x.to(weight.dtype) @ weight
        return y


class _Orthogonalised(torch.autograd.Function):
    """The parameter to the value that the cache holds.

    Several backwards may run through one node: nothing is saved that the first of them would free.
    """

    @staticmethod
    def forward(ctx: Any, original: Tensor, cache: _Cache) -> Tensor:
        assert cache.value is not None
        ctx.cache, ctx.version, ctx.original = cache, _version(original), original.detach()
        ctx.factors = cache.factors
        return cache.value.view_as(cache.value)

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, drows: Tensor) -> Any:
        if _version(ctx.original) != ctx.version:
            raise RuntimeError(
                "rotate_layer: expected the parameter of the forward, but it was changed in place"
            )
        if ctx.original.device.type != "cpu":
            ctx.cache.alias = None
        return orthonormal_backward(ctx.factors, drows).to(ctx.original.dtype), None


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class Factors(NamedTuple):
    """What the map and its gradient are made of, in fp32 or wider."""

    reflectors: Tensor  # V [H, R]
    system: Tensor  # S [R, R]
    inner: Tensor  # S^-1 V_top^T [R, R]
    signs: Tensor  # [R]


def _full_precision(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast; entered only where there is one, because that costs more than a thin product."""
    if _torch.any_autocast():
        return torch.autocast(like.device.type, enabled=False)
    return contextlib.nullcontext()


def factors_of(original: Tensor) -> Factors:  # [H, R]
    with _full_precision(original):
        wide = original.to(torch.promote_types(original.dtype, torch.float32))
        reflectors = torch.tril(wide, -1)
        reflectors.diagonal().fill_(1.0)
        gram = reflectors.t() @ reflectors
        system = torch.triu(gram)
        system.diagonal().mul_(0.5)
        top = reflectors[: original.shape[1]].t()
        inner = torch.linalg.solve_triangular(system, top, upper=True)
        signs = torch.where(wide.diagonal() < 0, -1.0, 1.0).to(wide.dtype)
        return Factors(reflectors, system, inner, signs)


def orthonormal_rows(
    original: Tensor,  # [H, R]
) -> Tensor:
    """R [R, H] contiguous, in fp32 or wider, autocast or not."""
    return rows_from(factors_of(original))


def rows_from(factors: Factors) -> Tensor:
    """R [R, H] contiguous."""
    reflectors, _, inner, signs = factors
    with _full_precision(reflectors):
        rows: Tensor = -(reflectors @ inner).t()
        rows.diagonal().add_(1.0)
        return (rows * signs.unsqueeze(1)).contiguous()


def orthonormal_backward(
    factors: Factors,
    drows: Tensor,  # [R, H]
) -> Tensor:
    """The gradient [H, R] of the parameter; zero on its diagonal and above."""
    reflectors, system, inner, signs = factors
    with _full_precision(reflectors):
        dq = (drows * signs.unsqueeze(1)).t().to(reflectors.dtype)  # of Q [H, R]
        dtop = -torch.linalg.solve_triangular(system.t(), reflectors.t() @ dq, upper=False)
        dgram = torch.triu(-dtop @ inner.t())
        dgram.diagonal().mul_(0.5)
        dreflectors = reflectors @ (dgram + dgram.t()) - dq @ inner.t()
        dreflectors[: len(dtop)] += dtop.t()
        return torch.tril(dreflectors, -1)


def original_of(
    weight: Tensor,  # [H, R]
) -> Tensor:
    """The parameter [H, R] of a matrix with orthonormal columns."""
    packed, tau = torch.geqrf(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    diagonal = packed.diagonal()
    diagonal.copy_(torch.where(diagonal < 0, -1.0, 1.0))
    # LAPACK leaves a column alone where tau is 0; the map here reflects it, which turns its sign.
    diagonal[tau == 0] *= -1
    return packed
