"""Seeds of dropout on a GPU: many are drawn at a time, and each follows from torch's generator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttune.ops import _dropout, lora_linear

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")


def draw(count: int) -> list[int]:
    return [int(_dropout.draw_seed(GPU)) for _ in range(count)]


def test_a_seed_does_not_come_twice() -> None:
    torch.manual_seed(0)
    seeds = draw(300)
    torch.manual_seed(1)
    assert len({*seeds, *draw(300)}) == 600


def test_the_same_state_gives_the_same_seeds() -> None:
    torch.manual_seed(3)
    first = draw(5)
    state = torch.cuda.get_rng_state()
    expected = draw(200)
    _dropout._seeds._blocks.clear()  # what was kept is drawn again
    torch.cuda.set_rng_state(state)
    assert draw(200) == expected
    torch.manual_seed(3)
    assert draw(205) == first + expected


def test_other_draws_move_the_seeds_and_seeds_move_other_draws() -> None:
    torch.manual_seed(5)
    plain = draw(3)
    after_seeds = torch.rand(8, device=GPU)
    torch.manual_seed(5)
    assert not torch.equal(torch.rand(8, device=GPU), after_seeds)
    assert draw(1) != plain[:1]


def test_no_address_makes_a_kernel_compile_anew() -> None:
    assert {_dropout.draw_seed(GPU).data_ptr() % 16 for _ in range(100)} == {0}


def layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w = torch.randn(32, 64, device=GPU), torch.randn(48, 64, device=GPU)
    return x, w, torch.randn(16, 64, device=GPU), torch.randn(48, 16, device=GPU)


def test_a_seed_of_inference_serves_training() -> None:
    torch.manual_seed(7)
    x, w, a, b = layer()
    _dropout._seeds._blocks.clear()
    with torch.inference_mode():
        lora_linear(x, w, a, b, dropout_p=0.5)
    lora_linear(x.requires_grad_(), w, a, b, dropout_p=0.5).sum().backward()
    assert x.grad is not None


def test_each_replay_of_a_graph_draws_anew() -> None:
    x, w, a, b = layer()
    for _ in range(3):  # kernels compile
        lora_linear(x, w, a, b, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_linear(x, w, a, b, dropout_p=0.5)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(y.clone())
    assert not torch.equal(*seen)
    y = lora_linear(x, w, a, b, dropout_p=0.5)  # outside, after a capture
    assert not any(torch.equal(y, other) for other in seen)


def test_streams_do_not_read_each_others_blocks_too_early() -> None:
    torch.manual_seed(9)
    expected = draw(4)
    torch.manual_seed(9)
    _dropout._seeds._blocks.clear()
    stream = torch.cuda.Stream()
    first = _dropout.draw_seed(GPU)
    with torch.cuda.stream(stream):
        second = _dropout.draw_seed(GPU)
    torch.cuda.synchronize()
    assert len(_dropout._seeds._blocks) == 2
    assert [int(first), int(second)] == expected[:2]
