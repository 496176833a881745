"""LoRA on the weights of experts (PEFT's target_parameters), on the side of the activations.

PEFT forms the updated weights of all experts at every forward, and in backward a gradient of their
size. Here the module's own forward runs with LazyExperts in place of its parameters, whichever
implementation is chosen (a loop, grouped or batched products), and nothing of that size is made.

That this is the same is proven: a module's forward runs on small random weights, once lazy and once
with the updated weights, and must agree without asking for them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fasttune.integrations import peft_experts
from fasttune.ops.lora_experts import LowRank
from fasttune.ops.policy import experts_too_small
from fasttune.patching import guard, probe, state, swap
from fasttune.patching.lazy_experts import LazyExperts, Use
from fasttune.patching.session import EXCLUDED, Session
from fasttune.reason import Reason

KIND = "experts"
_UNIT = 8  # of the features in a proof: grouped products want strides of 16 bytes
_RANKS = (3, 2)
_ROWS = 5
# Both sides sum the same terms in another order; a wrong formula is off by the size of the result.
_ROUNDINGS = 32


def patch_layers(session: Session) -> None:
    """Swap the outermost wrapper of every module whose adapted parameters are proven."""
    for name, layer in peft_experts.outermost(session.model):
        if not session.chosen(name):
            session.skip(KIND, name, EXCLUDED)
        elif KIND in swap.kinds_of(layer):
            state.of(layer, KIND).strict = session.strict
        elif not session.refuse(KIND, name, layer):
            reason = _proven(session, layer)
            if reason is None:
                session.swap(layer, name, KIND)
            else:
                session.skip(KIND, name, reason)


def _proven(session: Session, layer: nn.Module) -> str | None:
    module, names = peft_experts.owner(layer), tuple(peft_experts.adapted(layer))
    key = (KIND, names, probe.signature(module))
    if key not in session.proofs:
        session.proofs[key] = why_not_lazy(module, names)
    reason: str | None = session.proofs[key]
    return reason


# ---------------------------------------------------------------------------- proof


def why_not_lazy(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why a module cannot run with lazy weights in place of the parameters ``names``, or None."""
    title = swap.original_class(module).__name__
    shapes = _small_shapes(module, names)
    if isinstance(shapes, str):
        return f"{title}: {shapes}"
    random = probe.generator()
    with probe.quiet(), swap.stock():
        own = {name: _normal(shape, random) for name, shape in shapes.items()}
        updates = {name: [_update(own[name], rank, random) for rank in _RANKS] for name in names}
        formed = {
            name: weight + sum(update.product() for update in updates.get(name, ()))
            for name, weight in own.items()
        }
        for arguments in _calls(module, own, names, random):
            try:
                expected = probe.run(_twin(module, formed), *arguments)
            except probe.ANY_ERROR:
                continue
            return _compared(module, own, updates, arguments, expected, title)
    return f"{title}: its forward does not run on (x, indices, weights) or x"


def _compared(
    module: nn.Module,
    own: Mapping[str, Tensor],
    updates: Mapping[str, list[LowRank]],
    arguments: tuple[Tensor, ...],
    expected: Any,
    title: str,
) -> str | None:
    use, twin = Use(), _twin(module, own)
    for name, update in updates.items():
        twin.__dict__[name] = LazyExperts(own[name], update, use)
    before = dict(twin.__dict__)
    try:
        found = probe.run(twin, *arguments)
    except probe.ANY_ERROR as error:
        return f"{title}: its forward fails on lazy weights ({type(error).__name__})"
    if use.touched:
        return f"{title}: its forward needs the updated weight itself ({use.touched[0]})"
    if not use.backends:
        return f"{title}: its forward does not use its adapted parameters"
    if not _same_objects(before, twin.__dict__):
        return f"{title}: its forward sets attributes"
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return f"{title}: its forward returns {type(expected).__name__}, not one tensor"
    depth = max(size for weight in own.values() for size in weight.shape[1:])
    allowed = _ROUNDINGS * depth * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if found.shape == expected.shape and float((found - expected).abs().max()) <= allowed:
        return None
    return f"{title}: with lazy weights its forward computes something else"


