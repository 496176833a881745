"""A small ResNet learns five classes of Fashion-MNIST and is adapted to the five others.

First it trains in full on five classes. Then it is frozen, and the other five are learnt three
times from there: by a new classifier alone, by one with convolutional adapters beside or after a
convolution of every block (Conv-Adapter; Chen et al., 2022), which are saved, loaded into a fresh
copy and scored there.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import console, parser, predict, score, train
from rich.table import Table
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification
from vit_fashion_mnist import batches, find_data, read_split

from fasttune import adapters

FIRST = (0, 1, 2, 3, 4)  # T-shirt, trouser, pullover, dress, coat; the others: shoes, shirt, bag
VARIANTS = ("classifier alone", "conv_parallel", "conv_sequential")


def of_classes(split: tuple[Tensor, Tensor], first: bool) -> tuple[Tensor, Tensor]:
    """The images of the first five classes, or of the others, with labels from 0 to 4."""
    images, labels = split
    rows = (labels < len(FIRST)) == first
    return images[rows], labels[rows] % len(FIRST)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=100, batch_size=64)
    options.add_argument("--data", type=Path, help="the folder with Fashion-MNIST")
    options.add_argument("--test-rows", type=int, default=2000)
    options.add_argument("--width", type=int, default=32, help="channels of the first stage")
    options.add_argument("--reduction", type=int, default=4, help="of the adapters")
    options.add_argument("--lr", type=float, default=3e-3)
    args = options.parse_args(arguments)

    folder = find_data(args.data)
    splits = {name: read_split(folder, name) for name in ("train", "t10k")}
    torch.manual_seed(args.seed)

    def rows(name: str, first: bool, count: int, size: int) -> list[dict[str, Tensor]]:
        images, labels = of_classes(splits[name], first)
        order = torch.randperm(len(images))[:count]
        return batches(images, labels, order, size, args.device)

    config = ResNetConfig(
        num_channels=1,
        embedding_size=args.width,
        hidden_sizes=[args.width, 2 * args.width, 4 * args.width],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=len(FIRST),
    )
    base = ResNetForImageClassification(config).to(args.device)
    count = args.steps * args.batch_size
    train(base, rows("train", True, count, args.batch_size), lr=args.lr, title="five classes")
    seen = rows("t10k", True, args.test_rows, 500)
    accuracy = score(torch.cat([b["labels"] for b in seen]).cpu(), predict(base, seen))[0]
    console.print(f"all weights, the first five classes: accuracy {accuracy:.4f}", highlight=False)

    training = rows("train", False, count, args.batch_size)
    test = rows("t10k", False, args.test_rows, 500)
    labels = torch.cat([batch["labels"] for batch in test]).cpu()
    table = Table("", "trained", "accuracy", "F1", "ROC AUC", "median step")
    table.title = f"the other five classes: {len(training)} steps, {len(labels)} test rows"
    for variant in VARIANTS:
        torch.manual_seed(args.seed)
        model = _with_classifier(base)
        fresh = copy.deepcopy(model)
        if variant == "classifier alone":
            model.requires_grad_(False).classifier.requires_grad_(True)
            model.resnet.register_forward_pre_hook(_keeps_statistics)
        else:
            adapters.add(
                model, "other", variant, reduction_factor=args.reduction,
                train_also=["classifier"],
            )  # fmt: skip
        times = train(model, training, lr=args.lr, title=f"{variant:<16}")
        probabilities = predict(model, test)
        if variant != "classifier alone":
            with tempfile.TemporaryDirectory() as path:
                adapters.save(model, "other", path)
                adapters.load(fresh, path)
            if not torch.equal(predict(fresh, test), probabilities):
                raise SystemExit("the loaded adapter gives other probabilities")
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        share = trained / sum(p.numel() for p in model.parameters())
        metrics = [f"{value:.4f}" for value in score(labels, probabilities)]
        table.add_row(
            variant, f"{trained:,} ({share:.1%})", *metrics, f"{statistics.median(times):.0f} ms"
        )
    console.print(table)


def _with_classifier(base: nn.Module) -> nn.Module:
    """A copy of the model with a new classifier."""
    model = copy.deepcopy(base)
    model.classifier[-1].reset_parameters()
    return model


def _keeps_statistics(module: nn.Module, args: object) -> None:
    module.eval()


if __name__ == "__main__":
    main()
