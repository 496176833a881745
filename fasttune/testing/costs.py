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
)
from fasttune.testing.accounting import Launch, register_cost

_FP32_BYTES = 4
_PAIR_COLUMNS = 128  # columns of dy per program of the fused up-backward pair
_PAIR_ROWS = 1024  # and its rows at most
_PAIR_MAX_RANK = 32  # above, two products
_WEIGHT_GRADIENT_ROWS = 256  # rows per split of dA, at least
_WEIGHT_GRADIENT_SPLITS = 16


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


def _forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    x, weights, biases, a, b = args[:5]
    owners = _owners(args[9])
    ys, ts = result
    bases = args[12]
    launches = [
        Launch("fasttune::lora_down", _bytes(x, down), _bytes(t))
        for down, t in zip(a, ts, strict=True)
    ]
    for i, (weight, y) in enumerate(zip(weights, ys, strict=True)):
        own = [j for j, owner in enumerate(owners) if owner == i]
        if own:
            reads = sum(_bytes(ts[j], b[j]) for j in own) + _bytes(biases[i], bases[i])
            launches.append(Launch("fasttune::lora_up", reads, _bytes(y)))
            if weight is None:  # the base layer's own forward has run
                continue
            launches.append(Launch("aten::addmm_", _bytes(x, weight, y), _bytes(y), gemm=True))
        else:
            reads = _bytes(x, weight, biases[i])
            launches.append(Launch("aten::linear", reads, _bytes(y), gemm=True))
    return launches


def _backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    dys, x, weights, a, b = args[:5]
    counts, needs = args[9], args[12]
    n, k = len(weights), len(a)
    need_x, need_w = needs[0], needs[1 : 1 + n]
    need_a, need_b = needs[1 + 2 * n :][:k], needs[1 + 2 * n + k :][:k]
    launches: list[Launch] = []
    written = 0 if not need_x else _bytes(result[0])
    for j, i in enumerate(_owners(counts)):
        if dys[i] is None:
            continue
        dy, rows, rank = dys[i], dys[i].shape[0], a[j].shape[0]
        d_bytes = rows * rank * _FP32_BYTES
        need_d = need_x or need_a[j]
        if need_d and need_b[j] and rank <= _PAIR_MAX_RANK:
            launches.append(Launch("fasttune::lora_up_backward", _bytes(dy, b[j]) + d_bytes, 0))
            columns = -(-dy.shape[1] // _PAIR_COLUMNS)
            seconds = _second_pass("lora_up_backward", rows * rank, columns)
            seconds += _second_pass("lora_up_backward", b[j], -(-rows // _PAIR_ROWS))
            launches += _one_launch(seconds)  # both sums together
        else:
            if need_d:
                launches.append(Launch("fasttune::lora_up_backward.d", _bytes(dy, b[j]), d_bytes))
            if need_b[j]:
                reads = _bytes(dy) + d_bytes
                launches.append(Launch("fasttune::lora_up_backward.db", reads, _bytes(b[j])))
        if need_a[j]:
            launches.append(Launch("fasttune::lora_down_backward.da", _bytes(x) + d_bytes, 0))
            splits = min(_WEIGHT_GRADIENT_SPLITS, max(rows // _WEIGHT_GRADIENT_ROWS, 1))
            launches += _second_pass("lora_down_backward.da", a[j], splits)
        if need_x:
            reads = _bytes(a[j]) + d_bytes
            launches.append(Launch("fasttune::lora_down_backward.dx", reads, written))
    for i, weight in enumerate(weights):
        if need_x and weight is not None and dys[i] is not None:
            reads = _bytes(dys[i], weight) + written
            launches.append(Launch("aten::addmm_", reads, written, gemm=True))
        if need_w[i]:
            launches.append(Launch("aten::mm", _bytes(dys[i], x), _bytes(weight), gemm=True))
    return launches


def _cross_entropy(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    hidden, weight, bias = args[:3]
    dtype, needs = args[10], args[13]
    rows, vocab = hidden.shape[0], weight.shape[0]
    size = chunk_rows(rows, vocab, dtype.itemsize, hidden.device.type)
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


def _dora_forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    x, weight, bias, a, b = args[:5]
    dropped = args[9] > 0
    y, t, _ = result
    product = y.numel() * args[11].itemsize
    scaled = b.numel() * _FP32_BYTES
    launches = [
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


register_cost("fasttune::lora_linear_fwd", _forward)
register_cost("fasttune::dora_linear_fwd", _dora_forward)
register_cost("fasttune::dora_linear_bwd", _dora_backward)
register_cost("fasttune::lora_linear_bwd", _backward)
register_cost("fasttune::linear_cross_entropy_fwd", _cross_entropy)
