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
)


def sum_of_squares(grads: Sequence[Tensor]) -> Tensor:
    """0-d float64."""
    return torch.stack([grad.double().square().sum() for grad in grads]).sum()


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    residues: Sequence[Tensor],
    scales: Sequence[Tensor],
    facts: Tensor,
    lrs: Sequence[Tensor],
    decays: Sequence[Tensor],
    steps: Sequence[Tensor],
    squares: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float,
    skip_nonfinite: bool,
    rounding: str,
    maximize: bool,
    seed: int,
) -> Tensor:
    """[n, 3] fp32 norms of gradient, update and updated parameter; NaN if the step is skipped."""
    unscale, clip, skip = control(squares, grad_scale, found_inf, max_grad_norm, skip_nonfinite)
    norms = torch.full((len(params), 3), math.nan, device=params[0].device)
    if skip:
        return norms
    for i, (param, row) in enumerate(zip(params, facts.tolist(), strict=True)):
        fact: dict[str, Any] = dict(zip(FACTS, row, strict=True))
        for name, given in (("lr", lrs), ("decay", decays), ("step", steps)):
            if given:
                fact[name] = float(given[i])
        tensor = _Tensor(param, exp_avgs[i], exp_avg_sqs[i], fact, seed, rounding)
        tensor.top = max_exp_avg_sqs[i] if max_exp_avg_sqs else None
        tensor.residue = residues[i] if residues else None
        tensor.scales = scales[i] if scales else None
        gradient = grads[i].to(tensor.dtype) * unscale
        update, updated = tensor.step(gradient * (-clip if maximize else clip))
        norms[i] = torch.stack([gradient.norm(), update.norm(), updated.norm()])
    return norms


def control(
    squares: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    max_grad_norm: float,
    skip_nonfinite: bool,
) -> tuple[float, float, bool]:
    """The factors that unscale and clip the gradients, and whether the step is skipped; reads
    device scalars.
    """
    unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
    skip = found_inf is not None and float(found_inf) != 0
    if squares is None:
        return unscale, 1.0, skip
    norm = math.sqrt(float(squares)) * unscale
    if not math.isfinite(norm):
        return unscale, (math.nan if math.isnan(norm) else 0.0), skip or skip_nonfinite
    return unscale, min(1.0, max_grad_norm / (norm + 1e-6)), skip


def _towards(moment: Tensor, term: Tensor, beta: float) -> Tensor:
    """From the nearer end: with beta 0 the term, which rounding of a larger moment would hide."""
    if beta < 0.5:
        return term - (term - moment) * beta
    return moment + (term - moment) * (1 - beta)


class _Tensor:
    """One parameter and its state."""

    top: Tensor | None
    residue: Tensor | None
    scales: Tensor | None

    def __init__(
        self,
        param: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        fact: dict[str, Any],
        seed: int,
        rounding: str,
    ) -> None:
        self.param, self.exp_avg, self.exp_avg_sq = param, exp_avg, exp_avg_sq
        self.fact, self.seed, self.rounding = fact, seed, rounding
        self.dtype = accumulator(param.dtype)

    def step(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the results; returns the update and the parameter before it is rounded."""
        fact = self.fact
        p = self._load_param()
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

    def _load_param(self) -> Tensor:
        if self.rounding == "master":
            assert self.residue is not None
            return storage.load_master(self.param, self.residue)
        wide = self.param.to(self.dtype)
        if self.rounding == "kahan":
            assert self.residue is not None
            wide = wide + self.residue.to(self.dtype)
        return wide

    def _store_param(self, value: Tensor) -> None:
        if self.rounding == "master":
            assert self.residue is not None
            storage.store_master(value, self.param, self.residue)
        elif self.rounding == "stochastic":
            self.param.copy_(storage.round_stochastically(value, self._random(WEIGHT_BITS)))
        else:
            self.param.copy_(value)
            if self.rounding == "kahan":
                assert self.residue is not None
                self.residue.copy_(value - self.param.to(self.dtype))

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
