"""The first half of verify: fused layers replayed in fp64 on what they saw in a real step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fasttune import _registry, _torch
from fasttune.errors import VerificationError
from fasttune.integrations import (
    peft,
    peft_dora,
    peft_embedding,
    peft_ia3,
    peft_linear,
    peft_lowrank,
)
from fasttune.ops import LoraProjection, _dropout
from fasttune.ops._activations import ACTIVATIONS
from fasttune.ops.bias_activation import apply_bias_activation
from fasttune.ops.dora_linear import apply_dora
from fasttune.ops.ia3_scale import apply_ia3_scale
from fasttune.ops.lora_linear import apply_group
from fasttune.patching import (
    activation,
    ia3,
    lora,
    lora_embedding,
    loss,
    lowrank,
    norm,
    probe,
    state,
    swap,
)
from fasttune.patching.step import LossFn, run_loss
from fasttune.patching.variants import Variants

# Both sides make the same number of roundings, in another order: the maximum over many elements of
# two samples of the
# same error distribution differs by less than a factor of two.
_FACTOR = 2.0


@dataclass(frozen=True)
class LayerCheck:
    """One replayed tensor: error and what was allowed, both absolute."""

    layer: str
    tensor: str
    error: float
    allowed: float


def check_layers(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> list[LayerCheck]:
    """Run a step and replay every fused LoRA and (IA)^3 layer, norm and activation once.

    Raises:
        VerificationError: a tensor of a layer deviates.
    """
    checks: list[LayerCheck] = []
    seen: set[str] = set()
    failures: list[VerificationError] = []

    def watch(kind: str, calls_before: int) -> Any:
        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record = state.of(layer, kind)
            name = record.name
            if name in seen or not isinstance(output, Tensor) or not output.requires_grad:
                return
            # (IA)^3 of an input ends in torch's product and VeRA may in a cast, not in our nodes.
            counted = kind in (ia3.KIND, lowrank.KIND) and record.fused_calls > calls_before
            if not (counted or _is_ours(output.grad_fn)):
                return
            seen.add(name)
            variants = _VARIANTS[kind](layer, args[0].detach())
            if variants is None:
                return
            x = args[0].detach() if variants.x is None else variants.x
            dtype = _torch.autocast_dtype(x.device.type)

            def replay(dy: Tensor) -> None:
                try:
                    checks.extend(_replay(name, x, variants, dy, dtype))
                except VerificationError as error:  # raised outside the engine, with its type
                    failures.append(error)

            output.register_hook(replay)

        return after

    handles = [
        module.register_forward_hook(watch(kind, state.of(module, kind).fused_calls))
        for module in model.modules()
        for kind in swap.kinds_of(module)
        # A hook on the head would send the loss down the original path; the step covers it.
        if kind in _VARIANTS and loss.HEAD not in swap.kinds_of(module)
    ]
    try:
        run_loss(model, batch, loss_fn).backward()
    finally:
        for handle in handles:
            handle.remove()
    if failures:
        raise failures[0]
    model.zero_grad(set_to_none=True)
    return checks


def _is_ours(node: Any) -> bool:
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and function.__module__.startswith("fasttune.ops.")


# ---------------------------------------------------------------------------- kinds


def _lora_variants(layer: Any, x: Tensor) -> Variants:
    if peft_embedding.is_embedding(swap.original_class(layer)):
        return lora_embedding.variants(layer, x)
    adapter = peft_dora.adapter_of(layer)
    if adapter is not None:
        return _dora_variants(layer, adapter, x)
    with torch.no_grad(), swap.stock():  # an opaque base runs once more, and stays fixed
        projection = peft_linear.projection(layer, x)
    return _projection_variants(layer, x, projection)


def _lowrank_variants(layer: Any, x: Tensor) -> Variants:
    with torch.no_grad(), swap.stock():
        projection = peft_lowrank.projection(layer, x)
    # A scale may be computed from trained tensors: with gradients on, it counts as trained.
    return _projection_variants(
        layer, x, replace(projection, branches=peft_lowrank.branches(layer))
    )


def _projection_variants(layer: Any, x: Tensor, projection: LoraProjection) -> Variants:
    seed = _dropout.draw_seed(x.device)
    leaves = dict(_trained(projection))
    names = list(leaves)

    def with_leaves(values: Sequence[Tensor]) -> LoraProjection:
        return _replaced(projection, dict(zip(names, values, strict=True)))

    dtype = _torch.autocast_dtype(x.device.type) or x.dtype
    return Variants(
        leaves,
        fused=lambda x, v: apply_group(x, (with_leaves(v),), dtype, seed=seed)[0],
        stock=lambda x, v: _peft_formula(x, with_leaves(v), seed),
        truth=lambda x, v: _peft_formula(x, _in_double(with_leaves(v)), seed),
        depth=max(layer.in_features, layer.out_features, x.numel() // max(x.shape[-1], 1)),
    )


def _dora_variants(layer: Any, adapter: str, x: Tensor) -> Variants:
    (branch,) = peft_linear.branches(layer)
    everything = {
        "weight": peft.plain_weight(layer),
        "lora_A": branch.a,
        "lora_B": branch.b,
        "lora_magnitude_vector": peft_dora.magnitude(layer, adapter),
        "bias": layer.base_layer.bias,
    }
    leaves = {n: t for n, t in everything.items() if t is not None and t.requires_grad}
    seed = _dropout.draw_seed(x.device)
    dtype = _torch.autocast_dtype(x.device.type) or x.dtype
    facts: dict[str, Any] = {
        "scaling": float(branch.scaling),
        "dropout_p": branch.dropout_p,
        "seed": seed,
    }

    second = peft_dora.has_dropout(layer, adapter) and layer.training

    def with_leaves(values: Sequence[Tensor]) -> list[Any]:
        return list({**everything, **dict(zip(leaves, values, strict=True))}.values())

    def fused(x: Tensor, values: Sequence[Tensor]) -> Tensor:
        weight, a, b, magnitude, bias = with_leaves(values)
        factors = (weight, a, b, magnitude)
        return apply_dora(x, *factors, dtype, bias=bias, second_product=second, **facts)

    def truth(x: Tensor, values: Sequence[Tensor]) -> Tensor:
        tensors: list[Any] = [None if t is None else t.double() for t in with_leaves(values)]
        return _dora_formula(x, *tensors, second=second, **facts)

    return Variants(
        leaves,
        fused=fused,
        stock=lambda x, v: _dora_formula(x, *with_leaves(v), second=second, **facts),
        truth=truth,
        depth=max(layer.in_features, layer.out_features, x.numel() // max(x.shape[-1], 1)),
    )


def _norm_variants(layer: nn.Module, x: Tensor) -> Variants:
    formula = state.of(layer, norm.KIND).plan
    everything = {n: p for n, p in layer._parameters.items() if p is not None}
    leaves: dict[str, Tensor] = {n: p for n, p in everything.items() if p.requires_grad}
    names = list(leaves)

    def twin(values: Sequence[Tensor], dtype: torch.dtype | None) -> nn.Module:
        parameters = {**everything, **dict(zip(names, values, strict=True))}
        if dtype is not None:
            parameters = {n: p.to(dtype) for n, p in parameters.items()}
        return probe.imitation(layer, parameters=parameters, training=True)

    def truth(x: Tensor, values: Sequence[Tensor]) -> Tensor:
        with _registry.use_backend("reference"):
            return norm.evaluate(twin(values, torch.float64), formula, x)

    return Variants(
        leaves,
        fused=lambda x, v: norm.evaluate(twin(v, None), formula, x),
        stock=lambda x, v: probe.run(twin(v, None), x),
        truth=truth,
        depth=max(x.shape[-1], x.numel() // max(x.shape[-1], 1)),
    )


def _activation_variants(layer: nn.Module, x: Tensor) -> Variants:
    name = state.of(layer, activation.KIND).plan.name
    twin = probe.imitation(layer, training=True)
    return Variants(
        {},
        fused=lambda x, v: apply_bias_activation(x, None, activation=name),
        stock=lambda x, v: probe.run(twin, x),
        truth=lambda x, v: ACTIVATIONS[name].value(x),
        depth=1,
    )


def _ia3_variants(layer: Any, x: Tensor) -> Variants | None:
    """Of the scale and, where it is applied to the input, the product behind it."""
    vectors = peft_ia3.active_vectors(layer)
    leaves = {name: vector for name, vector in vectors.items() if vector.requires_grad}
    weight = bias = base = None
    if peft_ia3.scales_input(layer):
        weight, bias = peft.plain_weight(layer), layer.base_layer.bias
        if weight is None:  # an opaque base has no formula; the step covers it
            return None
    else:
        with torch.no_grad(), swap.stock():  # the base runs once more, and stays fixed
            base = layer.base_layer(peft_ia3.converted(layer, x))

    def scale(values: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        own = {**vectors, **dict(zip(leaves, values, strict=True))}
        return peft_ia3.scale([v if dtype is None else v.to(dtype) for v in own.values()])

    def product(scaled: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if weight is None:
            return scaled
        factors = [t if t is None or dtype is None else t.to(dtype) for t in (weight, bias)]
        return nn.functional.linear(scaled, *factors)  # type: ignore[arg-type]

    wide = torch.float64
    return Variants(
        {f"ia3_l[{name!r}]": vector for name, vector in leaves.items()},
        fused=lambda x, v: product(apply_ia3_scale(x, scale(v))),
        stock=lambda x, v: product((x * scale(v)).to(x.dtype)),
        truth=lambda x, v: product(x * scale(v, wide), wide),
        depth=max(layer.in_features, layer.out_features, x.numel() // max(x.shape[-1], 1)),
        x=base,
    )


_VARIANTS: dict[str, Callable[[nn.Module, Tensor], Variants | None]] = {
    lora.KIND: _lora_variants,
    lowrank.KIND: _lowrank_variants,
    ia3.KIND: _ia3_variants,
    norm.KIND: _norm_variants,
    activation.KIND: _activation_variants,
}


# ---------------------------------------------------------------------------- comparison


def _replay(
    name: str, x: Tensor, variants: Variants, dy: Tensor, autocast: torch.dtype | None
) -> list[LayerCheck]:
    names = ["output", "input gradient", *(f"gradient of {leaf}" for leaf in variants.leaves)]
    leaves = [leaf.detach() for leaf in variants.leaves.values()]
    with torch.enable_grad(), _autocast(x.device.type, None):
        exact = _results(
            variants.truth, x.double(), [leaf.double() for leaf in leaves], dy.double()
        )
    with torch.enable_grad(), _autocast(x.device.type, autocast):
        stock = _results(variants.stock, x, leaves, dy)
        fused = _results(variants.fused, x, leaves, dy)
    checks = []
    for what, truth, theirs, ours in zip(names, exact, stock, fused, strict=True):
        error, theirs_error = _distance(ours, truth), _distance(theirs, truth)
        # The floor: two roundings of the largest value to the dtype of the result, and fp32 sums of
        # `depth` terms in another order than stock's, whose own error may be small by luck.
        units = 2 * torch.finfo(ours.dtype).eps
        units += torch.finfo(torch.float32).eps * variants.depth**0.5
        floor = units * float(truth.abs().max()) if truth.numel() else 0.0
        allowed = _FACTOR * theirs_error + floor
        if not error <= allowed:  # also when the error is NaN
            raise VerificationError(name, what, error, allowed)
        checks.append(LayerCheck(name, what, error, allowed))
    return checks


def _results(function: Any, x: Tensor, leaves: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    fresh = [leaf.detach().requires_grad_() for leaf in leaves]
    y = function(x, fresh)
    return [y.detach(), *torch.autograd.grad(y, [x, *fresh], dy.to(y.dtype))]


def _distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).abs().max()) if exact.numel() else 0.0


@contextlib.contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        yield


# ---------------------------------------------------------------------------- LoRA


def _peft_formula(x: Tensor, projection: LoraProjection, seed: Tensor) -> Tensor:
    """PEFT's formula in plain torch, with the mask of a seed instead of its own dropout."""
    if projection.weight is None:
        assert projection.base is not None
        result = projection.base
    else:
        result = nn.functional.linear(x, projection.weight, projection.bias)
    dtype = result.dtype
    for j, branch in enumerate(projection.branches):
        threshold = _dropout.threshold(branch.dropout_p)
        x2 = x.reshape(-1, x.shape[-1])
        keep = _dropout.keep_mask(seed, threshold, *x2.shape, branch=j)
        cast = x.to(branch.a.dtype)
        scaled = (keep * _dropout.keep_scale(threshold)).to(cast.dtype)
        dropped = cast * scaled.expand_as(x2).view_as(x)
        down = nn.functional.linear(dropped, branch.a)
        if branch.rank_scale is not None:
            down = branch.rank_scale * down
        if branch.out_scale is None:
            up = nn.functional.linear(down, branch.b, branch.bias)
        else:  # without a bias
            up = branch.out_scale * nn.functional.linear(down, branch.b)
        result = result + up * branch.scaling
    return result.to(dtype)


