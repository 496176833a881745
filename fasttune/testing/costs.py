"""What fasttune's own ops launch inside, declared for :mod:`fasttune.testing.accounting`.

The design for a GPU: a matrix product of the vendor for every base weight, and around it the
kernels of ``fasttune_kernels``, each argument read once. The second pass of a split reduction is a
launch of its own; its splits are those that the launchers choose at many rows on a GPU with 132
multiprocessors (``lora_tables.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fasttune.ops._chunked_head import chunk_rows
from fasttune.testing import (  # noqa: F401  each registers its own
    costs_activations,
    costs_attention,
    costs_ia3_scale,
    costs_linear_log_probs,
    costs_norms,
    costs_rope,
    costs_scaled_glu,
)
from fasttune.testing.accounting import Launch, register_cost

_FP32_BYTES = 4
_PAIR_COLUMNS = 128  # columns of dy per program of the fused up-backward pair
_PAIR_ROWS = 1024  # and its rows at most
_PAIR_MAX_RANK = 32  # above, two products
_WEIGHT_GRADIENT_ROWS = 256  # rows per split of dA, at least
_WEIGHT_GRADIENT_SPLITS = 16
_DOWN_ROWS = 64  # rows of x per program
_MULTIPROCESSORS = 132
_GROUP_BRANCHES = 3  # that one kernel takes
_GROUP_RANKS = 64  # of them together, each padded to at least 16


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _second_pass(name: str, out: Tensor | int, splits: int) -> list[Launch]:
    """The launch that adds ``splits`` fp32 partial results; the partials are written before."""
    elements = out if isinstance(out, int) else out.numel()
    written = elements * _FP32_BYTES if isinstance(out, int) else _bytes(out)
    if splits == 1:
        return []
    partial = splits * elements * _FP32_BYTES
    return [Launch(f"fasttune::{name}.second_pass", partial, written + partial)]


def _one_launch(parts: list[Launch]) -> list[Launch]:
    """Launches of one name as one."""
    if not parts:
        return []
    read, written = (sum(getattr(p, f"bytes_{way}") for p in parts) for way in ("read", "written"))
    return [Launch(parts[0].name, read, written)]


def _owners(counts: Sequence[int]) -> list[int]:
    """The projection of each branch."""
    return [i for i, count in enumerate(counts) for _ in range(count)]


def _splits_of_down(rows: int, features: int) -> int:
    """Splits of the features in `lora_down`: two programs a multiprocessor, 512 features each."""
    programs = -(-rows // _DOWN_ROWS)
    return min(-(-2 * _MULTIPROCESSORS // programs), 8, max(features // 512, 1))


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _take_together(factors: Sequence[Tensor], thresholds: Sequence[int] = ()) -> bool:
    """Whether one kernel takes all of these branches (``fasttune_kernels.lora_group``)."""
    padded = max((max(_next_power_of_2(min(factor.shape)), 16) for factor in factors), default=0)
    return (
        1 < len(factors) <= _GROUP_BRANCHES
        and len(factors) * padded <= _GROUP_RANKS
        and len({factor.dtype for factor in factors}) == 1
        and len(set(thresholds)) < 2
    )


def _together(launches: list[Launch], shared: int, grouped: bool) -> list[Launch]:
    """The launches as one if they are a group, which reads ``shared`` bytes once instead of each
    time.
    """
    if not grouped:
        return launches
    (whole,) = _one_launch(launches)
    return [
        Launch(whole.name, whole.bytes_read - shared * (len(launches) - 1), whole.bytes_written)
    ]


def _forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    x, weights, biases, a, b = args[:5]
    thresholds, counts, bases = args[8], args[9], args[12]
    owners = _owners(counts)
    ys, ts = result
    grouped = _take_together(a, thresholds)
    splits = _splits_of_down(*x.shape)
    down = [
        Launch("fasttune::lora_down", _bytes(x, factor), _bytes(t) if splits == 1 else 0)
        for factor, t in zip(a, ts, strict=True)
    ]
    launches = _together(down, _bytes(x), grouped)
    seconds = [launch for t in ts for launch in _second_pass("lora_down", t, splits)]
    launches += _one_launch(seconds) if grouped else seconds
    first: list[Launch] = []
    of_bases: list[Launch] = []
    for i, (weight, y) in enumerate(zip(weights, ys, strict=True)):
        own = [j for j, owner in enumerate(owners) if owner == i]
        if own:
            reads = sum(_bytes(ts[j], b[j]) for j in own) + _bytes(biases[i], bases[i])
            # The base layer's own forward has run if there is no weight.
            (first if weight is not None else of_bases).append(
                Launch("fasttune::lora_up", reads, _bytes(y))
            )
        if weight is not None:
            reads = _bytes(x, weight) + (_bytes(y) if own else _bytes(biases[i]))
            name = "aten::addmm_" if own else "aten::linear"
            launches.append(Launch(name, reads, _bytes(y), gemm=True))
    up = [b[j] for j, owner in enumerate(owners) if weights[owner] is not None]
    single = all(count < 2 for count in counts)  # several branches are joined to one wider rank
    return [*launches, *_together(first, 0, single and _take_together(up)), *of_bases]


def _backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    dys, x, weights, a, b = args[:5]
    thresholds, counts, needs = args[8], args[9], args[12]
    n, k = len(weights), len(a)
    need_x, need_w = needs[0], needs[1 : 1 + n]
    need_a, need_b = needs[1 + 2 * n :][:k], needs[1 + 2 * n + k :][:k]
    dx = 0 if not need_x else _bytes(result[0])
    owners = _owners(counts)
    alive = [j for j, i in enumerate(owners) if dys[i] is not None]
    of_alive = {j: dys[owners[j]] for j in alive}
    launches = _up_backward(of_alive, b, [need_x or flag for flag in need_a], need_b)
    same_needs = len({need_a[j] for j in alive}) == 1
    together = _take_together([a[j] for j in alive], [thresholds[j] for j in alive]) and same_needs
    weight_gradients: list[Launch] = []
    sums: list[Launch] = []
    input_gradients: list[Launch] = []
    for j in alive:
        rows = of_alive[j].shape[0]
        d_bytes = rows * a[j].shape[0] * _FP32_BYTES
        if need_a[j]:
            splits = min(_WEIGHT_GRADIENT_SPLITS, max(rows // _WEIGHT_GRADIENT_ROWS, 1))
            written = 0 if splits > 1 else _bytes(a[j])
            name = "fasttune::lora_down_backward.da"
            weight_gradients.append(Launch(name, _bytes(x) + d_bytes, written))
            sums += _second_pass("lora_down_backward.da", a[j], splits)
        if need_x:
            reads = _bytes(a[j]) + d_bytes
            input_gradients.append(Launch("fasttune::lora_down_backward.dx", reads, dx))
    if together:
        launches += _together(weight_gradients, _bytes(x), bool(weight_gradients))
        launches += _one_launch(sums)
        launches += [
            Launch(whole.name, whole.bytes_read, dx) for whole in _one_launch(input_gradients)
        ]
    else:
        launches += [*weight_gradients, *sums, *input_gradients]
    for i, weight in enumerate(weights):
        if need_x and weight is not None and dys[i] is not None:
            reads = _bytes(dys[i], weight) + dx
            launches.append(Launch("aten::addmm_", reads, dx, gemm=True))
        if need_w[i]:
            launches.append(Launch("aten::mm", _bytes(dys[i], x), _bytes(weight), gemm=True))
    return launches


def _up_backward(
    dys: Mapping[int, Tensor], b: Sequence[Tensor], need_d: Sequence[bool], need_b: Sequence[bool]
) -> list[Launch]:
    """D and dB of the branches, the keys of ``dys``."""
    pairs: list[Launch] = []
    seconds: list[Launch] = []
    singles: list[Launch] = []
    for j, dy in dys.items():
        rows, rank = dy.shape[0], b[j].shape[1]
        d_bytes = rows * rank * _FP32_BYTES
        if need_d[j] and need_b[j] and rank <= _PAIR_MAX_RANK:
            reads = _bytes(dy, b[j]) + d_bytes
            pairs.append(Launch("fasttune::lora_up_backward", reads, 0))
            columns = -(-dy.shape[1] // _PAIR_COLUMNS)
            both = _second_pass("lora_up_backward", rows * rank, columns)
            both += _second_pass("lora_up_backward", b[j], -(-rows // _PAIR_ROWS))
            seconds += _one_launch(both)  # both sums together
            continue
        if need_d[j]:
            singles.append(Launch("fasttune::lora_up_backward.d", _bytes(dy, b[j]), d_bytes))
            singles += _second_pass(
                "lora_up_backward.d", rows * rank, _splits_of_down(rows, dy.shape[1])
            )
        if need_b[j]:
            reads = _bytes(dy) + d_bytes
            singles.append(Launch("fasttune::lora_up_backward.db", reads, _bytes(b[j])))
    if not singles and _take_together([b[j] for j in dys]):
        return [*_one_launch(pairs), *_one_launch(seconds)]
    return [*pairs, *seconds, *singles]


def _cross_entropy(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    hidden, weight, bias = args[:3]
    dtype, needs = args[10], args[13]
    rows, vocab = hidden.shape[0], weight.shape[0]
    size = chunk_rows(rows, hidden.shape[1], vocab, dtype.itemsize, hidden.device.type)
    launches: list[Launch] = []
    for start in range(0, rows, size):
        part = min(size, rows - start)
        logits = part * vocab * dtype.itemsize
        h = part * hidden.shape[1] * hidden.element_size()
        launches.append(Launch("aten::mm", h + _bytes(weight, bias), logits, gemm=True))
        gradient = logits if any(needs) else 0
        reads = 2 * logits if gradient else logits  # one sweep for the sum, one for the gradient
        launches.append(
            Launch("fasttune::cross_entropy_rows_", reads + part * 8, gradient + part * 4)
        )
        if needs[0]:
            launches.append(Launch("aten::mm", logits + _bytes(weight), h, gemm=True))
        if needs[1]:
            total = weight.numel() * _FP32_BYTES
            launches.append(Launch("aten::mm", logits + h + total, total, gemm=True))
    return launches


def _norm(weight: Tensor, a: Tensor) -> list[Launch]:
    """What reads the weight for the norm of its rows."""
    thin = weight.shape[0] * _FP32_BYTES
    return [
        Launch("fasttune::lora_down", _bytes(weight, a), thin * a.shape[0]),
        Launch("aten::linalg_vector_norm", _bytes(weight), thin),
    ]


def _dora_forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    x, weight, bias, a, b = args[:5]
    dropped = args[9] > 0
    y, t = result[:2]
    product = y.numel() * args[11].itemsize
    scaled = b.numel() * _FP32_BYTES
    launches = _norm(weight, a) if args[6] is None else []
    launches += [
        Launch("fasttune::lora_down", _bytes(x, a), _bytes(t)),
        Launch("aten::mul", _bytes(b), scaled),
        Launch("aten::mm", _bytes(x, weight), product, gemm=True),
        Launch("fasttune::lora_up", _bytes(t, bias) + scaled + product, _bytes(y)),
    ]
    if dropped:
        launches.append(Launch("fasttune::drop", _bytes(x), _bytes(x)))
        launches.append(Launch("aten::addmm_", _bytes(x, weight, y), _bytes(y), gemm=True))
    return launches


def _dora_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    dy, x, weight, a, b = args[:5]
    base, dropped, needs = args[8], args[11] > 0, args[13]
    d = dy.shape[0] * a.shape[0] * _FP32_BYTES
    scaled = b.numel() * _FP32_BYTES
    launches = [
        Launch("aten::mul", _bytes(b), scaled),
        Launch("fasttune::lora_up_backward", _bytes(dy) + d + scaled, d + scaled),
    ]
    if needs[0] or needs[1]:
        launches.append(Launch("aten::mul", _bytes(dy), _bytes(dy)))
    if needs[0]:
        dx = _bytes(result[0])
        launches.append(Launch("aten::mm", _bytes(dy, weight), dx, gemm=True))
        launches.append(Launch("fasttune::lora_up", _bytes(a) + d + dx, dx))
        if dropped:
            launches.append(Launch("fasttune::drop", dx, dx))
            launches.append(Launch("aten::addmm_", _bytes(dy, weight) + dx, dx, gemm=True))
    for _ in range(needs[1] * (2 if dropped else 1)):
        launches.append(Launch("aten::mm", _bytes(dy, x), _bytes(weight), gemm=True))
    if needs[3]:
        launches.append(Launch("fasttune::lora_down_backward.da", _bytes(x) + d, _bytes(a)))
    if needs[5]:  # the sum over rows of dy times the base product, in fp32
        launches.append(Launch("aten::sum", _bytes(dy, base), dy.shape[1] * _FP32_BYTES))
    return launches


def _embedding_forward(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> list[Launch]:
    base, ids, scaling_tensors, _, b, _ = args
    y, ts = result
    launches: list[Launch] = []
    for t, scale in zip(ts, scaling_tensors, strict=True):
        launches.append(Launch("aten::index", _bytes(ids, t), _bytes(t)))
        launches.append(Launch("aten::mul_", _bytes(t, scale), _bytes(t)))
    return [*launches, Launch("fasttune::lora_up", _bytes(base, *ts, *b), _bytes(y))]


def _embedding_backward(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> list[Launch]:
    dy, ids, _, a, b, *_, needs = args
    need_a, need_b = needs[: len(a)], needs[len(a) :]
    launches = _up_backward(dict.fromkeys(range(len(a)), dy), b, need_a, need_b)
    for factor, flag in zip(a, need_a, strict=True):
        if flag:
            d = ids.numel() * factor.shape[0] * _FP32_BYTES
            launches += [
                Launch("aten::zeros_like", 0, _bytes(factor)),
                Launch("aten::sort", _bytes(ids), 2 * _bytes(ids)),
                Launch("aten::index", d + _bytes(ids), d),
                Launch("aten::embedding_dense_backward", d + _bytes(ids), d),
                Launch("aten::index", d + _bytes(ids), d),
                Launch("aten::scatter_", d + _bytes(ids), d),
            ]
    return launches


register_cost("fasttune::lora_embedding_fwd", _embedding_forward)
register_cost("fasttune::lora_embedding_bwd", _embedding_backward)
register_cost("fasttune::lora_linear_fwd", _forward)
register_cost("fasttune::dora_linear_fwd", _dora_forward)
register_cost("fasttune::dora_linear_bwd", _dora_backward)
register_cost("fasttune::lora_linear_bwd", _backward)
register_cost("fasttune::linear_cross_entropy_fwd", _cross_entropy)
