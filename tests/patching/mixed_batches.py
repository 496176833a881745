"""A model with three adapters, a mixed batch, and the same as separate runs of stock PEFT."""

from __future__ import annotations

import torch
from tiny_models import gradients

import fasttune

ADAPTERS = {  # rank and targets
    "de": (4, "all-linear"),
    "fr": (8, ["q_proj", "down_proj"]),
    "it": (16, ["v_proj", "up_proj", "o_proj"]),
}
NAMES = ["de", "fr", "__base__", "it", "de"]


def inputs(samples=5, tokens=9):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 499, (samples, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def incoming(samples=5, tokens=9):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(samples, tokens, 499, generator=generator).bfloat16().float()


def mixed_run(model, names=NAMES, batch=None):
    """Logits and gradients of one mixed batch."""
    model.zero_grad()
    with fasttune.mixed_adapters(model, names):
        logits = model(**(batch or inputs(len(names)))).logits
    logits.backward(incoming(len(names)).to(logits.dtype))
    return logits.detach(), gradients(model)


def separate_runs(model, names=NAMES):
    """The same with stock PEFT: each adapter on its samples, one after the other."""
    model.zero_grad()
    batch, dy = inputs(len(names)), incoming(len(names))
    logits = torch.empty(dy.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    found = {}
    for adapter in dict.fromkeys(names):
        places = [i for i, name in enumerate(names) if name == adapter]
        own = {key: value[places] for key, value in batch.items()}
        if adapter == "__base__":
            with torch.no_grad(), model.disable_adapter():
                logits[places] = model(**own).logits.to(logits.dtype)
            continue
        model.set_adapter(adapter)
        result = model(**own).logits
        result.backward(dy[places].to(result.dtype))
        logits[places] = result.detach().to(logits.dtype)
        found |= {n: g for n, g in gradients(model).items() if f".{adapter}." in n}
        model.zero_grad()
    return logits, found


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj
