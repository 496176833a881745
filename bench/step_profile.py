"""Draws a training step of SmolLM2-135M as stacked bars: stock, patched and, on request, compiled.

    python bench/step_profile.py [--compile] [--dtype fp32] [--out bench/results]

Each variant runs in this process, one after the other, under torch's profiler; what is drawn is the
self time of the operators, so a matrix product by torch inside one of our ops counts as a matrix
product; those that our own kernels make (bf16 on AMX) count as ours.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, environment, hardware_slug
from floor import attention_step, gemm_step
from paired import timed
from torch.profiler import ProfilerActivity, profile
from training import Scenario, lora_model, make_step

import fasttune

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("matrix products", "attention", "fasttune's kernels", "everything else")
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#b0b0b0")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear", "_mkl_linear")
WARM_UP, STEPS = 2, 3


def part_of(name: str) -> str:
    """The part of the step that an operator belongs to."""
    namespace, _, op = name.partition("::")
    if "scaled_dot_product" in op or op.startswith("attention_"):
        return PARTS[1]
    if namespace == "fasttune" or (not op and name.startswith("_") and "Backward" in name):
        return PARTS[2]
    return PARTS[0] if op.rstrip("_").removesuffix(".out") in PRODUCTS else PARTS[3]


def profile_step(model: Any, scenario: Scenario) -> dict[str, float]:
    """Milliseconds of each part of a step, median of a few by total."""
    step = make_step(scenario, model, "cpu")
    for _ in range(WARM_UP):
        step()
    runs = []
    for _ in range(STEPS):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            step()
        parts: Counter[str] = Counter()
        for entry in recorded.key_averages():
            parts[part_of(entry.key)] += entry.self_cpu_time_total / 1e3
        runs.append({part: parts[part] for part in PARTS})
    return sorted(runs, key=lambda run: sum(run.values()))[STEPS // 2]


def floor(dtype: torch.dtype) -> dict[str, float]:
    """What the step must do at least, timed alone."""
    gemm, attention = gemm_step(dtype), attention_step(dtype, ours=True)
    gemm(), attention()
    times = sorted(timed(gemm) for _ in range(STEPS))
    attention_s = sorted(timed(attention) for _ in range(20))[10] * 30
    return {
        PARTS[0]: times[STEPS // 2] * 1e3,
        PARTS[1]: attention_s * 1e3,
        PARTS[2]: 0,
        PARTS[3]: 0,
    }


def draw(bars: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """One stacked bar a variant, in milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.9 * len(bars) + 1.6))
    left = [0.0] * len(bars)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        values = [bar[part] for bar in bars.values()]
        axes.barh(list(bars), values, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:,.0f} ms", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(left))
    axes.set_xlabel("milliseconds a step")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--compile", action="store_true", help="also compiled stock (minutes)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    scenario = Scenario(options.dtype, DTYPES[options.dtype], options.dropout)
    bars = {"stock": profile_step(lora_model(scenario, "cpu"), scenario)}
    if options.compile:
        model = lora_model(scenario, "cpu")
        model.compile()
        bars["stock, torch.compile"] = profile_step(model, scenario)
    bars["fasttune"] = profile_step(fasttune.patch(lora_model(scenario, "cpu")), scenario)
    bars["products and attention alone"] = floor(scenario.dtype)
    facts = environment("python bench/step_profile.py")
    stem = f"step_profile-{options.dtype}-{hardware_slug(facts['hardware'])}"
    options.out.mkdir(parents=True, exist_ok=True)
    title = f"SmolLM2-135M, LoRA r 16, 4 x 256 tokens, {options.dtype}, dropout {options.dropout}"
    draw(bars, f"{title}\n{facts['hardware']['cpu']}", options.out / f"{stem}.png")
    record = {"environment": facts, "unit": "ms", "bars": bars}
    (options.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, bar in bars.items():
        print(f"{name:30s}", {part: round(value) for part, value in bar.items()})


if __name__ == "__main__":
    main()