def _small_shapes(module: nn.Module, names: tuple[str, ...]) -> dict[str, tuple[int, ...]] | str:
    """The shapes of the parameters, with features divided by what they have in common."""
    shapes = {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None}
    for name in names:
        if len(shapes.get(name, ())) != 3:
            return f"{name} is no stack of matrices"
    experts = shapes[names[0]][0]
    if experts < 2 or any(len(s) < 2 or s[0] != experts for s in shapes.values()):
        return "not every parameter is a stack over the same experts, two or more"
    small = _small_features(shapes)
    return {n: (experts, *(small[size] for size in shape[1:])) for n, shape in shapes.items()}


def _small_features(shapes: Mapping[str, tuple[int, ...]]) -> dict[int, int]:
    """A small number for every number of features; twice as many stay twice as many (gate and up
    are often one matrix), others stay different.
    """
    small: dict[int, int] = {}
    for size in sorted({size for shape in shapes.values() for size in shape[1:]}):
        half = small.get(size // 2) if size % 2 == 0 else None
        small[size] = 2 * half if half else _UNIT * (2 * len(small) + 3)
    return small


def _normal(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    drawn = torch.randn(*shape, generator=random, device="cpu")
    return drawn / math.sqrt(shape[-1])


def _update(weight: Tensor, rank: int, random: torch.Generator) -> LowRank:
    """An update as large as the weight."""
    experts, rows, columns = weight.shape
    left = _normal((experts, rows, rank), random)
    return LowRank(left, _normal((experts, rank, columns), random), 1.0 + rank / 4)


def _calls(
    module: nn.Module, own: Mapping[str, Tensor], names: tuple[str, ...], random: torch.Generator
) -> Iterator[tuple[Tensor, ...]]:
    """What a module of experts may be called with: rows, their experts and the weights of those; or
    rows sorted by expert, the same number for each.
    """
    parameters = inspect.signature(swap.original_class(module).forward).parameters
    experts = len(own[names[0]])
    chosen = torch.stack([torch.randperm(experts, generator=random) for _ in range(_ROWS)])[:, :2]
    weights = torch.rand(_ROWS, 2, generator=random)
    for features in sorted({size for name in names for size in own[name].shape[1:]}):
        if len(parameters) == 2:  # self and x
            yield (torch.randn(experts * _ROWS, features, generator=random),)
        else:
            x = torch.randn(_ROWS, features, generator=random)
            yield x, chosen, weights
            yield x, weights, chosen


def _twin(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    children = dict(module._modules)
    twin = probe.imitation(module, parameters=parameters, children=children, training=True)
    shapes = {n: tuple(p.shape) for n, p in module._parameters.items() if p is not None}
    small, experts = _small_features(shapes), {shape[0] for shape in shapes.values()}
    for name, value in module.__dict__.items():  # forwards reshape by sizes that they keep
        if type(value) is int and value in small and value not in experts:
            twin.__dict__[name] = small[value]
    return twin


def _same_objects(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first.keys() == second.keys() and all(second[n] is v for n, v in first.items())


# ---------------------------------------------------------------------------- forward


def _forward(layer: Any, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    record = state.of(layer, KIND)
    # What is too small are the experts, of any input of this dtype.
    if type(x) is Tensor and not is_compiling() and guard.was_small(record, x, None):
        return original(layer, x, *args, **kwargs)
    reason = _why_original(layer, x, kwargs)
    if reason is guard.TOO_SMALL:
        guard.remember_small(record, x, None)
    if reason is not None:
        if reason is not guard.COMPILED:
            state.note_fallback(record, reason)
        return original(layer, x, *args, **kwargs)
    use, module = Use(), peft_experts.owner(layer)
    # An object of the module's class with its attributes: the module itself stays untouched.
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for name, updates in peft_experts.updates(layer).items():
        twin.__dict__[name] = LazyExperts(getattr(module, name), updates, use)
    y = type(module).forward(twin, x, *args, **kwargs)
    if use.touched:
        what = ", ".join(sorted(set(use.touched)))
        state.note_fallback(record, Reason(f"its forward needs the updated weight itself ({what})"))
    else:
        backend = ", ".join(sorted(use.backends - {""})) or record.backend
        state.note_fused(record, backend, 0)
    return y


def _why_original(layer: Any, x: Any, kwargs: dict[str, Any]) -> Reason | None:
    if kwargs.get("adapter_names") is not None:
        return guard.EXTRA
    reason = guard.why_original(layer, x, (), {}) or peft_experts.why_original(layer)
    if reason is not None:
        return reason
    small = experts_too_small(x, peft_experts.adapted_elements(layer))
    return guard.TOO_SMALL if small else None


swap.register_kind(KIND, _forward)
