"""Every method of PEFT on a patched model: what is not fused is left alone, and all is exact."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tiny_models import gradients, relative, tiny_llama
from torch import Tensor, nn

import fasttune

PROMPT = {"num_virtual_tokens": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "CARTRIDGE": PROMPT,
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {**PROMPT, "num_tasks": 2, "num_ranks": 2},
    "OFT": {"oft_block_size": 8},
    "POLY": {"n_tasks": 2},
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": {**PROMPT, "encoder_hidden_size": 16},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "VBLORA": {"num_vectors": 8, "vector_length": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 20},
}
WITHOUT_TARGETS = {"ADAPTION_PROMPT", "LN_TUNING", "TRAINABLE_TOKENS"}
WITH_TASKS = {"MULTITASK_PROMPT_TUNING", "POLY"}
# XLORA: tests/patching/test_peft_contract.py. CPT: its loss of these prompts is NaN in stock.
# SHADOW: stock fails on a causal model with labels.
ELSEWHERE = {"CPT", "SHADOW", "XLORA"}
METHODS = sorted({method.value for method in PeftType} - ELSEWHERE)
FUSED = {"LORA": "lora", "IA3": "ia3", "TRAINABLE_TOKENS": "tokens"}
FUSED |= {"ADALORA": "lowrank", "DELORA": "lowrank", "VERA": "lowrank", "PREFIX_TUNING": "prefix"}
PROMPTS = {"CARTRIDGE", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
TABLE = Path(__file__).parents[2] / "docs" / "peft.md"


def adapted(method: str) -> nn.Module:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    options: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in inspect.signature(config).parameters and method not in WITHOUT_TARGETS:
        options["target_modules"] = ["q_proj", "v_proj", "up_proj"]
    torch.manual_seed(1)
    model: nn.Module = get_peft_model(
        tiny_llama(), config(**{**options, **OPTIONS.get(method, {})})
    ).train()
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # away from zero, so that every gradient counts
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def step(model: Callable[..., Any], method: str) -> Tensor:
    tokens = torch.randint(3, 499, (2, 9), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    if method in WITH_TASKS:
        batch["task_ids"] = torch.tensor([0, 1])
    torch.manual_seed(4)
    loss: Tensor = model(**batch).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_a_patched_model_is_exact(method: str) -> None:
    stock, ours = adapted(method), fasttune.patch(adapted(method))
    expected, loss = step(stock, method), step(ours, method)
    assert torch.isfinite(expected) and relative(loss, expected) < 1e-5
    theirs, mine = gradients(stock), gradients(ours)
    assert mine.keys() == theirs.keys() and theirs
    whole = [torch.cat([g[name].flatten() for name in theirs]) for g in (mine, theirs)]
    assert relative(*whole) < 1e-4
    kinds = {kind.kind: kind for kind in fasttune.report(ours).kinds}
    assert kinds["norm"].fused >= 4  # the model around the method is fused
    if method in FUSED:
        assert kinds[FUSED[method]].fused > 0
    elif method not in PROMPTS | {"ADAPTION_PROMPT"}:
        title = method.lower().replace("_", "")
        (reason,) = kinds["lora"].original
        assert title in reason.replace("_", "") and "not fused" in reason


def test_the_table_names_every_method() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    named = {name for line in rows for name in line.split("|")[1].replace("`", "").split(", ")}
    named = {name.strip() for name in named}
    missing = {method.value for method in PeftType} - named
    assert not missing
