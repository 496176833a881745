"""Norms: found by structure, proven by numbers, whatever their class is called.

A candidate has no children and no buffers, at most two 1-D parameters and a small positive float
attribute (eps). Its output on random weights is compared with the candidate formulas in every
combination of dtypes; only the combinations that agree are fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _registry, _torch
from fasttune.ops.layer_norm import apply_layer_norm
from fasttune.ops.policy import row_wise_too_small
from fasttune.ops.rms_norm import apply_rms_norm
from fasttune.patching import guard, probe, state, swap
from fasttune.patching.session import Session
from fasttune.reason import Reason

KIND = "norm"
_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
# x dtype, parameter dtype
_COMBINATIONS = (
    *((_FP32, _FP32), (_BF16, _BF16), (_FP16, _FP16)),
    *((_BF16, _FP32), (_FP16, _FP32), (_FP32, _BF16), (_FP32, _FP16)),
)
_LARGEST_EPS = 1e-2
_WEIGHTLESS_WIDTH = 24
# torch's layer norm and a module's own arithmetic sum in another order: units in the last place of
# the largest output of a row. RMS norms have one formula and must agree bit for bit.
_LAYER_NORM_ULPS = 4


@dataclass(frozen=True)
class Formula:
    """What a norm computes.

    Attributes:
        centred: layer norm (True) or RMS norm.
        eps, weight, bias: names of the attribute and the parameters; "" where there is none.
        weight_offset: added to the weight, in fp32 (RMS norm) or in the weight's dtype (layer norm,
            as Nemotron does).
        round_first: the normalised value is rounded before the weight multiplies.
        operations: operators of torch that the module's own forward dispatches.
        proven: (x dtype, parameter dtype, CPU autocast dtype) that were compared.
        settings: its other attributes at the time of the proof.
    """

    centred: bool
    eps: str
    weight: str
    bias: str
    weight_offset: float = 0.0
    round_first: bool = False
    operations: int = 0
    proven: frozenset[tuple[torch.dtype, torch.dtype | None, torch.dtype | None]] = frozenset()
    settings: tuple[tuple[str, Any], ...] = ()


def patch_layers(session: Session) -> None:
    """Swap every norm whose formula is proven."""
    for name, module in session.candidates(KIND):
        if not _looks_like_a_norm(module):
            continue
        key = (KIND, probe.signature(module))
        if key not in session.proofs:
            session.proofs[key] = prove(module)
        formula: Formula | None = session.proofs[key]
        if formula is None:
            if module._parameters:  # a float attribute alone says little
                session.skip(KIND, name, f"{type(module).__name__}: its formula is not known")
        elif not session.refuse(KIND, name, module):
            session.swap(module, name, KIND, formula)


# ---------------------------------------------------------------------------- proof


def _looks_like_a_norm(module: nn.Module) -> bool:
    if module._modules or any(b is not None for b in module._buffers.values()):
        return False
    parameters = [p for p in module._parameters.values() if p is not None]
    if len(parameters) > 2 or any(p.dim() != 1 for p in parameters):
        return False
    if len({p.shape for p in parameters}) > 1:
        return False
    return next(_eps_names(module), None) is not None


def _eps_names(module: nn.Module) -> Iterator[str]:
    for name, value in module.__dict__.items():
        if isinstance(value, float) and 0.0 < value < _LARGEST_EPS:
            yield name


def prove(module: nn.Module) -> Formula | None:
    """The formula of a norm with the combinations in which it holds, or None."""
    best: Formula | None = None
    for formula in _formulas(module):
        if not _agrees(module, formula, *_combinations(formula)[0], None):
            continue  # not in fp32: another formula
        proven = frozenset(
            (x, weight, autocast)
            for x, weight in _combinations(formula)
            for autocast in (None, _BF16)
            if _agrees(module, formula, x, weight, autocast)
        )
        if proven and (best is None or len(proven) > len(best.proven)):
            twin, x = _imitated(module, _FP32, _FP32)
            with probe.quiet():
                operations = probe.operations(twin, x)
            settings = _settings(module, formula)
            best = replace(formula, proven=proven, operations=operations, settings=settings)
    return best


def _settings(module: nn.Module, formula: Formula) -> tuple[tuple[str, Any], ...]:
    """Attributes that the proof depended on; eps is read at every call."""
    return tuple(entry for entry in probe.settings(module) if entry[0] != formula.eps)


def _combinations(formula: Formula) -> list[tuple[torch.dtype, torch.dtype | None]]:
    if formula.weight or formula.bias:
        return list(_COMBINATIONS)
    return [(x, None) for x in (_FP32, _BF16, _FP16)]


def _formulas(module: nn.Module) -> Iterator[Formula]:
    names = [name for name, p in module._parameters.items() if p is not None]
    for eps in _eps_names(module):
        if len(names) == 2:
            for offset in (0.0, 1.0):
                yield Formula(True, eps, names[0], names[1], offset)
                yield Formula(True, eps, names[1], names[0], offset)
            continue
        weight = names[0] if names else ""
        for offset in (0.0, 1.0) if weight else (0.0,):
            for round_first in (True, False) if weight else (False,):
                yield Formula(False, eps, weight, "", offset, round_first)
            yield Formula(True, eps, weight, "", offset)


def _agrees(
    module: nn.Module,
    formula: Formula,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    autocast: torch.dtype | None,
) -> bool:
    twin, x = _imitated(module, x_dtype, weight_dtype)
    before = x.clone()
    with probe.quiet(autocast):
        try:
            theirs = probe.run(twin, x)
        except probe.ANY_ERROR:
            return False
        if not isinstance(theirs, Tensor) or not torch.equal(x, before):
            return False
        with _registry.use_backend("reference"):
            ours = evaluate(twin, formula, x)
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if not formula.centred:
        return torch.equal(ours, theirs)
    allowed = _LAYER_NORM_ULPS * torch.finfo(_FP32).eps * theirs.double().abs().amax(-1, True)
    if ours.dtype != _FP32:  # a value next to a rounding boundary may go either way
        allowed = allowed + torch.finfo(ours.dtype).eps * theirs.double().abs()
    return bool(((ours.double() - theirs.double()).abs() <= allowed).all())


def _imitated(
    module: nn.Module, x_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> tuple[nn.Module, Tensor]:
    """The module with random parameters, and an input [rows, H] for it."""
    first = next((p for p in module._parameters.values() if p is not None), None)
    size = _WEIGHTLESS_WIDTH if first is None else first.shape[0]
    shape = module.__dict__.get("normalized_shape")
    if shape is not None and first is None:
        size = int(shape[-1])
    random = probe.generator()
    x = torch.randn(7, size, generator=random, device="cpu") + 0.25
    # Rows as large as activations get, and as small as eps matters.
    x *= torch.tensor([1.0, 3.0, 1e-3, 40.0, 1.0, 0.1, 1e-2], device="cpu")[:, None]
    x = x.to(x_dtype)
    parameters = {
        name: None
        if p is None
        else (torch.rand(size, generator=random, device="cpu") + 0.5).to(weight_dtype or _FP32)
        for name, p in module._parameters.items()
    }
    return probe.imitation(module, parameters=parameters), x


def evaluate(module: nn.Module, formula: Formula, x: Tensor) -> Tensor:
    """The norm of x by our op, with the module's parameters and eps as they are now."""
    parameters = module._parameters
    weight: Tensor | None = parameters[formula.weight] if formula.weight else None
    eps: float = module.__dict__[formula.eps]
    if formula.centred:
        bias = parameters[formula.bias] if formula.bias else None
        if weight is not None and formula.weight_offset:
            weight = weight + formula.weight_offset
        return apply_layer_norm(x, weight, bias, eps=eps, weight_offset=0.0)
    return apply_rms_norm(
        x, weight, eps=eps, weight_offset=formula.weight_offset, round_first=formula.round_first
    )


