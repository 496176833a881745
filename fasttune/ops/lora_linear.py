"""lora_linear: projections of one input with any number of LoRA branches each.

Maths, for projection i with branches j (an active adapter each), products accumulated in fp32:

    t_ij = s_ij / (1 - p_ij) (x * keep_ij) A_ij^T                             [M, R], fp32, saved
    y_i = x W_i^T + bias_i + sum_j s_ij lora_bias_ij + sum_j t_ij B_ij^T      [M, N_i]
      (or base_i + ..., where the base layer has a forward of its own: quantised, hooked, sharded)

    d_ij = s_ij / (1 - p_ij) dy_i B_ij                                        [M, R], fp32
    dx = sum_i (dy_i W_i + sum_j keep_ij * (d_ij A_ij))                       [M, K]
    dA_ij = d_ij^T (x * keep_ij),  dB_ij = dy_i^T t_ij,  dW_i = dy_i^T x
    dbias_i = sum_m dy_i,  dlora_bias_ij = s_ij dbias_i

A branch may scale its ranks and outputs by trained vectors: then B_ij above is out_scale B
rank_scale, formed for each pass and never kept (_lora_scales.py). VeRA, AdaLoRA and DeLoRA are
that.

A projection whose output got no gradient takes no part in backward: its parameters get none.

Saved for backward: x as it came (only if A or W trains, and not if its producer can rebuild it:
_recipe.py), t and parameters. The dropout mask is drawn again from the seed (docs/design.md states
the format).

Precision: C is the compute dtype, the autocast dtype under autocast, else the dtype of x, which
then must be that of W. y has dtype C, dx that of x, a parameter's gradient that of the parameter.
The LoRA branch uses x, dy, A and B as stored, whatever their dtypes, and keeps t and d in fp32: an
fp32 adapter on a bf16 base is never rounded. docs/precision.md has the table of all combinations.

- One sum on AMX tiles (bf16): bias + t B^T + x W^T, one rounding; dx likewise.
- Vendor product in C (GPU, fp32, what tiles do not take): y0 = bias + t B^T is rounded to C, then
  addmm adds x W^T in fp32 and rounds; under autocast x and W are rounded to C first, as torch does.
  dx likewise.
- Products through fp32 (other CPUs): x W^T stays in fp32 until branch and bias are added, one
  rounding.

Semantics: peft.tuners.lora.layer.Linear.forward (PEFT 0.21); LoRA (Hu et al., 2021).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fasttune import _registry, _torch
from fasttune.ops import _dropout, _lora_linear_reference, _recipe
from fasttune.ops._arguments import check_float, check_shape, output_shaped, rows_first
from fasttune.ops._lora_linear_backends import BACKWARD, FORWARD
from fasttune.ops._lora_linear_products import Needs
from fasttune.ops._lora_scales import scale_gradients, scaled_up


@dataclass(frozen=True)
class LoraBranch:
    """One adapter on one projection.

    Attributes:
        a: [R, K].
        b: [N, R].
        scaling: a float, or a 0-d tensor on the device of ``a`` (read without synchronisation).
        bias: [N] or None: PEFT's ``lora_bias``, scaled like the branch.
        dropout_p: probability in [0, 1) to drop an element of the branch's input; rounded to 1 /
            65536.
        rank_scale: [R] or None, multiplies the columns of ``b`` (as well: the rows of ``a``).
        out_scale: [N] or None, multiplies the rows of ``b``.
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = 1.0
    bias: Tensor | None = None
    dropout_p: float = 0.0
    rank_scale: Tensor | None = None
    out_scale: Tensor | None = None

    def refuse_scales(self) -> None:
        """Raises ValueError if ranks or outputs are scaled: for ops that cannot."""
        if self.rank_scale is not None or self.out_scale is not None:
            raise ValueError("branches: expected no rank_scale and no out_scale here, got one")


