"""What a result depends on: hardware, packages, commit, allocator and thread settings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import cpuinfo
import psutil
import torch

PACKAGES = ("fasttune", "torch", "transformers", "peft", "accelerate", "triton", "numpy")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd")
SETTINGS = re.compile(
    r"MALLOC|GLIBC_TUNABLES|TCMALLOC|OMP_|KMP_|GOMP_|MKL_|ONEDNN_|DNNL_|_ALLOC_CONF|FASTTUNE_"
)
REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def hardware() -> dict[str, Any]:
    """CPU model and features, cores, memory, GPU."""
    cpu = cpuinfo.get_cpu_info()
    flags = set(cpu.get("flags", ()))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu.get("brand_raw", platform.processor()),
        "machine": platform.machine(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
    }


def hardware_slug(facts: dict[str, Any]) -> str:
    """A file name part for ``hardware()``."""
    amx = "amx " if "amx_bf16" in facts["features"] else ""  # one brand, with tiles and without
    name = facts["gpu"] or f"{facts['cpu']} {amx}{facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    """Package versions, None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an unpacked source archive
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """The commit, and whether anything but earlier results differs from it."""
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def settings() -> dict[str, Any]:
    """Allocator and thread settings; libraries by file name only."""
    preload = os.environ.get("LD_PRELOAD", "")
    pages = TRANSPARENT_HUGE_PAGES
    return {
        "torch_threads": torch.get_num_threads(),
        "variables": {key: os.environ[key] for key in sorted(os.environ) if SETTINGS.search(key)},
        "preloaded": [Path(item).name for item in re.split(r"[: ]+", preload) if item],
        "transparent_huge_pages": pages.read_text().strip() if pages.exists() else None,
    }


def environment(command: str) -> dict[str, Any]:
    """Everything above, and the command that ran."""
    return {
        "hardware": hardware(),
        "versions": versions(),
        "git": commit(),
        "settings": settings(),
        "command": command,
    }
