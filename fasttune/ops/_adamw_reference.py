"""AdamW in plain torch; adamw.py states the maths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _adamw_storage as storage
from fasttune.ops._arguments import accumulator
from fasttune.ops._dropout import random_lanes
from fasttune_kernels.adamw_tables import (
    EXP_AVG_BITS,
    EXP_AVG_SQ_BITS,
    FACTS,
    WEIGHT_BITS,
    StepArguments,
)


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """0-d float64."""
    return torch.stack([grad.double().square().sum() for grad in grads]).sum()


def step(arguments: StepArguments) -> Tensor:
    """[n, 3] fp32 norms of gradient, update and updated parameter; NaN if the step is skipped."""
    unscale, clip, skip = control(arguments)
    params = arguments.params
    norms = torch.full((len(params), 3), math.nan, device=params[0].device)
    if skip:
        return norms
    for i, row in enumerate(arguments.facts.tolist()):
        fact: dict[str, Any] = dict(zip(FACTS, row, strict=True))
        for name, given in zip(("lr", "decay", "step"), arguments.scalars, strict=True):
            if given:
                fact[name] = float(given[i])
        tensor = _Tensor(arguments, i, fact)
        gradient = arguments.grads[i].to(tensor.dtype) * unscale
        update, updated = tensor.step(gradient * (-clip if arguments.maximize else clip))
        norms[i] = torch.stack([gradient.norm(), update.norm(), updated.norm()])
    return norms


def limit_norms(
    params: Sequence[Tensor],
    residues: Sequence[Tensor],
    norms: Tensor,
    limits: Tensor,
    rounding: str,
) -> None:
    """Scales each parameter whose norm is above its limit down to it; reads the norms."""
    wanted, sizes = limits.to(torch.float32), norms[:, 2].cpu()
    larger = (sizes > wanted) & sizes.isfinite()
    for i, factor in enumerate((wanted / sizes).tolist()):
        if larger[i]:
            residue = residues[i] if residues else None
            scaled = load_param(params[i], residue, rounding) * factor
            store_param(scaled, params[i], residue, rounding)


def control(arguments: StepArguments) -> tuple[float, float, bool]:
    """The factors that unscale and clip the gradients, and whether the step is skipped; reads
    device scalars.
    """
    grad_scale, found_inf = arguments.grad_scale, arguments.found_inf
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    skip = found_inf is not None and float(found_inf) != 0
    if arguments.squares is None:
        return unscale, 1.0, skip
    norm = math.sqrt(float(arguments.squares)) * unscale
    if not math.isfinite(norm):
        skip = skip or arguments.skip_nonfinite
        return unscale, (math.nan if math.isnan(norm) else 0.0), skip
    return unscale, min(1.0, arguments.max_grad_norm / (norm + 1e-6)), skip


def load_param(param: Tensor, residue: Tensor | None, rounding: str) -> Tensor:
    """A parameter in the dtype of the arithmetic."""
    if rounding == "master":
        assert residue is not None
        return storage.load_master(param, residue)
    wide = param.to(accumulator(param.dtype))
    if rounding == "kahan":
        assert residue is not None
        wide = wide + residue.to(wide.dtype)
    return wide


def store_param(value: Tensor, param: Tensor, residue: Tensor | None, rounding: str) -> None:
    """Rounds to nearest what is not kept in a residue."""
    if rounding == "master":
        assert residue is not None
        storage.store_master(value, param, residue)
        return
    param.copy_(value)
    if rounding == "kahan":
        assert residue is not None
        residue.copy_(value - param.to(value.dtype))


def _towards(moment: Tensor, term: Tensor, beta: float) -> Tensor:
    """From the nearer end: with beta 0 the term, which rounding of a larger moment would hide."""
    if beta < 0.5:
        return term - (term - moment) * beta
    return moment + (term - moment) * (1 - beta)


class _Tensor:
    """One parameter and its state."""

    def __init__(self, arguments: StepArguments, i: int, fact: dict[str, Any]) -> None:
        self.param, self.exp_avg = arguments.params[i], arguments.exp_avgs[i]
        self.exp_avg_sq = arguments.exp_avg_sqs[i]
        self.top, self.residue, self.scales = (
            tensors[i] if tensors else None for tensors in arguments.operands[4:]
        )
        self.fact, self.seed, self.rounding = fact, arguments.seed, arguments.rounding
        self.dtype = accumulator(self.param.dtype)

    def step(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the results; returns the update and the parameter before it is rounded."""
        fact = self.fact
        p = load_param(self.param, self.residue, self.rounding)
        m = self._load_moment(self.exp_avg, signed=True)
        v = self._load_moment(self.exp_avg_sq, signed=False)
        m = _towards(m, g, fact["beta1"])
        v = _towards(v, g * g, fact["beta2"])
        self._store_moment(self.exp_avg, m, signed=True)
        self._store_moment(self.exp_avg_sq, v, signed=False)
        if self.top is not None:
            v = torch.maximum(self._load_moment(self.top, signed=False), v)
            self._store_moment(self.top, v, signed=False)
        step_size = fact["lr"] / (1 - fact["beta1"] ** fact["step"])
        root = v.sqrt() / math.sqrt(1 - fact["beta2"] ** fact["step"]) + fact["eps"]
        update = step_size * m / root + fact["lr"] * fact["decay"] * p
        updated = p - update
        self._store_param(updated)
        return update, updated

    def _store_param(self, value: Tensor) -> None:
        if self.rounding == "stochastic":
            self.param.copy_(storage.round_stochastically(value, self._random(WEIGHT_BITS)))
        else:
            store_param(value, self.param, self.residue, self.rounding)

    def _load_moment(self, moment: Tensor, *, signed: bool) -> Tensor:
        if moment.dtype != torch.uint8:
            return moment.to(self.dtype)
        assert self.scales is not None
        scales = self.scales[0 if signed else 1]
        return storage.load_codes(moment.reshape(-1), scales, signed=signed).view(moment.shape)

    def _store_moment(self, moment: Tensor, value: Tensor, *, signed: bool) -> None:
        if moment.dtype not in (torch.uint8, torch.bfloat16):
            moment.copy_(value)
            return
        random = self._random(EXP_AVG_BITS if signed else EXP_AVG_SQ_BITS)
        if moment.dtype == torch.bfloat16:
            moment.copy_(storage.round_stochastically(value, random))
            return
        assert self.scales is not None
        codes, scales = storage.store_codes(value.reshape(-1), random.reshape(-1), signed=signed)
        moment.copy_(codes.view(moment.shape))
        self.scales[0 if signed else 1].copy_(scales)

    def _random(self, purpose: int) -> Tensor:
        stream, step = int(self.fact["stream"]), int(self.fact["step"])
        bits = random_lanes(self.seed, self.param.numel(), stream, step, purpose, self.param.device)
        return bits.view(self.param.shape)
