"""Loads the model and the tokenizer, chooses device and dtype, and adds LoRA."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttune.demo.encode import PLAIN_TEMPLATE
from fasttune.demo.options import DTYPES, DemoError
from fasttune.demo.packaged import MODEL_ID, MODEL_PACKAGE, packaged_file

LORA_RANK = 16
LORA_ALPHA = 32
LORA_DROPOUT = 0.05


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, in a form that travels to the worker processes."""

    name: str  # what the user reads and the adapter names as its base
    location: str  # the argument of from_pretrained
    gguf_file: str | None = None  # file name inside the folder `location`


def find_model(model: str | None) -> ModelSource:
    """Resolves ``--model``: None (packaged), a ``.gguf`` file, a folder, or a Hub id.

    Raises:
        DemoError: a path that does not exist, or the packaged model is not installed.
    """
    if model is None:
        path = packaged_file(MODEL_PACKAGE, ".gguf")
        return ModelSource(MODEL_ID, str(path.parent), path.name)
    if model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise DemoError(f"--model {model} does not exist")
        return ModelSource(model, str(path.parent), path.name)
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).expanduser().is_dir():
        raise DemoError(f"--model {model} does not exist")
    return ModelSource(model, str(Path(model).expanduser()) if looks_local else model)


def quiet_transformers() -> None:
    """Keeps transformers' progress bars and advice out of the demo's output."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer; one without a chat template gets a plain one (``PLAIN_TEMPLATE``).

    Raises:
        DemoError: it cannot be loaded, or it is not a fast tokenizer (no character offsets).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
    except Exception as error:  # from_pretrained documents no common base of what it raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DemoError(f"cannot load the tokenizer of {source.name}: {reason}") from None
    if not tokenizer.is_fast:
        raise DemoError(f"the tokenizer of {source.name} gives no character offsets (not fast)")
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


def cpu_has_native_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX).

    torch does not say so on Arm, which counts as no.
    """
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)


def resolve_device(device: str) -> str:
    """``auto`` becomes ``cuda`` where there is a GPU, else ``cpu``.

    Raises:
        DemoError: a CUDA device was asked for and is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise DemoError(
                f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices"
            )
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """The torch name of the dtype; ``auto`` is bfloat16 where it is native, else float32."""
    name = DTYPES[dtype]
    if name != "auto":
        return name
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_has_native_bf16()
    return "bfloat16" if native else "float32"


def _plain_copy(model: Any, dtype: torch.dtype) -> Any:
    """The same model without its GGUF quantisation config, which refuses training and saving."""
    from transformers import AutoModelForCausalLM

    config = model.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


def load_model(source: ModelSource, *, dtype: str, device: str) -> Any:
    """The base model in ``dtype`` on ``device``."""
    from transformers import AutoModelForCausalLM

    torch_dtype: torch.dtype = getattr(torch, dtype)
    arguments: dict[str, Any] = {"dtype": torch_dtype}
    if source.gguf_file is not None:
        arguments["gguf_file"] = source.gguf_file
    model = AutoModelForCausalLM.from_pretrained(source.location, **arguments)
    if source.gguf_file is not None:
        model = _plain_copy(model, torch_dtype)
    model.config.use_cache = False  # a cache would also switch off the mask of packed samples
    model.config._name_or_path = source.name
    model.name_or_path = source.name
    return model.to(device)


def add_lora(model: Any, seed: int) -> nn.Module:
    """LoRA on all linear layers but the head, adapters in fp32 (PEFT's default)."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    lora: nn.Module = get_peft_model(model, config)
    return lora


def save_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Writes the adapter in PEFT format; its base is named as the user named it."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
