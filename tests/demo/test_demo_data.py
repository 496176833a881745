from __future__ import annotations

import json
from pathlib import Path

import pytest

from fasttune.demo.data import Message, Sample, load_data, parse_line, read_samples
from fasttune.demo.options import DemoError, DemoOptions

QA = (Message("user", "Why?"), Message("assistant", "Because."))
GOOD = '{"prompt": "Why?", "completion": "Because."}'


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": "Because."},
                ]
            },
            QA,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                    {"role": "assistant", "content": "Because."},
                ],
                "id": 7,
            },
            QA,
        ),
        ({"prompt": "Why?", "completion": "Because."}, QA),
        (
            {
                "prompt": [{"role": "user", "content": "Why?"}],
                "completion": [{"role": "assistant", "content": "Because."}],
            },
            QA,
        ),
        ({"instruction": "Why?", "output": "Because."}, QA),
        ({"instruction": "Why?", "input": "", "output": "Because."}, QA),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            (Message("user", "Add.\n\n1 2"), Message("assistant", "3")),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "Because."},
                ]
            },
            QA,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": ""},
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "Because."},
                ]
            },
            QA,
        ),
    ],
)
def test_every_conversation_format_is_read(row: object, messages: tuple[Message, ...]) -> None:
    assert parse_line(json.dumps(row), 3) == Sample(3, messages)


def test_plain_text_is_read() -> None:
    assert parse_line('{"text": "Once upon a time"}', 1) == Sample(1, text="Once upon a time")


def test_formats_may_be_mixed_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(f'{GOOD}\n\n{{"text": "Once"}}\r\n')
    assert [(s.line, s.text) for s in read_samples(path)] == [(1, None), (3, "Once")]


def test_byte_order_mark_and_non_ascii_text_are_read(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "Åäö 日本"}\n{"text": "b"}'.encode())
    assert [sample.text for sample in read_samples(path)] == ["Åäö 日本", "b"]


def test_unicode_line_separators_inside_a_string_do_not_split_it(tmp_path: Path) -> None:
    path = tmp_path / "separators.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n{"text": "d"}\n', encoding="utf-8")
    assert [sample.text for sample in read_samples(path)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "a"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must be a JSON object, not list"),
        ('"text"', "must be a JSON object, not str"),
        ("{}", "keys: none"),
        ('{"question": "a", "answer": "b"}', "keys: question, answer"),
        ('{"prompt": "a"}', "unknown format"),
        ('{"instruction": "a"}', "unknown format"),
        ('{"text": 3}', "text must be a string, not int"),
        ('{"text": null}', "text must be a string, not NoneType"),
        ('{"text": "  "}', "text is empty"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        ('{"instruction": "a", "input": 5, "output": "b"}', "input must be a string, not int"),
        ('{"messages": "a"}', "messages must be a list, not str"),
        ('{"messages": []}', "conversation is empty"),
        ('{"messages": ["a"]}', "messages[0] must be an object, not str"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "messages[0].role is 'robot'"),
        ('{"messages": [{"content": "a"}]}', "messages[0].role is None"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content must be a string"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "messages[0].content has parts that are not text",
        ),
        ('{"conversations": [{"from": "alien", "value": "a"}]}', "conversations[0].from is"),
        ('{"conversations": [{"from": "human"}]}', "conversations[0].value must be a string"),
    ],
)
def test_malformed_line_is_named_with_its_number(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(DemoError) as error:
        read_samples(path)
    message = str(error.value)
    assert "bad.jsonl, line 3: " in message
    assert complaint in message
    assert "\n" not in message


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() + '{"text": "Åäö"}'.encode("latin-1"))
    with pytest.raises(DemoError, match="line 2: not UTF-8"):
        read_samples(path)


@pytest.mark.parametrize(("content", "count"), [("", "no samples"), ("\n \n", "no samples")])
def test_empty_file_is_refused(tmp_path: Path, content: str, count: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DemoError, match=count):
        read_samples(path)


def test_single_sample_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(GOOD)
    with pytest.raises(DemoError, match="only one sample"):
        read_samples(path)


def test_packaged_data_are_503_pairs() -> None:
    pytest.importorskip("zaragoza_construction_faq")
    samples = load_data(DemoOptions())
    assert len(samples) == 503
    assert {tuple(m.role for m in sample.messages) for sample in samples} == {("user", "assistant")}
    assert samples[0].messages[0].content == "What is a bygglov (building permit)?"
