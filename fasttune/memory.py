"""Peak memory of a block of training steps, above the loaded weights.

Where it comes from depends on the platform, and the result names it:

- CUDA: the allocator's own peak, reset before each block
- Linux CPU: the kernel's high-water mark of resident memory (VmHWM), reset through clear_refs
- elsewhere: resident memory sampled every 10 ms, which can miss short peaks
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path
from typing import Protocol

import psutil
import torch

SAMPLE_INTERVAL_S = 0.01


class MemoryMeter(Protocol):
    """Measures one block at a time. All sizes in bytes, above the baseline."""

    method: str

    def set_baseline(self) -> None:
        """Declares what is in memory now (the loaded weights) to be zero."""

    def start_block(self) -> None:
        """Returns free memory to the system and resets the peak."""

    def end_block(self) -> int:
        """The peak since ``start_block``."""


def release_free_memory() -> None:
    """Collects garbage and gives what malloc holds back to the system (glibc only)."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


class CudaMeter:
    """The CUDA caching allocator's peak of allocated bytes."""

    method = "CUDA allocator, peak of allocated memory"

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._baseline = 0

    def set_baseline(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self._baseline = torch.cuda.memory_allocated(self._device)

    def start_block(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def end_block(self) -> int:
        return max(0, torch.cuda.max_memory_allocated(self._device) - self._baseline)


class HighWaterMeter:
    """Linux: VmHWM of this process, reset by writing 5 to ``/proc/self/clear_refs``."""

    method = "Linux VmHWM, peak of resident memory"

    def __init__(self) -> None:
        self._baseline = 0

    @staticmethod
    def available() -> bool:
        """Whether this system lets a process reset its own high-water mark."""
        try:
            HighWaterMeter._reset()
            HighWaterMeter._status("VmHWM")
        except (OSError, LookupError):
            return False
        return True

    @staticmethod
    def _reset() -> None:
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024  # the file says kB and means KiB
        raise LookupError(field)

    def set_baseline(self) -> None:
        release_free_memory()
        self._baseline = self._status("VmRSS")

    def start_block(self) -> None:
        release_free_memory()
        self._reset()

    def end_block(self) -> int:
        return max(0, self._status("VmHWM") - self._baseline)


class SampledMeter:
    """Resident memory sampled in a thread: a lower bound of the peak."""

    method = f"resident memory sampled every {SAMPLE_INTERVAL_S * 1000:.0f} ms (a lower bound)"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._baseline = 0
        self._peak = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def set_baseline(self) -> None:
        release_free_memory()
        self._baseline = int(self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            self._peak = max(self._peak, int(self._process.memory_info().rss))

    def start_block(self) -> None:
        release_free_memory()
        self._peak = int(self._process.memory_info().rss)
        self._stop.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end_block(self) -> int:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._peak = max(self._peak, int(self._process.memory_info().rss))
        return max(0, self._peak - self._baseline)


def memory_meter(device: str) -> MemoryMeter:
    """The best meter for ``device`` on this system."""
    if device.startswith("cuda"):
        return CudaMeter(device)
    return HighWaterMeter() if HighWaterMeter.available() else SampledMeter()
