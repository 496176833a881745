"""A head and its row loss, a chunk of rows at a time, in terms of the primitives of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fasttune import _native
from fasttune.ops import _dropout, _gemm
from fasttune.ops._row_loss import CrossEntropy

# Logits of a chunk: on a GPU enough rows to fill it, on a CPU few enough not to show in the peak.
_LOGITS_BYTES = {"cpu": 36 << 20, "cuda": 512 << 20}
# Every chunk reads the head again. With fewer rows than this part of its features, a chunk is bound
# by that read: 256 rows for the 4096 features of an 8B model.
_FEATURES_A_ROW = 16
_ROWS_MULTIPLE = 64
_LINE_BYTES, _CONTENDING_BYTES = 64, 2048  # as in csrc/cpu/amx/base_product.cpp, in_place


def chunk_rows(rows: int, features: int, vocab: int, itemsize: int, device_type: str) -> int:
    """Rows of a chunk: equal chunks, each a multiple of 64 that fits the budget of the device or
    has a sixteenth as many rows as the head has features, so that logits take at most a sixteenth
    of the head.
    """
    budget = _LOGITS_BYTES.get(device_type, _LOGITS_BYTES["cuda"])
    allowed = max(budget // max(vocab * itemsize, 1), features // _FEATURES_A_ROW)
    fitting = max(allowed // _ROWS_MULTIPLE, 1) * _ROWS_MULTIPLE
    chunks = max(-(-rows // fitting), 1)
    equal = -(-rows // chunks)
    return max(min(-(-equal // _ROWS_MULTIPLE) * _ROWS_MULTIPLE, rows), 1)


@dataclass
class Gradients:
    """What the forward accumulates; None where it is not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    a: list[Tensor | None]
    b: list[Tensor | None]

    def flat(self) -> list[Tensor]:
        everything = [self.hidden, self.weight, self.bias, *self.a, *self.b]
        return [gradient for gradient in everything if gradient is not None]


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Unscaled fp16 weight gradients could overflow, so they stay fp32 until backward scales
    them.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class Head:
    """The head and its LoRA branches, as a backend's chunks see them."""

    prims: ModuleType
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scaling_tensors: Sequence[Tensor | None]
    scales: Sequence[float]  # scaling / (1 - p)
    thresholds: Sequence[int]
    seed: Tensor | None
    dtype: torch.dtype  # of the logits

    @property
    def through_fp32(self) -> bool:
        return self.prims is _native and _gemm.through_fp32(self.weight.device, self.dtype)

    def branches(self, hidden: Tensor, row: int) -> list[Tensor]:
        """t_j [rows, R_j] of the rows that start at ``row``."""
        return [
            self.prims.lora_down(
                hidden,
                self.a[j],
                self.scales[j],
                self.scaling_tensors[j],
                seed=self.seed,
                threshold=self.thresholds[j],
                branch=j,
                row_offset=row,
            )
            for j in range(len(self.a))
        ]

    def logits(self, hidden: Tensor, ts: list[Tensor], out: Tensor) -> Tensor:
        """Writes the logits of hidden [rows, H] into out [rows, V]."""
        if self.through_fp32:
            return self._logits_fp32(hidden, ts, out)
        hidden, right = hidden.to(self.dtype), self.weight.to(self.dtype).t()
        if self._takes(hidden, right):
            t, b = self._ts(hidden, ts), self._bs(slice(None))
            return _native.lora_up(
                t, b, self.bias, out_dtype=self.dtype, product=(hidden, right), out=out
            )
        if ts:
            t, b = self._ts(hidden, ts), self._bs(slice(None))
            out.copy_(self.prims.lora_up(t, b, self.bias, out_dtype=self.dtype))
            return out.addmm_(hidden, right)
        if self.bias is None:
            return torch.mm(hidden, right, out=out)
        return torch.addmm(self.bias.to(self.dtype), hidden, right, out=out)

    def _takes(self, x: Tensor, right: Tensor, *, deep: bool = False) -> bool:
        return self.prims is _native and _native.takes_product(x, right, deep=deep)

    def _ts(self, hidden: Tensor, ts: list[Tensor]) -> Tensor:
        """t [rows, R] fp32 of all branches."""
        if ts:
            return torch.cat(ts, dim=1)
        return hidden.new_empty(len(hidden), 0, dtype=torch.float32)

    def _bs(self, span: slice) -> Tensor:
        """B [V, R] fp32 of all branches, for a span of the vocabulary."""
        b = [factor[span].to(torch.float32) for factor in self.b]
        rows = self.weight[span]
        return torch.cat(b, dim=1) if b else rows.new_empty(len(rows), 0, dtype=torch.float32)

    def _logits_fp32(self, hidden: Tensor, ts: list[Tensor], out: Tensor) -> Tensor:
        rows, t = hidden.shape[0], self._ts(hidden, ts)
        hidden = _gemm.as_fp32(hidden, "rows")
        step = _gemm.block_rows(self.weight.shape[1])
        for start in range(0, self.weight.shape[0], step):
            span = slice(start, min(start + step, self.weight.shape[0]))
            weight = _gemm.as_fp32(self.weight[span], "weight")
            base = torch.mm(hidden, weight.t(), out=_native.scratch("linear", rows, len(weight)))
            bias = None if self.bias is None else self.bias[span]
            up = self._bs(span)
            _native.lora_up(t, up, bias, out_dtype=self.dtype, addend=base, out=out[:, span])
        return out

    def backward(
        self,
        gradient: Tensor,
        hidden: Tensor,
        ts: list[Tensor],
        row: int,
        into: Gradients,
        rows: slice,
    ) -> None:
        """Adds the gradients of a chunk, given d loss / d logits [rows, V]."""
        if into.weight is not None:
            self._accumulate_weight(gradient, hidden, into.weight)
        if into.bias is not None:
            into.bias += gradient.sum(0, dtype=torch.float32)
        base = self._hidden_base(gradient) if into.hidden is not None else None
        for j, t in enumerate(ts):
            d, db = self.prims.lora_up_backward(
                gradient, t, self.b[j], self.scales[j], self.scaling_tensors[j],
                need_d=into.a[j] is not None or base is not None, need_db=into.b[j] is not None,
            )  # fmt: skip
            if db is not None and (total := into.b[j]) is not None:
                total += db
            if d is None:
                continue
            part, da = self.prims.lora_down_backward(
                d, self.a[j], hidden, seed=self.seed, threshold=self.thresholds[j], branch=j,
                row_offset=row, dx_dtype=torch.float32, need_dx=base is not None, need_da=into.a[j]
                is not None,
            )  # fmt: skip
            if da is not None and (total := into.a[j]) is not None:
                total += da
            if base is not None:
                base = base + part
        if base is not None and into.hidden is not None:
            into.hidden[rows].copy_(base)

    def _hidden_base(self, gradient: Tensor) -> Tensor:
        if self.through_fp32:
            return _gemm.linear_backward_fp32(gradient, self.weight)
        weight = self.weight.to(gradient.dtype)
        if self._takes(gradient, weight, deep=True):
            return _native.deep_product(gradient, weight)
        return torch.mm(gradient, weight)

    def _accumulate_weight(self, gradient: Tensor, hidden: Tensor, total: Tensor) -> None:
        """total [V, H] fp32 += gradient^T hidden, a block of the vocabulary at a time."""
        if not self.through_fp32:
            total += torch.mm(gradient.t(), hidden.to(gradient.dtype))
            return
        hidden = _gemm.as_fp32(hidden, "weight")
        step = _gemm.block_rows(gradient.shape[0])
        for start in range(0, gradient.shape[1], step):
            block = _gemm.as_fp32(gradient[:, start : start + step], "rows")
            total[start : start + step].addmm_(block.t(), hidden)


