"""Mask-free dropout in torch: the reference of the fixed format that docs/design.md states."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import lru_cache

import torch
from torch import Tensor

from fasttune import _torch

_RESOLUTION = 65536  # a lane has 16 bits
_MASK32 = 0xFFFFFFFF


@lru_cache(maxsize=256)
def threshold(p: float) -> int:
    """The lane value below which an element is dropped: round(65536 p).

    Raises:
        ValueError: p is outside [0, 1), or so near 1 that nothing would be kept.
    """
    value = round(p * _RESOLUTION) if 0.0 <= p < 1.0 else _RESOLUTION
    if value >= _RESOLUTION:
        raise ValueError(f"dropout_p: expected a probability in [0, 1), got {p}")
    return value


def keep_scale(threshold: int) -> float:
    """1 / (1 - p) for the quantised p."""
    return _RESOLUTION / (_RESOLUTION - threshold)


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed on ``device`` from torch's generator of that device, without
    synchronisation.
    """
    if device.type == "cuda" and (seed := _seeds.draw(device)) is not None:
        return seed
    return _random_seeds((), device)


def _random_seeds(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    return torch.randint(
        -(2**63), 2**63 - 1, shape, dtype=torch.int64, device=device, generator=generator
    )


class _Seeds:
    """Seeds on a GPU, drawn many at a time: one at a time, a step of a LoRA model has hundreds of
    launches for them.

    A seed is a function of the state of torch's generator, its seed and its offset, and moves the
    offset as any draw does. So it is the same again where the state is restored, as a checkpointed
    block does that is computed a second time.
    """

    _STEP = 4  # of the offset for a draw
    _COUNT = 64  # seeds drawn together
    _KEPT = 64  # blocks of them
    _OWN = 0x5FA57_7E5EED  # apart from what torch draws with its own seed

    def __init__(self) -> None:
        self._blocks: OrderedDict[tuple[int, ...], tuple[Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def draw(self, device: torch.device) -> Tensor | None:
        """The next seed; None where a draw has to be seen: by a trace, by torch.func (whose vmap
        draws one for each sample or raises), or in a CUDA graph.
        """
        if torch.compiler.is_compiling() or _torch.under_dispatch_mode():
            return None
        if _torch.in_functorch() or _torch.capturing():
            return None
        generator = _torch.cuda_generator(device)
        with self._lock:
            seed, offset = generator.initial_seed(), generator.get_offset()
            generator.set_offset(offset + self._STEP)
            block, i = divmod(offset // self._STEP, self._COUNT)
            # A block is ready on the stream that has drawn it.
            index = generator.device.index
            key = index, _torch.current_stream(index), seed, block
            found = self._blocks.get(key)
            if found is None:
                found = self._blocks[key] = self._block(generator.device, seed, block)
                if len(self._blocks) > self._KEPT:
                    self._blocks.popitem(last=False)
            return found[i]

    def _block(self, device: torch.device, seed: int, block: int) -> tuple[Tensor, ...]:
        own = torch.Generator(device).manual_seed(seed ^ self._OWN)
        own.set_offset(block * self._COUNT * self._STEP)
        with torch.inference_mode(False):  # else no later call could keep them for its backward
            # Each at a multiple of 16 bytes: kernels are compiled anew for another alignment.
            return _random_seeds((self._COUNT, 2), device, own)[:, 0].unbind()


_seeds = _Seeds()


def keep_mask(
    seed: Tensor | None,
    threshold: int,
    rows: int,
    features: int,
    *,
    branch: int,
    row_offset: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """The 0 / 1 mask [rows, features] in fp32 of one branch; all ones for threshold 0."""
    if threshold == 0 or seed is None:
        device = device if seed is None else seed.device
        return torch.ones((), device=device)
    counters = -(-features // 8)
    row = torch.arange(rows, device=seed.device, dtype=torch.int64)[:, None] + row_offset
    k = torch.arange(counters, device=seed.device, dtype=torch.int64)[None, :]
    words = _philox(seed, k, row & _MASK32, (row >> 32) & _MASK32, branch)
    lanes = [lane for word in words for lane in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(torch.broadcast_tensors(*lanes), dim=-1).reshape(rows, counters * 8)
    return (bits[:, :features] >= threshold).to(torch.float32)


def random_lanes(seed: int, count: int, c1: int, c2: int, c3: int, device: torch.device) -> Tensor:
    """[count] int64: 16 random bits for each element k, of the counter (k // 8, c1, c2, c3)."""
    k = torch.arange(-(-count // 8), dtype=torch.int64, device=device)
    key = torch.tensor(seed, dtype=torch.int64, device=device)
    row = torch.zeros_like(k)
    words = _philox(key, k, row + c1, row + c2, c3)
    lanes = [lane for word in words for lane in (word & 0xFFFF, word >> 16)]
    return torch.stack(lanes, dim=-1).reshape(-1)[:count]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two unsigned 32-bit values held in int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: int) -> tuple[Tensor, ...]:
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    last = torch.full_like(c0, c3)
    for _ in range(7):
        high0, low0 = _multiply(0xD2511F53, c0)
        high2, low2 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, last = high2 ^ c1 ^ k0, low2, high0 ^ last ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, last
