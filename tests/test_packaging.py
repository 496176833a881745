"""A wheel built from the sdist, without torch in the build environment, trains in an empty one."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

SMOKE = """
import torch
from torch import nn
from fasttune import _native
from fasttune.ops import linear_cross_entropy, lora_linear
assert _native.cpu_missing() is None
torch.manual_seed(0)
weight, head = torch.randn(32, 16), torch.randn(50, 32)
a, b = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.zeros(32, 4))
x, y = torch.randn(64, 16), torch.randint(0, 50, (64,))
optimizer = torch.optim.AdamW([a, b], lr=0.05)
losses = []
for _ in range(20):
    loss = linear_cross_entropy(lora_linear(x, weight, a, b, dropout_p=0.05), head, y)
    loss.backward(); optimizer.step(); optimizer.zero_grad(); losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses
print("trained")
"""


def run(*command: str, cwd: Path | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_sdist_to_wheel_to_a_training_step(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "-o", str(tmp_path), str(ROOT))
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "source", filter="data")
    assert any(name.endswith("csrc/cpu/lora_linear.cpp") for name in names)
    (source,) = (tmp_path / "source").iterdir()
    run(sys.executable, "-m", "build", "--wheel", "-o", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        contents = archive.namelist()
    assert any(name.startswith("fasttune/_cpu") for name in contents)
    assert "fasttune_kernels/lora_linear.py" in contents
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in contents)
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv/bin/python")
    version = torch.__version__.split("+")[0]
    run(python, "-m", "pip", "install", "-q", f"torch=={version}", str(wheel))
    assert run(python, "-c", SMOKE, cwd=tmp_path).strip() == "trained"
    assert "lora_linear_fwd" in run(str(tmp_path / "venv/bin/fasttune"), "doctor", cwd=tmp_path)
