"""Seeds drawn in blocks: what can be seen without a GPU, with a generator in the place of its."""

from __future__ import annotations

import pytest
import torch

from fasttune import _torch
from fasttune.ops import _dropout

GPU = torch.device("cuda", 0)


class Generator:
    """The part of a CUDA generator that seeds are drawn from."""

    device = GPU

    def __init__(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    own = Generator(11)

    def block(self, device, seed, number):
        numbers = torch.Generator().manual_seed(seed + 1000 * number)
        return _dropout._random_seeds((64,), torch.device("cpu"), numbers).unbind()

    monkeypatch.setattr(_torch, "cuda_generator", lambda device: own)
    monkeypatch.setattr(_torch, "current_stream", lambda index: 0)
    monkeypatch.setattr(_torch, "capturing", lambda: False)
    monkeypatch.setattr(_dropout._Seeds, "_block", block)
    monkeypatch.setattr(_dropout, "_seeds", _dropout._Seeds())
    return own


def draw(count: int) -> list[int]:
    return [int(_dropout.draw_seed(GPU)) for _ in range(count)]


def test_a_state_gives_its_seeds_again(generator: Generator) -> None:
    first = draw(150)
    assert len(set(first)) == 150 and generator.offset == 600
    generator.offset = 4 * 60  # restored
    assert draw(10) == first[60:70]
    generator.seed = 12
    assert not set(draw(80)) & set(first)


def test_few_blocks_are_kept(generator: Generator) -> None:
    first = draw(1)
    draw(64 * 80)
    assert len(_dropout._seeds._blocks) == 64
    generator.offset = 0
    assert draw(1) == first


@pytest.mark.parametrize("cached", [False, True], ids=["miss", "hit"])
def test_vmap_draws_for_each_sample_or_raises(
    cached: bool, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cached:
        draw(1)
    original = _dropout._random_seeds
    monkeypatch.setattr(  # the device that is there
        _dropout, "_random_seeds", lambda shape, device, own=None: original(shape, "cpu", own)
    )
    draw_one = lambda x: x + _dropout.draw_seed(GPU)  # noqa: E731
    samples = torch.zeros(5, dtype=torch.int64)
    seen = torch.vmap(draw_one, randomness="different")(samples)
    assert len(set(seen.tolist())) == 5
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(draw_one)(samples)
    assert all(
        type(seed) is torch.Tensor for block in _dropout._seeds._blocks.values() for seed in block
    )
    assert not torch._C._functorch.is_batchedtensor(_dropout.draw_seed(GPU))
