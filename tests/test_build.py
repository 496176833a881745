"""Whether the build takes the CUDA C++ kernels in, and what it says where it does not."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHEELS = ["nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime"]
WHEELS += ["nvidia-cuda-cccl"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nvcc is looked for on Linux only")


def setup(
    folder: Path, cuda: str, cuda_home: str = "", packages: str = ""
) -> subprocess.CompletedProcess[str]:
    """``setup.py --version`` with nothing but ``folder`` on PATH: decides, builds nothing."""
    return python(folder, cuda, "setup.py", "--version", CUDA_HOME=cuda_home, PYTHONPATH=packages)


def python(
    folder: Path, cuda: str, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_HOME": "", "PATH": str(folder), "FASTTUNE_CUDA": cuda}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**environment, **more}, capture_output=True, text=True
    )


def build_requirements(folder: Path, cuda: str) -> list[list[str]]:
    """What the three hooks of the build backend ask pip for, with ``folder`` alone on PATH."""
    hooks = [f"backend.get_requires_for_build_{kind}()" for kind in ("wheel", "editable", "sdist")]
    code = "import sys, json; sys.path.insert(0, 'csrc'); import build_backend as backend; "
    result = python(folder, cuda, "-c", f"{code}print(json.dumps([{', '.join(hooks)}]))")
    assert result.returncode == 0, result.stderr
    requirements: list[list[str]] = json.loads(result.stdout)
    return requirements


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


def test_another_nvcc_is_taken_where_the_first_is_old(tmp_path: Path) -> None:
    make_nvcc(tmp_path, "12.8")
    make_nvcc(tmp_path / "toolkit/bin", "13.0")
    result = setup(tmp_path, "1", cuda_home=str(tmp_path / "toolkit"))
    assert result.returncode == 0, result.stderr


def test_the_wheels_are_taken_when_all_are_there(tmp_path: Path) -> None:
    root = tmp_path / "packages/nvidia/cu13"
    make_nvcc(root / "bin", "13.0")
    incomplete = setup(tmp_path, "auto", packages=str(tmp_path / "packages"))
    assert f"{root}/bin/nvcc lacks {', '.join(WHEELS[1:])}" in incomplete.stdout
    files = ("nvvm/bin/cicc", "include/crt/host_config.h", "lib/libcudart_static.a")
    for file in (*files, "include/cccl/nv/target"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    complete = setup(tmp_path, "1", packages=str(tmp_path / "packages"))
    assert complete.returncode == 0, complete.stderr


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="nvcc has no wheels for this machine"
)
def test_insisting_brings_the_wheels_of_one_release(tmp_path: Path) -> None:
    expected = [f"{wheel}==13.0.*" for wheel in WHEELS]
    assert build_requirements(tmp_path, "1") == [expected] * 3


@pytest.mark.parametrize("cuda", ["auto", "0"])
def test_nothing_is_brought_unless_asked_for(tmp_path: Path, cuda: str) -> None:
    assert build_requirements(tmp_path, cuda) == [[]] * 3


def test_nothing_is_brought_where_there_is_nvcc(tmp_path: Path) -> None:
    make_nvcc(tmp_path, "13.0")
    assert build_requirements(tmp_path, "1") == [[]] * 3


@pytest.mark.slow
def test_the_wheels_build_a_kernel_where_there_is_no_nvcc(tmp_path: Path) -> None:
    """pip's isolated build, of one kernel for one target and of the plain C++ kernels."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    for folder in ("fasttune", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for kernel in (source / "csrc/cuda").glob("*.cu"):
        if kernel.stem not in ("rms_norm", "device"):
            kernel.unlink()
    text = (source / "setup.py").read_text()
    targets = "CUDA_TARGETS = {75: (75,), 80: (80, 86, 89, 90, 100, 120)}"
    assert text.count(targets) == text.count('platform.machine() in ("x86_64", "AMD64")') == 1
    text = text.replace(targets, "CUDA_TARGETS = {80: (80,)}")
    (source / "setup.py").write_text(
        text.replace('platform.machine() in ("x86_64", "AMD64")', "False")
    )
    without_nvcc = tmp_path / "bin"
    without_nvcc.mkdir()
    for tool in ("gcc", "g++", "cc", "c++", "as", "ld", "ar", "sh", "uname"):
        found = shutil.which(tool)
        assert found is not None, f"the build needs {tool}"
        (without_nvcc / tool).symlink_to(found)
    command = ["-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(source)]
    result = python(without_nvcc, "1", *command)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.startswith("fasttune/_cuda."))
        code = archive.read(name)
    assert b"rms_norm_fwd_kernel" in code and b"sm_80" in code
