"""B' = out_scale B rank_scale: the up factor of a branch whose rows and columns are scaled.

    B'_nr = out_scale_n B_nr rank_scale_r
    dB_nr = out_scale_n dB'_nr rank_scale_r
    drank_scale_r = sum_n out_scale_n dB'_nr B_nr,  dout_scale_n = sum_r dB'_nr B_nr rank_scale_r

B' is N x R and formed for each pass: layers may share B, so no copy of it waits for the backward.
"""

from __future__ import annotations

from torch import Tensor

from fasttune.ops._arguments import accumulator


def scaled_up(b: Tensor, rank_scale: Tensor | None, out_scale: Tensor | None) -> Tensor:
    """B' [N, R] in fp32 (fp64 for fp64); ``b`` itself if nothing is scaled."""
    if rank_scale is None and out_scale is None:
        return b
    return _times(b.to(accumulator(b.dtype)), rank_scale, out_scale)


def _times(b: Tensor, rank_scale: Tensor | None, out_scale: Tensor | None) -> Tensor:
    if rank_scale is not None:
        b = b * rank_scale.to(b.dtype)
    return b if out_scale is None else b * out_scale.to(b.dtype)[:, None]


def scale_gradients(
    db: Tensor,  # [N, R], of B'
    b: Tensor,
    rank_scale: Tensor | None,
    out_scale: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of B, rank_scale and out_scale where they are needed, in their dtypes."""
    dfactor = _times(db, rank_scale, out_scale).to(b.dtype) if needs[0] else None
    drank = dout = None
    if rank_scale is not None and needs[1]:
        drank = (_times(db, None, out_scale) * b).sum(0).to(rank_scale.dtype)
    if out_scale is not None and needs[2]:
        dout = (_times(db, rank_scale, None) * b).sum(1).to(out_scale.dtype)
    return dfactor, drank, dout
