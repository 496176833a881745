"""Where a fused path is not faster than the original forward, and the original must run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fasttune import _native, _registry, _torch
from fasttune.ops import _bottleneck_triton, _triton
from fasttune.ops.lora_linear import LoraBranch


@dataclass(frozen=True)
class Limits:
    """The smallest calls that the fused path is not slower for, in elements; on the CPU but two.

    Measured per module, forward and backward (bench/results, small inputs): what a fused call
    saves grows with the input, its fixed cost does not.

    Attributes:
        lora_dropout: inputs and outputs of a LoRA layer with dropout.
        lora_16bit, lora_fp32, lora_autocast: the same without dropout, where PEFT runs few
            kernels. The branch stays in the adapter's dtype under autocast, where torch rounds it
            to 16 bits: least is gained there.
        lora_embedding: output of a LoRA embedding and factors A, whose gradients are dense.
        kernels: input of a norm or an activation that is more than two kernels of torch.
        two_kernels: the same of two: the square of a relu, a layer norm with a shifted weight.
        one_kernel, one_kernel_fp32: input of a module that is one kernel of torch already. In fp32
            layer_norm and gelu of torch are as fast as ours (Xeon with AMX), and a call of ours
            takes 50 to 100 us longer.
        one_kernel_cuda: the same on a GPU, where the host takes 0.1 ms longer for our layer norm on
            an H100, whose kernels are 0.05 ms faster at 8192 x 4096.
        mlp: input of a gated MLP.
        rope: q and k of a rotary embedding.
        attention_scores: B x Hq x S x T.
        logits: rows x vocabulary of the head below a loss.
        bottleneck: input of a bottleneck adapter with a trained scale and without dropout.
        bottleneck_weights: weights of one for each row of its input, where tiles take it whole:
            beyond, torch's operations run.
        bottleneck_rows: rows of its input where it is computed whole in fp32 (Xeon with AMX; a
            width of 16 to 48: 0.91 to 1.16 times as fast as torch at 256 rows, 1.14 to 1.54 at
            2048; of 64 and 256: 0.89 to 1.22, 0.97 to 1.30 at 512, 1.02 to 1.43 at 2048).
        bottleneck_fp32: or its elements (1.01 to 1.40 times as fast from these on, within the limit
            of weights; 0.83 to 1.16 below).
        bottleneck_cuda: input of one on a GPU whose parameters have the dtype that it is computed
            in: kernels take 0.4 to 0.9 of torch's time at any size, the host 0.9 to 1.2 (H200).
            With others, which torch casts first, the host takes 0.7 to 1.0.
        experts_fp32, experts_16bit: weights of a module of experts that have adapters, by the dtype
            of the input: what PEFT forms grows with them, what ours costs with experts and rows.
        ia3: activations that (IA)^3 scales.
        ia3_cast: the same where they differ from the vector in dtype, so that PEFT casts them.
        vera_rank: the largest rank (not the smallest call) of VeRA. Its gradient of the output's
            scale is a product of that rank here, where PEFT has kept the branch's output.
        lora_rank: the largest rank of LoRA that pays off with few rows where products run on tiles,
            for which fp32 factors are split into terms (Xeon with AMX).
        lora_rows: rows for each rank from which larger ones do.
    """

    lora_dropout: int = 3 << 16
    lora_16bit: int = 1 << 19
    lora_fp32: int = 1 << 20
    lora_autocast: int = 1 << 21
    lora_embedding: int = 1 << 18
    kernels: int = 1 << 15
    two_kernels: int = 1 << 19
    one_kernel: int = 1 << 18
    one_kernel_fp32: int = 1 << 21
    one_kernel_cuda: int = 1 << 24
    mlp: int = 1 << 16
    rope: int = 1 << 15
    attention_scores: int = 1 << 16
    logits: int = 1 << 18
    bottleneck: int = 1 << 21
    bottleneck_cuda: int = 1 << 25
    bottleneck_weights: int = 1 << 11
    bottleneck_rows: int = 1 << 10
    bottleneck_fp32: int = 1 << 20
    experts_fp32: int = 3 << 18
    experts_16bit: int = 7 << 19
    ia3: int = 1 << 20
    ia3_cast: int = 1 << 18
    vera_rank: int = 128
    lora_rank: int = 128
    lora_rows: float = 2.5


_ANY = sys.maxsize  # for what a limit allows at most
NO_LIMITS = replace(
    Limits(*(0 for _ in fields(Limits))), vera_rank=_ANY, lora_rank=_ANY, bottleneck_weights=_ANY
)
limits = Limits()  # tests on tiny models put NO_LIMITS here


@contextlib.contextmanager
def no_limits() -> Iterator[None]:
    """Inputs of any size take the fused path: for checks, which are about results, not time."""
    global limits
    previous, limits = limits, NO_LIMITS
    try:
        yield
    finally:
        limits = previous


def lora_too_small(x: Tensor, outputs: int) -> bool:
    """True if PEFT's own forward is faster, dropout or not; cheap enough to ask first."""
    if not x.is_cpu or _elements(x, outputs) >= limits.lora_dropout:
        return False
    return _registry.forced_backend() is None


