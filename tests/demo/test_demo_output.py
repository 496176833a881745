from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fasttune.demo.options import DemoError
from fasttune.demo.output import ADAPTER, RESULT, TOOL, OutputFolder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_earlier(out: Path, mark: str = "earlier") -> None:
    (out / ADAPTER).mkdir(parents=True)
    (out / ADAPTER / "weights").write_text(mark)
    (out / RESULT).write_text(json.dumps({"tool": TOOL}))


def test_nothing_is_at_the_target_before_the_commit(tmp_path: Path) -> None:
    out = tmp_path / "o"
    with OutputFolder(out) as folder:
        (folder.files / RESULT).write_text("{}")
        (folder.scratch / "log").write_text("noise")
        assert not out.exists()
        folder.commit()
        assert names(out) == {RESULT}
    assert names(tmp_path) == {"o"}


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "o") as folder:
        (folder.files / RESULT).write_text("{}")
        raise RuntimeError
    assert names(tmp_path) == set()


def test_failure_keeps_the_earlier_output(tmp_path: Path) -> None:
    write_earlier(tmp_path / "o")
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "o"):
        raise RuntimeError
    assert (tmp_path / "o" / ADAPTER / "weights").read_text() == "earlier"
    assert names(tmp_path) == {"o"}


def test_earlier_output_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_earlier(tmp_path / "o")
    with OutputFolder(tmp_path / "o") as folder:
        (folder.files / RESULT).write_text("new")
        folder.commit()
    assert names(tmp_path / "o") == {RESULT}
    assert names(tmp_path) == {"o"}


def test_empty_folder_and_missing_parents_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        with OutputFolder(out) as folder:
            (folder.files / RESULT).write_text("{}")
            folder.commit()
        assert names(out) == {RESULT}
    assert names(tmp_path) == {"empty", "a"}


def test_missing_parents_are_not_created_without_a_commit(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == set()


def test_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "o").symlink_to("real")
    with OutputFolder(tmp_path / "o") as folder:
        (folder.files / RESULT).write_text("{}")
        folder.commit()
    assert names(tmp_path / "real") == {RESULT}
    assert (tmp_path / "o").is_symlink()


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {RESULT: '{"tool": "other"}'}])
def test_folder_of_somebody_else_is_refused(tmp_path: Path, content: dict[str, str]) -> None:
    out = tmp_path / "o"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    with pytest.raises(DemoError, match="no earlier output"):
        OutputFolder(out)
    assert names(out) == set(content)


def test_earlier_output_with_files_of_the_user_is_refused(tmp_path: Path) -> None:
    write_earlier(tmp_path / "o")
    (tmp_path / "o" / "notes.txt").write_text("mine")
    with pytest.raises(DemoError, match=r"notes\.txt"):
        OutputFolder(tmp_path / "o")


def test_file_and_broken_link_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DemoError, match="not a folder"):
        OutputFolder(tmp_path / "file")
    with pytest.raises(DemoError, match="broken link"):
        OutputFolder(tmp_path / "link")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(DemoError, match="cannot write"):
        OutputFolder(locked / "o")


def test_place_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "o"
    with OutputFolder(out) as folder:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        with pytest.raises(DemoError):
            folder.commit()
    assert names(tmp_path) == {"o"}
    assert names(out) == {"notes.txt"}
