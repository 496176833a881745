"""tune_allocator keeps memory mapped: counted in page faults, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
import fasttune
tuned = sys.argv[1] == "tuned" and fasttune.tune_allocator()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(32 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(tuned, faults())
"""


def run(mode: str) -> tuple[str, int]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
    )
    tuned, faults = result.stdout.split()
    return tuned, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_large_temporaries_stop_faulting() -> None:
    stock, tuned = run("stock"), run("tuned")
    assert tuned[0] == "True"
    # 5 x 32 MiB are 40,960 pages of 4 KB, fewer with huge pages.
    assert tuned[1] < 0.1 * stock[1], (stock, tuned)
