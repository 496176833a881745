from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fasttune.cli import app
from fasttune.demo.options import DemoError, DemoOptions

GOOD = '{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize(
    ("setting", "value", "complaint"),
    [
        ("steps", 0, "--steps must be at least 1, not 0"),
        ("batch_size", 0, "--batch-size"),
        ("seq_len", 7, "--seq-len must be at least 8"),
        ("grad_accum", -1, "--grad-accum"),
        ("lr", 0.0, "--lr"),
        ("lr", float("nan"), "--lr"),
        ("dtype", "fp8", "unknown --dtype 'fp8'"),
        ("dtype", "float16", "unknown --dtype"),
        ("device", "tpu", "unknown --device 'tpu'"),
        ("device", "cuda:", "unknown --device"),
    ],
)
def test_value_out_of_range_is_refused(setting: str, value: object, complaint: str) -> None:
    with pytest.raises(DemoError) as error:
        DemoOptions(**{setting: value})  # type: ignore[arg-type]
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def invoke(folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """Exit status and the lines of stderr of ``fasttune demo`` in this process."""
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert not list(folder.glob(".o*")), "the hidden work folder is left behind"
    return result.exit_code, result.stderr.splitlines()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(GOOD)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "."], "is not a file"),
        (["--dtype", "fp8"], "unknown --dtype 'fp8'"),
        (["--device", "abacus"], "unknown --device 'abacus'"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--model", "./nowhere"], "--model ./nowhere does not exist"),
        (["--model", "nowhere.gguf"], "--model nowhere.gguf does not exist"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    in_tmp: Path, arguments: list[str], complaint: str
) -> None:
    if "--data" not in arguments:
        arguments = [*arguments, "--data", "good.jsonl"]
    status, lines = invoke(in_tmp, *arguments, "--out", "o")
    assert status == 2
    assert len(lines) == 1
    assert complaint in lines[0]
    assert not Path("o").exists()


def test_file_in_the_way_of_the_output_is_status_2(in_tmp: Path) -> None:
    Path("o").write_text("mine")
    status, lines = invoke(in_tmp, "--data", "good.jsonl", "--out", "o")
    assert (status, len(lines)) == (2, 1)
    assert Path("o").read_text() == "mine"


def test_folder_that_cannot_be_written_is_status_2(in_tmp: Path, tiny_model: Path) -> None:
    Path("file").write_text("mine")
    status, lines = invoke(in_tmp, "--data", "good.jsonl", "--out", "file/o")
    assert (status, len(lines)) == (2, 1)
    assert "--out file/o" in lines[0]


def test_model_without_a_tokenizer_is_status_2(in_tmp: Path) -> None:
    Path("hollow").mkdir()
    status, lines = invoke(in_tmp, "--data", "good.jsonl", "--model", "./hollow", "--out", "o")
    assert (status, len(lines)) == (2, 1)
    assert "cannot load the tokenizer of ./hollow" in lines[0]


def test_malformed_line_exits_2_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(GOOD + '{"text": 3}\n')
    arguments = ["--steps", "5", "--data", "bad.jsonl", "--out", "o"]
    result = subprocess.run(
        [sys.executable, "-m", "fasttune.cli", "demo", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr == ("fasttune demo: bad.jsonl, line 3: text must be a string, not int\n")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_version_and_help_are_offered() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("fasttune ")
    assert (
        "--grad-accum" in CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).stdout
    )
