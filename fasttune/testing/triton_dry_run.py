"""Run the real Triton launchers without a GPU and record every launch.

A stand-in for Triton's driver names a GPU architecture and does nothing at a launch. Everything
before that is real: the launcher's Python, argument specialisation, compilation to a cubin with
ptxas, and Triton's own limits on shared memory and threads. So what is compiled is what a launcher
would launch, and nothing is listed by hand.

    with dry_run(90) as launches:
        lora_down(torch.empty(8192, 4096, dtype=torch.bfloat16), ...)
    launches[0].resources.registers

What it cannot see: whether the kernel computes the right thing (see `triton_interpreter`), and
time.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from fasttune.testing.triton_compile import (
    GPU_LIMITS,
    GpuLimits,
    Resources,
    read_instructions,
    read_resources,
    resident_programs,
)
from fasttune_kernels import repeat
from fasttune_kernels.tables import Gpu, assume_gpu


@dataclass
class Launch:
    """One recorded kernel launch."""

    kernel: str
    grid: tuple[int, int, int]
    limits: GpuLimits
    cubin: bytes = field(repr=False)
    num_warps: int
    num_stages: int
    shared_bytes: int  # static and dynamic
    constants: dict[str, Any]  # constexpr parameters and specialised ones, by name
    signature: dict[str, str]  # Triton types by parameter, "constexpr" for constants
    divisible_by_16: frozenset[str]  # parameters specialised as multiples of 16

    @functools.cached_property
    def resources(self) -> Resources:
        """Registers, stack and local memory that ptxas assigned."""
        return read_resources(self.cubin)

    @functools.cached_property
    def instructions(self) -> Counter[str]:
        """Machine instructions by mnemonic with all its modifiers, such as "LDG.E.128"."""
        return read_instructions(self.cubin)

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def resident_programs(self) -> int:
        """Programs of this launch that one multiprocessor holds at a time."""
        fit = resident_programs(
            self.limits, self.resources.registers, self.shared_bytes, self.num_warps
        )
        return min(fit, -(-self.programs // self.limits.multiprocessors))


class _Utils:
    """The part of a driver that a compiled kernel asks when it is loaded."""

    def __init__(self, limits: GpuLimits) -> None:
        self._limits = limits

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {
            "max_shared_mem": self._limits.shared_bytes_per_block,
            "multiprocessor_count": self._limits.multiprocessors,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: Any
    ) -> tuple[object, bytes, int, int, int]:
        # module, function, registers, spills, greatest number of threads. The "function" comes back
        # at every launch, so the binary itself serves as one.
        return object(), kernel, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


def _make_launcher(source: Any, metadata: Any) -> Any:
    def launch(x: int, y: int, z: int, stream: int, cubin: bytes, *_: Any) -> None:
        if not (0 < x < 2**31 and 0 < y < 65536 and 0 < z < 65536):
            raise ValueError(f"{metadata.name}: illegal grid {(x, y, z)}")
        # A compiled kernel keeps its launcher beyond one dry run, so the driver is the current one.
        driver = triton.runtime.driver.active
        driver.launches.append(_record(source, metadata, (x, y, z), cubin, driver.limits))

    return launch


class _RecordingDriver(DriverBase):  # type: ignore[misc, unused-ignore]
    """A CUDA driver for a GPU that is not there."""

    def __init__(self, limits: GpuLimits, launches: list[Launch]) -> None:
        self.limits = limits
        self.utils = _Utils(limits)

        self.launches = launches
        self.launcher_cls = _make_launcher

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.limits.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> None:
        return None

    # Triton caches compiled kernels and limits per device: each architecture is a device of its
    # own.
    def get_current_device(self) -> str:
        return f"dry-run:sm_{self.limits.capability}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self.limits.capability, 10)


def _record(
    source: Any, metadata: Any, grid: tuple[int, int, int], cubin: bytes, limits: GpuLimits
) -> Launch:
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    divisible = frozenset(
        names[path[0]]
        for path, attributes in source.attrs.items()
        if ["tt.divisibility", 16] in attributes
    )
    return Launch(
        kernel=metadata.name,
        grid=grid,
        limits=limits,
        cubin=cubin,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        shared_bytes=metadata.shared,
        constants=constants,
        signature=dict(source.signature),
        divisible_by_16=divisible,
    )


@contextlib.contextmanager
def dry_run(capability: int) -> Iterator[list[Launch]]:
    """Launch nothing, compile for `capability` (75, 80, 86, 89, 90, 100, 120), record every launch.

    Yields the list that grows with each launch. Tensors are CPU tensors whose contents no kernel
    reads or writes, so outputs hold whatever `torch.empty` gave.
    Raises `KeyError` for an unknown capability and, at a launch, Triton's `OutOfResources`.
    """
    limits = GPU_LIMITS[capability]
    launches: list[Launch] = []
    driver = _RecordingDriver(limits, launches)
    config = triton.runtime.driver
    previous = config._active
    config.set_active(driver)
    repeat.forget()
    try:
        with assume_gpu(Gpu(capability, limits.multiprocessors)):
            yield launches
    finally:
        config._active = previous
        repeat.forget()