@dataclass(frozen=True)
class LoraProjection:
    """A base and the branches added to it, in order.

    Attributes:
        weight: [N, K], any strides; or None with ``base``.
        bias: [N] or None.
        branches: the active adapters.
        base: [*, N], what a base layer with a forward of its own (quantised, hooked, sharded) has
            computed, in place of x W^T + bias; then ``weight`` and ``bias`` are None, there is at
            least one branch, and the output has the dtype of ``base``.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    branches: tuple[LoraBranch, ...] = ()
    base: Tensor | None = None


# The kinds of tensors of a call, in order: of each projection or of each branch; seeds are drawn.
_OF_PROJECTIONS, _OF_BRANCHES = 0, 1
_KINDS = (
    *((_OF_PROJECTIONS, "weight"), (_OF_PROJECTIONS, "bias")),
    *((_OF_BRANCHES, "a"), (_OF_BRANCHES, "b"), (_OF_BRANCHES, "bias"), (_OF_BRANCHES, "scaling")),
    *((_OF_PROJECTIONS, "base"), (_OF_PROJECTIONS, "seed")),
    *((_OF_BRANCHES, "rank_scale"), (_OF_BRANCHES, "out_scale")),
)
_SEEDS, _SCALES = 7, slice(8, 10)  # their places there


@dataclass(frozen=True, eq=False)  # compared by identity: one object for all calls of a kind
class _Spec:
    """Everything about a call that is no tensor.

    Attributes:
        counts: branches of each projection.
        scalings, thresholds: of each branch.
        streams: the number of each branch in the random bits of its seed.
        compute_dtype: of the products with the base weights.
        places: of each kind of tensors in the order of ``_KINDS``, how many there are and where
            they lie among the tensors of a call; nowhere if they are all None: they are not passed.
    """

    counts: tuple[int, ...]
    scalings: tuple[float, ...]
    thresholds: tuple[int, ...]
    streams: tuple[int, ...]
    compute_dtype: torch.dtype
    places: tuple[tuple[int, slice | None], ...]

    def each_kind(self, items: Sequence[Any], missing: Any) -> list[Sequence[Any]]:
        """What belongs to the tensors of each kind, ``missing`` where there are none."""
        return [[missing] * n if place is None else items[place] for n, place in self.places]

    def flat(self, kinds: Sequence[Sequence[Any]]) -> list[Any]:
        """The other way round."""
        chosen = zip(kinds, self.places, strict=True)
        return [item for kind, (_, place) in chosen if place is not None for item in kind]

    @property
    def scaled(self) -> bool:
        """Whether a branch scales its ranks or outputs."""
        return any([place is not None for _, place in self.places[_SCALES]])


def _new_spec(
    counts: tuple[int, ...],
    scalings: tuple[float, ...],
    thresholds: tuple[int, ...],
    streams: tuple[int, ...],
    compute_dtype: torch.dtype,
    given: tuple[bool, ...],  # of each kind, whether a call has any
) -> _Spec:
    places: list[tuple[int, slice | None]] = []
    at = 0
    for (of, _), has in zip(_KINDS, given, strict=True):
        size = len(scalings) if of == _OF_BRANCHES else len(counts)
        places.append((size, slice(at, at + size) if has else None))
        at += size if has else 0
    return _Spec(counts, scalings, thresholds, streams, compute_dtype, tuple(places))


# Making one takes longer than finding it.
_spec = lru_cache(maxsize=1024)(_new_spec)


@dataclass(frozen=True)
class _Wanted:
    """Which gradients a call is to give.

    Attributes:
        flags: of x and of each w, bias, a, b, lora_bias: what the op takes. A scaled B is wanted if
            B or one of its scales is.
        of_scaled: the scaled branches, each with which of B, rank_scale and out_scale are wanted.
        keeps_input, keeps_weights, keeps_t: whether the call keeps its input, each weight, and t of
            each branch.
    """

    flags: tuple[bool, ...]
    of_scaled: dict[int, tuple[bool, bool, bool]]
    keeps_input: bool
    keeps_weights: tuple[bool, ...]
    keeps_t: tuple[bool, ...]


def _wanted(spec: _Spec, needs: tuple[bool, ...], scaled: tuple[bool, ...]) -> _Wanted:
    """``needs``: torch's ``needs_input_grad``; ``scaled``: of each branch, whether it is."""
    _, x, *flags = needs
    w, bias, a, b, lora_bias, *_, rank_scales, out_scales = spec.each_kind(flags, False)
    of_scaled = {
        j: (b[j], rank_scales[j], out_scales[j]) for j, is_scaled in enumerate(scaled) if is_scaled
    }
    t = tuple([any(of_scaled.get(j, (flag,))) for j, flag in enumerate(b)])
    return _Wanted(
        (x, *w, *bias, *a, *t, *lora_bias),
        of_scaled,
        True in a or True in w,
        tuple([x or flag for flag in w]),
        t,
    )


