"""Whole runs: killed and resumed, and sharded over two ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tiny_models import tiny_llama
from fasttune.optim import AdamW, layerwise_lr_groups

torch.set_num_threads(1)
folder, kill = Path(sys.argv[1]), sys.argv[2] == "kill"
model = tiny_llama(num_hidden_layers=4).bfloat16()
for param in model.parameters():
    param.requires_grad_(False)
model.lm_head.weight.requires_grad_(True)
optimizer = AdamW(layerwise_lr_groups(model, 1e-3, 0.8), max_grad_norm=1.0, moments="8bit")
first = 0
if (folder / "state.pt").exists():
    saved = torch.load(folder / "state.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"]
for step in range(first, 40):
    for block in range(step // 10):  # from the top, one every 10 steps
        model.model.layers[3 - block].requires_grad_(True)
    tokens = torch.randint(3, 499, (2, 9), generator=torch.Generator().manual_seed(step))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % 5 == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, folder / "new.pt")
        os.replace(folder / "new.pt", folder / "state.pt")
    if kill and step + 1 == 25:
        os.kill(os.getpid(), signal.SIGKILL)
print("first step", first)
"""


def test_a_killed_run_with_gradual_unfreezing_resumes_bit_equal(tmp_path: Path) -> None:
    def run(name: str, mode: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return python("-c", KILLED, str(folder), mode)

    straight = run("straight", "straight")
    assert straight.returncode == 0, straight.stderr
    assert run("killed", "kill").returncode == -signal.SIGKILL
    resumed = run("killed", "resume")
    assert resumed.stdout.strip() == "first step 25", resumed.stderr
    one, two = (torch.load(tmp_path / name / "state.pt") for name in ("straight", "killed"))
    assert one["step"] == two["step"] == 40
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    mine, other = one["optimizer"]["state"], two["optimizer"]["state"]
    assert mine.keys() == other.keys() and len(mine) == 1 + 3 * 9
    for key, own in mine.items():
        assert own.keys() == other[key].keys()
        assert all(torch.equal(own[name], other[key][name]) for name in own)


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tiny_models import relative, tiny_llama
from fasttune.optim import AdamW

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
mesh = hybrid if sys.argv[1] == "hybrid" else init_device_mesh("cpu", (2,))
tokens = torch.randint(3, 499, (4, 23), generator=torch.Generator().manual_seed(0))
options = dict(lr=1e-3, eps=1e-3, max_grad_norm=0.5, max_norm=3.0)

def train(model, batch, optimizer):
    for _ in range(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

single = tiny_llama()
reference = AdamW(single.named_parameters(), **options)
train(single, tokens, reference)
sharded = tiny_llama()
for block in sharded.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
optimizer = AdamW(sharded.named_parameters(), **options)
train(sharded, tokens[2 * rank : 2 * rank + 2], optimizer)
named = dict(single.named_parameters())
assert all(isinstance(p, DTensor) for p in sharded.parameters())
for name, param in sharded.named_parameters():
    assert relative(param.full_tensor().detach(), named[name].detach()) < 1e-5, name
    own = optimizer.state[param]["exp_avg"]
    assert isinstance(own, DTensor) and own.placements == param.placements
assert abs(float(optimizer.grad_norm) / float(reference.grad_norm) - 1) < 1e-4
theirs = reference.monitor()
for name, ours in optimizer.monitor().items():
    assert abs(ours.weight / theirs[name].weight - 1) < 1e-5, name
    assert abs(ours.gradient / theirs[name].gradient - 1) < 1e-2, name
try:
    AdamW(sharded.parameters(), moments="8bit")
except ValueError as error:
    assert "sharded parameters" in str(error)
else:
    raise AssertionError("8-bit moments of sharded parameters must be refused")
print(f"rank {rank} equals", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("mesh", ["whole", "hybrid"])
def test_sharded_parameters_equal_a_single_process(tmp_path: Path, mesh: str) -> None:
    """Hybrid: replicated over both ranks, so that a norm must not be summed over them."""
    program = tmp_path / "sharded.py"
    program.write_text(SHARDED)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    result = python(*launcher, str(program), mesh)
    # Not the exit status: gloo's threads can abort a process that is done.
    for rank in (0, 1):
        assert f"rank {rank} equals" in result.stdout, result.stderr[-3000:]