def lora_not_faster(x: Tensor, outputs: int, dropouts: Sequence[float]) -> bool:
    """True if PEFT's own forward is faster for branches with these probabilities of dropout."""
    if not x.is_cpu or any(p > 0 for p in dropouts):
        return False
    if _torch.autocast_dtype("cpu") is not None:
        limit = limits.lora_autocast
    else:
        limit = limits.lora_fp32 if x.dtype == torch.float32 else limits.lora_16bit
    return _elements(x, outputs) < limit and _registry.forced_backend() is None


def lora_rank_not_faster(x: Tensor, rank: int, dropouts: Sequence[float]) -> bool:
    """True if PEFT's own forward is as fast for a LoRA of this rank, its widest branch's."""
    if rank <= limits.lora_rank or not x.is_cpu or _registry.forced_backend() is not None:
        return False
    if not _native.has_base_product():
        return False
    wide = x.dtype == torch.float32 and _torch.autocast_dtype("cpu") is None
    if wide and not any(p > 0 for p in dropouts):
        return True  # all products are the vendor's
    return x.numel() < limits.lora_rows * rank * x.shape[-1]


def vera_not_faster(x: Tensor, ranks: Sequence[int]) -> bool:
    """True if PEFT's own forward is faster for VeRA of these ranks, whatever the size of x."""
    return x.is_cpu and max(ranks) > limits.vera_rank and _registry.forced_backend() is None


def lora_embedding_not_faster(ids: Tensor, branches: Sequence[LoraBranch]) -> bool:
    """True if PEFT's own forward is faster for these branches on an embedding."""
    if not ids.is_cpu:
        return False
    elements = ids.numel() * branches[0].b.shape[0] + sum(branch.a.numel() for branch in branches)
    return elements < limits.lora_embedding and _registry.forced_backend() is None


def _elements(x: Tensor, outputs: int) -> int:
    """Of the input [*, K] and the output [*, outputs] of a projection."""
    features = x.size(-1) if x.dim() else 1
    return x.numel() // max(features, 1) * (features + outputs)


def fast_backend_missing(device_type: str) -> str | None:
    """Why no backend faster than plain torch serves this device, or None if one does."""
    if _registry.forced_backend() is not None:
        return None
    if device_type == "cpu":
        return _native.cpu_missing()
    if device_type == "cuda":
        return _triton.why_not(())
    if device_type == "meta":  # shapes only: no backend runs
        return None
    return f"no kernels for device {device_type}"


def row_wise_too_small(x: Tensor, operations: int) -> bool:
    """True if torch's kernels are faster for a norm or an activation of this input.

    Args:
        x: its input.
        operations: operators of torch that the module's own forward dispatches.
    """
    if not x.is_cpu:
        limit = limits.one_kernel_cuda if x.is_cuda and operations == 1 else 0
    elif operations > 1:
        limit = limits.kernels if operations > 2 else limits.two_kernels
    else:
        limit = limits.one_kernel_fp32 if x.dtype == torch.float32 else limits.one_kernel
    return x.numel() < limit and _registry.forced_backend() is None