# ---------------------------------------------------------------------------- forward


def _forward(module: nn.Module, original: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    record = state.of(module, KIND)
    if guard.is_small(record, x, row_wise_too_small, record.plan.operations):
        return original(module, x, *args, **kwargs)
    reason = guard.why_original(module, x, args, kwargs) or _why_original(module, record.plan, x)
    if reason is None:
        y = evaluate(module, record.plan, x)
        state.note_output(record, y)
        return y
    if reason is not guard.COMPILED:
        state.note_fallback(record, reason)
    return original(module, x, *args, **kwargs)


def _why_original(module: nn.Module, formula: Formula, x: Tensor) -> Reason | None:
    if _settings(module, formula) != formula.settings:
        return Reason("an attribute changed since fasttune.patch")
    weight_dtype = None
    for name in (formula.weight, formula.bias):
        if not name:
            continue
        parameter = module._parameters.get(name)
        if parameter is None or type(parameter) not in (Tensor, nn.Parameter):
            return Reason("its weight is missing or sharded")
        if parameter.device != x.device or x.shape[-1:] != parameter.shape:
            return Reason(f"input shape {tuple(x.shape)} on {x.device} does not fit the weight")
        weight_dtype = parameter.dtype
    autocast = _torch.autocast_dtype(x.device.type)
    if autocast is not None and x.device.type != "cpu" and formula.centred and x.dtype != _FP32:
        return Reason("a layer norm of 16-bit input under autocast")
    # The proof covers one autocast dtype: which one does not matter to a norm.
    key = (x.dtype, weight_dtype, None if autocast is None else _BF16)
    if key not in formula.proven:
        return Reason(f"not proven for input {x.dtype} and weight {weight_dtype}")
    return None


swap.register_kind(KIND, _forward, of_tensor=True)
