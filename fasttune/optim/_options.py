"""The arguments of AdamW: their checks, and how a parameter's state is stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fasttune_kernels.adamw_tables import MOMENTS, QUANTISED, ROUNDINGS

# Below so many elements moments stay fp32: their bytes do not count, their error does.
SMALLEST_8BIT = 4096

EXTRA = ("moments", "rounding", "max_grad_norm", "max_norm", "skip_nonfinite", "seed")


def check_group(group: dict[str, Any]) -> None:
    """Raises TypeError or ValueError if an option of a parameter group has no meaning."""
    for name in ("lr", "eps", "weight_decay"):
        _check_number(name, group[name])
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers, got {betas!r}")
    for beta in betas:
        _check_number("betas", beta, below=1.0)
    for name, known in (("moments", MOMENTS), ("rounding", ROUNDINGS)):
        if group[name] not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {group[name]!r}")
    for name in ("max_grad_norm", "max_norm"):
        if group[name] is not None and not group[name] > 0:
            raise ValueError(f"{name}: expected a positive number or None, got {group[name]!r}")
    if group["differentiable"]:
        raise ValueError("differentiable: expected False, the step is computed in place")
    if group["amsgrad"] and group["moments"] == "8bit":
        raise ValueError("amsgrad: expected False with moments='8bit', got True")
    for param in group["params"]:
        _check_param(param, group)


def _check_number(name: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a tensor of one element, got {list(value.shape)}")
        if value.device.type != "cpu":  # reading it would wait for the device
            return
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0.0 <= value < below:
        raise ValueError(f"{name}: expected a number in [0, {below}), got {value}")


def _check_param(param: Tensor, group: dict[str, Any]) -> None:
    if not param.is_floating_point():
        raise ValueError(f"params: expected real float parameters, got {param.dtype}")
    if isinstance(param, DTensor) and group["moments"] == "8bit":
        raise ValueError("moments: expected 'fp32' or 'bf16' for sharded parameters, got '8bit'")


def rounding_of(param: Tensor, group: dict[str, Any]) -> str:
    """How the updated parameter is stored: fp32 and fp64 have nothing to lose; a master's low bits
    and stochastic rounding exist for bf16, and fp16 takes Kahan's sum in their place.
    """
    wanted: str = group["rounding"]
    if param.dtype == torch.bfloat16 or wanted == "nearest":
        return wanted
    return "kahan" if param.dtype == torch.float16 else "nearest"


def residue_key(rounding: str) -> str | None:
    """The name in the state of what is kept beside a 16-bit parameter."""
    return {"master": "master_low_bits", "kahan": "kahan_sum"}.get(rounding)


def residue_dtype(param: Tensor, rounding: str) -> torch.dtype:
    return torch.int16 if rounding == "master" else param.dtype


def moment_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    if param.dtype == torch.float64:
        return torch.float64
    if group["moments"] == "8bit":
        return torch.uint8 if param.numel() >= SMALLEST_8BIT else torch.float32
    return torch.bfloat16 if group["moments"] == "bf16" else torch.float32


def scales_shape(param: Tensor) -> tuple[int, int]:
    return 2, -(-param.numel() // QUANTISED)


def moment_keys(group: dict[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))


def expected_state(
    param: Tensor, group: dict[str, Any]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor of a parameter's state, without the step."""
    dtype, shape = moment_dtype(param, group), tuple(param.shape)
    expected = {name: (dtype, shape) for name in moment_keys(group)}
    rounding = rounding_of(param, group)
    key = residue_key(rounding)
    if key is not None:
        expected[key] = (residue_dtype(param, rounding), shape)
    if dtype == torch.uint8:
        expected["moment_scales"] = (torch.float32, scales_shape(param))
    return expected


def new_state(
    param: Tensor, group: dict[str, Any], *, without: Container[str] = ()
) -> dict[str, Tensor]:
    """Zeros for a parameter that makes its first step, but for what it has already."""
    make: Callable[..., Tensor] = torch.zeros_like
    state = {}
    for name, (dtype, shape) in expected_state(param, group).items():
        if name in without:
            continue
        if name == "moment_scales":
            state[name] = torch.zeros(shape, dtype=dtype, device=param.device)
        else:
            state[name] = make(param, dtype=dtype, memory_format=torch.preserve_format)
            state[name].requires_grad_(False)
    return state
