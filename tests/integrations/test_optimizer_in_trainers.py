"""fasttune's AdamW in HF Trainer and accelerate: clipping once, resuming, monitoring."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainers import Tokens, pad
from tiny_models import loss_of, relative, tiny_llama, with_lora
from torch import nn

from fasttune import FasttuneCallback
from fasttune.integrations.monitor import Monitor
from fasttune.optim import AdamW, trainer_args


def arguments(folder: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    options: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": 6, "seed": 7,
        "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "max_grad_norm": 0.05, "adam_epsilon": 1e-3,
    }  # fmt: skip
    return TrainingArguments(**{**options, **changes})


def trainer(model: nn.Module, args: Any, **options: Any) -> Any:
    from transformers import Trainer

    return Trainer(model, args, train_dataset=Tokens(), data_collator=pad, **options)


def test_the_trainer_clips_once(tmp_path: Path) -> None:
    theirs, ours = with_lora(tiny_llama()), with_lora(tiny_llama())
    stock = trainer(theirs, arguments(tmp_path))
    stock.train()
    args = arguments(tmp_path)
    fused = trainer(ours, args, **trainer_args(args))
    fused.train()
    inner = fused.optimizer.optimizer
    assert type(inner) is AdamW and inner.param_groups[0]["max_grad_norm"] == 0.05
    assert args.max_grad_norm == 0.0
    names = dict(theirs.named_parameters())
    for name, param in ours.named_parameters():
        assert relative(param.detach(), names[name].detach()) < 1e-5
    losses, norms = (
        [[e[key] for e in t.state.log_history if key in e] for t in (stock, fused)]
        for key in ("loss", "grad_norm")
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_both_limits_set_the_one_given_here_wins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = arguments(tmp_path)
    with caplog.at_level(logging.WARNING, logger="fasttune"):
        _, options = trainer_args(args, max_grad_norm=3.0)["optimizer_cls_and_kwargs"]
    assert options["max_grad_norm"] == 3.0 and args.max_grad_norm == 0.0
    assert "max_grad_norm=3.0 is used in place of args.max_grad_norm=0.05" in caplog.text
    _, options = trainer_args(args)["optimizer_cls_and_kwargs"]
    assert options["max_grad_norm"] is None
    with pytest.raises(TypeError, match=r"args: expected transformers.TrainingArguments, got dict"):
        trainer_args({})


def test_resuming_a_trainer_is_bit_equal(tmp_path: Path) -> None:
    def run(checkpoint: str | None) -> nn.Module:
        args = arguments(tmp_path, save_strategy="steps", save_steps=3)
        model = with_lora(tiny_llama())
        made = trainer(model, args, **trainer_args(args, moments="bf16"))
        made.train(resume_from_checkpoint=checkpoint)
        return model

    straight = run(None)
    resumed = run(str(tmp_path / "checkpoint-3"))
    parameters = zip(straight.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in parameters)


def test_the_callback_logs_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=3)
    model = with_lora(tiny_llama())
    callback = FasttuneCallback(
        verbose=False, monitor=Monitor(gradient_norm=(1e-9, 1e-6), gap=1e-9)
    )
    made = trainer(model, args, eval_dataset=Tokens(), callbacks=[callback], **trainer_args(args))
    with caplog.at_level(logging.WARNING, logger="fasttune"):
        made.train()
    steps = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(steps) == 6
    for entry in steps:
        assert 0 < entry["fasttune/gradient_norm_min"] <= entry["fasttune/gradient_norm_max"]
        assert 0 < entry["fasttune/update_ratio_max"] < 1
    gaps = [entry["fasttune/loss_gap"] for entry in made.state.log_history if "eval_loss" in entry]
    assert len(gaps) == 2
    assert callback.monitor is not None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(callback.monitor.last) == trained
    assert caplog.text.count("monitor: gradient norm") == 1  # once a kind


def test_the_monitor_needs_our_optimizer(tmp_path: Path) -> None:
    made = trainer(
        with_lora(tiny_llama()), arguments(tmp_path), callbacks=[FasttuneCallback(monitor=True)]
    )
    with pytest.raises(TypeError, match=r"monitor: expected fasttune.optim.AdamW"):
        made.train()
    with pytest.raises(ValueError, match="gradient_norm: expected 0 <= low < high"):
        Monitor(gradient_norm=(1.0, 0.1))


def test_accelerate_wraps_and_accumulates() -> None:
    from accelerate import Accelerator

    results = []
    for cls in (AdamW, torch.optim.AdamW):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = tiny_llama()
        optimizer = cls(model.parameters(), lr=1e-3, eps=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, step))
                optimizer.step()
                optimizer.zero_grad()
        results.append([param.detach().clone() for param in model.parameters()])
        if cls is AdamW:
            inner = optimizer.optimizer
            assert float(next(iter(inner.state.values()))["step"]) == 3
    for p, q in zip(*results, strict=True):
        assert relative(p, q) < 1e-5
