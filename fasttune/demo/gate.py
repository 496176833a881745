"""The Trainer callback that makes a worker wait for its turn and measures its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from fasttune.demo.protocol import BlockDone, Command, Event, Go, Halt, Quit, StepDone
from fasttune.memory import MemoryMeter


class Halted(Exception):
    """Training was halted while this worker waited for its turn."""


class GateCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Waits for a ``Go`` before each block of steps; times every step.

    A step is timed from before its first forward until after its optimizer step; fetching the batch
    is not part of it. On CUDA the device is synchronised at both ends.
    """

    def __init__(
        self,
        *,
        send: Callable[[Event], None],
        receive: Callable[[], Command],
        waiting: Callable[[], bool],  # whether a command is there to receive
        meter: MemoryMeter,
        device: str,
    ) -> None:
        self._send = send
        self._receive = receive
        self._waiting = waiting
        self._meter = meter
        self._cuda = device.startswith("cuda")
        self._granted = 0
        self._started = 0.0
        self._seconds = 0.0
        self.steps_done = 0

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._granted == 0:
            command = self._receive()
            if isinstance(command, Halt | Quit):
                raise Halted
            if not isinstance(command, Go):
                raise RuntimeError(f"expected Go or Halt, not {command}")
            self._granted = command.steps
            self._meter.start_block()
        self._started = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds = self._now() - self._started
        self._granted -= 1
        self.steps_done += 1
        # While steps are granted, the only command that can arrive is Halt.
        if self._granted > 0 and self._waiting():
            self._receive()
            control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end of training
            return
        self._send(
            StepDone(
                step=state.global_step,
                seconds=self._seconds,
                loss=logs["loss"],
                grad_norm=logs.get("grad_norm", float("nan")),
                lr=logs["learning_rate"],
            )
        )
        if self._granted == 0:
            self._send(BlockDone(self._meter.end_block()))
