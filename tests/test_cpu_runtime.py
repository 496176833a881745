"""A patched step on the CPU is right whatever the instruction set, the threads and the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
import torch
from tiny_models import gradients, relative, tiny_llama, with_lora
import fasttune
from fasttune.ops import policy

policy.limits = policy.NO_LIMITS  # the model is tiny

def step(model):
    ids = torch.randint(3, 499, (2, 70), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {"loss": loss.detach(), **gradients(model)}
    model.zero_grad()
    return found

def largest_difference(dtype):
    model = with_lora(tiny_llama().to(dtype)).train()
    stock = step(model)
    ours = step(fasttune.patch(model, strict=True))
    assert fasttune.report(model)["norm"].fused == 5
    return max(relative(ours[name], stock[name]) for name in stock)
"""
BARS = "assert largest_difference(torch.float32) < 1e-5\n"
# A step in bf16 carries its own noise of about one percent.
BARS += "assert largest_difference(torch.bfloat16) < 0.05\n"
FORK = """
torch.set_num_threads(2)
largest_difference(torch.float32)  # the parent's team of threads exists
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as a DataLoader worker does
    try:
        assert largest_difference(torch.float32) < 1e-5
    except BaseException:
        os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run(code: str, **environment: str) -> str:
    path = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM + code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return result.stderr[-2000:] or "no message" if result.returncode else ""


@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_a_step_with_less_than_avx512(isa: str) -> None:
    if isa == "avx2" and not _has("avx2"):
        pytest.skip("this CPU has no AVX2")
    assert (
        run(BARS, ONEDNN_MAX_CPU_ISA="AVX2", FASTTUNE_CPU_ISA=isa, ATEN_CPU_CAPABILITY="avx2") == ""
    )


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_step_with_any_number_of_threads(threads: str) -> None:
    assert run(BARS, OMP_NUM_THREADS=threads) == ""


def test_a_step_after_fork() -> None:
    assert run(FORK, OMP_NUM_THREADS="2") == ""


def _has(isa: str) -> bool:
    from fasttune import _native

    return isa in _native.cpu().isa_available().split(",")
