"""attention in plain torch: the ground truth, and the portable path. Reads like the maths."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttune.ops._arguments import accumulator


def forward(
    q: Tensor,  # [B, Hq, S, D]
    k: Tensor,  # [B, Hk, T, D]
    v: Tensor,  # [B, Hk, T, D]
    mask: Tensor | None,  # broadcastable to [B, Hq, S, T]
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Hq, S, D], and the maximum and the sum of each row [B, Hq, S]."""
    wide = accumulator(q.dtype)
    scores = _scores(q, k, mask, causal, scale)  # [B, Hk, G, S, T]
    if scores.shape[-1] == 0:  # no maximum
        row_max = row_sum = scores.sum(-1)
    else:
        row_max = scores.detach().amax(-1)
        row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
        row_sum = torch.exp(scores - row_max.unsqueeze(-1)).sum(-1)
    out = _weights(scores, row_max, row_sum) @ v.to(wide).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype), row_max.flatten(1, 2), row_sum.flatten(1, 2)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the dtypes of q, k and v."""
    wide, heads = accumulator(q.dtype), k.shape[1]
    scores = _scores(q, k, mask, causal, scale)
    dout, out, row_max, row_sum = (_grouped(t, heads) for t in (dout, out, row_max, row_sum))
    weights = _weights(scores, row_max, row_sum)
    dout = dout.to(wide)
    delta = (dout * out.to(wide)).sum(-1, keepdim=True)
    dweights = dout @ v.to(wide).unsqueeze(2).transpose(-1, -2)
    dscores = weights * (dweights - delta)
    dq = scale * dscores @ k.to(wide).unsqueeze(2)
    dk = (scale * dscores.transpose(-1, -2) @ _grouped(q, heads).to(wide)).sum(2)
    dv = (weights.transpose(-1, -2) @ dout).sum(2)
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, ...] as [B, Hk, G, ...]."""
    return x.reshape(x.shape[0], kv_heads, x.shape[1] // max(kv_heads, 1), *x.shape[2:])


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    wide, heads = accumulator(q.dtype), k.shape[1]
    scores = scale * _grouped(q, heads).to(wide) @ k.to(wide).unsqueeze(2).transpose(-1, -2)
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    if mask is not None:
        mask = _grouped(mask.expand(*q.shape[:3], k.shape[2]), heads)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask.to(wide)
    return scores


def _weights(scores: Tensor, row_max: Tensor, row_sum: Tensor) -> Tensor:
    """The softmax; 0 in a row that may attend to nothing, whose sum is 0."""
    row_sum = row_sum.masked_fill(row_sum == 0, 1.0)
    return torch.exp(scores - row_max.unsqueeze(-1)) / row_sum.unsqueeze(-1)
