"""Adapters and a PEFT LoRA on the same model, with checkpointing and generate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fasttune
from fasttune import adapters
from fasttune.testing.families import FAMILIES

LLAMA = next(family for family in FAMILIES if family.name == "llama")
ORDERS = ["peft first", "adapters first"]


def built(order: str, placement: str = "double_seq_bn") -> Any:
    """LoRA on the layers that the adapters follow too; everything random, nothing at zero."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    model = LLAMA.build()
    if order == "peft first":
        model = get_peft_model(model, config)
        adapters.add(model, "s", placement, reduction_factor=4)
    else:
        adapters.add(model, "s", placement, reduction_factor=4)
        model = get_peft_model(model, config)
        adapters.activate(model, "s")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, parameter in sorted(
            model.named_parameters(), key=lambda p: p[0].replace(".base_layer", "")
        ):
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**LLAMA.batch()).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ORDERS)
def test_both_are_applied_and_trained(order: str) -> None:
    model = built(order)
    both = model(**LLAMA.batch()).loss
    with model.disable_adapter():
        alone = model(**LLAMA.batch()).loss
    adapters.deactivate(model)
    lora = model(**LLAMA.batch()).loss
    assert len({both.item(), alone.item(), lora.item()}) == 3
    adapters.activate(model, "s")
    assert torch.equal(model(**LLAMA.batch()).loss, both)
    trained = gradients(model)
    assert {".lora_" in key or ".adapters.s." in key for key in trained} == {True}
    assert any(".lora_" in key for key in trained) and any(".adapters.s." in k for k in trained)


@pytest.mark.parametrize("order", ORDERS)
def test_the_layer_computes_what_the_documentation_says(order: str) -> None:
    model = built(order, "seq_bn")
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    x = torch.randn(3, 64)
    linear = layer.base_layer
    plain = nn.functional.linear(x, linear.weight)
    branch = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    if order == "peft first":
        expected = layer.adapters["s"](plain + branch)
    else:
        expected = linear.adapters["s"](plain) + branch
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("placement", ["double_seq_bn", "par_bn"])
@pytest.mark.parametrize("order", ORDERS)
def test_both_kinds_of_checkpointing_give_the_same_gradients(
    order: str, placement: str, reentrant: bool
) -> None:
    model = built(order, placement)
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients(model.train())
    assert list(found) == list(expected)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad)


@pytest.mark.parametrize("order", ORDERS)
def test_generate_uses_both(order: str) -> None:
    model = built(order)
    ids = torch.arange(3, 9).unsqueeze(0)
    made = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    logits = model(made[:, :-1]).logits[:, ids.shape[1] - 1 :]
    assert torch.equal(logits.argmax(-1), made[:, ids.shape[1] :])


@pytest.mark.parametrize("order", ORDERS)
def test_patch_gives_the_same_numbers(order: str) -> None:
    stock, model = built(order), built(order)
    fasttune.patch(model)
    expected, found = gradients(stock), gradients(model)
    assert list(found) == list(expected)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6)


def test_a_saved_adapter_fits_with_and_without_peft(tmp_path: Path) -> None:
    model = built("peft first")
    adapters.save(model, "s", tmp_path)
    plain, later = LLAMA.build(), built("adapters first")
    adapters.load(plain, tmp_path)
    adapters.restore(later, {"s": tmp_path})
    for key, value in model.state_dict().items():
        if ".adapters.s." in key:
            name = key.removeprefix("base_model.model.")
            assert torch.equal(plain.get_parameter(name), value)
            site, _, tail = key.partition(".adapters.s.")
            inner = later.get_submodule(site)
            inner = getattr(inner, "base_layer", inner)
            assert torch.equal(inner.get_parameter(f"adapters.s.{tail}"), value)


@pytest.mark.parametrize("order", ORDERS)
def test_removal_leaves_the_lora(order: str) -> None:
    model = built(order)
    adapters.deactivate(model)
    lora = model(**LLAMA.batch()).loss
    adapters.remove(model, "s")
    assert torch.equal(model(**LLAMA.batch()).loss, lora)
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in key for key in trained)
