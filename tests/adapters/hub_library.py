"""What runs in an environment with the library adapters: ``hub_library.py write|read FOLDER``.

``write`` makes a tiny model of every family with one of that library's adapters of every kind, all
weights random, and saves base, adapter and outputs; ``read`` loads what fasttune wrote beside them.
Nothing here imports fasttune.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_T5 = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "decoder_start_token_id": 0,
}  # fmt: skip
_SEQ2SEQ = "AutoModelForSeq2SeqLM"
_CLASSIFIER = "AutoModelForSequenceClassification"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (_CLASSIFIER, _TEXT),
    "distilbert": (
        _CLASSIFIER,
        {"vocab_size": 99, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "electra": (_CLASSIFIER, {**_TEXT, "embedding_size": 16}),
    "roberta": (_CLASSIFIER, _TEXT),
    "gpt2": ("AutoModelForCausalLM", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("AutoModelForCausalLM", {**_TEXT, "num_key_value_heads": 2}),
    "mistral": ("AutoModelForCausalLM", {**_TEXT, "num_key_value_heads": 2}),
    "vit": ("AutoModelForImageClassification", _IMAGE),
    "t5": (_SEQ2SEQ, _T5),
    "mt5": (_SEQ2SEQ, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bart": (_SEQ2SEQ, _BART),
    "mbart": (_SEQ2SEQ, _BART),
}
# The adapters of that library by its own configuration classes, and the placement in fasttune.
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "seq_bn": ("SeqBnConfig", {"reduction_factor": 4}, "hub_seq_bn"),
    "double_seq_bn": ("DoubleSeqBnConfig", {"reduction_factor": 8}, "double_seq_bn"),
    "cross": (
        "DoubleSeqBnConfig",
        {"reduction_factor": 8, "cross_adapter": True, "non_linearity": "relu"},
        "double_seq_bn",
    ),
    "par_bn": ("ParBnConfig", {"reduction_factor": 2}, "hub_par_bn"),  # scaling 4
    "learned": ("ParBnConfig", {"scaling": "learned", "non_linearity": "gelu"}, "hub_par_bn"),
    "plus": ("AdapterPlusConfig", {"reduction_factor": 8, "stochastic_depth": 0.0}, "adapter_plus"),
    "plain": (
        "BnConfig",
        {
            "mh_adapter": False, "output_adapter": True, "reduction_factor": 5.5,
            "non_linearity": "leakyrelu", "scaling": 0.5, "dropout": 0.1,
        },
        "seq_bn",
    ),
}  # fmt: skip


def kinds(family: str) -> dict[str, str]:
    """The adapters that ``family`` has, and their placements in fasttune."""
    found = {kind: placement for kind, (_, _, placement) in KINDS.items()}
    if FAMILIES[family][0] == _SEQ2SEQ:
        return {**found, "double_seq_bn": "hub_double_seq_bn"}
    del found["cross"]
    return found


def inputs(family: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator).double()}
    found = {"input_ids": torch.randint(3, 99, (2, 7), generator=generator)}
    if FAMILIES[family][0] == _SEQ2SEQ:
        found["decoder_input_ids"] = torch.randint(3, 99, (2, 5), generator=generator)
    return found


def logits(model: Any, family: str) -> torch.Tensor:
    # The T5 of that library's transformers rounds scores to fp32, the one of today does not.
    exact = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
    with torch.no_grad(), exact if family in ("t5", "mt5") else contextlib.nullcontext():
        found: torch.Tensor = model.double().eval()(**inputs(family)).logits
    return found


def _with_noise(model: Any, part: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


def write(folder: Path) -> None:
    import adapters
    import transformers

    for family, (auto, options) in FAMILIES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **options)
        config.pad_token_id = 0
        model = getattr(transformers, auto).from_config(config).double()
        _with_noise(model, "")
        model.save_pretrained(folder / family / "base")
        torch.save(logits(model, family), folder / family / "base.pt")
        adapters.init(model)
        for kind in kinds(family):
            name, fields, _ = KINDS[kind]
            model.add_adapter(kind, config=getattr(adapters, name)(**fields))
            _with_noise(model, f"adapters.{kind}.")
            model.set_active_adapters(kind)
            torch.save(logits(model, family), folder / family / f"{kind}.pt")
            model.save_adapter(str(folder / family / kind), kind)
            model.delete_adapter(kind)


def read(folder: Path) -> None:
    import adapters
    import transformers

    for family, (auto, _) in FAMILIES.items():
        for kind in kinds(family):
            path = folder / family / "base"
            model = getattr(transformers, auto).from_pretrained(path, dtype=torch.float64)
            adapters.init(model)
            name = model.load_adapter(str(folder / family / f"{kind}-written"), set_active=True)
            assert name == kind, name
            torch.save(logits(model, family), folder / family / f"{kind}-read.pt")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
