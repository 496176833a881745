"""One worker without its process: commands go in through a scripted pipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from fasttune.demo.data import Message, Sample
from fasttune.demo.encode import IGNORE, Example, collate, split_samples, training_order
from fasttune.demo.model import ModelSource
from fasttune.demo.protocol import (
    BlockDone,
    Calibrate,
    Calibrated,
    Command,
    Evaluate,
    Evaluated,
    Event,
    Generate,
    Generated,
    Go,
    Halt,
    Quit,
    Save,
    Saved,
    StepDone,
    Train,
    Trained,
    WorkerSpec,
)
from fasttune.demo.turns import grouped, warmup_steps
from fasttune.demo.worker import Worker, next_token_loss


class Script:
    """The worker's end of a pipe: what it will receive, and what it sent."""

    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = list(commands)
        self.sent: list[Event] = []

    def recv(self) -> Command:
        return self.commands.pop(0)

    def send(self, event: Event) -> None:
        self.sent.append(event)

    def poll(self) -> bool:
        return bool(self.commands) and isinstance(self.commands[0], Halt)


def worker(tiny_model: Path, tmp_path: Path, *commands: Command) -> tuple[Worker, Script]:
    spec = WorkerSpec(
        name="stock",
        patched=False,
        source=ModelSource("author/tiny", str(tiny_model)),
        dtype="float32",
        device="cpu",
        seed=0,
        pad_id=0,
        scratch=str(tmp_path / "scratch"),
        log=str(tmp_path / "log"),
    )
    script = Script([*commands, Quit()])
    return Worker(spec, script), script


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Example]:
    turns = [(Message("user", f"{i}?"), Message("assistant", "x" * (i + 1))) for i in range(8)]
    samples = [Sample(i + 1, turn) for i, turn in enumerate(turns)]
    return split_samples(tokenizer, samples, seq_len=64, packing=False, seed=0).train


def train(
    examples: list[Example], *, steps: int, batch_size: int = 2, grad_accum: int = 1
) -> Train:
    return Train(
        examples=training_order(examples, steps * batch_size * grad_accum, 0),
        steps=steps,
        warmup_steps=warmup_steps(steps),
        batch_size=batch_size,
        grad_accum=grad_accum,
        lr=1e-2,
    )


def weights(subject: Worker) -> dict[str, torch.Tensor]:
    model: Any = subject._model
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def of_kind(script: Script, kind: type) -> list[Any]:
    return [event for event in script.sent if isinstance(event, kind)]


def test_loss_counts_trained_tokens_only() -> None:
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[5, IGNORE, 3, 2], [IGNORE, 1, IGNORE, IGNORE]])
    total, count = next_token_loss(logits, labels)
    expected = sum(
        functional.cross_entropy(logits[row, i - 1], labels[row, i])
        for row, i in ((0, 2), (0, 3), (1, 1))
    )
    assert count == 3
    torch.testing.assert_close(total, expected)


