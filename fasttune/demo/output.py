"""The output folder: written beside its final place and moved there when complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from fasttune.demo.interrupt import ctrl_c_ignored
from fasttune.demo.options import DemoError

ADAPTER = "adapter"
RESULT = "result.json"
PLOT = "training.png"
TOOL = (
    "fasttune demo"  # the value of "tool" in result.json, by which an earlier output is recognised
)


def _is_earlier_output(folder: Path) -> bool:
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(result, dict) and result.get("tool") == TOOL


def check_replaceable(out: Path) -> None:
    """An output may replace nothing, an empty folder, or an earlier output without other files.

    Raises:
        DemoError: something else is there.
    """
    if not out.exists():
        if out.is_symlink():
            raise DemoError(f"--out {out} is a broken link")
        return
    if not out.is_dir():
        raise DemoError(f"--out {out} exists and is not a folder")
    try:
        names = set(os.listdir(out))
    except OSError as error:
        raise DemoError(f"cannot read --out {out}: {error.strerror}") from None
    if not names:
        return
    if not _is_earlier_output(out):
        raise DemoError(f"--out {out} exists, is not empty and is no earlier output of the demo")
    if others := names - {ADAPTER, RESULT, PLOT}:
        raise DemoError(f"--out {out} also holds other files ({min(others)}); move them first")


class OutputFolder:
    """A context manager around a hidden folder next to ``out``; ``commit`` moves it to ``out``.

    Leaving the context without a commit removes all that was written. An earlier output is replaced
    only by a commit.

    Raises:
        DemoError: ``out`` holds something else, or its folder cannot be written.
    """

    def __init__(self, out: Path) -> None:
        check_replaceable(out)
        self.out = out
        self._target = Path(os.path.realpath(out))
        anchor = self._target.parent
        while not anchor.exists() and anchor != anchor.parent:
            anchor = anchor.parent
        try:
            self._work = Path(tempfile.mkdtemp(prefix=f".{self._target.name}-", dir=anchor))
        except OSError as error:
            raise DemoError(f"cannot write --out {out}: {error.strerror}") from None
        self.files = self._work / "files"  # becomes `out`
        self.scratch = self._work / "scratch"  # logs and what else is thrown away
        self.files.mkdir()
        self.scratch.mkdir()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        with ctrl_c_ignored():
            shutil.rmtree(self._work, ignore_errors=True)

    def commit(self) -> None:
        """Moves the files to their place.

        Raises:
            DemoError: the place was taken or became unwritable meanwhile.
        """
        check_replaceable(self.out)
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            if self._target.exists():
                self._target.rename(self._work / "earlier")
            self.files.rename(self._target)
        except OSError as error:
            earlier = self._work / "earlier"
            if earlier.exists() and not self._target.exists():
                earlier.rename(self._target)
            raise DemoError(f"cannot write --out {self.out}: {error.strerror}") from None
