"""The whole command in processes of its own, with a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 60.0


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Starts ``fasttune demo`` as a terminal does: as the leader of a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fasttune.cli", "demo", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "150", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """Reads stdout up to a line with ``text``; returns what was read."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen}{process.communicate()[1]}")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


@pytest.fixture
def arguments(tiny_model: Path, chat_file: Path) -> list[str]:
    return ["--model", str(tiny_model), "--data", str(chat_file), "--out", "o"]


@pytest.fixture
def long_run(
    tmp_path: Path, arguments: list[str]
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A run in the middle of training, and its two workers."""
    process = start(tmp_path, *arguments, "--steps", "5000")
    wait_for_line(process, "step 10/5000")
    workers = workers_of(process)
    assert len(workers) == 2
    yield process, workers
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def completed(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, chat_file: Path
) -> tuple[Path, str]:
    """The folder and the output of one completed run, with fasttune switched off in both."""
    folder = tmp_path_factory.mktemp("completed")
    process = start(
        folder,
        *["--model", str(tiny_model), "--data", str(chat_file), "--out", "o", "--steps", "7"],
        *["--grad-accum", "2", "--dtype", "fp32", "--lr", "1e-2", "--device", "cpu"],
        FASTTUNE_DISABLE="1",
    )
    out, err = process.communicate(timeout=START_TIMEOUT_S + END_TIMEOUT_S)
    assert process.returncode == 0, err
    assert err == ""
    return folder, out


def read_result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "o" / "result.json").read_text())
    return result


def test_output_is_complete_and_nothing_else_is_left(completed: tuple[Path, str]) -> None:
    folder, _ = completed
    assert [path.name for path in folder.iterdir()] == ["o"]
    assert {path.name for path in (folder / "o").iterdir()} == {
        "adapter",
        "result.json",
        "training.png",
    }
    assert (folder / "o" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "o" / "adapter" / "adapter_model.safetensors").exists()


def test_table_and_answers_are_printed(completed: tuple[Path, str]) -> None:
    _, out = completed
    for text in (
        "step time, median (ms)",
        "non-padding tokens/s",
        "peak memory above the weights (MiB)",
        "held-out loss before",
        "held-out loss after",
        "Question (held out)",
        "Answer before",
        "Answer after",
        "Reference",
    ):
        assert text in out


def test_result_has_the_documented_fields(completed: tuple[Path, str]) -> None:
    result = read_result(completed[0])
    assert result["tool"] == "fasttune demo"
    assert result["schema_version"] == 1
    assert result["status"] == "completed"
    assert set(result) == {
        "tool",
        "schema_version",
        "status",
        "versions",
        "python",
        "platform",
        "hardware",
        "device",
        "threads",
        "environment",
        "model",
        "lora",
        "data",
        "training",
        "stock",
        "patched",
        "speedup",
        "memory_ratio",
        "generation",
        "patch_report",
        "notices",
        "setup_s",
        "run_s",
    }
    assert result["data"] == {
        "source": "pairs.jsonl",
        "license": None,
        "train_samples": 36,
        "held_out_samples": 4,
        "truncated_samples": 0,
        "dropped_samples": 0,
    }
    training = result["training"]
    assert (training["steps_requested"], training["steps_planned"]) == (7, 7)
    assert training["steps_reduced"] is False
    assert len(training["step_tokens"]) == 7
    for name in ("stock", "patched"):
        worker = result[name]
        assert [step["step"] for step in worker["steps"]] == list(range(1, 8))
        assert len(worker["block_peaks_bytes"]) == 3
        assert worker["peak_memory_bytes"] == max(worker["block_peaks_bytes"]) > 0
        assert worker["held_out_loss_after"] < worker["held_out_loss_before"]
        seconds = sum(step["seconds"] for step in worker["steps"])
        assert worker["tokens_per_s"] == pytest.approx(sum(training["step_tokens"]) / seconds)


def test_unpatched_workers_agree_exactly(completed: tuple[Path, str]) -> None:
    """The same seed, data and order in both: with fasttune off, nothing may differ."""
    result = read_result(completed[0])
    stock, patched = result["stock"], result["patched"]
    assert [step["loss"] for step in stock["steps"]] == [step["loss"] for step in patched["steps"]]
    assert stock["held_out_loss_before"] == patched["held_out_loss_before"]
    assert stock["held_out_loss_after"] == patched["held_out_loss_after"]


def test_ctrl_c_saves_the_adapter_as_it_is(
    tmp_path: Path, long_run: tuple[subprocess.Popen[str], list[psutil.Process]]
) -> None:
    process, workers = long_run
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    out, err = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 130, err
    assert err == ""
    result = read_result(tmp_path)
    done = len(result["patched"]["steps"])
    assert result["status"] == "interrupted"
    assert done >= 5  # its first turn, before the round that was waited for
    assert f"Saved the adapter as it is after {done} of 5000 steps: o/adapter" in out
    assert (tmp_path / "o" / "adapter" / "adapter_model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert_gone(workers)


def test_worker_that_dies_is_reported(
    tmp_path: Path, long_run: tuple[subprocess.Popen[str], list[psutil.Process]]
) -> None:
    process, workers = long_run
    workers[0].kill()
    _, err = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "worker ended: killed by signal 9" in err
    assert list(tmp_path.iterdir()) == []
    assert_gone(workers)


def test_workers_end_with_their_parent(
    long_run: tuple[subprocess.Popen[str], list[psutil.Process]],
) -> None:
    process, workers = long_run
    process.kill()
    assert_gone(workers)


def test_sigterm_before_training_leaves_nothing(tmp_path: Path, arguments: list[str]) -> None:
    process = start(tmp_path, *arguments, "--steps", "5")
    wait_for_line(process, "Loading the model")
    time.sleep(0.5)
    workers = workers_of(process)
    process.terminate()
    _, err = process.communicate(timeout=END_TIMEOUT_S)
    assert process.returncode == 130
    assert err == "fasttune demo: interrupted; nothing was saved\n"
    assert list(tmp_path.iterdir()) == []
    assert_gone(workers)


def test_exception_in_a_worker_is_one_line(
    tmp_path: Path, arguments: list[str], tiny_model: Path
) -> None:
    """The tokenizer loads, the weights do not."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        content = b"damaged" if file.suffix == ".safetensors" else file.read_bytes()
        (broken / file.name).write_bytes(content)
    process = start(tmp_path, *arguments, "--model", str(broken), "--steps", "5")
    _, err = process.communicate(timeout=START_TIMEOUT_S)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "worker ended: " in err and "SafetensorError" in err
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.slow
def test_packaged_model_learns_the_packaged_pairs(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    process = start(tmp_path, "--steps", "12", "--out", "o")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    result = read_result(tmp_path)
    assert result["data"]["license"] == "CC-BY-4.0"
    assert "Zaragoza" in out
    for name in ("stock", "patched"):
        worker = result[name]
        assert worker["held_out_loss_after"] < worker["held_out_loss_before"] - 0.2
    before = [result[name]["held_out_loss_before"] for name in ("stock", "patched")]
    after = [result[name]["held_out_loss_after"] for name in ("stock", "patched")]
    assert before[0] == pytest.approx(before[1], abs=0.02)
    assert after[0] == pytest.approx(after[1], abs=0.1)
    config = json.loads((tmp_path / "o" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
