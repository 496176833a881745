"""Progress on the screen: bars on a terminal, a line per round elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from fasttune.demo.protocol import StepDone
from fasttune.demo.record import WORKERS


class Display:
    """Writes the phases of a run and the progress of training to a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def line(self, text: str) -> None:
        """One message."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """A phase of unknown length."""
        if not self.console.is_terminal:
            self.line(f"{text} ...")
            yield
            return
        # Four refreshes a second: drawing must not cost the workers anything.
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            progress.add_task(text, total=None)
            yield

    @contextmanager
    def training(self, steps: int) -> Iterator[None]:
        """Two bars, one per worker, fed by ``step``."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as bars:
            self._bars = bars
            self._tasks = {n: bars.add_task(n, total=steps, status="waiting") for n in WORKERS}
            try:
                yield
            finally:
                self._bars = None

    def step(self, name: str, event: StepDone) -> None:
        """A worker finished a step."""
        if self._bars is not None:
            status = f"loss {event.loss:.3f}  {event.seconds:.2f} s/step"
            self._bars.update(self._tasks[name], completed=event.step, status=status)

    def block(self, name: str, event: StepDone | None, steps: int) -> None:
        """A worker finished its turn."""
        if self._bars is None and event is not None:
            self.line(
                f"{name:<8} step {event.step}/{steps}  loss {event.loss:.3f}  "
                f"{event.seconds:.2f} s/step"
            )
