"""Triton's hooks around a compilation, and one compilation at a time among processes.

Read from triton 3.9 (``runtime/jit.py``, ``compiler/compiler.py``, ``knobs.py``);
tests/integrations/test_private_names.py fails loudly when it moves.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_POLL_S = 0.05


@contextlib.contextmanager
def one_compilation_at_a_time(
    note: Callable[[str, bool], None], timeout_s: float
) -> Iterator[FileLock]:
    """Inside, a kernel is compiled, or loaded from the cache directory, while no other process
    that shares the directory does: what one has compiled the others load.

    The lock is held for one kernel, never for a step, in which processes may wait for each other.

    Args:
        note: called after each with the kernel's name and whether it was in the directory.
        timeout_s: seconds after which a process no longer waits for another.
    """
    from triton import knobs

    lock = FileLock(Path(knobs.cache.dir) / "fasttune-warmup.lock", timeout_s)
    runtime, compilation = knobs.runtime, knobs.compilation
    before, after = runtime.jit_cache_hook, runtime.jit_post_compile_hook
    listener = compilation.listener

    def start(**facts: Any) -> Any:
        lock.acquire()
        return None if before is None else before(**facts)

    def compiled(**facts: Any) -> None:
        note(facts["src"].name, facts["cache_hit"])
        if listener is not None:
            listener(**facts)

    def end(**facts: Any) -> Any:
        lock.release()
        return None if after is None else after(**facts)

    runtime.jit_cache_hook, runtime.jit_post_compile_hook = start, end
    compilation.listener = compiled
    try:
        yield lock
    finally:
        runtime.jit_cache_hook, runtime.jit_post_compile_hook = before, after
        compilation.listener = listener
        lock.release()  # a compilation may have failed


class FileLock:
    """A lock on a file, which the system releases when its process ends.

    Attributes:
        waited_s: seconds spent waiting for other processes.
        timed_out: another process held it longer than ``timeout_s``; it is no longer asked for.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s
        self.waited_s, self.timed_out = 0.0, False
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Wait for the lock; nothing if this process has it."""
        import fcntl  # not on every platform on which fasttune imports

        if self._descriptor is not None or self.timed_out:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        start = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.timed_out = time.monotonic() - start > self.timeout_s
                if self.timed_out:
                    os.close(descriptor)
                    break
                time.sleep(_POLL_S)
            else:
                self._descriptor = descriptor
                break
        self.waited_s += time.monotonic() - start

    def release(self) -> None:
        """Let the next process go on; nothing if this one does not have the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
