"""Reads training samples from a JSON-lines file. Five formats, recognised line by line:

- ``messages``: ``{"messages": [{"role": ..., "content": ...}, ...]}``
- prompt and completion: ``{"prompt": ..., "completion": ...}``, strings or lists of messages
- plain text: ``{"text": ...}``, every token is trained
- Alpaca: ``{"instruction": ..., "input": ..., "output": ...}``, ``input`` may be missing or empty
- ShareGPT: ``{"conversations": [{"from": "human" | "gpt" | "system", "value": ...}, ...]}``

All but plain text become a conversation whose assistant turns are trained. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttune.demo.options import DemoError, DemoOptions
from fasttune.demo.packaged import DATA_FILE, DATA_PACKAGE, packaged_file

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
FORMATS = "messages | prompt + completion | text | instruction + output | conversations"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Sample:
    """One line of the file: a conversation that ends with the assistant, or plain text."""

    line: int  # counted from 1
    messages: tuple[Message, ...] = ()
    text: str | None = None


class _Malformed(Exception):
    pass


def _text(value: Any, name: str) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        texts = [part.get("text") for part in value if part.get("type") == "text"]
        if len(texts) != len(value):
            raise _Malformed(f"{name} has parts that are not text")
        return "".join(_text(text, name) for text in texts)
    if not isinstance(value, str):
        raise _Malformed(f"{name} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise _Malformed(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Malformed(f"{name} has half a surrogate pair, which is no character") from None
    return value


def _turn(value: Any, name: str, role_key: str, text_key: str, roles: dict[str, str]) -> Message:
    if not isinstance(value, dict):
        raise _Malformed(f"{name} must be an object, not {type(value).__name__}")
    role = value.get(role_key)
    if not isinstance(role, str) or role not in roles:
        raise _Malformed(f"{name}.{role_key} is {role!r}, expected one of {', '.join(roles)}")
    return Message(roles[role], _text(value.get(text_key), f"{name}.{text_key}"))


def _conversation(
    value: Any,
    name: str,
    *,
    role_key: str = "role",
    text_key: str = "content",
    roles: dict[str, str] | None = None,
) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise _Malformed(f"{name} must be a list, not {type(value).__name__}")
    known = roles or {role: role for role in ROLES}
    return tuple(
        _turn(turn, f"{name}[{i}]", role_key, text_key, known)
        for i, turn in enumerate(value)
        if not _is_empty_system(turn, role_key, text_key)
    )


def _is_empty_system(turn: Any, role_key: str, text_key: str) -> bool:
    """Many files carry an empty system turn, which says nothing."""
    return isinstance(turn, dict) and turn.get(role_key) == "system" and turn.get(text_key) == ""


def _from_messages(row: dict[str, Any], line: int) -> Sample:
    return Sample(line, _conversation(row["messages"], "messages"))


def _from_prompt(row: dict[str, Any], line: int) -> Sample:
    turns: list[Message] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[key], list):
            turns.extend(_conversation(row[key], key))
        else:
            turns.append(Message(role, _text(row[key], key)))
    return Sample(line, tuple(turns))


def _from_text(row: dict[str, Any], line: int) -> Sample:
    return Sample(line, text=_text(row["text"], "text"))


def _from_alpaca(row: dict[str, Any], line: int) -> Sample:
    question = _text(row["instruction"], "instruction")
    if row.get("input"):
        question += "\n\n" + _text(row["input"], "input")
    answer = Message("assistant", _text(row["output"], "output"))
    return Sample(line, (Message("user", question), answer))


def _from_sharegpt(row: dict[str, Any], line: int) -> Sample:
    turns = _conversation(
        row["conversations"],
        "conversations",
        role_key="from",
        text_key="value",
        roles=SHAREGPT_ROLES,
    )
    return Sample(line, turns)


_READERS: tuple[tuple[frozenset[str], Callable[[dict[str, Any], int], Sample]], ...] = (
    (frozenset({"messages"}), _from_messages),
    (frozenset({"conversations"}), _from_sharegpt),
    (frozenset({"prompt", "completion"}), _from_prompt),
    (frozenset({"instruction", "output"}), _from_alpaca),
    (frozenset({"text"}), _from_text),
)


def parse_line(source: str, line: int) -> Sample:
    """Reads one line.

    Raises:
        ValueError: what is wrong with the line, without its number.
    """
    try:
        row = json.loads(source)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, not {type(row).__name__}")
    read = next((read for keys, read in _READERS if keys <= row.keys()), None)
    if read is None:
        found = ", ".join(map(str, list(row)[:6])) or "none"
        raise ValueError(f"unknown format (keys: {found}); expected {FORMATS}")
    try:
        sample = read(row, line)
    except _Malformed as error:
        raise ValueError(str(error)) from None
    if sample.text is None:
        if not sample.messages:
            raise ValueError("the conversation is empty")
        if all(message.role != "assistant" for message in sample.messages):
            raise ValueError("the conversation has no assistant turn to train on")
    return sample


def read_samples(path: Path) -> list[Sample]:
    """Reads a whole file; blank lines and a byte-order mark are skipped.

    Raises:
        DemoError: the file cannot be read, a line is malformed (with its number), or the file has
            fewer than two samples (one to train on, one to hold out).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from None
    samples: list[Sample] = []
    for number, part in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            source = part.decode("utf-8").strip()
            if source:
                samples.append(parse_line(source, number))
        except UnicodeDecodeError:
            raise DemoError(f"{path}, line {number}: not UTF-8 text") from None
        except ValueError as error:
            raise DemoError(f"{path}, line {number}: {error}") from None
    if len(samples) < 2:
        count = "no samples" if not samples else "only one sample"
        raise DemoError(f"{path} has {count}; at least two are needed, one of them to hold out")
    return samples


def load_data(options: DemoOptions) -> list[Sample]:
    """The user's samples, or the packaged ones.

    Raises:
        DemoError: as `read_samples`, or the data package is not installed.
    """
    return read_samples(options.data or packaged_file(DATA_PACKAGE, DATA_FILE))
