"""Benchmark results as JSON, one file per suite and machine, and as a table.

A file holds runs; a run is an environment and its results. A repeated result leaves its old run,
so each number stays with the commit, the versions and the settings it was measured with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from environment import hardware_slug
from rich.table import Table

Result = dict[str, Any]


def merge(runs: list[dict[str, Any]], run: dict[str, Any]) -> list[dict[str, Any]]:
    """``runs`` without the results that ``run`` measures again, then ``run``."""
    repeated = {result["id"] for result in run["results"]}
    kept = []
    for old in runs:
        results = [result for result in old["results"] if result["id"] not in repeated]
        if results:
            kept.append({**old, "results": results})
    return [*kept, run]


def write(directory: Path, environment: dict[str, Any], results: list[Result]) -> list[Path]:
    """Adds results to the file of each suite; the files written."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for suite in dict.fromkeys(result["suite"] for result in results):
        path = directory / f"{suite}-{hardware_slug(environment['hardware'])}.json"
        runs = json.loads(path.read_text())["runs"] if path.exists() else []
        mine = [result for result in results if result["suite"] == suite]
        merged = merge(runs, {"environment": environment, "results": mine})
        partial = path.with_suffix(".partial")  # a second signal must not cost the runs before
        partial.write_text(json.dumps({"runs": merged}, indent=1) + "\n")
        partial.replace(path)
        paths.append(path)
    return paths


def line(result: Result) -> str:
    """One result in words."""
    return "  ".join([text for text in cells(result) if text])


def cells(result: Result) -> list[str]:
    """What the table says of a result, one text a column."""
    interval = (
        f"{result['ratio_low']:.2f} - {result['ratio_high']:.2f}" if "ratio_low" in result else ""
    )
    return [
        result["id"].partition("::test_")[2] + (" (quick)" if result["quick"] else ""),
        f"{result['stock']:,.3f} {result['unit']}" if result["stock"] else "out of memory",
        f"{result['fasttune']:,.3f} {result['unit']}",
        f"{result['ratio']:.2f}" if result["ratio"] else "",
        interval,
        str(result["runs"]),
    ]


def table(results: list[Result]) -> Table:
    """Both variants, their ratio (stock over fasttune) and how it was measured."""
    rendered = Table(
        "benchmark", "stock", "fasttune", "ratio", "95 %", "runs", title="fasttune against stock"
    )
    for column in rendered.columns[1:]:
        column.justify = "right"
    for result in results:
        rendered.add_row(*cells(result))
    return rendered
