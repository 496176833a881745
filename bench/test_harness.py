"""The harness itself; `pytest bench` without the suites' file pattern runs these in seconds."""

import json
import os
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from agreement import assert_agreement, dropout_off
from environment import environment, hardware_slug
from memory import compare_peaks, peak_above_weights
from paired import (
    MAX_PAIRS,
    MIN_PAIRS,
    QUICK_PAIRS,
    balanced_order,
    median_interval,
    number_of_pairs,
    summarise,
)
from results_file import merge, table, write
from rich.console import Console
from torch import nn

pytest_plugins = ["pytester"]
MIB = 2**20


def test_order_is_balanced_seeded_and_shuffled():
    order = balanced_order(40)
    assert sum(order) == 20
    assert order == balanced_order(40)
    assert order != [index % 2 == 0 for index in range(40)]


def test_paired_ratio_is_immune_to_drift_that_hits_both():
    drift = np.linspace(1, 10, 30)
    noise = 1 + 0.02 * np.random.default_rng(0).standard_normal(30)
    times = summarise(list(0.2 * drift * noise), list(0.1 * drift))
    assert times.pairs == 30
    assert times.ratio == pytest.approx(2, rel=0.02)
    assert times.ratio_low < times.ratio < times.ratio_high
    assert times.ratio_high - times.ratio_low < 0.1
    assert times.fasttune_ms == pytest.approx(550)


def test_interval_of_a_known_sample():
    # The median of 101 values 0 .. 100: the order statistics about 1.96 * sqrt(101) / 2 from 50.
    low, high = median_interval(range(101))
    assert low == pytest.approx(40, abs=2)
    assert high == pytest.approx(60, abs=2)
    assert median_interval([3.0] * 20) == (3.0, 3.0)


def test_unpaired_times_are_refused():
    with pytest.raises(ValueError, match="paired"):
        summarise([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="paired"):
        summarise([], [])


def test_number_of_pairs_follows_the_budget():
    assert number_of_pairs(7.5, quick=False) == MIN_PAIRS
    assert number_of_pairs(1e-6, quick=False) == MAX_PAIRS
    assert number_of_pairs(0.1, quick=False) == 40
    assert number_of_pairs(0.1, quick=True) == QUICK_PAIRS


def off_by(truth, relative):
    return {name: value * (1 + relative) for name, value in truth.items()}


def test_agreement_allows_three_times_stocks_error_and_no_more():
    truth = {"y": torch.randn(8, 8), "dx": torch.randn(8)}
    stock = off_by(truth, 1e-3)
    assert_agreement(stock, off_by(truth, -2.9e-3), truth, dtype=torch.float32)
    with pytest.raises(AssertionError, match=r"relative error 3\.1"):
        assert_agreement(stock, off_by(truth, -3.1e-3), truth, dtype=torch.float32)
    # Stock is exact: an eighth of bf16's rounding step is left.
    assert_agreement(truth, off_by(truth, 0.9e-3), truth, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="allowed"):
        assert_agreement(truth, off_by(truth, 1.1e-3), truth, dtype=torch.bfloat16)


def test_agreement_refuses_to_compare_nothing():
    ones, zeros = {"y": torch.ones(2)}, {"y": torch.zeros(2)}
    with pytest.raises(AssertionError, match="norm 0"):
        assert_agreement(zeros, zeros, zeros, dtype=torch.float32)
    with pytest.raises(AssertionError, match="dx"):
        assert_agreement({**ones, "dx": ones["y"]}, ones, ones, dtype=torch.float32)
    nan = {"y": torch.full((2,), float("nan"))}
    with pytest.raises(AssertionError, match="relative error nan"):
        assert_agreement(ones, nan, ones, dtype=torch.float32)


def test_dropout_off_restores_each_rate():
    model = nn.Sequential(nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.1)))
    x = torch.ones(1000)
    with dropout_off(model):
        assert torch.equal(model(x), x)
    assert (model[0].p, model[1][0].p) == (0.3, 0.1)


