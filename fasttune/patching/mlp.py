"""Gated MLPs: found and proven with their children stubbed, without names or weights.

The module's own forward runs once on stubs that return fresh random tensors and record their
inputs. If two stubs saw the input, and the next one saw act(a) * b of what they returned for an
activation that is known, and each following child saw what the one before returned, then this is
a gated MLP, and the order of the calls is its plan. A packed one has a single stub of double width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _torch
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops.glu import apply_glu
from fasttune.ops.policy import mlp_too_small
from fasttune.ops.scaled_glu import apply_scaled_glu
from fasttune.patching import guard, ia3, probe, state, swap
from fasttune.patching.activation import close
from fasttune.patching.session import Session
from fasttune.reason import Reason

KIND = "mlp"
_ROWS, _FEATURES = 3, 24
_MOST_CHILDREN = 8


@dataclass(frozen=True)
class GatedPlan:
    """How a gated MLP computes.

    Attributes:
        inputs: children that are called with the input, in order: two, or one packed.
        gate_first: the first of the two, or the first half of the packed one, is the gate.
        activation: of the gate.
        chain: children that are called one after the other on the product.
        settings: what else the proof depended on (:func:`_settings`), as it was then.
    """

    inputs: tuple[str, ...]
    gate_first: bool
    activation: str
    chain: tuple[str, ...]
    settings: tuple[Any, ...]


def patch_layers(session: Session) -> None:
    """Swap every module whose forward is proven to be that of a gated MLP."""
    for name, module in session.candidates(KIND):
        if not _looks_like_an_mlp(module):
            continue
        key = (KIND, probe.signature(module))
        if key not in session.proofs:
            session.proofs[key] = prove(module)
        plan = session.proofs[key]
        if isinstance(plan, str):
            session.skip(KIND, name, plan)
        elif plan is not None and not session.refuse(KIND, name, module):
            session.swap(module, name, KIND, plan)


# ---------------------------------------------------------------------------- proof


def _opaque(child: nn.Module) -> bool:
    return isinstance(child, nn.Dropout) or any(True for _ in child.parameters())


def _looks_like_an_mlp(module: nn.Module) -> bool:
    children = [child for child in module._modules.values() if child is not None]
    if module._parameters or not 2 <= len(children) <= _MOST_CHILDREN:
        return False
    linears = [c for c in children if _opaque(c) and probe.width(c) is not None]
    return 2 <= len(linears) <= 3


class _Stub(nn.Module):
    """Stands for a child: returns a fresh random tensor and records the call."""

    def __init__(self, name: str, real: nn.Module, calls: list[_Call], random: torch.Generator):
        super().__init__()
        self.__dict__.update(_name=name, _real=real, _calls=calls, _random=random)

    def forward(self, x: Tensor) -> Tensor:
        features = probe.width(self._real) or x.shape[-1]
        y = torch.randn(
            *x.shape[:-1], features, generator=self._random, dtype=x.dtype, device="cpu"
        )
        y = 4 * y
        self._calls.append(_Call(self._name, x, y))
        return y

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # models ask for its dtype
            return torch.empty(0, dtype=torch.float64, device="cpu")
        return getattr(self.__dict__["_real"], name)


@dataclass(frozen=True)
class _Call:
    child: str
    x: Tensor
    y: Tensor


def prove(module: nn.Module) -> GatedPlan | str | None:
    """The plan of a gated MLP, why something like one is none, or None for anything else."""
    plans = [_prove(module, training) for training in (True, False)]
    if any(isinstance(plan, str) for plan in plans):
        return next(plan for plan in plans if isinstance(plan, str))
    return plans[0] if plans[0] == plans[1] else None


def _prove(module: nn.Module, training: bool) -> GatedPlan | str | None:
    calls: list[_Call] = []
    random = probe.generator()
    children = {
        name: _Stub(name, child, calls, random) if child is not None and _opaque(child) else child
        for name, child in module._modules.items()
    }
    x = torch.randn(1, _ROWS, _FEATURES, generator=random, dtype=torch.float64, device="cpu")
    twin = probe.imitation(module, children=children, training=training)
    with probe.quiet():
        try:
            y = probe.run(twin, x)
        except probe.ANY_ERROR:
            return None
    heads = [call for call in calls if call.x is x]
    chain = calls[len(heads) :]
    if not 1 <= len(heads) <= 2 or not chain or calls[: len(heads)] != heads:
        return None
    if len({call.child for call in calls}) != len(calls) or y is not chain[-1].y:
        return None
    if any(after.x is not before.y for before, after in pairwise(chain)):
        return None
    names = tuple(call.child for call in heads), tuple(call.child for call in chain)
    parts = [call.y for call in heads] if len(heads) == 2 else _halves(heads[0].y)
    if len(parts) != 2:
        return None
    found = _activation_between(parts[0], parts[1], chain[0].x)
    if found is None:
        if parts[0].shape == chain[0].x.shape and len(heads) == 2:
            return f"{type(module).__name__}: what joins its projections is not known"
        return None
    settings = _settings(module, {*names[0], *names[1]})
    return GatedPlan(names[0], found[1], found[0], names[1], settings)


def _settings(module: nn.Module, called: Collection[str]) -> tuple[Any, ...]:
    """Attributes of the module and of the children that the fused forward does not call, with
    their classes and whether they are hooked."""
    own: list[Any] = [probe.settings(module)]
    for name, child in module._modules.items():
        if child is None or name in called:
            continue
        facts = name, swap.original_class(child), _torch.hooked(child)
        own.append((*facts, _settings(child, ())))
    return tuple(own)


def _halves(packed: Tensor) -> list[Tensor]:
    return list(packed.chunk(2, dim=-1)) if packed.shape[-1] % 2 == 0 else []


def _activation_between(a: Tensor, b: Tensor, h: Tensor) -> tuple[str, bool] | None:
    for gate_first, (gate, up) in ((True, (a, b)), (False, (b, a))):
        for name, known in ACTIVATIONS.items():
            if close(known.value(gate) * up, h):
                return name, gate_first
    return None


# ---------------------------------------------------------------------------- forward


def _forward(module: nn.Module, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    record = state.of(module, KIND)
    plan: GatedPlan = record.plan
    if guard.is_small(record, x, mlp_too_small):
        return original(module, x, *args, **kwargs)
    reason = guard.why_original(module, x, args, kwargs)
    if reason is None and _settings(module, plan.inputs + plan.chain) != plan.settings:
        reason = Reason("its activation or an attribute changed since fasttune.patch")
    if reason is None:
        reason = _why_dtypes_differ(module, plan)
    if reason is not None:
        if reason is not guard.COMPILED:
            state.note_fallback(record, reason)
        return original(module, x, *args, **kwargs)
    children: dict[str, Any] = module._modules
    parts = [children[name](x) for name in plan.inputs]
    gate, up = _gate_and_up(plan, parts)
    chain = [children[name] for name in plan.chain]
    scale = _scale_of(chain[0], gate, up)
    if scale is None:
        h = apply_glu(gate, up, plan.activation, plan.gate_first)
        state.note_output(record, h)
    else:  # (IA)^3 on the hidden state: no pass of its own
        scaled = apply_scaled_glu(gate, up, scale, plan.activation, plan.gate_first)
        state.note_output(record, scaled)
        h = ia3.forward_scaled(chain.pop(0), scaled)
    for child in chain:
        h = child(h)
    return h


def _scale_of(child: Any, gate: Any, up: Any) -> Tensor | None:
    """What the child multiplies the hidden state of gate and up by before all else, or None."""
    if ia3.KIND not in swap.kinds_of(child) or type(gate) is not Tensor or not gate.dim():
        return None
    if up is not None:
        fits = type(up) is Tensor and up.dtype == gate.dtype and up.shape == gate.shape
        return ia3.scale_of_input(child, gate) if fits else None
    return ia3.scale_of_input(child, gate[..., : gate.shape[-1] // 2])


def _gate_and_up(plan: GatedPlan, parts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    if len(parts) == 1:
        return parts[0], None
    return (parts[0], parts[1]) if plan.gate_first else (parts[1], parts[0])


def _why_dtypes_differ(module: nn.Module, plan: GatedPlan) -> Reason | None:
    """Some MLPs cast to the dtype of their last weight: a no-op unless the weights differ."""
    dtypes = set()
    for name in (*plan.inputs, *plan.chain):
        weight = getattr(module._modules[name], "weight", None)
        if isinstance(weight, Tensor):
            dtypes.add(weight.dtype)
    return Reason("its projections have several dtypes") if len(dtypes) > 1 else None


swap.register_kind(KIND, _forward, of_tensor=True)
