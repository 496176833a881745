"""lora_embedding: LoRA branches added to the output of an embedding.

Maths, for ids [M], base [M, D], branches j (an active adapter each), products accumulated in fp32:

    t_j = s_j A_j[:, ids]^T                                                   [M, R], fp32, saved
    y = base + sum_j t_j B_j^T                                                [M, D]

    dbase = dy
    dB_j = dy^T t_j                                                           [D, R]
    d_j = s_j dy B_j                                                          [M, R], fp32
    dA_j[:, v] = sum of d_j[m] over the m with ids[m] = v                     [R, V], dense

The gradient of A is as large as A, which is dense; nothing else of the size of the vocabulary is
made. torch's backward of an embedding sums into [V, R], which is then transposed into a third of
that size. Here the rows of one id are summed first, in fp32 and in ascending order ([M, R]), and
each sum is written once to its column: the result does not depend on the number of threads.

Around gathers and vendor kernels nothing is worth a kernel of its own but the two products, which
are those of ``lora_linear`` (docs/design.md): the branch, all adapters together, is added to the
base and rounded once.

Saved for backward: t_j where B_j trains, the ids and parameters.

Precision: A, B and dy enter their products as stored, whatever their dtypes; t and d are fp32. y
has the dtype of base, with and without autocast (docs/precision.md); a gradient that of its
parameter.

Semantics: peft.tuners.lora.layer.Embedding.forward (PEFT 0.21); LoRA (Hu et al., 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fasttune import _registry, _torch
from fasttune.ops import _lora_embedding_reference, _support
from fasttune.ops._arguments import accumulator, check_float, check_shape, output_shaped, rows_first
from fasttune.ops.lora_linear import LoraBranch

_NO_PADDING = -1


def _forward_fake(
    base: Tensor, ids: Tensor, scaling_tensors: Any, a: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    wide = accumulator(base.dtype)
    ts = [base.new_empty(base.shape[0], factor.shape[0], dtype=wide) for factor in a]
    return base.new_empty(base.shape), ts


def _backward_fake(
    dy: Tensor,
    ids: Tensor,
    scaling_tensors: Any,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ts: Any,
    scalings: Any,
    padding_idx: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    wanted = [factor for factor, flag in zip([*a, *b], needs, strict=True) if flag]
    return [factor.new_empty(factor.shape) for factor in wanted]


FORWARD = _registry.define(
    "lora_embedding_fwd",
    "(Tensor base, Tensor ids, Tensor?[] scaling_tensors, Tensor[] a, Tensor[] b, float[] scalings)"
    " -> (Tensor, Tensor[])",
    _forward_fake,
)
BACKWARD = _registry.define(
    "lora_embedding_bwd",
    "(Tensor dy, Tensor ids, Tensor?[] scaling_tensors, Tensor[] a, Tensor[] b, Tensor?[] ts, "
    "float[] scalings, int padding_idx, bool[] needs) -> Tensor[]",
    _backward_fake,
)


def _looked_up(
    ids: Tensor, a: Tensor, scaling: float, scaling_tensor: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """t [M, R] of one branch."""
    t = a.t()[ids].to(dtype)
    t = t if scaling == 1.0 else t.mul_(scaling)
    return t.contiguous() if scaling_tensor is None else t.mul_(scaling_tensor).contiguous()


def forward_with(
    prims: ModuleType,
    base: Tensor,  # [M, D]
    ids: Tensor,  # [M] int64
    scaling_tensors: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> tuple[Tensor, list[Tensor]]:
    """The forward in terms of the primitives of a backend."""
    ts = [
        _looked_up(ids, *branch, torch.float32)
        for branch in zip(a, scalings, scaling_tensors, strict=True)
    ]
    t, up = ts[0], b[0]
    if len(ts) > 1:
        t, up = torch.cat(ts, dim=1), torch.cat([f.to(torch.float32) for f in b], dim=1)
    y = prims.lora_up(t, up.contiguous(), None, out_dtype=base.dtype, addend=base)
    return y, ts


def backward_with(
    prims: ModuleType,
    dy: Tensor,  # [M, D]
    ids: Tensor,
    scaling_tensors: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    ts: Sequence[Tensor | None],
    scalings: Sequence[float],
    padding_idx: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The backward in terms of the primitives of a backend."""
    das, dbs = [], []
    for j, (factor, t) in enumerate(zip(b, ts, strict=True)):
        d, db = prims.lora_up_backward(
            dy,
            t,
            factor.contiguous(),
            scalings[j],
            scaling_tensors[j],
            need_d=needs[j],
            need_db=needs[len(a) + j],
        )
        if d is not None:
            das.append(_column_sums(d, ids, a[j], padding_idx))
        if db is not None:
            dbs.append(db)
    return [*das, *dbs]


