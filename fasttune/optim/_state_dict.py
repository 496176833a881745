"""States of AdamW: checked before anything changes, and converted from and to torch's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from fasttune.ops import _adamw_storage as storage
from fasttune.optim import _options as options

_TORCH_GROUP = (
    *("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable"),
    *("differentiable", "fused", "decoupled_weight_decay", "params", "param_names"),
    "initial_lr",  # of torch's schedulers
)
_HALF = 1 << 15  # the random bits that round to nearest


def prepare(
    state_dict: dict[str, Any], groups: Sequence[dict[str, Any]], defaults: dict[str, Any]
) -> dict[str, Any]:
    """``state`` and ``param_groups`` for the parameters of ``groups``, copied.

    Raises:
        TypeError, ValueError: the state is none of AdamW's, or does not fit.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise TypeError("state_dict: expected a dict with 'state' and 'param_groups'")
    saved_groups = deepcopy(state_dict["param_groups"])
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict: expected {len(groups)} groups, got {len(saved_groups)}")
    param_of: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
    for number, (own, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(saved.get("params", ())) != len(own["params"]):
            raise ValueError(
                f"state_dict: expected {len(own['params'])} parameters in group {number}, "
                f"got {len(saved.get('params', ()))}"
            )
        param_of.update(
            {k: (p, saved) for k, p in zip(saved["params"], own["params"], strict=True)}
        )
        saved["params"] = own["params"]
        if "param_names" in own:
            saved.setdefault("param_names", own["param_names"])
        for name, value in {**defaults, **{n: own[n] for n in options.EXTRA}}.items():
            saved.setdefault(name, value)
        options.check_group(saved)
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, value in state_dict["state"].items():
        if key not in param_of:
            raise ValueError(f"state_dict: expected state of parameters only, got key {key!r}")
        param, group = param_of[key]
        if value:
            state[param] = _state_of(key, value, param, group)
    return {"state": state, "param_groups": saved_groups}


def _state_of(
    key: Any, saved: dict[str, Any], param: Tensor, group: dict[str, Any]
) -> dict[str, Any]:
    where = f"state_dict: parameter {key}"
    if "step" not in saved:
        raise ValueError(f"{where}: expected 'step', got {sorted(saved)}")
    step = float(saved["step"])
    if not step >= 0 or step != int(step):
        raise ValueError(f"{where}: expected a whole number as step, got {step}")
    device = param.device if group["capturable"] else "cpu"
    state: dict[str, Any] = {"step": torch.tensor(step, dtype=torch.float32, device=device)}
    moments = _moments(where, saved, param, group)
    for name, (dtype, shape) in options.expected_state(param, group).items():
        value = moments.get(name, saved.get(name))
        if value is None and name in ("master_low_bits", "kahan_sum"):
            value = torch.zeros_like(param, dtype=dtype)  # torch keeps nothing beside the weight
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: expected {name!r}, got {sorted(saved)}")
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{where}: expected {name} of shape {list(shape)}, got {list(value.shape)}"
            )
        if value.dtype != dtype:
            raise ValueError(f"{where}: expected {name} in {dtype}, got {value.dtype}")
        if name == "moment_scales":
            state[name] = value.to(param.device, copy=True)
        else:
            fresh = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            state[name] = fresh.copy_(value)
    return state


def _moments(
    where: str, saved: dict[str, Any], param: Tensor, group: dict[str, Any]
) -> dict[str, Tensor]:
    """The moments in the format of the group: as they are, or converted if torch wrote them."""
    wanted = options.moment_dtype(param, group)
    found: dict[str, Tensor] = {}
    scales = []
    for name in options.moment_keys(group):
        value = saved.get(name)
        if not isinstance(value, Tensor) or value.dtype == wanted:
            continue
        if value.dtype == torch.uint8 or not value.is_floating_point():
            raise ValueError(f"{where}: expected {name} in {wanted}, got {value.dtype}")
        if wanted != torch.uint8:
            found[name] = value.to(wanted)
            continue
        wide = value.to(torch.float32).contiguous().view(-1)
        half = torch.full_like(wide, _HALF, dtype=torch.int64)
        codes, scale = storage.store_codes(wide, half, signed=name == "exp_avg")
        found[name] = codes.view(value.shape)
        scales.append(scale)
    if scales:
        if len(scales) != 2:
            raise ValueError(f"{where}: expected both moments in one format")
        found["moment_scales"] = torch.stack(scales)
    return found


def to_torch(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state of fasttune's AdamW with the keys of torch's only, moments in fp32 (fp64)."""
    groups = [
        {name: value for name, value in group.items() if name in _TORCH_GROUP}
        for group in state_dict["param_groups"]
    ]
    state = {}
    for key, own in state_dict["state"].items():
        kept = {"step": own["step"].clone()}
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if name in own:
                kept[name] = _widened(name, own)
        state[key] = kept
    return {"state": state, "param_groups": groups}


def _widened(name: str, own: dict[str, Tensor]) -> Tensor:
    moment = own[name]
    if moment.dtype == torch.uint8:
        signed = name == "exp_avg"
        scales = own["moment_scales"][0 if signed else 1]
        return storage.load_codes(moment.view(-1), scales, signed=signed).view(moment.shape)
    return moment.clone() if moment.dtype == torch.float64 else moment.to(torch.float32, copy=True)
