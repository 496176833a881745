"""The parent's end of one worker process."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fasttune.demo.interrupt import ctrl_c_ignored
from fasttune.demo.protocol import Command, Event, Failed, Notice, Quit, WorkerSpec
from fasttune.demo.worker import main

POLL_INTERVAL_S = 0.2  # how soon an interrupt is noticed while a worker computes
QUIT_TIMEOUT_S = 3.0

E = TypeVar("E")


class WorkerDied(Exception):
    """A worker ended unexpectedly; ``str()`` is one line that says which and why."""


@contextmanager
def worker_environment(device: str) -> Iterator[None]:
    """The environment that both workers inherit, the same for both.

    The user's own, plus one visible GPU (or the Trainer would use all) and no progress bars.
    """
    saved = dict(os.environ)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if device.startswith("cuda"):
        visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
        index = int(device.partition(":")[2] or 0)
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


class WorkerHandle:
    """Starts a worker, sends it commands and receives its events."""

    def __init__(self, spec: WorkerSpec, on_notice: Callable[[str], None]) -> None:
        self.name = spec.name
        self._log = Path(spec.log)
        self._on_notice = on_notice
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=main, args=(theirs, spec), name=f"fasttune-{spec.name}", daemon=True
        )
        with ctrl_c_ignored():
            self._process.start()
        theirs.close()

    def _death(self, error: str | None = None) -> WorkerDied:
        if error is None:
            self._process.join(QUIT_TIMEOUT_S)
            code = self._process.exitcode
            how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit {code}"
            with suppress(OSError):
                lines = self._log.read_text(errors="replace").split("\n")
                printed = [line.strip() for line in lines if line.strip()]
                how += f": {printed[-1]}" if printed else ""
            error = how
        return WorkerDied(f"the {self.name} worker ended: {error}")

    def send(self, command: Command) -> None:
        """Sends a command.

        Raises:
            WorkerDied: the process is gone.
        """
        try:
            self._pipe.send(command)
        except OSError:
            self._raise_failure()

    def _raise_failure(self) -> None:
        """Prefers the worker's own account, if it is still in the pipe."""
        with suppress(EOFError, OSError):
            while self._pipe.poll(0):
                event = self._pipe.recv()
                if isinstance(event, Failed):
                    raise self._death(event.error)
        raise self._death()

    def receive(self, check: Callable[[], None] = lambda: None) -> Event:
        """The next event; notices are passed on and not returned.

        Args:
            check: called while waiting; what it raises ends the waiting.

        Raises:
            WorkerDied: the worker failed or is gone.
        """
        while True:
            while not self._pipe.poll(POLL_INTERVAL_S):
                check()
            try:
                event: Event = self._pipe.recv()
            except (EOFError, OSError):
                raise self._death() from None
            if isinstance(event, Notice):
                self._on_notice(event.text)
            elif isinstance(event, Failed):
                raise self._death(event.error)
            else:
                return event

    def expect(self, kind: type[E], check: Callable[[], None] = lambda: None) -> E:
        """The next event, which must be a ``kind``."""
        event: Any = self.receive(check)
        if not isinstance(event, kind):
            raise RuntimeError(f"the {self.name} worker sent {event} instead of {kind.__name__}")
        return event

    def request(
        self, command: Command, kind: type[E], check: Callable[[], None] = lambda: None
    ) -> E:
        """Sends a command and returns its answer."""
        self.send(command)
        return self.expect(kind, check)

    def close(self) -> None:
        """Ends the process: politely, then by force. Never raises, never leaves it behind."""
        with suppress(OSError, ValueError):
            self._pipe.send(Quit())
        with suppress(OSError):
            self._pipe.close()
        self._process.join(QUIT_TIMEOUT_S)
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(QUIT_TIMEOUT_S)
