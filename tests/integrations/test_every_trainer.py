"""One tiny fine-tune in every trainer, stock against patched: the same losses and adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainers import Tokens, _tokenizer, pad
from tiny_models import tiny_llama, with_lora
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fasttune

STEPS = 3
LEARNING_RATE = 1e-2
Patch = Callable[[nn.Module], nn.Module]
Losses = list[float]


def own_loop(model: nn.Module, folder: Path) -> Losses:
    loader = DataLoader(Tokens(), batch_size=2, collate_fn=pad, num_workers=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    losses = []
    for _, batch in zip(range(STEPS), loader, strict=False):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def accelerate_loop(model: nn.Module, folder: Path) -> Losses:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    loader = DataLoader(Tokens(), batch_size=2, collate_fn=pad)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _, batch in zip(range(2 * STEPS), loader, strict=False):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return losses


def lightning_loop(model: nn.Module, folder: Path) -> Losses:
    lightning = pytest.importorskip("lightning")
    losses: Losses = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(
                [p for p in self.parameters() if p.requires_grad], LEARNING_RATE
            )

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(Module(), DataLoader(Tokens(), batch_size=2, collate_fn=pad))
    return losses


def _common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }


def _logged(trainer: Any) -> Losses:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def hf_trainer(model: nn.Module, folder: Path) -> Losses:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**_common(folder))
    return _logged(Trainer(model, arguments, train_dataset=Tokens(), data_collator=pad))


def sft_trainer(model: nn.Module, folder: Path) -> Losses:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{k: v.tolist() for k, v in Tokens()[i].items()} for i in range(8)]
    return _logged(
        SFTTrainer(
            model=model,
            args=SFTConfig(
                **_common(folder), bf16=False, dataset_kwargs={"skip_prepare_dataset": True}
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(),
        )
    )


def dpo_trainer(model: nn.Module, folder: Path) -> Losses:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def words(seed: int, count: int) -> str:
        tokens = torch.randint(3, 499, (count,), generator=torch.Generator().manual_seed(seed))
        return " ".join(f"w{token}" for token in tokens.tolist())

    rows = [
        {
            "prompt": words(i, 4),
            "chosen": " " + words(50 + i, 6),
            "rejected": " " + words(90 + i, 7),
        }
        for i in range(8)
    ]
    return _logged(
        DPOTrainer(
            model=model,
            args=DPOConfig(**_common(folder), bf16=False),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(),
        )
    )


TRAINERS = {
    "own-loop": own_loop,
    "accelerate": accelerate_loop,
    "lightning": lightning_loop,
    "hf-trainer": hf_trainer,
    "trl-sft": sft_trainer,
    "trl-dpo": dpo_trainer,
}


def adapters(model: nn.Module) -> Tensor:
    """Of the trained adapter; DPO adds a frozen copy as its reference."""
    parts = [p.detach().flatten() for n, p in model.named_parameters() if ".default." in n]
    return torch.cat(parts)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_patched_model_trains_as_stock(tmp_path: Path, name: str) -> None:
    results = {}
    for kind in ("stock", "patched"):
        model = with_lora(tiny_llama()).train()
        start = adapters(model)
        if kind == "patched":
            fasttune.patch(model)
        torch.manual_seed(0)
        losses = TRAINERS[name](model, tmp_path / kind)
        results[kind] = losses, adapters(model) - start
        if kind == "patched":
            report = fasttune.report(model)
            assert report["lora"].fused == 14, str(report)
            assert report["lora"].original == {}, str(report)
    (expected, moved), (losses, ours) = results["stock"], results["patched"]
    assert len(losses) >= STEPS
    assert losses == pytest.approx(expected, rel=1e-4)
    assert float(moved.norm()) > 0
    # Adam divides a gradient by its own size: where that is rounding noise, so is the step.
    assert float((ours - moved).norm() / moved.norm()) < 1e-2
