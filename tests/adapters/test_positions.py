"""Positions against a plain loop over the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fasttune.adapters._positions import FIRST, LAST, WHOLE, Positions, parse

PROMPTS = {
    "right padding": [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]],
    "left padding": [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1, 0, 1]],
    "none in a row": [[0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]],
}


def expected(prompt: torch.Tensor, positions: Positions, part: str) -> set[int]:
    rows = set()
    for number, row in enumerate(prompt.tolist()):
        tokens = [number * len(row) + place for place, real in enumerate(row) if real]
        limit = len(tokens) // 2 if positions.first and positions.last else len(tokens)
        first, last = min(positions.first, limit), min(positions.last, limit)
        if positions.every:
            rows |= set(tokens)
        elif positions.listed is not None:
            rows |= {tokens[k] for k in positions.listed if -len(tokens) <= k < len(tokens)}
        else:
            rows |= set(tokens[:first]) if part != LAST else set()
            rows |= set(tokens[len(tokens) - last :]) if part != FIRST else set()
    return rows


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("text", ["f2+l2", "f3+l1", "f7+l7", "f2", "l3", "l20", "all", (0, 2, -1)])
def test_rows_are_those_of_a_loop(text: Any, prompt: str) -> None:
    mask = torch.tensor(PROMPTS[prompt], dtype=torch.bool)
    positions = parse(text)
    for shared in (True, False):
        for part in positions.parts(shared):
            rows = positions.rows(mask, part)
            named = rows[rows >= 0]
            assert named.unique().numel() == named.numel()
            assert set(named.tolist()) == expected(mask, positions, part)


def test_parts() -> None:
    assert parse("f7+l5") == Positions(7, 5)
    assert parse("f7+l5").parts(False) == (FIRST, LAST)
    assert parse("f7+l5").parts(True) == (WHOLE,)
    assert parse("l5").parts(False) == (WHOLE,)


@pytest.mark.parametrize(
    "text", ["", "f", "7", "f7l7", "f7+", "+l7", "f0", "f7+l0", "l7+f7", "first"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match='positions: expected "f7'):
        parse(text)


@pytest.mark.parametrize("value", [7, None, [1.5], [True], ["f7"]])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match='positions: expected "f7'):
        parse(value)


def test_numbers_are_wanted_once() -> None:
    for value in ([], [1, 1]):
        with pytest.raises(ValueError, match="positions: expected each number once"):
            parse(value)
