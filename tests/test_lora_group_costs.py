"""Counted at Llama-3-8B size on meta: LoRA's own share of q, k and v."""

from __future__ import annotations

import torch
from tiny_models import with_lora
from torch import Tensor, nn

import fasttune
from fasttune.testing.accounting import Counts, count

TOKENS, HIDDEN, OF_KEYS, RANK = 8192, 4096, 1024, 16


class Projections(nn.Module):
    """q, k and v of one input."""

    def __init__(self) -> None:
        super().__init__()
        widths = {"q_proj": HIDDEN, "k_proj": OF_KEYS, "v_proj": OF_KEYS}
        for name, width in widths.items():
            setattr(self, name, nn.Linear(HIDDEN, width, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def counted(module: nn.Module) -> Counts:
    x = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    count(module, x)  # groups are found by watching a forward
    return count(module, x)


def projections() -> nn.Module:
    with torch.device("meta"):
        return Projections()


def adapted() -> nn.Module:
    return with_lora(projections(), r=RANK, lora_dropout=0.05).to("meta").train()


def test_loras_own_share_of_a_group() -> None:
    frozen, stock = counted(projections().requires_grad_(False)), counted(adapted())
    ours = counted(fasttune.patch(adapted(), strict=True))
    assert ours.total.opaque.calls == 0
    calls = (ours.calls - frozen.calls) / (stock.calls - frozen.calls)
    moved = (ours.bytes_moved - frozen.bytes_moved) / (stock.bytes_moved - frozen.bytes_moved)
    saved = (ours.saved_bytes - frozen.saved_bytes) / (stock.saved_bytes - frozen.saved_bytes)
    print(f"calls {ours.calls - frozen.calls} / {stock.calls - frozen.calls} = {calls:.2f}")
    print(f"moved {moved:.3f}, saved {saved:.4f}")
    assert calls <= 0.25
    assert moved <= 0.2
    assert saved <= 0.3
    masks = TOKENS * HIDDEN // 8  # what even one bit an element would take
    assert ours.saved_bytes - frozen.saved_bytes - TOKENS * HIDDEN * 2 < masks


def test_the_input_of_q_k_and_v_is_read_five_times() -> None:
    ours = counted(fasttune.patch(adapted(), strict=True))
    x = TOKENS * HIDDEN * 2
    readers = ("aten::addmm_", "fasttune::lora_down", "fasttune::lora_down_backward.da")
    launches = [
        launch
        for launch in ours.forward.launches
        if launch.name in readers and launch.bytes_read > x
    ] + [launch for launch in ours.backward.launches if launch.name in readers[1:]]
    assert sorted(launch.name for launch in launches) == sorted([*3 * readers[:1], *readers[1:]])
    assert all(launch.bytes_read < 1.1 * x for launch in launches if launch.name in readers[1:])