def _dora_formula(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    *,
    scaling: float,
    dropout_p: float,
    seed: Tensor,
    second: bool,
) -> Tensor:
    """PEFT's formula in plain torch, with the mask of a seed instead of its own dropout."""
    linear = nn.functional.linear
    result, base, cast = linear(x, weight, bias), linear(x, weight), x.to(a.dtype)
    whole = weight.to(cast.dtype) + scaling * (b @ a).to(cast.dtype)
    scale = magnitude / torch.linalg.vector_norm(whole, dim=1).detach()
    if second:
        threshold = _dropout.threshold(dropout_p)
        x2 = x.reshape(-1, x.shape[-1])
        keep = _dropout.keep_mask(seed, threshold, *x2.shape, branch=0).to(cast.dtype)
        cast = cast * keep.expand_as(x2).view(x.shape) * _dropout.keep_scale(threshold)
        base = linear(cast, weight.to(cast.dtype))
    up = linear(linear(cast, a), b)
    y: Tensor = (result + (scale - 1) * base + scale * up * scaling).to(result.dtype)
    return y


def _named(projection: LoraProjection) -> list[tuple[str, Tensor | None]]:
    named = [
        *(("weight", projection.weight), ("bias", projection.bias)),
        ("base", projection.base),
    ]
    for j, branch in enumerate(projection.branches):
        named += [
            (f"lora_A[{j}]", branch.a),
            (f"lora_B[{j}]", branch.b),
            (f"lora_B[{j}].bias", branch.bias),
            (f"rank_scale[{j}]", branch.rank_scale),
            (f"out_scale[{j}]", branch.out_scale),
        ]
    return named


def _trained(projection: LoraProjection) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in _named(projection) if t is not None and t.requires_grad]


def _replaced(projection: LoraProjection, leaves: dict[str, Tensor]) -> LoraProjection:
    tensors = {name: leaves.get(name, tensor) for name, tensor in _named(projection)}
    branches = []
    for j, branch in enumerate(projection.branches):
        a, b = tensors[f"lora_A[{j}]"], tensors[f"lora_B[{j}]"]
        assert a is not None and b is not None
        names = {"bias": f"lora_B[{j}].bias"}
        names |= {name: f"{name}[{j}]" for name in ("rank_scale", "out_scale")}
        others: Any = {field: tensors[name] for field, name in names.items()}
        branches.append(replace(branch, a=a, b=b, **others))
    return LoraProjection(tensors["weight"], tensors["bias"], tuple(branches), tensors["base"])


def _in_double(projection: LoraProjection) -> LoraProjection:
    doubled = {n: None if t is None else t.double() for n, t in _named(projection)}
    result = _replaced(projection, {n: t for n, t in doubled.items() if t is not None})
    branches = tuple(
        replace(b, scaling=b.scaling.double()) if isinstance(b.scaling, Tensor) else b
        for b in result.branches
    )
    return replace(result, branches=branches)
