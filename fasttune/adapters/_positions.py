"""Positions of a prompt: what the user writes, and the rows of a batch that they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FORM = re.compile(r"(?:f(\d+))?\+?(?:l(\d+))?")
_EXPECTED = 'expected "f7+l7", "f7", "l7", "all" or a list of integers'

# Of a pair of interventions with weights of their own, the one before the plus and the one after;
# of a single one.
FIRST, LAST, WHOLE = "first", "last", "whole"


@dataclass(frozen=True)
class Positions:
    """The first and the last tokens of a prompt, or listed ones, or all.

    Attributes:
        first, last: how many; each at most half of the prompt where both are asked for, so that no
            token is meant twice (pyreft's rule).
        listed: numbers of tokens of the prompt, from its end where negative; those that a shorter
            prompt lacks are left out. None: ``first`` and ``last``.
        every: all tokens of the prompt.
    """

    first: int = 0
    last: int = 0
    listed: tuple[int, ...] | None = None
    every: bool = False

    def parts(self, share_weights: bool) -> tuple[str, ...]:
        """The interventions that these positions take."""
        return (FIRST, LAST) if self.first and self.last and not share_weights else (WHOLE,)

    def rows(self, prompt: Tensor, part: str) -> Tensor:
        """The rows [P] int64 of hidden states [B S, H] that ``part`` edits, -1 where there is none.

        P depends on the shape of ``prompt`` [B, S] bool alone, so nothing waits for the device.
        """
        batch, tokens = prompt.shape
        if self.every:
            numbers = torch.arange(batch * tokens, device=prompt.device)
            return torch.where(prompt.reshape(-1), numbers, -1)
        count = prompt.sum(1, keepdim=True)  # [B, 1]
        place = self._places(count, part)  # [B, J], from 0
        # The token that is number k of the prompt is the first one with k + 1 of them up to it.
        token = torch.searchsorted(prompt.cumsum(1), place + 1)
        starts = torch.arange(batch, device=prompt.device).unsqueeze(1) * tokens
        return torch.where(place >= 0, starts + token, -1).reshape(-1)

    def _places(self, count: Tensor, part: str) -> Tensor:
        if self.listed is not None:
            wanted = torch.tensor(self.listed, dtype=torch.int64, device=count.device)
            place = torch.where(wanted < 0, wanted + count, wanted)
            place = torch.where((place >= 0) & (place < count), place, -1)
            same = place.unsqueeze(2) == place.unsqueeze(1)  # 0 and -1 of a prompt of one token
            again = torch.tril(same, -1).any(2)
            return torch.where(again, -1, place)
        limit = count // 2 if self.first and self.last else count
        first = torch.arange(0 if part == LAST else self.first, device=count.device)
        last = torch.arange(0 if part == FIRST else self.last, device=count.device)
        return torch.cat(
            [
                torch.where(first < limit, first, -1),
                torch.where(last < limit, count - 1 - last, -1),
            ],
            dim=1,
        )


def parse(positions: Any) -> Positions:
    """Raises TypeError or ValueError unless ``positions`` says which tokens it means."""
    if isinstance(positions, str):
        if positions == "all":
            return Positions(every=True)
        match = _FORM.fullmatch(positions)
        first, last = (int(group or 0) for group in match.groups()) if match else (0, 0)
        plus = bool(match and first and last)
        if not (first or last) or ("+" in positions) != plus:
            raise ValueError(f"positions: {_EXPECTED}, got {positions!r}")
        return Positions(first, last)
    if not isinstance(positions, Sequence) or not all(type(item) is int for item in positions):
        raise TypeError(f"positions: {_EXPECTED}, got {positions!r}")
    if not positions or len(set(positions)) != len(positions):
        raise ValueError(f"positions: expected each number once, got {list(positions)}")
    return Positions(listed=tuple(positions))