def test_calibration_teaches_nothing(
    tiny_model: Path, tmp_path: Path, examples: list[Example]
) -> None:
    subject, script = worker(tiny_model, tmp_path, Calibrate(grouped(examples, 2)))
    before = weights(subject)
    subject.serve()
    (calibrated,) = of_kind(script, Calibrated)
    assert len(calibrated.seconds) == len(grouped(examples, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(subject).items())
    model: Any = subject._model
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_held_out_loss_does_not_depend_on_the_batching(
    tiny_model: Path, tmp_path: Path, examples: list[Example]
) -> None:
    batchings = [Evaluate(grouped(examples, size)) for size in (1, 3)]
    subject, script = worker(tiny_model, tmp_path, *batchings)
    subject.serve()
    one, three = (event.loss for event in of_kind(script, Evaluated))
    assert one == pytest.approx(three, rel=1e-5)
    batch = collate(examples[:1], 0)
    subject2, script2 = worker(tiny_model, tmp_path, Evaluate([examples[:1]]))
    subject2.serve()
    model: Any = subject2._model
    stock = model.eval()(**batch).loss.item()
    assert of_kind(script2, Evaluated)[0].loss == pytest.approx(stock, rel=1e-5)


def test_training_goes_in_blocks_and_learns(
    tiny_model: Path, tmp_path: Path, examples: list[Example]
) -> None:
    held_out = Evaluate([examples])
    subject, script = worker(
        tiny_model, tmp_path, held_out, train(examples, steps=7), Go(3), Go(4), held_out
    )
    subject.serve()
    kinds = [type(event) for event in script.sent]
    assert kinds == [
        Evaluated,
        *[StepDone] * 3,
        BlockDone,
        *[StepDone] * 4,
        BlockDone,
        Trained,
        Evaluated,
    ]
    steps = of_kind(script, StepDone)
    assert [event.step for event in steps] == list(range(1, 8))
    assert all(event.seconds > 0 and event.grad_norm > 0 for event in steps)
    assert steps[0].lr == 0.0 and max(event.lr for event in steps) == pytest.approx(1e-2)
    before, after = (event.loss for event in of_kind(script, Evaluated))
    assert after < before - 0.1


def test_step_loss_is_the_mean_over_all_accumulated_tokens(
    tiny_model: Path, tmp_path: Path, examples: list[Example]
) -> None:
    """Two halves of a batch give the loss of the whole, although their answers differ in length."""
    losses = []
    for batch_size, grad_accum in ((4, 1), (2, 2)):
        command = train(examples, steps=1, batch_size=batch_size, grad_accum=grad_accum)
        subject, script = worker(tiny_model, tmp_path, command, Go(1))
        model: Any = subject._model
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        subject.serve()
        losses.append(of_kind(script, StepDone)[0].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_same_seed_gives_the_same_losses(
    tiny_model: Path, tmp_path: Path, examples: list[Example]
) -> None:
    """Also when the steps are cut into other blocks, and other work goes before."""
    runs = []
    for before, blocks in (([], [4]), ([Calibrate([examples[:2]])], [1, 2, 1])):
        turns = [Go(count) for count in blocks]
        subject, script = worker(tiny_model, tmp_path, *before, train(examples, steps=4), *turns)
        subject.serve()
        runs.append([event.loss for event in of_kind(script, StepDone)])
    assert runs[0] == runs[1]


def test_halt_while_waiting_ends_training(
    tiny_model: Path, tmp_path: Path, examples: list[Example]
) -> None:
    subject, script = worker(tiny_model, tmp_path, train(examples, steps=4), Go(2), Halt())
    script.poll = lambda: False  # type: ignore[method-assign]  # it comes after the block
    subject.serve()
    assert [type(event) for event in script.sent] == [StepDone, StepDone, BlockDone, Trained]
    assert script.sent[-1] == Trained(2)


def test_halt_during_a_block_ends_training_after_the_step(
    tiny_model: Path, tmp_path: Path, examples: list[Example]
) -> None:
    subject, script = worker(tiny_model, tmp_path, train(examples, steps=4), Go(4), Halt())
    subject.serve()
    assert [type(event) for event in script.sent] == [StepDone, Trained]


def test_packed_rows_train(tiny_model: Path, tmp_path: Path, tokenizer: Any) -> None:
    turns = [(Message("user", f"{i}?"), Message("assistant", "yes")) for i in range(12)]
    samples = [Sample(i + 1, turn) for i, turn in enumerate(turns)]
    packed = split_samples(tokenizer, samples, seq_len=40, packing=True, seed=0).train
    subject, script = worker(tiny_model, tmp_path, train(packed, steps=3), Go(3))
    subject.serve()
    assert all(event.loss > 0 for event in of_kind(script, StepDone))


def test_generation_is_greedy_and_leaves_training_mode(tiny_model: Path, tmp_path: Path) -> None:
    subject, script = worker(tiny_model, tmp_path, *[Generate([5, 6, 7], 6)] * 2)
    subject.serve()
    first, second = of_kind(script, Generated)
    assert first == second
    assert 1 <= len(first.ids) <= 6
    model: Any = subject._model
    assert model.training
    ids = torch.tensor([[5, 6, 7]])
    assert model.eval()(input_ids=ids).logits[0, -1].argmax().item() == first.ids[0]


def test_adapter_names_its_base_and_loads(
    tiny_model: Path, tmp_path: Path, examples: list[Example]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "adapter"
    subject, script = worker(
        tiny_model, tmp_path, train(examples, steps=3), Go(3), Save(str(folder))
    )
    subject.serve()
    assert of_kind(script, Saved)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "author/tiny"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.05)
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    ids = torch.tensor([[5, 6, 7]])
    model: Any = subject._model
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    for file in folder.iterdir():
        assert str(tiny_model).encode() not in file.read_bytes()
