"""What the examples share: finding packaged files, one training loop, metrics and the table."""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fasttune

# PEFT asks transformers for a name that is about to change.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
console = Console()
DATA_FOLDER = Path(__file__).parent / "data"

Batch = dict[str, Tensor]


def missing(what: str, command: str) -> SystemExit:
    """The end of a run that lacks something: one line that says how to get it."""
    return SystemExit(f"{what}; run: {command}")


def packaged_file(package: str, ending: str, command: str) -> Path:
    """The file of the installed ``package`` whose path ends with ``ending``."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise missing(f"the package {package} is not installed", command) from None
    for file in files:
        if str(file).endswith(ending):
            return Path(str(file.locate()))
    raise missing(f"the package {package} has no file {ending}", command)


def parser(description: str | None, *, steps: int, batch_size: int) -> argparse.ArgumentParser:
    """A command line with the options that every example has."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--steps", type=int, default=steps, help="optimizer steps of each run")
    options.add_argument("--batch-size", type=int, default=batch_size)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options


@dataclass(frozen=True)
class Run:
    """One training run and what it reached on the test split."""

    accuracy: float
    f1: float
    auc: float
    step_ms: float  # median


def train(model: nn.Module, batches: Sequence[Batch], *, lr: float, title: str) -> list[float]:
    """AdamW with a linearly falling rate, one step a batch; milliseconds of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    model.train()
    times = []
    for batch in track(batches, description=title, console=console):
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(1e3 * (time.perf_counter() - start))
        schedule.step()
    return times


@torch.no_grad()
def predict(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Class probabilities [N, C] in the order of the batches; labels are not looked at."""
    model.eval()
    logits = []
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits.append(model(**inputs).logits.float().cpu())
    return torch.cat(logits).softmax(-1)


def score(labels: Tensor, probabilities: Tensor) -> tuple[float, float, float]:
    """Accuracy, F1 (of the positive class, or the mean over classes) and area under the ROC curve
    (one class against the rest), by scikit-learn.
    """
    try:
        from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
    except ImportError:
        raise missing("scikit-learn is not installed", "pip install scikit-learn") from None
    chosen = probabilities.argmax(-1)
    if probabilities.shape[1] == 2:
        f1 = f1_score(labels, chosen)
        auc = roc_auc_score(labels, probabilities[:, 1])
    else:
        f1 = f1_score(labels, chosen, average="macro")
        auc = roc_auc_score(
            labels, probabilities.double() / probabilities.double().sum(-1, keepdim=True),
            multi_class="ovr",
        )  # fmt: skip
    return float(accuracy_score(labels, chosen)), float(f1), float(auc)


def stock_against_patched(
    make_model: Callable[[], nn.Module],
    training: Sequence[Batch],
    test: Sequence[Batch],
    *,
    lr: float,
    seed: int,
) -> dict[str, Run]:
    """Trains stock, then patched, from the same seed on the same batches; prints the table."""
    labels = torch.cat([batch["labels"].cpu() for batch in test])
    runs = {}
    model: Any = None
    for name in ("stock", "fasttune"):
        torch.manual_seed(seed)
        model = make_model()
        if name == "fasttune":
            model = fasttune.patch(model)
        times = train(model, training, lr=lr, title=f"{name:<8}")
        runs[name] = Run(*score(labels, predict(model, test)), statistics.median(times))
    console.print(_table(runs, len(training), len(labels)))
    console.print(
        "The runs follow one another in one process, so whatever else the machine does meanwhile "
        "blurs the times; fasttune.compare alternates. Dropout draws other masks in the patched "
        "run: metrics differ as between two seeds.",
        highlight=False,
    )
    print(fasttune.report(model))
    return runs


def _table(runs: dict[str, Run], steps: int, rows: int) -> Table:
    stock, ours = runs["stock"], runs["fasttune"]
    table = Table("", "stock", "fasttune", title=f"{steps} steps, {rows} test rows")
    for title, name in (("accuracy", "accuracy"), ("F1", "f1"), ("ROC AUC", "auc")):
        table.add_row(title, *(f"{getattr(run, name):.4f}" for run in (stock, ours)))
    ratio = ours.step_ms / stock.step_ms
    table.add_row("median step", f"{stock.step_ms:.0f} ms", f"{ours.step_ms:.0f} ms ({ratio:.2f})")
    return table
