"""Activation modules: found because they have no parameters, proven by their values.

Fused, an activation keeps nothing but its input, and the projection that follows rebuilds its own
input from it instead of keeping a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops.bias_activation import apply_bias_activation
from fasttune.ops.policy import row_wise_too_small
from fasttune.patching import guard, probe, state, swap
from fasttune.patching.session import Session
from fasttune.reason import Reason

KIND = "activation"


@dataclass(frozen=True)
class ActivationPlan:
    """What an activation module computes: its name, in how many operators of torch, and its
    attributes at the time of the proof."""

    name: str
    operations: int
    settings: tuple[tuple[str, Any], ...]


# Two ways to write one function differ by a few roundings of fp64, two functions by far more.
_RTOL, _ATOL = 1e-9, 1e-13


def patch_layers(session: Session) -> None:
    """Swap every module that computes a known activation and has no state."""
    inside = {
        id(child)
        for module in session.model.modules()
        for kind, children in (("mlp", module.children()), ("prefix", module.modules()))
        if kind in swap.kinds_of(module)
        for child in children
    }
    for name, module in session.candidates(KIND):
        if module._modules or module._parameters or module._buffers or id(module) in inside:
            continue
        key = (KIND, probe.signature(module))
        if key not in session.proofs:
            session.proofs[key] = prove(module)
        plan = session.proofs[key]
        if plan is not None and not session.refuse(KIND, name, module):
            session.swap(module, name, KIND, plan)


def samples() -> Tensor:
    """[N] fp64: a grid over the curved part, random values, and far outside."""
    grid = torch.linspace(-12, 12, 193, dtype=torch.float64, device="cpu")
    far = torch.tensor([-300.0, -40.0, 0.0, 40.0, 300.0], dtype=torch.float64, device="cpu")
    random = torch.randn(64, generator=probe.generator(), dtype=torch.float64, device="cpu")
    return torch.cat([grid, far, 4 * random])


def close(a: Tensor, b: Tensor) -> bool:
    """True if a and b are one function written in two ways (fp64)."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, _RTOL, _ATOL)


def prove(module: nn.Module) -> ActivationPlan | None:
    """The activation that the module computes, in training as in eval, or None."""
    x = samples()
    outputs, operations = [], 0
    for training in (True, False):
        twin = probe.imitation(module, training=training)
        given = x.clone()
        with probe.quiet():
            try:
                y = probe.run(twin, given)
                operations = probe.operations(twin, given)
            except probe.ANY_ERROR:
                return None
        if not isinstance(y, Tensor) or y is given or not torch.equal(given, x):
            return None  # identity, or in place
        outputs.append(y)
    if not torch.equal(*outputs):
        return None
    for name, known in ACTIVATIONS.items():
        if close(outputs[0], known.value(x)):
            return ActivationPlan(name, operations, probe.settings(module))
    return None


def _forward(module: nn.Module, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    record = state.of(module, KIND)
    if guard.is_small(record, x, row_wise_too_small, record.plan.operations):
        return original(module, x, *args, **kwargs)
    reason = guard.why_original(module, x, args, kwargs)
    if reason is None and probe.settings(module) != record.plan.settings:
        reason = Reason("an attribute changed since fasttune.patch")
    if reason is None:
        y = apply_bias_activation(x, None, activation=record.plan.name)
        state.note_output(record, y)
        return y
    if reason is not guard.COMPILED:
        state.note_fallback(record, reason)
    return original(module, x, *args, **kwargs)


swap.register_kind(KIND, _forward, of_tensor=True)