_known_wanted = lru_cache(maxsize=1024)(_wanted)

_INPUT = 0  # position of x among the tensor inputs of _LoraLinear


class _LoraLinear(torch.autograd.Function):
    """x and the tensors of _flat to the outputs of all projections."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, x: Tensor, *flat: Any) -> Any:
        weights, biases, a, b, lora_biases, scaling_tensors, bases, seeds, *scales = spec.each_kind(
            flat, None
        )
        m = math.prod(x.shape[:-1])
        rows = rows_first(x, m, x.shape[-1])
        args = (
            rows, weights, biases, a, _scaled(b, *scales) if spec.scaled else b, lora_biases,
            scaling_tensors, spec.scalings, spec.thresholds, spec.counts, seeds,
            spec.compute_dtype, [y if y is None else rows_first(y, m, y.shape[-1]) for y in bases],
            spec.streams,
        )  # fmt: skip
        if _registry.must_dispatch((x, *flat)):
            ctx.backend = None
            ys, ts = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            ys, ts = ctx.backend.run(*args)
        find = _wanted if torch.compiler.is_compiling() else _known_wanted
        scaled = tuple([pair != (None, None) for pair in zip(*scales, strict=True)])
        wanted = ctx.wanted = find(spec, ctx.needs_input_grad, scaled)
        # Keep only what this combination of frozen and trained tensors needs; parameters cost
        # nothing, nor does an input that its producer can rebuild.
        keep_input = wanted.keeps_input
        ctx.recipe = keep_input and not torch.compiler.is_compiling() and _recipe.available(x)
        keep_input = keep_input and not ctx.recipe
        ctx.save_for_backward(
            x if keep_input else None,
            *seeds,
            *[w if flag else None for w, flag in zip(weights, wanted.keeps_weights, strict=True)],
            *a,
            *b,
            *[t if flag else None for t, flag in zip(ts, wanted.keeps_t, strict=True)],
            *scaling_tensors,
            *scales[0],
            *scales[1],
        )
        ctx.set_materialize_grads(False)
        ctx.ran = False
        ctx.saved_bytes = x.numel() * x.element_size() if keep_input else 0
        if True in wanted.keeps_t:
            ctx.saved_bytes += sum([t.numel() * t.element_size() for t in ts])
        ctx.spec, ctx.shape, ctx.x_dtype = spec, x.shape, x.dtype
        ctx.widths = [y.shape[-1] for y in ys]
        ctx.has_base = [y is not None for y in bases]
        ctx.bias_dtypes = [
            [None if f is None else f.dtype for f in kind] for kind in (biases, lora_biases)
        ]
        return tuple(
            [output_shaped(y, (*x.shape[:-1], n)) for y, n in zip(ys, ctx.widths, strict=True)]
        )

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        ctx.ran = True  # deferred groups ask whether a call still waits for its backward
        spec: _Spec = ctx.spec
        n, k = len(spec.counts), len(spec.scalings)
        missing = [dy is None for dy in dys]
        if all(missing):
            return (None,) * len(ctx.needs_input_grad)
        x, *saved = ctx.saved_tensors
        if ctx.recipe:
            x = _recipe.rebuild(ctx, _INPUT)
        seeds, weights, a, b, ts, scaling_tensors, *scales = _split(saved, (n, n, *[k] * 6))
        rows = math.prod(ctx.shape[:-1])
        needs: Sequence[bool] = ctx.wanted.flags
        if True in missing:
            given = [not flag for flag in missing]
            needs = Needs.unpack(needs, n, k).of_outputs(given, spec.counts)
        args = (
            [
                None if dy is None else rows_first(dy, rows, width)
                for dy, width in zip(dys, ctx.widths, strict=True)
            ],
            None if x is None else rows_first(x, rows, ctx.shape[-1]),
            weights, a, _scaled(b, *scales) if spec.scaled else b, ts, scaling_tensors,
            spec.scalings, spec.thresholds, spec.counts, seeds, ctx.x_dtype, needs, spec.streams,
        )  # fmt: skip
        run = (
            BACKWARD.registered if ctx.backend is None else BACKWARD.backends[ctx.backend.name].run
        )
        grads = iter(run(*args))
        dx, *rest = [next(grads) if flag else None for flag in needs]
        if dx is not None:
            dx = dx.view(ctx.shape)
        dws, dbiases, das, dbs, dlora_biases = _split(rest, (n, n, k, k, k))
        dscales: list[list[Tensor | None]] = [[None] * k, [None] * k]
        for j, wanted in ctx.wanted.of_scaled.items():
            if dbs[j] is not None:
                grads_of = scale_gradients(dbs[j], b[j], scales[0][j], scales[1][j], wanted)
                dbs[j], dscales[0][j], dscales[1][j] = grads_of
        dbiases, dlora_biases = [
            [g if g is None else g.to(t) for g, t in zip(gradients, dtypes, strict=True)]
            for gradients, dtypes in zip((dbiases, dlora_biases), ctx.bias_dtypes, strict=True)
        ]
        kinds = (
            dws, dbiases, das, dbs, dlora_biases,
            (None,) * k,  # scaling tensors
            [dy if given else None for dy, given in zip(dys, ctx.has_base, strict=True)],
            (None,) * n,  # seeds
            *dscales,
        )  # fmt: skip
        return None, dx, *spec.flat(kinds)


def _scaled(
    b: Sequence[Tensor], rank_scales: Sequence[Tensor | None], out_scales: Sequence[Tensor | None]
) -> list[Tensor]:
    return [
        factor if rank is None and out is None else scaled_up(factor, rank, out)
        for factor, rank, out in zip(b, rank_scales, out_scales, strict=True)
    ]


def _split(items: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    parts, at = [], 0
    for size in sizes:
        parts.append(list(items[at : at + size]))
        at += size
    return parts


@dataclass(frozen=True)
class _Packed:
    """What calls of the same projections have in common.

    Attributes:
        drops: of each projection, whether it draws a seed.
        made_of: the projections, compute dtype, and whether one seed serves all.
    """

    spec: _Spec
    drops: tuple[bool, ...]
    made_of: tuple[tuple[weakref.ref[LoraProjection], ...], torch.dtype, bool]

    def fits(
        self, projections: Sequence[LoraProjection], compute_dtype: torch.dtype, one_seed: bool
    ) -> bool:
        """Whether it was made of the very same objects."""
        known, dtype, seed = self.made_of
        if dtype is not compute_dtype or seed is not one_seed or len(known) != len(projections):
            return False
        return not [0 for one, other in zip(known, projections) if one() is not other]  # noqa: B905


# By the address of the first projection, as long as it lives. A layer that computes what it
# computed before describes it by the same object.
_packs: dict[int, _Packed] = {}


def _pack(
    projections: Sequence[LoraProjection], compute_dtype: torch.dtype, one_seed: bool
) -> _Packed:
    """``one_seed``: one fixes the masks of all branches."""
    if torch.compiler.is_compiling():
        return _Packed(
            *_new_spec_of(_new_spec, projections, compute_dtype, one_seed),
            ((), compute_dtype, one_seed),
        )
    address = id(projections[0])
    packed = _packs.get(address)
    if packed is not None and packed.fits(projections, compute_dtype, one_seed):
        return packed
    spec, drops = _new_spec_of(_spec, projections, compute_dtype, one_seed)

    def forget(gone: Any) -> None:
        if (now := _packs.get(address)) is not None and now.made_of[0][0] is gone:
            del _packs[address]

    refs = [weakref.ref(projection) for projection in projections[1:]]
    made_of = (weakref.ref(projections[0], forget), *refs)
    packed = _Packed(spec, drops, (made_of, compute_dtype, one_seed))
    if all(type(projection.branches) is tuple for projection in projections):
        _packs[address] = packed  # a list may be changed
    return packed


def _tensors(
    kind: int, projections: Sequence[LoraProjection], branches: Sequence[LoraBranch]
) -> list[Any]:
    """All of a kind but seeds; None where there is none."""
    of, name = _KINDS[kind]
    found = [getattr(item, name) for item in (branches if of == _OF_BRANCHES else projections)]
    if name == "scaling":
        return [scale if isinstance(scale, Tensor) else None for scale in found]
    return found


def _flat(
    spec: _Spec, projections: Sequence[LoraProjection], seeds: Sequence[Tensor | None]
) -> list[Any]:
    """The tensors of a call, one after the other."""
    branches = [branch for projection in projections for branch in projection.branches]
    flat: list[Any] = []
    for kind, (_, place) in enumerate(spec.places):
        if place is not None:
            flat += seeds if kind == _SEEDS else _tensors(kind, projections, branches)
    return flat


def _new_spec_of(
    make: Callable[..., _Spec],
    projections: Sequence[LoraProjection],
    compute_dtype: torch.dtype,
    one_seed: bool,
) -> tuple[_Spec, tuple[bool, ...]]:
    branches = [branch for projection in projections for branch in projection.branches]
    scales = [branch.scaling for branch in branches]
    thresholds = [
        [_dropout.threshold(branch.dropout_p) for branch in projection.branches]
        for projection in projections
    ]
    drops = tuple([any(own) for own in thresholds])
    given = [
        (one_seed or any(drops))
        if kind == _SEEDS
        else any([item is not None for item in _tensors(kind, projections, branches)])
        for kind in range(len(_KINDS))
    ]
    counts = tuple([len(projection.branches) for projection in projections])
    # Each projection draws its own bits, as if it were called alone, or all share a seed's.
    alone = [j for count in counts for j in range(count)]
    spec = make(
        counts,
        tuple([1.0 if isinstance(scale, Tensor) else float(scale) for scale in scales]),
        tuple([threshold for own in thresholds for threshold in own]),
        tuple(range(sum(counts)) if one_seed else alone),
        compute_dtype,
        tuple(given),
    )
    return spec, drops


def lora_linear_group(
    x: Tensor,  # [*, K]
    projections: Sequence[LoraProjection],
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The outputs [*, N_i] of every projection of x, LoRA branches included.

    Args:
        x: [*, K], fp32, bf16, fp16 (fp64 on the reference backend), any leading shape, also empty.
        projections: weights [N_i, K] of one dtype and device with x; outside autocast also of x's
            dtype. Adapters, and outputs of opaque bases, may have another float dtype.
        seed: 0-d int64 tensor on the device of x that fixes the dropout masks, of all branches
            together. If None, each projection with dropout draws its own, as if it were called
            alone, from torch's
            generator of the device if None and a branch has dropout.

    Returns:
        One tensor [*, N_i] a projection, in x's dtype or, under autocast, in autocast's; in the
        dtype of the base where it is opaque.

    Raises:
        TypeError: an argument is no tensor, has no float dtype, or x and weight differ in dtype
            outside autocast.
        ValueError: shapes or devices do not fit, or a dropout probability is outside [0, 1).

    Semantics of each projection: ``peft.tuners.lora.layer.Linear.forward`` (PEFT 0.21).
    """
    compute_dtype = validate(x, projections, seed)
    return apply_group(x, projections, compute_dtype, seed=seed)