def _column_sums(d: Tensor, ids: Tensor, a: Tensor, padding_idx: int) -> Tensor:
    """dA [R, V] of d [M, R]: its columns are the sums of the rows of one id each."""
    da = torch.zeros_like(a, memory_format=torch.contiguous_format)
    if not ids.numel():
        return da
    if padding_idx != _NO_PADDING:
        d = d.masked_fill((ids == padding_idx).unsqueeze(1), 0.0)
    found, order = ids.sort(stable=True)
    place = functional.pad((found[1:] != found[:-1]).cumsum(0), (1, 0))
    # Not index_add_: on a GPU it adds in any order. Of M rows at most M different ids come, so the
    # host need not know how many they are.
    sums = torch.ops.aten.embedding_dense_backward(d[order], place, ids.numel(), -1, False)
    # Rows of one id write the same value.
    return da.scatter_(1, found.expand(a.shape[0], -1), sums.to(a.dtype)[place].t())


_support.register_lora_backends(
    FORWARD, BACKWARD, forward_with, backward_with, _lora_embedding_reference
)


class _LoraEmbedding(torch.autograd.Function):
    """base, ids and the branches' tensors (a, b, scaling tensors) to y."""

    @staticmethod
    def forward(
        ctx: Any,
        scalings: tuple[float, ...],
        padding_idx: int,
        base: Tensor,
        ids: Tensor,
        *flat: Any,
    ) -> Tensor:
        count = len(scalings)
        a, b, scales = flat[:count], flat[count : 2 * count], flat[2 * count :]
        rows = rows_first(base, math.prod(base.shape[:-1]), base.shape[-1])
        ids = ids.reshape(-1).long()
        args = (rows, ids, list(scales), list(a), list(b), list(scalings))
        if _registry.must_dispatch((base, ids, *flat)):
            ctx.backend = None
            y, ts = FORWARD.registered(*args)
        else:
            ctx.backend = FORWARD.select(*args)
            y, ts = ctx.backend.run(*args)
        ctx.needs = list(ctx.needs_input_grad[4 : 4 + 2 * count])
        kept = [t if flag else None for t, flag in zip(ts, ctx.needs[count:], strict=True)]
        ctx.save_for_backward(ids, *scales, *a, *b, *kept)
        ctx.set_materialize_grads(False)
        ctx.saved_bytes = ids.nbytes + sum(t.nbytes for t in kept if t is not None)
        ctx.scalings, ctx.padding_idx = scalings, padding_idx
        return output_shaped(y, base.shape)

    @staticmethod
    @_torch.first_order_only
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        count = len(ctx.scalings)
        nothing = (None,) * (4 + 3 * count)
        if dy is None:
            return nothing
        grads: list[Tensor | None] = [None] * (2 * count)
        if any(ctx.needs):
            ids, *saved = ctx.saved_tensors
            scales, a, b, ts = (saved[i * count : (i + 1) * count] for i in range(4))
            args = (
                rows_first(dy, ids.numel(), dy.shape[-1]), ids, scales, a, b, ts,
                list(ctx.scalings), ctx.padding_idx, ctx.needs,
            )  # fmt: skip
            run = BACKWARD.registered
            if ctx.backend is not None:
                run = BACKWARD.backends[ctx.backend.name].run
            computed = iter(run(*args))
            grads = [next(computed) if flag else None for flag in ctx.needs]
        dbase = dy if ctx.needs_input_grad[2] else None
        return None, None, dbase, None, *grads, *(None,) * count


