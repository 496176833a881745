"""Every causal and masked language model that transformers can build at a tiny size: never wrong.

Nothing is known about these families here: a generic configuration is tried, and what it cannot
build is left out. Slow: more than a hundred architectures.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from steps_compared import assert_close, exact_copy, step
from tiny_models import with_lora

import fasttune
from fasttune.testing.families import DECODER, Family

pytestmark = pytest.mark.slow
LARGEST = 20_000_000  # parameters: the generic sizes were not understood
SIZES = {
    **DECODER,
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "d_model": 32, "ffn_dim": 64, "d_ff": 64},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "embedding_size": 32},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_layers": 2, "num_heads": 4},
}


def names() -> list[tuple[str, str]]:
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return [(n, "AutoModelForCausalLM") for n in causal] + [
        (n, "AutoModelForMaskedLM") for n in masked if n not in causal
    ]


def build(name: str, auto: str) -> tuple[Family, Any] | str:
    """A tiny model of the family, or why there is none."""
    import transformers

    try:
        known = transformers.AutoConfig.for_model(name)
        options = {k: v for k, v in SIZES.items() if hasattr(known, k)}
        family = Family(name, auto, options=options)
        with torch.device("meta"):
            empty = getattr(transformers, auto).from_config(family.config())
        size = sum(p.numel() for p in empty.parameters())
        if size > LARGEST:
            return f"{size} parameters"
        model = with_lora(family.build()).train()
        step(model, family.batch())  # some settle something at their first forward
        reference = step(exact_copy(model), family.batch())
        if not all(bool(t.isfinite().all()) for t in reference.values()):
            return "not finite in stock"
        again = step(exact_copy(model), family.batch())
        if any(not torch.equal(a, again[n]) for n, a in reference.items()):
            return "random in stock"
    except Exception as error:  # whatever a foreign configuration raises
        return f"{type(error).__name__}: {str(error)[:100]}"
    return family, (model, reference)


@pytest.mark.parametrize(("name", "auto"), names(), ids=lambda value: str(value))
def test_a_family_that_nobody_named(name: str, auto: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = build(name, auto)
        if isinstance(built, str):
            pytest.skip(built)
        family, (model, reference) = built
        stock = step(model, family.batch())
        fasttune.patch(model)
        ours = step(model, family.batch())
    assert_close(ours, stock, reference, torch.float32)
    for entry in fasttune.report(model).kinds:
        print(entry.kind, entry.fused, entry.original)
