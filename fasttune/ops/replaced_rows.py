"""An embedding or a head some of whose rows are replaced by trained ones, without a copy of it.

PEFT's trainable tokens build a whole weight [V, D] with the trained rows copied in, at every
forward, and get a dense [V, D] gradient. Here the trained rows [k, D] are looked up or multiplied
on their own: bytes moved are those of the output, and gradients have the size of the rows. Plain
torch: there is nothing to fuse beyond a gather.

Semantics: ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer.forward_adapters`` (PEFT 0.21).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fasttune import _torch


def embedding_with_rows(
    ids: Tensor,  # [*]
    weight: Tensor,  # [V, D]
    rows: Tensor,  # [k, D]
    indices: Sequence[int],
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """``embedding(ids, weight)`` [*, D] where ``rows[i]`` stands for row ``indices[i]`` of it.

    Args:
        ids: [*] int32 or int64 token ids in [0, V).
        weight: [V, D], usually frozen: no gradient of its size is made then.
        rows: [k, D], cast to the dtype of ``weight``.
        indices: k different ids in [0, V).
        padding_idx: this id gets no gradient, trained or not, as in ``torch.nn.Embedding``.

    Raises:
        ValueError: ``rows`` and ``indices`` do not fit, or an index is repeated or outside [0, V).
    """
    check_indices(weight, rows, indices)
    traced = _torch.under_dispatch_mode()  # its tensors must not outlive it
    look_up = _slots if traced else _cached_slots
    found, slots = look_up(tuple(indices), ids.device)
    place = torch.searchsorted(found, ids).clamp_(max=max(len(indices) - 1, 0))
    hit = found[place] == ids
    padding_slot = next((i for i, index in enumerate(indices) if index == padding_idx), None)
    replaced = functional.embedding(slots[place], rows.to(weight.dtype), padding_idx=padding_slot)
    plain = functional.embedding(ids, weight, padding_idx=padding_idx)
    return torch.where(hit.unsqueeze(-1), replaced, plain)


def linear_with_rows(
    x: Tensor,  # [*, D]
    weight: Tensor,  # [V, D]
    rows: Tensor,  # [k, D]
    indices: Sequence[int],
) -> Tensor:
    """``x weight^T`` [*, V] where ``rows[i]`` stands for row ``indices[i]`` of the weight.

    Arguments and errors are those of :func:`embedding_with_rows`; x has the dtype of ``weight``.
    """
    check_indices(weight, rows, indices)
    y = functional.linear(x, weight)
    columns = torch.tensor(list(indices), device=y.device)
    # In place: nothing reads the product's own columns, and a copy would be as large as the logits.
    return y.index_copy_(-1, columns, functional.linear(x, rows.to(weight.dtype)).to(y.dtype))


def check_indices(weight: Tensor, rows: Tensor, indices: Sequence[int]) -> None:
    """Raises ValueError unless k different row numbers of the weight come with rows [k, D]."""
    if rows.shape != (len(indices), weight.shape[1]):
        expected = (len(indices), weight.shape[1])
        raise ValueError(f"rows: expected shape {expected}, got {tuple(rows.shape)}")
    if not indices:
        raise ValueError("indices: expected at least one, got none")
    if len(set(indices)) != len(indices) or min(indices) < 0 or max(indices) >= weight.shape[0]:
        raise ValueError(f"indices: expected different ones in [0, {weight.shape[0]})")


def _slots(indices: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The indices in ascending order, and for each its position in ``indices``."""
    with torch.inference_mode(mode=False):  # they outlive the mode of the call that made them
        found, slots = torch.tensor(indices, device=device).sort()
    return found, slots


_cached_slots = lru_cache(maxsize=64)(_slots)