def ia3_too_small(x: Tensor, features: int, *, casts: bool) -> bool:
    """True if torch's kernels are faster for (IA)^3 on a layer of this input.

    Args:
        x: [*, K], the input of the layer.
        features: of the activations that are scaled.
        casts: they differ from the vector in dtype.
    """
    limit = limits.ia3_cast if casts else limits.ia3
    elements = x.numel() // max(x.shape[-1], 1) * features
    return x.is_cpu and elements < limit and _registry.forced_backend() is None


def experts_too_small(x: Tensor, elements: int) -> bool:
    """True if PEFT's own forward is faster for experts with so many adapted weights.

    Args:
        x: the input of the experts.
        elements: of all stacks of weights that have an adapter.
    """
    limit = limits.experts_fp32 if x.dtype == torch.float32 else limits.experts_16bit
    return x.is_cpu and elements < limit and _registry.forced_backend() is None


def mlp_too_small(x: Tensor) -> bool:
    """True if a gated MLP of this input gains nothing."""
    return x.is_cpu and x.numel() < limits.mlp and _registry.forced_backend() is None


def rope_too_small(q: Tensor, k: Tensor) -> bool:
    """True if torch's kernels are faster for a rotary embedding of these."""
    return q.is_cpu and q.numel() + k.numel() < limits.rope and _registry.forced_backend() is None


def bottleneck_too_few(x: Tensor, dropout_p: float, scaled: bool) -> bool:
    """True if :func:`bottleneck_not_faster` is, whatever the adapter's weights; cheap enough to ask
    first: what it would ask takes 4 to 7 % of a small adapter.
    """
    if dropout_p > 0 or scaled or x.dtype != torch.float32 or not x.is_cpu:
        return False
    return _few_in_fp32(x) and not _torch.any_autocast()


def _few_in_fp32(x: Tensor) -> bool:
    return x.numel() < min(limits.bottleneck_rows * x.shape[-1], limits.bottleneck_fp32)


def bottleneck_not_faster(
    x: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype, dropout_p: float, scaled: bool
) -> bool:
    """True if torch's own operations are as fast for a bottleneck adapter. Around the vendor's
    products nothing is fused but a dropout or a trained scale: on a GPU that gains a tenth of the
    kernels' time and costs twice the host's (H100, 8192 x 4096). On a CPU with tiles an adapter is
    one call each way, which packs the weights: that takes rows to be worth it.

    Args:
        x: [*, K].
        down, up: [R, K] and [H, R].
        dtype: that it is computed in.
        dropout_p: of the output.
        scaled: by a parameter.
    """
    if x.is_cuda:
        if _registry.forced_backend() is not None:
            return False
        if not _bottleneck_triton.fused_on_gpu(x, down, dtype):
            return True
        return down.dtype == dtype and x.numel() < limits.bottleneck_cuda
    if dropout_p > 0:
        return False
    if torch.compiler.is_compiling():
        return True
    whole = x.is_cpu and _native.takes_bottleneck(x, down, up, dtype, None, 0)
    in_fp32 = dtype == torch.float32  # bf16 is taken on tiles alone
    if whole and (not in_fp32 or _native.has_base_product()):
        many = down.numel() * x.shape[-1] > limits.bottleneck_weights * x.numel()
        return many or (in_fp32 and _few_in_fp32(x))
    if not scaled:
        return True
    return x.is_cpu and x.numel() < limits.bottleneck and _registry.forced_backend() is None


def loss_too_small(like: Tensor, rows: int, vocabulary: int) -> bool:
    """True if the logits [rows, vocabulary], on the device of ``like``, are so few that torch is
    faster.
    """
    small = like.is_cpu and rows * vocabulary < limits.logits
    return small and _registry.forced_backend() is None


def attention_is_faster(q: Tensor, k: Tensor) -> bool:
    """True where our attention beats torch's: on the CPU, unless the call is tiny; GPUs have their
    vendor's.

    Args:
        q: [B, Hq, S, D].
        k: [B, Hk, T, D].
    """
    if q.device.type != "cpu" or type(q) is not Tensor or q.dim() != 4:
        return False
    return not attention_too_small(q, k)


def attention_too_small(q: Tensor, k: Tensor) -> bool:
    """True if torch's attention is as fast for these, on the CPU."""
    if not q.is_cpu or q.dim() != 4:
        return False
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return scores < limits.attention_scores and _registry.forced_backend() is None
