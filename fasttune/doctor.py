"""``fasttune doctor``: versions, CPU features, and which backend serves which op, with the reason
for the others."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.table import Table

from fasttune import _native, _registry
from fasttune.ops import _gemm, _triton  # importing the package registers the ops
from fasttune.patching.report import render

_PACKAGES = ("fasttune", "torch", "triton", "transformers", "peft", "trl", "accelerate", "numpy")

# Why a backend that could serve an op does not.
_ASIDE = {
    "reference": "slower, used for checks",
    "cuda": "Triton comes first; fasttune.use_backend('cuda') or FASTTUNE_BACKEND=cuda forces it",
}


def versions() -> dict[str, str]:
    """Installed versions of fasttune and its neighbours; "not installed" where there is none."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> dict[str, str]:
    """What fasttune sees of the CPU and the GPU."""
    missing = _native.cpu_missing()
    facts = {
        "machine": f"{platform.system()} {platform.machine()}",
        "torch threads": str(torch.get_num_threads()),
        "torch CPU capability": torch.backends.cpu.get_cpu_capability(),
        "C++ kernels": missing
        or f"{_native.cpu().isa_name()} (can run {_native.cpu().isa_available()})",
        "AMX": "yes" if _gemm.cpu_has_amx() else "no",
        "bf16 products on CPU": "through fp32"
        if _gemm.through_fp32(torch.device("cpu"), torch.bfloat16)
        else "native",
        "GPU": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none visible to torch",
        "CUDA C++ kernels": _native.cuda_not_built() or f"built for {_native.cuda().TARGETS}",
    }
    return facts


def backends(device_type: str) -> list[tuple[str, str, dict[str, str | None]]]:
    """For each op: its name, the backend that serves it on ``device_type``, and why the others do
    not."""
    why: dict[str, str | None] = {
        "reference": None,
        "cpu": _native.cpu_missing() if device_type == "cpu" else "it takes CPU tensors",
        "triton": _triton.why_not(()) if device_type == "cuda" else "it takes CUDA tensors",
        "cuda": _native.cuda_missing() if device_type == "cuda" else "it takes CUDA tensors",
    }
    rows = []
    for name, op in sorted(_registry.OPS.items()):
        order = _registry.ORDER.get(device_type, ("reference",))
        own = {
            key: reason if key in op.backends else "it is not implemented"
            for key, reason in why.items()
        }
        served = next(backend for backend in order if own[backend] is None)
        rows.append((name, served, {key: own[key] for key in own if key != served}))
    return rows


def render_report() -> str:
    """Everything above as text."""
    environment = Table("", "", title="fasttune doctor", show_header=False)
    for key, value in {**versions(), **hardware()}.items():
        environment.add_row(key, value)
    text = render(environment)
    for device_type in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        table = Table("op", "served by", "the others", title=f"ops on {device_type} tensors")
        for name, backend, others in backends(device_type):
            lines = [f"{other}: {reason or _ASIDE[other]}" for other, reason in others.items()]
            table.add_row(name, backend, "\n".join(lines))
        text += render(table)
    return text


def print_report() -> None:
    """Print :func:`render_report`."""
    print(render_report())
