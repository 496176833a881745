"""A small random BERT and a task that it can learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

LENGTH = 12


def classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=800, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=64, num_labels=2, initializer_range=0.05,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def texts(count: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of tokens, and the classes: which of two tokens stands at every other place."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    ids = torch.randint(10, 800, (count, LENGTH), generator=generator)
    ids[:, ::2] = 5 + labels[:, None]
    return {"input_ids": ids}, labels


class Texts(Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch, labels = texts(1, seed=1000 + index)
        return {"input_ids": batch["input_ids"][0], "labels": labels[0]}