def touching_step(kept_mib, temporary_mib, patched):
    """A step that writes a temporary, half as large when patched; importable by a new process."""
    weights = torch.ones(kept_mib * MIB, dtype=torch.uint8)
    factor = 1 if not patched else 2
    return lambda: torch.ones(temporary_mib * MIB // factor, dtype=torch.uint8).max() + weights[0]


def failing_step():
    raise LookupError("no weights")


def killed_step():
    os.abort()


def test_peak_is_of_the_step_and_not_of_the_weights():
    peak, method = peak_above_weights(touching_step, 256, 200, False)
    assert 200 * MIB <= peak < 240 * MIB
    assert method


def test_compare_peaks_gives_the_ratio():
    peaks = compare_peaks(touching_step, 16, 400, device="cpu", repeats=1)
    assert peaks.ratio == pytest.approx(2, rel=0.15)


def test_failures_of_the_fresh_process_are_raised():
    with pytest.raises(LookupError, match="no weights"):
        peak_above_weights(failing_step)
    with pytest.raises(BrokenProcessPool):
        peak_above_weights(killed_step)


def result(name, **changes):
    return {
        "id": f"bench_x.py::test_{name}",
        "suite": "x",
        "quick": False,
        "kind": "time",
        "unit": "ms",
        "runs": 20,
        "stock": 2.0,
        "fasttune": 1.0,
        "ratio": 2.0,
        "ratio_low": 1.9,
        "ratio_high": 2.1,
        **changes,
    }


def test_a_repeated_result_leaves_the_old_run_and_others_keep_their_environment():
    first = {"environment": "first", "results": [result("a"), result("b")]}
    second = {"environment": "second", "results": [result("a", stock=3.0)]}
    assert merge([first], second) == [
        {"environment": "first", "results": [result("b")]},
        second,
    ]
    everything = {"environment": "second", "results": [result("a"), result("b")]}
    assert merge([first], everything) == [everything]


def test_the_file_names_hardware_versions_commit_and_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1000")
    monkeypatch.setenv("LD_PRELOAD", "/some/where/libjemalloc.so.2")
    facts = environment("pytest bench")
    (path,) = write(tmp_path, facts, [result("a")])
    assert path.name == f"x-{hardware_slug(facts['hardware'])}.json"
    (run,) = json.loads(path.read_text())["runs"]
    assert run["results"] == [result("a")]
    stored = run["environment"]
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["hardware"]["threads"] >= 1
    assert stored["git"]["commit"] is None or len(stored["git"]["commit"]) == 40
    assert stored["settings"]["variables"]["MALLOC_TOP_PAD_"] == "1000"
    assert stored["settings"]["preloaded"] == ["libjemalloc.so.2"]


def test_the_table_marks_quick_results():
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table([result("a", quick=True), result("b", ratio=3.25)]))
    assert "a (quick)" in captured.get()
    assert "3.25" in captured.get()
    assert "1.90 - 2.10" in captured.get()


def test_paired_fixture_times_both_alternately_and_checks_first(pytester, request):
    bench = request.path.parent
    pytester.makepyfile(
        bench_sleeps="""
        import json, time, torch

        calls = []

        def step(name, seconds):
            def run():
                calls.append(name)
                time.sleep(seconds)
            return run

        def same():
            return {"y": torch.ones(2)}, {"y": torch.ones(2)}, {"y": torch.ones(2)}

        def wrong():
            return {"y": torch.ones(2)}, {"y": torch.zeros(2)}, {"y": torch.ones(2)}

        def test_good(paired):
            paired(step("A", 0.02), step("B", 0.01), check=same, dtype=torch.float32, size=7)
            timed = calls[6:]
            pairs = list(zip(timed[::2], timed[1::2]))
            assert {frozenset(pair) for pair in pairs} == {frozenset("AB")}
            assert {("A", "B"), ("B", "A")} == set(pairs)
            calls.clear()

        def test_red(paired):
            try:
                paired(step("A", 0), step("B", 0), check=wrong, dtype=torch.float32)
            finally:
                assert calls == []
        """
    )
    pytester.makeconftest((bench / "conftest.py").read_text())
    outcome = pytester.runpytest_subprocess(
        "-o",
        "python_files=bench_*.py",
        "--benchmark-enable",
        "--results=results",
        f"-opythonpath={bench}",
    )
    outcome.assert_outcomes(passed=1, failed=1)
    outcome.stdout.fnmatch_lines(["good  *ms  *ms  *", "*fasttune against stock*", "*good*"])
    (path,) = (pytester.path / "results").iterdir()
    ((stored,),) = [run["results"] for run in json.loads(path.read_text())["runs"]]
    assert stored["id"] == "bench_sleeps.py::test_good"
    assert stored["runs"] >= MIN_PAIRS
    assert stored["size"] == 7
    assert stored["ratio"] == pytest.approx(2, rel=0.3)
    assert stored["fasttune"] == pytest.approx(10, rel=0.3)


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_keeps_its_results(pytester, request, how):
    bench = request.path.parent
    pytester.makepyfile(
        bench_stopped=f"""
        import os, signal, time

        def test_first(record):
            record(kind="time", unit="ms", runs=1, stock=2.0, fasttune=1.0, ratio=2.0)

        def test_second():
            os.kill(os.getpid(), signal.{how})
            time.sleep(60)
        """
    )
    pytester.makeconftest((bench / "conftest.py").read_text())
    outcome = pytester.runpytest_subprocess(
        "-opython_files=bench_*.py",
        "--benchmark-enable",
        "--results=results",
        f"-opythonpath={bench}",
        timeout=50,
    )
    assert outcome.ret == pytest.ExitCode.INTERRUPTED
    outcome.stdout.fnmatch_lines(["first  2.000 ms  1.000 ms  2.00  1", "*fasttune against stock*"])
    (path,) = (pytester.path / "results").iterdir()
    ((stored,),) = [run["results"] for run in json.loads(path.read_text())["runs"]]
    assert stored["id"] == "bench_stopped.py::test_first"
