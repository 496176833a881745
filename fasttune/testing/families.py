"""Small random models of many families of transformers, each with a batch that gives a loss.

Used by the tests (does every family stay exact?) and the benchmarks (is any slower?).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, TOKENS = 99, 24
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class Family:
    """A model type, its tiny configuration and what must be fused in it.

    Attributes:
        name: model type of transformers.
        auto: name of the Auto class, or of a model class.
        fused: kinds that must be fused at least once.
        options: of the configuration.
        inputs: names of the inputs beside or instead of input_ids.
    """

    name: str
    auto: str = "AutoModelForCausalLM"
    fused: frozenset[str] = frozenset({"norm", "mlp", "attention", "loss"})
    options: dict[str, Any] = field(default_factory=lambda: dict(DECODER))
    inputs: str = "text"

    def config(self, **changes: Any) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.name, **{**self.options, **changes})

    def build(self, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
        """The model with seeded random weights, dropout off."""
        import transformers

        torch.manual_seed(0)
        factory = getattr(transformers, self.auto)
        if self.auto.startswith("Auto"):
            factory = factory.from_config
        model: nn.Module = factory(self.config(**changes)).to(dtype)
        for module in model.modules():  # masks of ours and of torch's dropout differ
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for attribute in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(module.__dict__.get(attribute), float):
                    setattr(module, attribute, 0.0)
        # Away from the initial values, where norms and biases do nothing.
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise.to(dtype))
            for name, parameter in model.named_parameters():
                if "router" in name or name.endswith("gate.weight"):
                    parameter.mul_(30)  # no expert is chosen by a rounding
        return model

    def medium(self) -> Family:
        """The same family at eight times the width: hidden size 256."""
        return dataclasses.replace(self, options=_widened(self.options))

    def batch(self, dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> dict[str, Tensor]:
        return _INPUTS[self.inputs](dtype, tokens)


_WIDTHS = frozenset(
    {
        *("hidden_size", "intermediate_size", "head_dim", "n_embd", "d_model", "d_ff", "d_kv"),
        *("dim", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "embedding_size"),
        *("word_embed_proj_dim", "moe_intermediate_size", "projection_dim", "projection_size"),
    }
)


def _widened(options: dict[str, Any]) -> dict[str, Any]:
    wide: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            wide[name] = _widened(value)
        else:
            wide[name] = 8 * value if name in _WIDTHS else value
    return wide


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(2))


def _text(dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    ids = _ids(2, tokens)
    mask = torch.ones_like(ids)
    mask[0, tokens - 5 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _sequence_to_sequence(dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    return {"input_ids": _ids(2, tokens), "labels": _ids(2, tokens // 2)}


def _images(dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def _pairs(dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    images = _images(dtype, tokens)["pixel_values"]
    return {"input_ids": _ids(2, tokens), "pixel_values": images, "return_loss": True}


def _speech(dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 16, 2 * tokens, generator=generator).to(dtype)
    return {"input_features": features, "labels": _ids(2, tokens // 2)}


def _image_text(dtype: torch.dtype, tokens: int) -> dict[str, Tensor]:
    """Text alone: the language model of a vision-language model."""
    batch = _text(dtype, tokens)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


_INPUTS: dict[str, Callable[[torch.dtype, int], dict[str, Any]]] = {
    "text": _text,
    "seq2seq": _sequence_to_sequence,
    "image": _images,
    "pair": _pairs,
    "speech": _speech,
    "image-text": _image_text,
}


def _decoder(name: str, *fused: str, **options: Any) -> Family:
    kinds = frozenset(fused) if fused else frozenset({"norm", "mlp", "attention", "loss"})
    return Family(name, fused=kinds, options={**DECODER, **options})


def _encoder(name: str, *fused: str, auto: str = "AutoModelForMaskedLM", **options: Any) -> Family:
    return Family(name, auto, frozenset(fused), {**_ENCODER, **options})


_PLAIN = ("norm", "activation", "attention", "loss")
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}

FAMILIES = [
    _decoder("llama"),
    _decoder("mistral", sliding_window=None),
    _decoder("qwen2"),
    _decoder("qwen3"),
    _decoder("gemma2"),
    _decoder("gemma3_text"),
    _decoder("phi3"),
    _decoder("cohere"),
    _decoder("granite"),
    _decoder("glm4"),
    _decoder("olmo2"),
    _decoder("smollm3"),
    _decoder("stablelm"),
    _decoder("starcoder2", *_PLAIN),
    _decoder("nemotron", *_PLAIN),
    _decoder("mixtral", "norm", "attention", "loss", "experts", **_MOE),
    _decoder("qwen3_moe", "norm", "attention", "loss", "experts", moe_intermediate_size=32, **_MOE),
    _decoder("gpt_oss", "norm", "attention", "loss", **_MOE),
    _decoder("gpt_neox", "norm", "activation", "attention", "loss"),
    Family(
        "gpt2",
        fused=frozenset({"norm", "activation", "loss"}),
        options={"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    ),
    Family(
        "opt",
        fused=frozenset({"norm", "activation", "loss"}),
        options={
            **_ENCODER,
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    Family(
        "bloom",
        fused=frozenset({"norm", "loss"}),
        options={"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    ),
    Family(
        "falcon",
        fused=frozenset({"norm", "activation", "loss"}),
        options={**_ENCODER, "num_kv_heads": 4, "new_decoder_architecture": True},
    ),
    _encoder("bert", "norm", "activation"),
    _encoder("roberta", "norm", "activation", max_position_embeddings=1030),
    _encoder("electra", "norm", "activation", embedding_size=32),
    _encoder("albert", "norm", "activation", embedding_size=16),
    _encoder("deberta-v2", "norm", "activation"),
    _encoder("modernbert", "norm", "mlp"),
    Family(
        "distilbert",
        "AutoModelForMaskedLM",
        frozenset({"norm", "activation"}),
        {
            "dim": 32,
            "hidden_dim": 64,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": VOCABULARY,
        },
    ),
    Family(
        "t5",
        "AutoModelForSeq2SeqLM",
        frozenset({"norm", "mlp"}),
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
        "seq2seq",
    ),
    Family(
        "bart",
        "AutoModelForSeq2SeqLM",
        frozenset({"norm", "activation"}),
        {
            "d_model": 32,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        "seq2seq",
    ),
    Family(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        frozenset({"norm", "activation"}),
        {
            "d_model": 32,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "num_mel_bins": 16,
            "max_source_positions": TOKENS,
            "max_target_positions": 1024,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        "speech",
    ),
    Family(
        "vit",
        "AutoModelForImageClassification",
        frozenset({"norm", "activation"}),
        _VISION,
        "image",
    ),
    Family(
        "deit",
        "DeiTForImageClassification",
        frozenset({"norm", "activation"}),
        _VISION,
        "image",
    ),
    Family(
        "clip",
        "AutoModel",
        frozenset({"norm", "activation"}),
        {"text_config": _ENCODER, "vision_config": _VISION, "projection_dim": 32},
        "pair",
    ),
    Family(
        "siglip",
        "AutoModel",
        frozenset({"norm", "activation"}),
        {"text_config": {**_ENCODER, "projection_size": 32}, "vision_config": _VISION},
        "pair",
    ),
]