def lora_linear(
    x: Tensor,  # [*, K]
    weight: Tensor,  # [N, K]
    a: Tensor,  # [R, K]
    b: Tensor,  # [N, R]
    *,
    bias: Tensor | None = None,  # [N]
    scaling: float | Tensor = 1.0,
    lora_bias: Tensor | None = None,  # [N]
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + scaling (dropout(x) A^T B^T + lora_bias), [*, N].

    One projection with one branch of :func:`lora_linear_group`, which states dtypes and errors.
    """
    branch = LoraBranch(a, b, scaling, lora_bias, dropout_p)
    return lora_linear_group(x, [LoraProjection(weight, bias, (branch,))], seed=seed)[0]


def apply_group(
    x: Tensor,
    projections: Sequence[LoraProjection],
    compute_dtype: torch.dtype,
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_linear_group` without validation, for callers that know their arguments."""
    packed = _pack(projections, compute_dtype, seed is not None)
    spec = packed.spec
    seeds: list[Tensor | None] = []
    if spec.places[_SEEDS][1] is not None:
        # Drawn seeds are those that the projections would draw one by one: masks do not depend on
        # which of them are computed together.
        seeds = [
            seed if seed is not None else _dropout.draw_seed(x.device) if drops else None
            for drops in packed.drops
        ]
    flat = _flat(spec, projections, seeds)
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        x2 = x.reshape(-1, x.shape[-1])
        *tensors, bases, seeds, rank_scales, out_scales = map(list, spec.each_kind(flat, None))
        tensors[3] = _scaled(tensors[3], rank_scales, out_scales)
        bases = [y if y is None else y.reshape(-1, y.shape[-1]) for y in bases]
        numbers = spec.scalings, spec.thresholds, spec.counts
        facts: Any = (*tensors, *numbers, seeds, compute_dtype, bases, spec.streams)
        ys, _ = _lora_linear_reference.forward(x2, *facts)
        return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in ys)
    outputs: tuple[Tensor, ...] = _LoraLinear.apply(spec, x, *flat)  # type: ignore[no-untyped-call]
    return outputs


