"""tune_allocator: keep freed memory mapped, so that large temporaries cost no page faults.

glibc gives large blocks back to the system at every free and maps them anew at the next malloc: one
page fault for every 4 KB. A training step of a small model on a CPU has hundreds of thousands.
"""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 1 << 30  # the most that glibc takes: blocks below it come from the heap
_TRIM_THRESHOLD_BYTES = (1 << 31) - 1  # an int; free memory at the top of the heap up to it stays


def tune_allocator() -> bool:
    """Tell glibc's malloc to keep up to 2 GiB of freed memory instead of returning it.

    Opt-in and for the whole process: CPU training gets faster by what page faults cost, the
    resident memory stays at its peak. Nothing is done, and False returned, where the C library is
    not glibc (macOS, musl) or refuses. jemalloc or tcmalloc by LD_PRELOAD go further and ignore
    this call.

    Returns:
        True if glibc took both settings.

    Source: ``mallopt(3)``.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES),
    )
    return all([libc.mallopt(name, value) == 1 for name, value in settings])
