"""Log-probabilities of targets under a head and their gradients, a chunk of rows at a time, in
terms of the primitives of a backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fasttune.ops._chunked_head import Gradients, Head, allocate, chunk_rows, logits_buffer
from fasttune.ops._row_loss import CrossEntropy


def forward_with(
    prims: ModuleType,
    hidden: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [M]
    dtype: torch.dtype,
    options: Sequence[float],
    need_dhidden: bool,
) -> tuple[Tensor, list[Tensor]]:
    """[M] fp32, and the gradient of each row's loss, which is minus that, by hidden [M, H] if
    needed."""
    loss, keep = _loss(options), _kept(targets, options)
    out = torch.zeros(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    rows_hidden, rows_targets = (t if keep is None else t[keep] for t in (hidden, targets))
    found = out if keep is None else out.new_empty(len(keep))
    into = allocate(rows_hidden, weight, bias, [], [], [need_dhidden, False, False])
    head = Head(prims, weight, bias, [], [], [], [], [], None, dtype)
    for rows, chunk, logits in _chunks(head, rows_hidden):
        found[rows] = loss.rows_(prims, logits, rows_targets[rows], need_dhidden, False)[0]
        if need_dhidden:
            head.backward(logits, chunk, [], rows.start, into, rows)
    found.neg_()
    if keep is None:
        return found, into.flat()
    _spread(into, hidden, keep)
    return out.index_copy_(0, keep, found), into.flat()


def backward_with(
    prims: ModuleType,
    gradient: Tensor,  # [M] fp32
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    dtype: torch.dtype,
    options: Sequence[float],
    needs: Sequence[bool],  # of hidden, weight, bias
) -> list[Tensor]:
    loss, keep = _loss(options), _kept(targets, options)
    rows_hidden, rows_targets, factors = (
        t if keep is None else t[keep] for t in (hidden, targets, gradient)
    )
    into = allocate(rows_hidden, weight, bias, [], [], needs)
    head = Head(prims, weight, bias, [], [], [], [], [], None, dtype)
    for rows, chunk, logits in _chunks(head, rows_hidden):
        loss.rows_(prims, logits, rows_targets[rows], True, False)
        logits.mul_(-factors[rows, None])
        head.backward(logits, chunk, [], rows.start, into, rows)
    if keep is not None:
        _spread(into, hidden, keep)
    if into.weight is not None:
        into.weight = into.weight.to(weight.dtype)
    return into.flat()


def _spread(into: Gradients, hidden: Tensor, keep: Tensor) -> None:
    """Ignored rows get a gradient of 0."""
    if into.hidden is not None:
        rows = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        into.hidden = rows.index_copy_(0, keep, into.hidden)


def _loss(options: Sequence[float]) -> CrossEntropy:
    return CrossEntropy(int(options[0]), *options[1:])


def _kept(targets: Tensor, options: Sequence[float]) -> Tensor | None:
    """The rows that are not ignored, where asking needs no synchronisation; None for all."""
    if targets.device.type != "cpu":
        return None
    valid = targets != int(options[0])
    return None if bool(valid.all()) else valid.nonzero()[:, 0]


def _chunks(head: Head, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, hidden, logits) of every chunk; the logits are overwritten by the next one."""
    total, vocab = hidden.shape[0], head.weight.shape[0]
    size = chunk_rows(total, hidden.shape[1], vocab, head.dtype.itemsize, hidden.device.type)
    buffer = logits_buffer(size, vocab, head.dtype, hidden.device)
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        chunk = hidden[rows]
        yield rows, chunk, head.logits(chunk, [], buffer[: chunk.shape[0]])
