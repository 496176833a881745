"""Whether the build takes the CUDA C++ kernels in, and what it says where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nvcc is looked for on Linux only")


def setup(folder: Path, cuda: str, cuda_home: str = "") -> subprocess.CompletedProcess[str]:
    """``setup.py --version`` with nothing but ``folder`` on PATH: decides, builds nothing."""
    environment = {**os.environ, "PATH": str(folder), "FASTTUNE_CUDA": cuda, "CUDA_HOME": cuda_home}
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def make_nvcc(folder: Path, release: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = f"Cuda compilation tools, release {release}, V{release}.1"
    (folder / "nvcc").write_text(f'#!/bin/sh\necho "{text}"\n')
    (folder / "nvcc").chmod(0o755)


def test_without_nvcc_the_build_goes_on_and_says_why(tmp_path: Path) -> None:
    result = setup(tmp_path, "auto")
    assert result.returncode == 0, result.stderr
    assert "built without CUDA C++ kernels: nvcc was not found on PATH" in result.stdout


def test_an_old_nvcc_is_not_taken(tmp_path: Path) -> None:
    make_nvcc(tmp_path, "12.8")
    result = setup(tmp_path, "auto")
    assert result.returncode == 0, result.stderr
    assert "is release 12.8, and 13.0 or later is needed" in result.stdout


def test_cuda_home_is_looked_at(tmp_path: Path) -> None:
    make_nvcc(tmp_path / "toolkit/bin", "12.9")
    result = setup(tmp_path, "1", cuda_home=str(tmp_path / "toolkit"))
    assert result.returncode != 0
    assert f"{tmp_path}/toolkit/bin/nvcc is release 12.9" in result.stderr


def test_a_recent_nvcc_is_taken(tmp_path: Path) -> None:
    make_nvcc(tmp_path, "13.1")
    result = setup(tmp_path, "1")
    assert result.returncode == 0, result.stderr
    assert "without CUDA" not in result.stdout


def test_insisting_without_nvcc_is_an_error(tmp_path: Path) -> None:
    result = setup(tmp_path, "1")
    assert result.returncode != 0
    assert "FASTTUNE_CUDA=1: nvcc was not found" in result.stderr


def test_zero_leaves_it_out_silently_and_another_value_is_refused(tmp_path: Path) -> None:
    make_nvcc(tmp_path, "12.8")
    silent = setup(tmp_path, "0")
    assert silent.returncode == 0 and "CUDA" not in silent.stdout
    refused = setup(tmp_path, "yes")
    assert refused.returncode != 0
    assert "FASTTUNE_CUDA: expected auto, 0 or 1, got 'yes'" in refused.stderr
