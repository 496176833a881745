"""What a compiled Triton kernel costs, read from its cubin with the tools in the triton wheel.

Limits of the GPUs are from NVIDIA's CUDA programming guide (shared memory, registers, threads) and
data sheets (memory bandwidth of the fastest common part of each architecture).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class GpuLimits:
    """Facts about one GPU architecture, taken from a common part of it."""

    capability: int
    part: str
    multiprocessors: int
    shared_bytes_per_block: int  # the opt-in maximum of one thread block
    shared_bytes_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    # Bandwidth times latency per multiprocessor: what must be in flight to saturate memory.
    bytes_in_flight: int

    @property
    def has_bf16_tensor_cores(self) -> bool:
        return self.capability >= 80


_KB = 1024
# fmt: off
GPU_LIMITS: dict[int, GpuLimits] = {
    limits.capability: limits
    for limits in (
        #                          SMs  per block  per SM    threads blocks in flight
        GpuLimits(75, "T4",         40, 64 * _KB,  64 * _KB,  1024, 16, 4 * _KB),
        GpuLimits(80, "A100",      108, 163 * _KB, 164 * _KB, 2048, 32, 11 * _KB),
        GpuLimits(86, "RTX 3090",   82, 99 * _KB,  100 * _KB, 1536, 16, 7 * _KB),
        GpuLimits(89, "RTX 4090",  128, 99 * _KB,  100 * _KB, 1536, 24, 5 * _KB),
        GpuLimits(90, "H100",      132, 227 * _KB, 228 * _KB, 2048, 32, 18 * _KB),
        GpuLimits(100, "B200",     148, 227 * _KB, 228 * _KB, 2048, 32, 43 * _KB),
        GpuLimits(120, "RTX 5090", 170, 99 * _KB,  100 * _KB, 1536, 24, 7 * _KB),
    )
}
# fmt: on


@dataclass(frozen=True)
class Resources:
    """What ptxas assigned to a kernel, per thread unless said otherwise."""

    registers: int
    stack_bytes: int
    local_bytes: int

    @property
    def spills(self) -> bool:
        return self.stack_bytes > 0 or self.local_bytes > 0


def _run_tool(tool: str, option: str, cubin: bytes) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run(
            [str(path), option, file.name], capture_output=True, text=True, check=True
        )
    return result.stdout


def read_resources(cubin: bytes) -> Resources:
    """Registers, stack and local memory of the only kernel in `cubin`."""
    text = _run_tool("cuobjdump", "-res-usage", cubin)
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)
    usage = {name: int(value) for name, value in found}
    if len(found) != 3 or usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise ValueError(f"expected the resource usage of one kernel, got {text!r}")
    return Resources(usage["REG"], usage["STACK"], usage["LOCAL"])


def read_instructions(cubin: bytes) -> Counter[str]:
    """Counts of the machine instructions in `cubin` by full mnemonic."""
    text = _run_tool("cuobjdump", "-sass", cubin)
    # "        /*0130*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    pattern = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
    counts = Counter(pattern.findall(text))
    if not counts:
        raise ValueError("no instructions found in the disassembly")
    return counts


def count_tensor_core(instructions: Counter[str]) -> int:
    """Matrix instructions of any generation: HMMA, HGMMA (Hopper), UTCHMMA (Blackwell)."""
    return sum(n for name, n in instructions.items() if re.match(r"(HMMA|HGMMA|UTC\w*MMA)", name))


def count_global_loads(instructions: Counter[str], *, bits: int | None = None) -> int:
    """Global loads, to registers (LDG), to shared memory (LDGSTS) or by the bulk unit (UTMALDG)."""
    return _count_accesses(instructions, r"(LDG|LDGSTS)\.", r"UTMALDG", bits)


def count_global_stores(instructions: Counter[str], *, bits: int | None = None) -> int:
    """Global stores, from registers (STG) or by the bulk unit (UTMASTG)."""
    return _count_accesses(instructions, r"STG\.", r"UTMASTG", bits)


def _count_accesses(instructions: Counter[str], plain: str, bulk: str, bits: int | None) -> int:
    total = 0
    for name, n in instructions.items():
        if re.match(bulk, name) or (re.match(plain, name) and (bits is None or f".{bits}" in name)):
            total += n
    return total


def resident_programs(limits: GpuLimits, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs of these resources one multiprocessor holds at a time."""
    threads = 32 * num_warps
    registers_per_warp = -(-registers * 32 // 256) * 256  # allocated in units of 256
    by_registers = 65536 // (registers_per_warp * num_warps)
    # The driver keeps 1 KB of shared memory per block for itself.
    reserved = shared_bytes + (0 if limits.capability < 80 else _KB)
    by_shared = limits.shared_bytes_per_multiprocessor // reserved if reserved else by_registers
    by_threads = limits.threads_per_multiprocessor // threads
    return min(by_registers, by_shared, by_threads, limits.blocks_per_multiprocessor)
