"""fasttune._cuda as nvcc built it: what the machine code holds, and a call without a driver."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from fasttune import BackendError, _native, use_backend
from fasttune.ops import glu

triton = pytest.importorskip("triton")
missing = _native.cuda_not_built()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
LORA = ("lora_down", "lora_up", "lora_input_gradient", "lora_weight_gradient")
VECTORISED = ("rms_norm_fwd", "rms_norm_bwd", "glu_fwd", "glu_bwd", "bias_activation", "scaled_sum")
STATIC_SHARED_LIMIT = 48 * 1024  # of a block, on every target, without asking for more


def cuobjdump(*options: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    library = _native.cuda().__file__
    command = [str(tool), *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@lru_cache(maxsize=1)
def resources() -> list[tuple[str, str, dict[str, int]]]:
    """(target, kernel, registers, stack, shared, local bytes) of every kernel."""
    found, target = [], ""
    text = cuobjdump("-res-usage")
    pattern = r"arch = (sm_\d+)|Function (\S+?):\s+(REG:.*)"
    for arch, kernel, usage in re.findall(pattern, text):
        if arch:
            target = arch
        else:
            numbers = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
            found.append((target, kernel, numbers))
    return found


def test_every_target_has_every_kernel() -> None:
    kernels = {target: {k for t, k, _ in resources() if t == target} for target in TARGETS}
    assert {t for t, _, _ in resources()} == set(TARGETS)
    for name in (*VECTORISED, "adamw", "grad_norm", "limit_norms", *LORA):
        assert any(f"{name}_kernel" in kernel for kernel in kernels["sm_75"]), name
    assert all(own == kernels["sm_75"] for own in kernels.values())
    assert " ".join(TARGETS) == _native.cuda().TARGETS


def test_no_kernel_spills_or_takes_too_much_shared_memory() -> None:
    assert len(resources()) > 100
    for target, kernel, usage in resources():
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, (target, kernel, usage)
        assert usage["SHARED"] <= STATIC_SHARED_LIMIT, (target, kernel, usage)


def test_ptx_for_later_devices_is_there() -> None:
    assert "compute_80" in cuobjdump("-lptx") or "sm_80.ptx" in cuobjdump("-lptx")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_vectorised_kernels_access_16_bytes_at_a_time(target: str) -> None:
    """Loads and stores of the specialisation for whole packs."""
    checked = 0
    text = cuobjdump("-sass", "-arch", target)
    for kernel, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", text, re.S):
        scalar = re.search(r"Li1EE", kernel)
        if not any(f"{name}_kernel" in kernel for name in VECTORISED):
            continue
        counts = Counter(re.findall(r"\b((?:LDG|STG)\.[A-Z0-9.]+)", body))
        wide = Counter(name.partition(".")[0] for name in counts if ".128" in name)
        assert bool(wide["LDG"]) == (not scalar), (kernel, counts)
        assert bool(wide["STG"]) == (not scalar), (kernel, counts)
        checked += 1
    assert checked > 100


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_limits_on_norms_access_16_bytes_at_a_time(target: str) -> None:
    """Of whole runs; the kernels hold the path of tails as well. Addresses that come from a table
    are generic: LD and ST."""
    checked = 0
    text = cuobjdump("-sass", "-arch", target)
    for kernel, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", text, re.S):
        if "limit_norms_kernel" not in kernel:
            continue
        assert re.search(r"LDG?\.\S*128", body) and re.search(r"STG?\.\S*128", body), kernel
        checked += 1
    assert checked == 7  # to nearest and with Kahan's sum for three dtypes, and a master


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_75"])
def test_lora_kernels_use_tensor_cores_and_copy_past_the_registers(target: str) -> None:
    checked = 0
    text = cuobjdump("-sass", "-arch", target)
    for kernel, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", text, re.S):
        if not any(f"{name}_kernel" in kernel for name in LORA):
            continue
        for instruction in (
            r"HMMA\.16816\.F32",
            r"LDGSTS\.\S*128",
            r"LDSM\.16\.MT?88\.4",
            r"STG\.\S*128",
        ):
            assert re.search(instruction, body), (kernel, instruction)
        checked += 1
    assert checked == 34


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_launch_without_a_driver_is_one_clear_error() -> None:
    with pytest.raises(RuntimeError, match="a CUDA kernel was not launched: no CUDA driver: CUDA "):
        _native.cuda().glu_fwd(0, 0, 0, 1, 8, 8, 8, 8, 0, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_the_forced_backend_says_that_there_is_no_driver() -> None:
    with use_backend("cuda"), pytest.raises(BackendError, match="no CUDA driver"):
        glu(torch.ones(2, 8), torch.ones(2, 8), activation="silu")
