"""Fixtures of the suites: ``paired`` times, ``compare_memory`` measures peaks, both record."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_agreement
from environment import RESULTS, environment
from memory import compare_peaks
from paired import (
    balanced_order,
    collector_paused,
    number_of_pairs,
    summarise,
    timed,
    warm_up,
)
from results_file import line, table, write
from rich.console import Console

MEMORY_REPEATS = 3
TABLE_WIDTH = 140
RECORDS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fasttune")
    group.addoption("--quick", action="store_true", help="fewer alternations, marked in the JSON")
    group.addoption("--device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--results", type=Path, default=RESULTS, help="where the JSON goes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    if config.getoption("--benchmark-enable"):
        # What was measured until then is shown and written, also where SIGINT was ignored, as in
        # the background of a script.
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.default_int_handler)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device of ``--device``."""
    return request.config.getoption("--device")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Adds a result of this benchmark to the JSON and the table, and shows it at once."""

    def add(**result: Any) -> None:
        config, node = request.config, request.node
        full = {
            "id": f"{node.path.name}::{node.name}",
            "suite": node.path.stem.removeprefix("bench_"),
            "quick": config.getoption("--quick"),
            **result,
        }
        config.stash[RECORDS].append(full)
        terminal = config.pluginmanager.getplugin("terminalreporter")
        capture = config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            if terminal:
                terminal.ensure_newline()
                terminal.write_line(line(full))

    return add


@pytest.fixture
def paired(request: pytest.FixtureRequest, benchmark, record, device) -> Callable[..., None]:
    """``paired(stock, fasttune, check=, dtype=, ...)``: compares the results, then times the steps.

    ``check`` returns the named tensors of stock, fasttune and the truth for ``assert_agreement``;
    further keywords are facts about the case that go into the JSON.

    pytest-benchmark times the fasttune step and shows it in its table; the stock step runs before
    or after it, outside its clock, and goes to ``extra_info`` with the ratio.
    """
    quick = request.config.getoption("--quick")

    def synchronised(step: Callable[[], object]) -> Callable[[], object]:
        if device == "cpu":
            return step

        def run() -> None:
            step()
            torch.cuda.synchronize()

        return run

    def measure(
        stock: Callable[[], object],
        fasttune: Callable[[], object],
        *,
        check: Callable[[], tuple[dict, dict, dict]],
        dtype: torch.dtype,
        **facts: Any,
    ) -> None:
        assert_agreement(*check(), dtype=dtype)
        stock, fasttune = synchronised(stock), synchronised(fasttune)
        if benchmark.disabled:
            benchmark.pedantic(fasttune)
            return
        benchmark.group = request.node.path.stem
        with collector_paused():
            order = balanced_order(number_of_pairs(warm_up(stock, fasttune), quick=quick))
            stock_s: list[float] = []

            def before() -> None:
                gc.collect()  # what the pair before left, outside the clock
                if order[len(stock_s)]:
                    stock_s.append(timed(stock))

            def after() -> None:
                if len(stock_s) < len(benchmark.stats.stats.data):
                    stock_s.append(timed(stock))

            benchmark.pedantic(fasttune, setup=before, teardown=after, rounds=len(order))
        times = summarise(stock_s, benchmark.stats.stats.data)
        benchmark.extra_info.update(vars(times), quick=quick, **facts)
        record(
            kind="time",
            unit="ms",
            runs=times.pairs,
            stock=times.stock_ms,
            fasttune=times.fasttune_ms,
            ratio=times.ratio,
            ratio_low=times.ratio_low,
            ratio_high=times.ratio_high,
            **facts,
        )

    return measure


@pytest.fixture
def compare_memory(request: pytest.FixtureRequest, record, device) -> Callable[..., None]:
    """``compare_memory(build, *arguments)``: peaks of ``build(*arguments, patched)``'s steps."""
    if not request.config.getoption("--benchmark-enable"):
        pytest.skip("measures only with --benchmark-enable")
    repeats = 1 if request.config.getoption("--quick") else MEMORY_REPEATS

    def measure(build: Callable[..., Callable[[], object]], *arguments: Any, **facts: Any) -> None:
        peaks = compare_peaks(build, *arguments, device=device, repeats=repeats)
        record(
            kind="memory",
            unit="MiB",
            runs=repeats,
            stock=peaks.stock_bytes / 2**20,
            fasttune=peaks.fasttune_bytes / 2**20,
            ratio=peaks.ratio,
            method=peaks.method,
            **facts,
        )

    return measure


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RECORDS]
    if not results:
        return
    Console(width=TABLE_WIDTH).print(table(results))
    command = " ".join(("pytest", *_without_folder(config.invocation_params.args)))
    for path in write(config.getoption("--results"), environment(command), results):
        terminalreporter.write_line(f"wrote {path.name}")


def _without_folder(args: Sequence[str]) -> list[str]:
    """The arguments but for where results go, a path of this machine."""
    kept, skip = [], False
    for arg in args:
        if not skip and arg != "--results" and not arg.startswith("--results="):
            kept.append(arg)
        skip = arg == "--results"
    return kept
