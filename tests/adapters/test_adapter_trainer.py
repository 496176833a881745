"""Trainer checkpoints of a model with adapters: small, resumed bit for bit, never incomplete."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from story import Texts, classifier
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fasttune import adapters


def adapted(**options: Any) -> nn.Module:
    model = classifier()
    torch.manual_seed(0)
    adapters.add(model, "s", train_also=["classifier"], dropout=0.1, **options)
    return model


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "seed": 1,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**options, **changes})


def train(model: nn.Module, folder: Path, resume: bool | str = False, **changes: Any) -> Trainer:
    trainer = adapters.AdapterTrainer(model, arguments(folder, **changes), train_dataset=Texts())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}


def test_a_checkpoint_holds_the_adapter_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = train(adapted(), tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    size = sum(p.numel() * p.element_size() for p in whole.model.parameters())
    weights = [*checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*model*.bin")]
    assert [path.relative_to(checkpoint).as_posix() for path in weights] == [
        "adapters/s/adapter_model.safetensors"
    ]
    assert weights[0].stat().st_size < 0.05 * size
    assert (checkpoint / "config.json").is_file() and (checkpoint / "training_args.bin").is_file()

    model = adapted()
    with torch.no_grad():  # everything trained must come from the checkpoint
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    resumed = train(model, tmp_path / "resumed", str(checkpoint))
    expected = trained(whole.model)
    assert list(expected) == list(trained(model))
    assert all(torch.equal(value, expected[key]) for key, value in trained(model).items())
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log]
              for t in (whole, resumed)]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_checkpoint_is_what_load_reads(tmp_path: Path) -> None:
    model = train(adapted(), tmp_path, save_steps=6).model
    other = classifier()
    adapters.load(other, tmp_path / "checkpoint-6" / "adapters" / "s")
    assert all(torch.equal(value, trained(model)[key]) for key, value in trained(other).items())


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model, seen = adapted(), {}

    class Watched(adapters.AdapterTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            seen[self.state.global_step] = trained(self.model)
            metrics = {"eval_loss": float(self.state.global_step)}  # the first is the best
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True
    )
    Watched(model, args, train_dataset=Texts(), eval_dataset=Texts()).train()
    assert all(torch.equal(value, seen[2][key]) for key, value in trained(model).items())
    assert not all(torch.equal(value, seen[6][key]) for key, value in trained(model).items())


def test_other_adapters_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    train(adapted(), tmp_path)
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="expected the adapters none, got s"):
        train(classifier(), tmp_path / "none", checkpoint)
    narrow = adapted(reduction_factor=8)
    before = trained(narrow)
    with pytest.raises(ValueError, match="with reduction_factor=8, got reduction_factor=16"):
        train(narrow, tmp_path / "narrow", checkpoint)
    assert all(torch.equal(value, before[key]) for key, value in trained(narrow).items())


def test_a_model_in_the_folder_stays_there(tmp_path: Path) -> None:
    model = adapted()
    model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"somebody's weights")
    adapters.AdapterTrainer(model, arguments(tmp_path), train_dataset=Texts()).save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == b"somebody's weights"
    assert (tmp_path / "training_args.bin").is_file()
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["s"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_of_several_adapters_all_are_restored_or_none(tmp_path: Path) -> None:
    def two(**second: Any) -> nn.Module:
        model = adapted()
        adapters.add(model, "z", **second)
        return model

    saved = two()
    trainer = adapters.AdapterTrainer(saved, arguments(tmp_path), train_dataset=Texts())
    trainer.save_model(str(tmp_path / "checkpoint-3"))
    same, other = two(), two(reduction_factor=8)
    for model in (same, other):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
    adapters.restore(same, {n: tmp_path / "checkpoint-3" / "adapters" / n for n in ("s", "z")})
    expected = dict(saved.named_parameters())
    restored = [k for k, p in same.named_parameters() if ".adapters." in k]
    assert restored and all(torch.equal(same.get_parameter(k), expected[k]) for k in restored)
    with pytest.raises(ValueError, match="with reduction_factor=8, got reduction_factor=16"):
        train(other, tmp_path / "other", str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in other.parameters())


def test_what_is_trained_besides_is_never_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def unfrozen() -> nn.Module:
        model = adapted()
        model.bert.pooler.requires_grad_(True)
        return model

    with caplog.at_level(logging.WARNING, "fasttune"):
        whole = train(unfrozen(), tmp_path)
    assert "bert.pooler.dense.weight (128, 128) is trained and of no adapter" in caplog.text
    model = unfrozen()
    train(model, tmp_path / "resumed", str(tmp_path / "checkpoint-3"))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_beside_peft_both_are_saved_and_resumed(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def both() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
        model = get_peft_model(classifier(), config)
        adapters.add(model, "s", train_also=["classifier"])
        return model

    whole = train(both(), tmp_path)
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()
    model = both()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    train(model, tmp_path / "resumed", str(tmp_path / "checkpoint-3"))
    expected = trained(whole.model)
    assert any("lora_" in key for key in expected) and any(".adapters.s." in k for k in expected)
    assert all(torch.equal(value, expected[key]) for key, value in trained(model).items())


def test_a_plain_model_is_saved_as_ever(tmp_path: Path) -> None:
    train(classifier(), tmp_path, max_steps=1, save_steps=1)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def test_accelerate_saves_and_loads_the_state(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = adapted()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    expected = trained(model)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(value, expected[key]) for key, value in trained(model).items())
