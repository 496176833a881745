"""Why something takes the original path."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why a call takes the original path.

    Attributes:
        text: one clause, in the words of the report.
        expected: the user asked for it (adapters disabled or merged, inference): no warning, no
            strict error.
    """

    text: str
    expected: bool = False
