"""What linear_log_probs launches, for :mod:`fasttune.testing.costs`: for each chunk of rows the
head's product and the row loss; of a frozen head the product of the gradient too, otherwise in
backward the first product again and those of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fasttune.ops._chunked_head import chunk_rows
from fasttune.testing.accounting import Launch, register_cost, tensor_bytes

_FP32_BYTES, _INT64_BYTES = 4, 8


def _chunks(hidden: Any, weight: Any, dtype: Any) -> Iterator[tuple[int, int, int]]:
    """Rows, and bytes of their logits and hidden states."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    size = chunk_rows(rows, hidden.shape[1], vocab, dtype.itemsize, hidden.device.type)
    for start in range(0, rows, size):
        part = min(size, rows - start)
        yield part, part * vocab * dtype.itemsize, part * tensor_bytes(hidden[:1])


def _logits(h: int, head: int, logits: int) -> Launch:
    return Launch("aten::mm", h + head, logits, gemm=True)


def _forward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    hidden, weight, bias, _, dtype, _, need_dhidden = args
    head = tensor_bytes(weight) + (0 if bias is None else tensor_bytes(bias))
    launches = []
    for rows, logits, h in _chunks(hidden, weight, dtype):
        launches.append(_logits(h, head, logits))
        reads = logits * (1 + need_dhidden) + rows * _INT64_BYTES
        written = logits * need_dhidden + rows * _FP32_BYTES
        launches.append(Launch("fasttune::cross_entropy_rows_", reads, written))
        if need_dhidden:
            launches.append(Launch("aten::mm", logits + tensor_bytes(weight), h, gemm=True))
    return launches


def _backward(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> list[Launch]:
    _, hidden, weight, bias, _, dtype, _, needs = args
    head = tensor_bytes(weight) + (0 if bias is None else tensor_bytes(bias))
    total = weight.numel() * _FP32_BYTES
    launches = []
    for rows, logits, h in _chunks(hidden, weight, dtype):
        launches.append(_logits(h, head, logits))
        reads = 2 * logits + rows * _INT64_BYTES  # one sweep for the sum, one for the gradient
        launches.append(Launch("fasttune::cross_entropy_rows_", reads, logits + rows * _FP32_BYTES))
        launches.append(Launch("aten::mul_", logits + rows * _FP32_BYTES, logits))
        if needs[1]:
            launches.append(Launch("aten::mm", logits + h + total, total, gemm=True))
        if needs[2]:
            launches.append(Launch("aten::sum", logits, weight.shape[0] * _FP32_BYTES))
        if needs[0]:
            launches.append(Launch("aten::mm", logits + tensor_bytes(weight), h, gemm=True))
    return launches


register_cost("fasttune::linear_log_probs_fwd", _forward)
register_cost("fasttune::linear_log_probs_bwd", _backward)
