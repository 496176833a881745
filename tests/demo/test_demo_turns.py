from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from fasttune.demo.data import Sample
from fasttune.demo.display import Display
from fasttune.demo.encode import Split
from fasttune.demo.options import DEFAULT_STEPS, MIN_STEPS, DemoOptions
from fasttune.demo.output import OutputFolder
from fasttune.demo.protocol import StepDone
from fasttune.demo.record import RunRecord
from fasttune.demo.runner import DemoRun, Task
from fasttune.demo.turns import affordable_steps, block_steps, grouped, turns, warmup_steps


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 10, 60, 61])
def test_both_workers_do_all_steps_in_mirrored_turns(steps: int) -> None:
    order = turns(steps)
    done: Counter[str] = Counter()
    for name, count in order:
        assert 1 <= count <= block_steps(steps)
        done[name] += count
    assert done == {"stock": steps, "patched": steps}
    pairs = grouped([name for name, _ in order], 2)
    expected = [["patched", "stock"], ["stock", "patched"]]
    assert pairs == [expected[i % 2] for i in range(len(pairs))]


def test_a_drifting_machine_favours_neither() -> None:
    place = {"stock": 0.0, "patched": 0.0}
    for i, (name, count) in enumerate(turns(40)):
        place[name] += i * count
    assert place["stock"] == place["patched"]


@pytest.mark.parametrize(
    ("pair_s", "left_s", "steps"),
    [
        (1.0, 1000.0, DEFAULT_STEPS),
        (10.0, 250.0, 25),
        (100.0, 250.0, MIN_STEPS),
        (10.0, -5.0, MIN_STEPS),
    ],
)
def test_slow_machine_does_fewer_steps(pair_s: float, left_s: float, steps: int) -> None:
    assert affordable_steps(DemoOptions(), pair_s, left_s) == steps


def test_steps_that_were_asked_for_are_never_reduced() -> None:
    assert affordable_steps(DemoOptions(steps=500), 10.0, 20.0) == 500


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (10, 1), (60, 6)])
def test_warmup_is_a_tenth_and_leaves_a_step(steps: int, warmup: int) -> None:
    assert warmup_steps(steps) == warmup


def test_speed_is_compared_over_the_steps_both_did() -> None:
    record = RunRecord(model="m", step_tokens=[100, 300, 50])
    for name, times in (("stock", [2.0, 4.0, 9.0]), ("patched", [1.0, 2.0])):
        record.workers[name].steps = [
            StepDone(i, seconds, 1.0, 1.0, 1e-4) for i, seconds in enumerate(times, start=1)
        ]
    assert record.speedup() == 2.0
    assert record.workers["patched"].tokens_per_s(record.step_tokens) == pytest.approx(400 / 3)
    assert record.workers["stock"].tokens_per_s(record.step_tokens) == pytest.approx(30)
    assert record.workers["stock"].step_time_s() == 4.0


def test_nothing_measured_is_none() -> None:
    record = RunRecord(model="m")
    assert record.speedup() is None
    assert record.memory_ratio() is None
    assert record.workers["stock"].tokens_per_s([]) is None


class Silent:
    """A tokenizer that has nothing to say."""

    def decode(self, ids: list[int], **_: object) -> str:
        return ""


def test_reduced_number_of_steps_is_said(tmp_path: Path) -> None:
    """The decision falls before training starts, so that the schedule fits the steps."""
    lines: list[str] = []

    class Recorder(Display):
        def line(self, text: str) -> None:
            lines.append(text)

    task = Task(
        tokenizer=Silent(),
        split=Split([], [], Sample(1, text="a"), [], "", 0, 0, 0),
        device="cpu",
        dtype="float32",
    )
    with OutputFolder(tmp_path / "o") as folder:
        run = DemoRun(DemoOptions(), folder, Recorder(Console()), task, "m")
        steps = run.plan(pair_s=7.0, spent_s=40.0, evaluation_s=10.0)
    assert steps == 30  # (270 - 40 - 10 - 10) / 7
    assert (run.record.steps_requested, run.record.steps_planned) == (60, 30)
    assert len(lines) == 1
    assert "7.0 s here: 30 steps instead of 60, to stay within 4.5 minutes" in lines[0]
