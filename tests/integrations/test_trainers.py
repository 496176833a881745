"""The same tiny fine-tune in an own loop, HF Trainer and TRL; saving, generating."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_models import gradients, relative, tiny_llama, with_lora
from torch.utils.data import Dataset

import fasttune


class Tokens(Dataset):
    """Sixteen random sequences of different length, prompts masked."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        length = 12 + index % 5
        tokens = torch.randint(3, 499, (length,), generator=generator)
        labels = tokens.clone()
        labels[:4] = -100
        return {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}


def pad(items):
    from torch.nn.utils.rnn import pad_sequence

    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        key: pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)
        for key, value in fill.items()
    }


def train(model, folder, *, callbacks=(), **changes):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=7,
        use_cpu=True,
        **changes,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Tokens(),
        data_collator=pad,
        callbacks=list(callbacks),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hf_trainer_follows_stock(tmp_path, bf16, checkpointing):
    options = {"bf16": bf16, "gradient_checkpointing": checkpointing}
    stock = with_lora(tiny_llama())
    expected = train(stock, tmp_path, **options)
    model = with_lora(tiny_llama())
    losses = train(model, tmp_path, callbacks=[fasttune.FasttuneCallback(verbose=False)], **options)
    assert losses == pytest.approx(expected, rel=2e-3 if bf16 else 1e-4)
    assert losses[-1] < losses[0]
    report = fasttune.report(model)
    assert (report["lora"].fused, report["loss"].fused) == (14, 1)


def test_callback_prints_the_report_once(tmp_path, capsys):
    train(with_lora(tiny_llama()), tmp_path, callbacks=[fasttune.FasttuneCallback()])
    assert capsys.readouterr().out.count("fasttune report") == 1


def test_other_kernel_libraries_are_named(tmp_path):
    from types import SimpleNamespace

    model = with_lora(tiny_llama())
    model.base_model.model._use_kernels = True
    with pytest.raises(fasttune.PatchError, match="use_kernels=False"):
        fasttune.patch(model)
    assert not fasttune.is_patched(model)
    callback, arguments = fasttune.FasttuneCallback(), SimpleNamespace(use_liger_kernel=True)
    with pytest.raises(fasttune.PatchError, match="use_liger_kernel=True"):
        callback.on_train_begin(arguments, None, None, model=with_lora(tiny_llama()))


def test_story_trl_adds_the_adapters_and_keeps_its_head(tmp_path, capsys):
    """SFTTrainer(peft_config=...) and the callback: LoRA is fused, TRL's head keeps the loss."""
    datasets = pytest.importorskip("datasets")
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = [{k: v.tolist() for k, v in Tokens()[i].items()} for i in range(8)]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[fasttune.FasttuneCallback()],
    )
    trainer.train()
    report = fasttune.report(trainer.model)
    assert report["lora"].fused == 14
    assert report["lora"].original == {}
    assert report["loss"].original == {
        "trl installed its own forward and stays in charge of the loss": 1
    }
    assert "stays in charge of the loss" in capsys.readouterr().out


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(499)}
    fast = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="w0", eos_token="w2", bos_token="w1"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_story_generate_equals_stock(dtype):
    stock = with_lora(tiny_llama().to(dtype)).eval()
    model = fasttune.patch(with_lora(tiny_llama().to(dtype))).eval()
    prompt = torch.randint(3, 499, (2, 9))
    options = {
        "max_new_tokens": 16,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    theirs, ours = stock.generate(prompt, **options), model.generate(prompt, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_story_saved_adapter_loads_without_fasttune(tmp_path):
    """Trained patched, saved with save_pretrained, loaded where fasttune cannot be imported."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = with_lora(tiny_llama())
    train(model, tmp_path, callbacks=[fasttune.FasttuneCallback(verbose=False)])
    model.save_pretrained(tmp_path / "adapter")
    tokens = Tokens()[3]["input_ids"][None]
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits, tmp_path / "logits.pt")
    code = f"""
import sys
sys.modules["fasttune"] = None  # an import of fasttune fails here
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
with torch.no_grad():
    logits = model(torch.tensor({tokens.tolist()})).logits
print(torch.equal(logits, torch.load({str(tmp_path / "logits.pt")!r})))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


def test_own_loop_with_dropout_stays_within_seed_noise():
    """With dropout the masks differ from torch's; the curve differs as two stock seeds do."""

    def curve(seed, patched):
        model = with_lora(tiny_llama(), lora_dropout=0.1).train()
        if patched:
            fasttune.patch(model)
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for step in range(12):
            loss = model(**pad([Tokens()[step % 4], Tokens()[step % 4 + 4]])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    stock = [curve(seed, False) for seed in range(4)]
    spread = max(float((a - b).abs().max()) for a in stock for b in stock)
    for seed in range(2):
        ours = curve(seed, True)
        nearest = min(float((ours - other).abs().max()) for other in stock)
        assert nearest <= 1.5 * spread


def test_fifty_steps_without_dropout_follow_stock():
    """Per-step losses stay within 1e-2 relative of stock over 50 steps in bf16."""

    def curve(patched):
        model = with_lora(tiny_llama().to(torch.bfloat16)).train()
        if patched:
            fasttune.patch(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for step in range(50):
            loss = model(**pad([Tokens()[step % 8], Tokens()[step % 8 + 8]])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    stock, ours = curve(False), curve(True)
    assert float(((ours - stock).abs() / stock).max()) < 1e-2
    assert relative(ours[-1], ours[0]) > 1e-3  # it did train


def test_data_parallel_replicas_take_the_stock_path(batch):
    model = fasttune.patch(tiny_llama().train())
    model._is_replica = True
    assert isinstance(model(**batch).logits, torch.Tensor)
    assert "a DataParallel replica" in fasttune.explain(model).layers[0].fallbacks


def test_torch_compile_of_a_patched_model_gives_the_same_numbers(batch):
    model = fasttune.patch(with_lora(tiny_llama()).train())
    inputs = {name: batch[name] for name in ("input_ids", "labels")}
    expected = model(**inputs).loss
    expected.backward()
    gradients_of_eager = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(**inputs).loss
    loss.backward()
    assert relative(loss.detach(), expected.detach()) < 1e-6
    ours = gradients(model)
    assert ours.keys() == gradients_of_eager.keys()
    for name, gradient in gradients_of_eager.items():
        assert relative(ours[name], gradient) < 2e-5, name