def lora_embedding(
    base: Tensor,  # [*, D]
    ids: Tensor,  # [*]
    branches: Sequence[LoraBranch],
    *,
    padding_idx: int | None = None,
) -> Tensor:
    """base + sum over the branches of scaling A[:, ids]^T B^T, [*, D].

    Args:
        base: [*, D], what the embedding returned for ``ids``: fp32, bf16, fp16 (fp64 on the
            reference backend).
        ids: [*] int32 or int64 token ids in [0, V).
        branches: one or more, with A [R, V] and B [D, R] of one dtype, which may differ from that
            of ``base``; without bias and dropout.
        padding_idx: this id gives A no gradient, as in ``torch.nn.Embedding``.

    Returns:
        [*, D] in the dtype of ``base``.

    Raises:
        TypeError: an argument is no tensor or has another dtype.
        ValueError: shapes or devices do not fit; no branch; a branch has bias or dropout; a scaling
            tensor is trained.

    Semantics: ``peft.tuners.lora.layer.Embedding.forward`` (PEFT 0.21), whose dropout does nothing.
    """
    check_float("base", base)
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids: expected an int32 or int64 tensor, got {got}")
    if base.dim() < 1 or base.shape[:-1] != ids.shape:
        raise ValueError(f"ids: expected shape {list(base.shape[:-1])}, got {list(ids.shape)}")
    if ids.device != base.device:
        raise ValueError(f"ids: expected device {base.device} as base, got {ids.device}")
    if not branches:
        raise ValueError("branches: expected at least one, got none")
    vocabulary = branches[0].a.shape[1] if branches[0].a.dim() == 2 else None
    for branch in branches:
        check_shape("a", branch.a, (None, vocabulary), base.device, like="base")
        rank = branch.a.shape[0]
        check_shape("b", branch.b, (base.shape[-1], rank), base.device, like="base")
        if branch.a.dtype != branch.b.dtype:
            raise TypeError(f"b: expected a's dtype {branch.a.dtype}, got {branch.b.dtype}")
        if branch.bias is not None or branch.dropout_p:
            raise ValueError("branches: expected no bias and no dropout, got one")
        if isinstance(branch.scaling, Tensor):
            check_shape("scaling", branch.scaling, (), base.device, like="base")
            if branch.scaling.requires_grad:
                raise ValueError("scaling: expected a tensor without requires_grad")
    return apply_lora_embedding(base, ids, branches, padding_idx=padding_idx)


def apply_lora_embedding(
    base: Tensor, ids: Tensor, branches: Sequence[LoraBranch], *, padding_idx: int | None
) -> Tensor:
    """:func:`lora_embedding` without validation, for callers that know their arguments."""
    a, b = [branch.a for branch in branches], [branch.b for branch in branches]
    scales = [branch.scaling for branch in branches]
    tensors = [scale if isinstance(scale, Tensor) else None for scale in scales]
    scalings = [1.0 if isinstance(scale, Tensor) else float(scale) for scale in scales]
    if _torch.in_functorch():  # plain torch operations compose with vmap and grad
        masked = a
        if padding_idx is not None:
            trained = torch.arange(a[0].shape[1], device=ids.device) != padding_idx
            masked = [torch.where(trained, factor, factor.detach()) for factor in a]
        flat = base.reshape(-1, base.shape[-1])
        facts = (tensors, masked, b, scalings)
        plain, _ = _lora_embedding_reference.forward(flat, ids.reshape(-1), *facts)
        return plain.reshape(base.shape)
    padding = _NO_PADDING if padding_idx is None else padding_idx
    y: Tensor = _LoraEmbedding.apply(  # type: ignore[no-untyped-call]
        tuple(scalings), padding, base, ids, *a, *b, *tensors
    )
    return y
