"""AdamW with decoupled weight decay, a drop-in for torch.optim.AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fasttune.ops.adamw import apply_adamw_step, with_table
from fasttune.optim import _facts, _state_dict
from fasttune.optim import _options as options
from fasttune.optim._buckets import Bucket, Plan
from fasttune.optim._global_norm import parts_of, sum_of_squares
from fasttune.optim._norms import limit_norms, reduced
from fasttune_kernels.adamw_tables import StepArguments


@dataclass(frozen=True)
class TensorNorms:
    """What the last step saw of one parameter.

    Attributes:
        gradient: norm of the unscaled gradient before clipping.
        update: norm of what was subtracted.
        weight: norm of the parameter after the step.
    """

    gradient: float
    update: float
    weight: float

    @property
    def update_ratio(self) -> float:
        """update / weight; infinite for a weight of zeros."""
        return self.update / self.weight if self.weight else math.inf


class AdamW(Optimizer):
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019) in two kernels a step.

    The arguments, parameter groups and state keys of ``torch.optim.AdamW``; fasttune.ops.adamw_step
    states the maths. Parameters may be fp32, bf16, fp16 or fp64, dense or sharded (DTensor).

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate; a float or a tensor of one element, which is not read on the host if it
            lies on another device.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled decay; lr * weight_decay * p is subtracted at each step. A float or
            a tensor of one element.
        amsgrad: use the largest second moment so far.
        maximize: climb instead of descend.
        foreach, fused: accepted and ignored, there is one implementation.
        capturable: keep the step on the device of the parameters, for CUDA graphs.
        differentiable: must be False.
        max_grad_norm: limit the norm of all gradients together, as clip_grad_norm_ does, without
            writing the gradients. One value for all groups.
        moments: "fp32"; "bf16" or "8bit" (blocks of 256, parameters of at least 4,096 elements),
            both rounded stochastically.
        rounding: what keeps small updates of 16-bit parameters: "master" (default; the low 16 bits
            of an fp32 master beside each bf16 weight, exact), "stochastic" (nothing kept),
            "kahan" (a compensation of the parameter's dtype) or "nearest" (as torch: updates below
            half the last place are lost). fp16 parameters take "kahan" in place of the first two.
        max_norm: after the step, scale a parameter down to this norm if its norm is larger.
        skip_nonfinite: leave everything as it is if the norm of the gradients is not finite.
        seed: of the random bits of stochastic rounding.

    Raises:
        TypeError, ValueError: an argument has no meaning; names it.

    Example:
        optimizer = fasttune.optim.AdamW(model.parameters(), lr=2e-4, max_grad_norm=1.0)
    """

    _step_supports_amp_scaling = True  # a GradScaler then hands over grad_scale and found_inf
    _plan: Plan | None = None
    _norms: tuple[tuple[Bucket, Tensor], ...] = ()
    # Parameters that the current backward has stepped; None unless fuse_into_backward is in force.
    fused_steps: set[int] | None = None
    _squares: Tensor | None = None  # 0-d float64, of the unscaled gradients of the last step

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        moments: str = "fp32",
        rounding: str = "master",
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
            "max_grad_norm": max_grad_norm,
            "moments": moments,
            "rounding": rounding,
            "max_norm": max_norm,
            "skip_nonfinite": skip_nonfinite,
            "seed": seed,
        }
        options.check_group({**defaults, "params": ()})
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the options of the group are checked."""
        super().add_param_group(param_group)
        try:
            options.check_group(self.param_groups[-1])
            self._one_value("max_grad_norm")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: a gradient is sparse; nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fused_steps is not None:  # the backward has stepped
            self.fused_steps.clear()
            return loss
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        _check_dense(grads)
        plan = self._plan
        if plan is None or not plan.holds(self.param_groups, self.state, params, grads):
            group_of = self._group_of()
            plan = self._plan = Plan(self.param_groups, self.state, params, grads, group_of)
        if plan.buckets:
            self._run(plan, grads)
        return loss

    def _group_of(self) -> list[int]:
        groups = enumerate(self.param_groups)
        return [index for index, group in groups for _ in range(len(group["params"]))]

    def _run(self, plan: Plan, grads: list[Tensor | None]) -> None:
        flats = [bucket.gradients(grads) for bucket in plan.buckets]
        limit, skips = self._one_value("max_grad_norm"), self._one_value("skip_nonfinite")
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        wanted = limit is not None or bool(skips)
        parts = parts_of(plan, grads, flats) if wanted else {}  # may raise: nothing has changed yet
        squares: dict[Any, Tensor] = {}
        if self._reads_on_host(plan):
            squares = sum_of_squares(parts)
            self._note_norm(squares, scale)
            if self._skipped_on_host(squares, found):
                self._norms = ()
                return
        self._advance(plan, found is not None or bool(skips))
        table = _facts.of_groups(self.param_groups)
        steps = [
            self._arguments(bucket, own, table, scale, found)
            for bucket, own in zip(plan.buckets, flats, strict=True)
        ]
        if not self._reads_on_host(plan):
            if wanted:  # two kernels read a table: one copy for both
                steps = [with_table(arguments) for arguments in steps]
            squares = sum_of_squares(parts, [arguments.table for arguments in steps])
            self._note_norm(squares, scale)
        self._norms = tuple(
            (bucket, self._run_bucket(bucket, arguments, squares))
            for bucket, arguments in zip(plan.buckets, steps, strict=True)
        )
        self._step_back_where_skipped(plan, squares, found)

    def _arguments(
        self,
        bucket: Bucket,
        grads: list[Tensor],
        table: Tensor,
        scale: Tensor | None,
        found: Tensor | None,
    ) -> StepArguments:
        """All but the sum of squares."""
        form = bucket.format
        lrs, decays, steps = _facts.on_device(bucket, self.param_groups)
        limit = self._one_value("max_grad_norm")
        return StepArguments(
            params=bucket.local(bucket.params),
            grads=grads,
            exp_avgs=bucket.list_of("exp_avg"),
            exp_avg_sqs=bucket.list_of("exp_avg_sq"),
            max_exp_avg_sqs=bucket.list_of("max_exp_avg_sq"),
            residues=bucket.list_of(options.residue_key(form.rounding)),
            scales=bucket.list_of("moment_scales"),
            facts=_facts.of_bucket(bucket, table),
            lrs=lrs,
            decays=decays,
            steps=steps,
            grad_scale=_on(form.device, scale),
            found_inf=_on(form.device, found),
            max_grad_norm=math.inf if limit is None else float(limit),
            skip_nonfinite=bool(self._one_value("skip_nonfinite")),
            rounding=form.rounding,
            maximize=form.maximize,
            seed=int(self._one_value("seed")),
        )

    def _run_bucket(
        self, bucket: Bucket, arguments: StepArguments, squares: dict[Any, Tensor]
    ) -> Tensor:
        total = squares.get(bucket.format.device)
        norms = apply_adamw_step(arguments._replace(squares=total))
        limit_norms(bucket, norms, [group["max_norm"] for group in self.param_groups])
        return norms

    @torch.no_grad()
    def step_one(self, index: int) -> None:
        """Step one parameter, counted over all groups, inside the backward that made its gradient.

        Raises:
            RuntimeError: it was stepped already since :meth:`step`, or a GradScaler is in use.
        """
        assert self.fused_steps is not None
        if index in self.fused_steps:
            raise RuntimeError(
                "fuse_into_backward: a parameter got a second gradient before optimizer.step(); "
                "gradients cannot be accumulated, because each is freed at once"
            )
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("fuse_into_backward: a GradScaler has to see all gradients first")
        group = self._group_of()[index]
        param = [param for group in self.param_groups for param in group["params"]][index]
        _check_dense([param.grad])
        plan = Plan(self.param_groups, self.state, [param], [param.grad], [group], index)
        before = self._norms if self.fused_steps else ()
        if plan.buckets:
            self._run(plan, [param.grad])
        self._norms = (*before, *self._norms)
        self.fused_steps.add(index)

    # ------------------------------------------------------------------ numbers of a step

    def _advance(self, plan: Plan, may_skip: bool) -> None:
        for bucket in plan.buckets:
            device = bucket.format.device
            wanted = may_skip or any(self.param_groups[g]["capturable"] for g in bucket.used_groups)
            if wanted and any(step.device != device for step in bucket.unique_steps):
                moved = {id(s): s.to(device, non_blocking=True) for s in bucket.unique_steps}
                bucket.state["step"] = [moved[id(step)] for step in bucket.state["step"]]
                bucket.index_steps()
                for param, step in zip(bucket.params, bucket.state["step"], strict=True):
                    self.state[param]["step"] = step
        for step in plan.unique_steps():
            step.add_(1)

    def _reads_on_host(self, plan: Plan) -> bool:
        """True if everything is on the CPU, where reading is free and a skipped step is left out;
        elsewhere the device decides, after the host has counted the step.
        """
        return all(bucket.format.device.type == "cpu" for bucket in plan.buckets)

    def _skipped_on_host(self, squares: dict[Any, Tensor], found: Tensor | None) -> bool:
        if found is not None and float(found) != 0:
            return True
        if not self._one_value("skip_nonfinite"):
            return False
        return not all(math.isfinite(float(total)) for total in squares.values())

    def _step_back_where_skipped(
        self, plan: Plan, squares: dict[Any, Tensor], found: Tensor | None
    ) -> None:
        """A step that a device decided to skip does not count."""
        for step in plan.unique_steps():
            if step.device.type == "cpu":
                continue
            if found is not None:
                step.sub_((_on(step.device, found) != 0).to(step.dtype).view(()))  # type: ignore[union-attr]
            elif self._one_value("skip_nonfinite"):
                step.sub_((~squares[step.device].isfinite()).to(step.dtype))

    def _note_norm(self, squares: dict[Any, Tensor], scale: Tensor | None) -> None:
        total = next(iter(squares.values()), None)
        if total is not None and scale is not None:  # the scaler changes its scale after the step
            total = total / _on(total.device, scale).view(()).double().square()  # type: ignore[union-attr]
        self._squares = total

    @property
    def grad_norm(self) -> Tensor | None:
        """0-d float64: the norm of all gradients of the last step before clipping, unscaled; None
        without ``max_grad_norm`` and ``skip_nonfinite``. Computed when it is read.
        """
        return None if self._squares is None else self._squares.sqrt()

    def _one_value(self, name: str) -> Any:
        values = [group.get(name, self.defaults[name]) for group in self.param_groups]
        if any(value != values[0] for value in values[1:]):
            raise ValueError(f"{name}: expected one value for all groups, got {values}")
        return values[0] if values else self.defaults[name]

    # ------------------------------------------------------------------ what users read

    def name_parameters(self, named: Any) -> None:
        """Names for :meth:`monitor`, from ``model.named_parameters()``."""
        names = {id(param): name for name, param in named}
        for g, group in enumerate(self.param_groups):
            group["param_names"] = [
                names.get(id(param), f"{g}.{i}") for i, param in enumerate(group["params"])
            ]

    def monitor(self) -> dict[str, TensorNorms]:
        """The norms of the last step by parameter name, with one copy from each device.

        Names come from :meth:`name_parameters` or named parameters; else "group.index". Empty
        before the first step and after a skipped one.
        """
        names = [
            name
            for g, group in enumerate(self.param_groups)
            for name in group.get("param_names", [f"{g}.{i}" for i in range(len(group["params"]))])
        ]
        found = {}
        for bucket, norms in self._norms:
            for i, row in zip(bucket.streams, reduced(bucket, norms).tolist(), strict=True):
                if not math.isnan(row[2]):
                    found[i] = TensorNorms(*row)
        return {names[i]: found[i] for i in sorted(found)}

    # ------------------------------------------------------------------ state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state of this class or of ``torch.optim.AdamW``.

        The groups' options come from the state, as with torch; what torch does not know (moments,
        rounding, ...) keeps this optimizer's value.

        Raises:
            TypeError, ValueError: the state does not fit the parameters; nothing is changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = _state_dict.prepare(state_dict, self.param_groups, self.defaults)
        self.__setstate__(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._norms = None, ()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def to_torch_state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim.AdamW`` would have written it: its keys only, moments fp32.

        What torch has no place for (low bits of masters, Kahan's sums) is left out.
        """
        return _state_dict.to_torch(self.state_dict())


def _on(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    if tensor is None or tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=True)


def _check_dense(grads: Sequence[Tensor | None]) -> None:
    layouts = {grad.layout for grad in grads if grad is not None}
    if not layouts <= {torch.strided}:
        raise TypeError(f"grad: expected dense gradients, got layouts {layouts}")
