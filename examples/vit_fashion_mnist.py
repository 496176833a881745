"""A small vision transformer on Fashion-MNIST with LoRA, stock against patched.

The transformer starts from random weights: LoRA on all of its linear layers, and patch embedding,
norms and classifier train in full. The images are those of the Debian package
dataset-fashion-mnist (Xiao et al., 2017).
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import DATA_FOLDER, Batch, console, missing, parser, stock_against_patched
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts it
COMMAND = (
    "mkdir -p examples/data && cd examples/data && apt-get download dataset-fashion-mnist "
    "&& dpkg -x dataset-fashion-mnist_*.deb ."
)
FULLY_TRAINED = ("embeddings", "layernorm", "classifier")


def find_data(folder: Path | None) -> Path:
    """The folder with the four files of Fashion-MNIST."""
    unpacked = DATA_FOLDER / INSTALLED.relative_to("/")
    for candidate in [folder] if folder else [unpacked, INSTALLED]:
        if (candidate / "train-images-idx3-ubyte.gz").is_file():
            return candidate
    raise missing(f"Fashion-MNIST is not in {folder or 'examples/data'}", COMMAND)


def read_idx(path: Path) -> Tensor:
    """A tensor of bytes from a gzipped IDX file."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]  # after two zero bytes and the type 0x08
    shape = np.frombuffer(data, ">i4", dimensions, 4).astype(int)
    return torch.from_numpy(
        np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    )


def read_split(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 28, 28] in [-1, 1] and labels [N]."""
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
    return images[:, None].float() / 127.5 - 1, labels.long()


def batches(images: Tensor, labels: Tensor, rows: Tensor, size: int, device: str) -> list[Batch]:
    return [
        {"pixel_values": images[part].to(device), "labels": labels[part].to(device)}
        for part in rows.split(size)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=250, batch_size=64)
    options.add_argument("--data", type=Path, help="the folder with Fashion-MNIST")
    options.add_argument("--test-rows", type=int, default=2000)
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--dropout", type=float, default=0.05, help="of LoRA")
    options.add_argument("--lr", type=float, default=3e-3)
    args = options.parse_args(arguments)

    folder = find_data(args.data)
    images, labels = read_split(folder, "train")
    test_images, test_labels = read_split(folder, "t10k")
    generator = torch.Generator().manual_seed(args.seed)
    rows: list[int] = []
    while len(rows) < args.steps * args.batch_size:
        rows += torch.randperm(len(images), generator=generator).tolist()
    order = torch.tensor(rows[: args.steps * args.batch_size])
    test_order = torch.randperm(len(test_images), generator=generator)[: args.test_rows]
    console.print(
        f"{len(set(order.tolist()))} images to train on, {len(test_order)} to test", highlight=False
    )

    def make_model() -> nn.Module:
        config = ViTConfig(
            image_size=28,
            patch_size=4,
            num_channels=1,
            hidden_size=args.hidden,
            intermediate_size=4 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_labels=10,
            # The frozen weights must pass signals on: the usual 0.02 is for training them.
            initializer_range=args.hidden**-0.5,
        )
        model = get_peft_model(
            ViTForImageClassification(config),
            LoraConfig(
                r=args.rank,
                lora_alpha=2 * args.rank,
                lora_dropout=args.dropout,
                target_modules="all-linear",
                exclude_modules=["classifier"],
            ),
        )
        for name, parameter in model.named_parameters():
            if any(part in name for part in FULLY_TRAINED):
                parameter.requires_grad_(True)
        return model.to(args.device)

    stock_against_patched(
        make_model,
        batches(images, labels, order, args.batch_size, args.device),
        batches(test_images, test_labels, test_order, 500, args.device),
        lr=args.lr,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
