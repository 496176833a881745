"""Two ranks on gloo: DDP and FSDP2 of a patched model follow a stock model in one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
import torch
import torch.distributed as dist
from tiny_models import relative, tiny_llama, with_lora
import fasttune
from fasttune.ops import policy

policy.limits = policy.NO_LIMITS  # the model is tiny
torch.set_num_threads(1)
mode, checkpointing = sys.argv[1], sys.argv[2] == "checkpointing"
dist.init_process_group("gloo")
rank = dist.get_rank()

def model():
    made = with_lora(tiny_llama(), r=4).train()
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
        made.enable_input_require_grads()
    return made

tokens = torch.randint(3, 499, (4, 23), generator=torch.Generator().manual_seed(0))
own = tokens[2 * rank : 2 * rank + 2]

def train(wrapped, batch, steps=3):
    losses = []
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-3)  # a large eps: noise stays noise
    for _ in range(steps):
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)

stock = model()
expected = train(stock, tokens)
patched = fasttune.patch(model(), strict=True)
if mode == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(patched)
else:
    from torch.distributed.fsdp import fully_shard

    for block in patched.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(patched.base_model.model)  # a class that patch swapped too
    wrapped = patched
losses = train(wrapped, own)
dist.all_reduce(losses)
assert relative(losses / 2, expected) < 1e-5, (losses / 2, expected)
names = dict(stock.named_parameters())
for name, parameter in patched.named_parameters():
    value = parameter.full_tensor() if mode == "fsdp2" else parameter
    assert relative(value.detach(), names[name].detach()) < 1e-4, name
report = fasttune.report(patched)
assert report["lora"].fused == 14 and report["norm"].fused == 5 and report["mlp"].fused == 2, report
if mode == "fsdp2":
    try:
        fasttune.unpatch(patched)
    except fasttune.PatchError as error:
        assert "unpatch before sharding" in str(error), error
    else:
        raise AssertionError("unpatch of a sharded model must refuse")
    assert type(patched.base_model.model).__name__.startswith("FSDP")
    assert fasttune.is_patched(patched)
dist.barrier()
dist.destroy_process_group()
print("rank", rank, "agrees")
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [
        ("ddp", "plain"),
        ("fsdp2", "checkpointing"),
        pytest.param("ddp", "checkpointing", marks=pytest.mark.slow),
        pytest.param("fsdp2", "plain", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_follow_one_stock_process(tmp_path: Path, mode: str, checkpointing: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    port = str(_free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), mode, checkpointing],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
                ),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": "2",
                "RANK": str(rank),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, (out, error)) in enumerate(zip(ranks, results, strict=True)):
        assert rank.returncode == 0, f"rank {number}: {error[-3000:]}"
        assert f"rank {number} agrees" in out