def _check_base(x: Tensor, projection: LoraProjection) -> int:
    """The outputs N of a projection whose weight or base output fits x."""
    weight, base = projection.weight, projection.base
    if (weight is None) == (base is None):
        raise ValueError("projections: expected either a weight or a base output, got both or none")
    if weight is not None:
        check_shape("weight", weight, (None, x.shape[-1]), x.device)
        if _torch.autocast_dtype(x.device.type) is None and weight.dtype != x.dtype:
            raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
        return weight.shape[0]
    assert base is not None
    check_float("base", base)
    check_shape("base", base, (*x.shape[:-1], None), x.device)
    if projection.bias is not None or not projection.branches:
        raise ValueError("projections: expected branches and no bias beside a base output")
    return base.shape[-1]


def validate(x: Tensor, projections: Sequence[LoraProjection], seed: Tensor | None) -> torch.dtype:
    """The compute dtype of a call; raises what :func:`lora_linear_group` documents."""
    check_float("x", x)
    if x.dim() < 1:
        raise ValueError(f"x: expected at least one dimension [*, K], got shape {tuple(x.shape)}")
    if not projections:
        raise ValueError("projections: expected at least one, got none")
    features = x.shape[-1]
    compute_dtype = _torch.autocast_dtype(x.device.type) or x.dtype
    for projection in projections:
        outputs = _check_base(x, projection)
        if projection.bias is not None:
            check_shape("bias", projection.bias, (outputs,), x.device)
        for branch in projection.branches:
            check_shape("a", branch.a, (None, features), x.device)
            check_shape("b", branch.b, (outputs, branch.a.shape[0]), x.device)
            if branch.bias is not None:
                check_shape("lora_bias", branch.bias, (outputs,), x.device)
            if branch.rank_scale is not None:
                check_shape("rank_scale", branch.rank_scale, (branch.a.shape[0],), x.device)
            if branch.out_scale is not None:
                check_shape("out_scale", branch.out_scale, (outputs,), x.device)
            if isinstance(branch.scaling, Tensor):
                check_shape("scaling", branch.scaling, (), x.device)
                if branch.scaling.requires_grad:
                    raise ValueError(
                        "scaling: expected a tensor without requires_grad, got a trained one"
                    )
            _dropout.threshold(branch.dropout_p)
    if seed is not None and not isinstance(seed, Tensor):
        raise TypeError(f"seed: expected a tensor, got {type(seed).__name__}")
    if seed is not None and (
        seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device
    ):
        raise ValueError(
            f"seed: expected a 0-d int64 tensor on {x.device}, "
            f"got shape {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )
    return compute_dtype