def chunked(prims: ModuleType, *args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The forward in terms of the primitives of a backend: loss, correct, entropy sums,
    gradients.
    """
    (
        hidden,
        weight,
        bias,
        targets,
        a,
        b,
        scaling_tensors,
        scalings,
        thresholds,
        seed,
        dtype,
        options,
        stats,
        needs,
    ) = args
    loss_fn = CrossEntropy(int(options[0]), *options[1:])
    scales = [s * _dropout.keep_scale(k) for s, k in zip(scalings, thresholds, strict=True)]
    head = Head(prims, weight, bias, a, b, scaling_tensors, scales, thresholds, seed, dtype)
    keep = None
    if hidden.device.type == "cpu" and not any(thresholds):
        valid = targets != loss_fn.ignore_index
        if not bool(valid.all()):
            keep = valid.nonzero()[:, 0]
    rows_hidden = hidden if keep is None else hidden[keep]
    rows_targets = targets if keep is None else targets[keep]
    into = allocate(rows_hidden, weight, bias, a, b, needs)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    correct, entropy = torch.zeros_like(loss), torch.zeros_like(loss)
    total, vocab = rows_hidden.shape[0], weight.shape[0]
    size = chunk_rows(total, hidden.shape[1], vocab, dtype.itemsize, hidden.device.type)
    buffer = logits_buffer(size, vocab, dtype, hidden.device)
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        chunk = rows_hidden[rows]
        ts = head.branches(chunk, start)
        logits = head.logits(chunk, ts, buffer[: chunk.shape[0]])
        losses, right, spread = loss_fn.rows_(prims, logits, rows_targets[rows], any(needs), stats)
        loss += losses.sum()
        if right is not None and spread is not None:
            correct += right.sum()
            entropy += spread.sum()
        if any(needs):
            head.backward(logits, chunk, ts, start, into, rows)
    if into.hidden is not None and keep is not None:
        into.hidden = torch.zeros_like(hidden).index_copy_(0, keep, into.hidden)
    if into.weight is not None:
        into.weight = into.weight.to(stored_dtype(weight.dtype))
    return loss, correct, entropy, into.flat()


def allocate(
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    needs: Sequence[bool],
) -> Gradients:
    def zeros(like: Tensor, wanted: bool) -> Tensor | None:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device) if wanted else None

    k = len(a)
    return Gradients(
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None,
        zeros(weight, needs[1]),
        None if bias is None else zeros(bias, needs[2]),
        [zeros(f, flag) for f, flag in zip(a, needs[3 : 3 + k], strict=True)],
        [zeros(f, flag) for f, flag in zip(b, needs[3 + k :], strict=True)],
    )


def _stride(vocab: int, itemsize: int) -> int:
    """Elements from a row of logits to the next: rows a multiple of 2048 bytes apart would share
    few sets of the first-level cache, so a line is put between them. Others lie as they are: where
    their length is no multiple of a line, oneDNN's products would read what lies between rows.
    """
    contending = vocab * itemsize % _CONTENDING_BYTES == 0
    return vocab + (_LINE_BYTES // itemsize if contending else 0)


def logits_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return _native.scratch("logits", rows, _stride(vocab, dtype.itemsize), dtype)[:, :vocab]
    return torch.empty(rows, vocab, dtype=dtype, device=device)
