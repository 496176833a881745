"""Whole models on a GPU: every family, every kind of LoRA, the properties of a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, TaskType, get_peft_model
from steps_compared import assert_close, exact_copy, in_double, loss_of, step
from tiny_models import gradients, tiny_llama, with_lora
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fasttune
from fasttune import adapters
from fasttune.nn import bottleneck as bottleneck_module
from fasttune.optim import AdamW
from fasttune.testing.families import FAMILIES, Family

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
ON_THE_CPU_ALONE = {"attention"}  # GPUs have their vendor's


def to_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch.items()}


def tokens(rows: int = 2, length: int = 23) -> dict[str, Tensor]:
    """Rows of tokens of the tiny Llama; the first five labels are masked."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 499, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :5] = -100
    return to_gpu({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_is_fused_and_equals_stock(family: Family, dtype: torch.dtype) -> None:
    model = with_lora(family.build(dtype)).train().cuda()
    batch = to_gpu(family.batch(dtype))
    truth = step(exact_copy(model), in_double(batch))
    stock = step(model, batch)
    with torch.no_grad():
        before = model.eval()(**batch)
    fasttune.patch(model.train())
    ours = step(model, batch)
    assert_close(ours, stock, truth, dtype)
    report = fasttune.report(model)
    expected = {"lora", *family.fused} - ON_THE_CPU_ALONE
    assert {kind for kind in expected if report[kind].fused == 0} == set(), str(report)
    fasttune.unpatch(model)
    with torch.no_grad():
        after = model.eval()(**batch)
    assert torch.equal(loss_of(before), loss_of(after))


def lora(**options: Any) -> Callable[[], nn.Module]:
    return lambda: with_lora(tiny_llama(), **options)


def ia3() -> nn.Module:
    model: nn.Module = get_peft_model(tiny_llama(), IA3Config(task_type=TaskType.CAUSAL_LM))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def two_adapters() -> nn.Module:
    model: Any = with_lora(tiny_llama())
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    return model


METHODS = {
    "dropout": lora(lora_dropout=0.3),
    "rank-256": lora(r=256),
    "rslora": lora(use_rslora=True),
    "bias": lora(lora_bias=True),
    "dora": lora(use_dora=True),
    "dora-dropout": lora(use_dora=True, lora_dropout=0.3),
    "tokens": lora(trainable_token_indices=[5, 7, 11]),
    "two-adapters": two_adapters,
    "ia3": ia3,
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_verified(method: str, dtype: torch.dtype) -> None:
    model = METHODS[method]().to("cuda", dtype).train()
    fasttune.patch(model)
    step(model, tokens())
    verified = fasttune.verify(model, tokens())
    assert verified.layers and verified.step
    kinds = {kind.kind: kind.fused for kind in fasttune.report(model).kinds}
    assert kinds["ia3" if method == "ia3" else "lora"] > 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("placement", ["seq_bn", "par_bn", "adapter_plus"])
def test_bottleneck_adapters_are_fused_and_equal_torchs(
    placement: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to("cuda", torch.float32 if autocast else BF16).train()
    # A smooth activation: one token on the other side of relu's kink changes a whole gradient.
    adapters.add(model, "a", placement, reduction_factor=4, activation="silu")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=1.0 if name.endswith("scale") else 0.1)
    truth = step(exact_copy(model), tokens())
    results, kernels = [], []
    for slow in (True, False):
        monkeypatch.setattr(bottleneck_module, "bottleneck_not_faster", lambda *_, slow=slow: slow)
        with (
            torch.autocast("cuda", BF16, enabled=autocast),
            profile(activities=[ProfilerActivity.CUDA]) as recorded,
        ):
            results.append(step(model, tokens()))
            torch.cuda.synchronize()
        names = [event.name for event in recorded.events()]
        kernels.append(sum(name.startswith("_widen") for name in names))
    assert kernels == [0, 4]  # one forward and one backward for each of two blocks
    stock, ours = results
    assert_close(ours, stock, truth, BF16)


def dropout_model(**changes: Any) -> nn.Module:
    model = with_lora(tiny_llama().to(BF16), lora_dropout=0.2, **changes).cuda().train()
    return fasttune.patch(model)


def test_a_step_does_not_wait_for_the_gpu() -> None:
    model, batch = dropout_model(), tokens()
    del batch["attention_mask"]  # transformers looks into it on the host
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], max_grad_norm=1.0)

    def whole_step() -> None:
        loss_of(model(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # groups form, kernels compile, the optimizer makes its plan
        whole_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            batch["input_ids"].sum().item()
        whole_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_gives_the_same_bits_again() -> None:
    model, batch = dropout_model(), tokens()
    step(model, batch)
    first, second = step(model, batch), step(model, batch)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("reentrant", [False, True])
def test_masks_are_those_of_the_recomputation(reentrant: bool) -> None:
    model, batch = dropout_model(), tokens()
    step(model, batch)
    plain = step(model, batch)
    options = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    if reentrant:
        model.enable_input_require_grads()  # type: ignore[operator]
    checkpointed = step(model, batch)
    for name, value in plain.items():
        error = float((checkpointed[name] - value).norm() / value.norm())
        assert error < 2e-2, name  # another mask: of the size of the gradient itself


def test_under_autocast() -> None:
    model = with_lora(tiny_llama()).cuda().train()
    batch = tokens()
    truth = step(exact_copy(model), batch)
    with torch.autocast("cuda", BF16):
        stock = step(model, batch)
        fasttune.patch(model)
        ours = step(model, batch)
    assert_close(ours, stock, truth, BF16)


def test_generation_is_that_of_stock() -> None:
    stock: Any = with_lora(tiny_llama().to(BF16)).cuda().eval()
    patched: Any = fasttune.patch(copy.deepcopy(stock).train()).eval()
    prompt = tokens()["input_ids"][:1]
    options = {"max_new_tokens": 12, "do_sample": False}
    expected, found = stock.generate(prompt, **options), patched.generate(prompt, **options)
    assert torch.equal(expected, found)


def test_a_mixed_batch_is_its_adapters_one_by_one() -> None:
    model: Any = with_lora(tiny_llama())
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("second", config)
    model = fasttune.patch(model.cuda().train())
    model.set_requires_grad(["default", "second"])
    batch = tokens(rows=3)
    del batch["labels"]
    names = ["default", "__base__", "second"]
    with fasttune.mixed_adapters(model, names):
        mixed = model(**batch).logits
        mixed.square().sum().backward()
    found = gradients(model)
    model.zero_grad()
    fasttune.unpatch(model)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter(), torch.no_grad():
                logits = model(**own).logits
        else:
            model.set_adapter(name)
            model.zero_grad()
            logits = model(**own).logits
            logits.square().sum().backward()
            for key, value in gradients(model).items():
                assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4), key
            model.zero_grad()
        assert torch.allclose(mixed[row], logits[0], rtol=1e-4, atol=1e-5), name


def test_the_loss_needs_no_logits() -> None:
    model = with_lora(tiny_llama(vocab_size=60_000)).to("cuda", BF16).train()
    batch = tokens(rows=16, length=128)
    fasttune.patch(model)
    comparison = fasttune.compare(model, batch, pairs=2)
    assert comparison.method.startswith("CUDA allocator")
    assert comparison.fasttune_bytes < 0.5 * comparison.stock_bytes
