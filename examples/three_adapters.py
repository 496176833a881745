"""Three LoRA adapters trained at once: one base model, one batch, one adapter for each sample.

The model is a small random Llama; each adapter learns its own rule for the next token, x -> (a x +
b) mod V. The three are then trained one after the other with PEFT alone, from the same start, on
the same samples, and must agree with those trained together. No data or model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import console, parser
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, logging

import fasttune

VOCABULARY = 97
RULES = {"twice": (2, 1), "thrice": (3, 5), "shift": (1, 11)}  # a and b
RANKS = {"twice": 4, "thrice": 8, "shift": 16}
# Of the distance that training moved an adapter: fp32 sums in another order, which AdamW's division
# by the size of the gradient enlarges.
AGREEMENT = 1e-3


def make_model(seed: int, device: str) -> nn.Module:
    """A random Llama with an adapter for each rule, all of them trained."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    model = None
    base = LlamaForCausalLM(config)
    for name, rank in RANKS.items():
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        if model is None:
            model = get_peft_model(base, lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    model.set_requires_grad(list(RULES))
    return model.to(device).train()


def samples(rule: str, count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """[count, tokens] int64: sequences that follow the rule from random starts."""
    factor, shift = RULES[rule]
    columns = [torch.randint(VOCABULARY, (count,), generator=generator)]
    while len(columns) < tokens:
        columns.append((factor * columns[-1] + shift) % VOCABULARY)
    return torch.stack(columns, dim=1)


def make_batches(steps: int, count: int, seed: int, device: str) -> list[dict[str, Tensor]]:
    """``steps`` batches: for each rule ``count`` samples."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {rule: samples(rule, count, 24, generator).to(device) for rule in RULES}
        for _ in range(steps)
    ]


def train_together(model: nn.Module, batches: list[dict[str, Tensor]], lr: float) -> float:
    """All adapters at once; returns the last loss, the mean over the rules."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        ids = torch.cat(list(batch.values()))
        names = [rule for rule, own in batch.items() for _ in own]
        with fasttune.mixed_adapters(model, names):
            loss = model(input_ids=ids, labels=ids).loss
        # The mean over all samples is a third of each rule's own mean.
        (len(batch) * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def train_alone(model: nn.Module, rule: str, batches: list[dict[str, Tensor]], lr: float) -> float:
    """One adapter on its own samples; returns the last loss."""
    model.set_adapter(rule)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        loss = model(input_ids=batch[rule], labels=batch[rule]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def weights(model: nn.Module, rule: str) -> Tensor:
    """All parameters of an adapter in one vector."""
    parts = [p.detach().flatten() for n, p in model.named_parameters() if f".{rule}." in n]
    return torch.cat(parts).double()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, steps=100, batch_size=24)
    options.add_argument("--lr", type=float, default=3e-3)
    args = options.parse_args(arguments)
    logging.set_verbosity_error()
    batches = make_batches(
        args.steps, max(args.batch_size // len(RULES), 1), args.seed, args.device
    )

    together = fasttune.patch(make_model(args.seed, args.device))
    start = {rule: weights(together, rule) for rule in RULES}
    loss = train_together(together, batches, args.lr)
    console.print(f"trained together: last loss {loss:.3f}, the mean of the three")

    alone = make_model(args.seed, args.device)
    table = Table("adapter", "rank", "last loss alone", "deviation of the weights")
    worst = 0.0
    for rule in RULES:
        loss = train_alone(alone, rule, batches, args.lr)
        ours, theirs = weights(together, rule), weights(alone, rule)
        deviation = float((ours - theirs).norm() / (theirs - start[rule]).norm())
        worst = max(worst, deviation)
        table.add_row(rule, str(RANKS[rule]), f"{loss:.3f}", f"{deviation:.1e}")
    console.print(table)
    if worst > AGREEMENT:
        raise SystemExit(f"the adapters differ by {worst:.1e} of what they learned")
    console.print("trained together and alone, the adapters agree")


if __name__ == "__main__":
    main()
