"""A patched LoRA layer does what PEFT does, fused or by the original path with a reason."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig
from tiny_models import gradients, relative
from torch import nn
from torch.utils.checkpoint import checkpoint

import fasttune


def layer_of(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


def outputs_and_gradients(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.loss.detach(), gradients(model)


# fp32 sums of a few dozen terms in another order; the gradients of attention nearly cancel, which
# magnifies their rounding by about a hundred.
FP32_TOLERANCE = 2e-5


def assert_equal_to_stock(stock, patched, batch, tolerance=FP32_TOLERANCE):
    loss, theirs = outputs_and_gradients(stock, batch)
    ours_loss, ours = outputs_and_gradients(patched, batch)
    assert relative(ours_loss, loss) < tolerance
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) < tolerance, name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_configurations_equal_stock(make_lora_model, batch, change):
    assert_equal_to_stock(
        make_lora_model(**change), fasttune.patch(make_lora_model(**change)), batch
    )


def test_two_active_adapters(make_lora_model, batch):
    def build():
        model = make_lora_model()
        torch.manual_seed(5)
        model.add_adapter(
            "second", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "up_proj"])
        )
        model.base_model.set_adapter(["default", "second"])
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                nn.init.normal_(parameter, std=0.05)
        return model.train()

    assert_equal_to_stock(build(), fasttune.patch(build()), batch)


def test_disabled_merged_and_switched_adapters(make_lora_model, batch):
    stock, model = make_lora_model(), fasttune.patch(make_lora_model())
    with stock.disable_adapter(), model.disable_adapter():
        expected = stock(**batch).logits
        assert relative(model(**batch).logits.materialize(), expected) < 1e-6
    for each in (stock, model):
        each.merge_adapter()
    assert relative(model(**batch).loss, stock(**batch).loss) < 1e-6
    for each in (stock, model):
        each.unmerge_adapter()
    assert_equal_to_stock(stock, model, batch)
    # What the user asked for is no fallback.
    assert fasttune.report(model)["lora"].original == {}


def test_scaling_changes_are_seen(make_lora_model, batch):
    stock, model = make_lora_model(), fasttune.patch(make_lora_model())
    for each in (stock, model):
        layer_of(each).set_scale("default", 3.0)
        layer_of(each).scaling["default"] = torch.tensor(0.25)
    assert_equal_to_stock(stock, model, batch)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_factors(make_lora_model, batch, frozen):
    def build():
        model = make_lora_model()
        for name, parameter in model.named_parameters():
            if frozen in name:
                parameter.requires_grad_(False)
        return model

    model = fasttune.patch(build())
    assert_equal_to_stock(build(), model, batch)
    saved = fasttune.explain(model)["layers.0.self_attn.q_proj"].saved_bytes
    rows, features = batch["input_ids"].numel(), 64
    kept_input, kept_t = rows * features * 4, rows * 4 * 4
    assert saved == (kept_t if frozen == "lora_A" else kept_input)


def test_requires_grad_flipped_during_training(make_lora_model, batch):
    stock, model = make_lora_model(), fasttune.patch(make_lora_model())
    for trained in (True, False, True):
        for each in (stock, model):
            layer_of(each).base_layer.weight.requires_grad_(trained)
            layer_of(each).lora_A["default"].weight.requires_grad_(not trained)
        assert_equal_to_stock(stock, model, batch)


@pytest.mark.parametrize("module", ["lora_A", "lora_B", "lora_dropout"])
def test_a_hooked_child_sees_its_calls(make_lora_model, batch, module, caplog):
    stock, model = make_lora_model(), fasttune.patch(make_lora_model())
    seen = {"stock": 0, "patched": 0}
    for name, each in (("stock", stock), ("patched", model)):
        target = getattr(layer_of(each), module)
        target = target["default"] if isinstance(target, nn.ModuleDict) else target
        target.register_forward_hook(lambda *a, name=name: seen.__setitem__(name, seen[name] + 1))
    with caplog.at_level(logging.WARNING, "fasttune"):
        assert_equal_to_stock(stock, model, batch)
    assert seen["patched"] == seen["stock"] == 1
    explained = fasttune.explain(model)["layers.0.self_attn.q_proj"]
    assert explained.path == "original"
    assert any("a hook on" in reason for reason in explained.fallbacks)
    others = [layer for layer in fasttune.explain(model).layers if layer.kind == "lora"]
    assert sum(layer.path == "fused" for layer in others) == 13


def test_story_hook_strict_unpatch(make_lora_model, batch):
    """One hooked lora_A: that layer alone is original, strict raises, unpatch restores all."""
    stock = make_lora_model()
    model = make_lora_model()
    types = [type(module) for module in model.modules()]
    layer_of(model).lora_A["default"].register_forward_hook(lambda *a: None)
    fasttune.patch(model, strict=True)
    with pytest.raises(fasttune.PatchError, match=r"q_proj: the original path .* a hook on lora_A"):
        model(**batch)
    fasttune.unpatch(model)
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(model.eval()(**batch).logits, stock.eval()(**batch).logits)


def test_hooks_on_the_layer_itself_keep_it_fused(make_lora_model, batch):
    model = fasttune.patch(make_lora_model())
    calls = []
    layer_of(model).register_forward_hook(lambda *a: calls.append(1))
    model(**batch).loss.backward()
    assert calls == [1]
    assert fasttune.explain(model)["layers.0.self_attn.q_proj"].path == "fused"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(make_lora_model, use_reentrant):
    model = fasttune.patch(make_lora_model(lora_dropout=0.3))
    layer = layer_of(model)
    x = torch.randn(5, 64, requires_grad=True)
    results = []
    for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(9)
        layer.zero_grad()
        y = run()
        (dx,) = (
            torch.autograd.grad(y.square().sum(), x, retain_graph=False)
            if not use_reentrant
            else (None,)
        )
        if use_reentrant:
            x.grad = None
            y.square().sum().backward()
            dx = x.grad.clone()
        results.append((y.detach(), dx))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_model_checkpointing_with_dropout(make_lora_model, batch, use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = fasttune.patch(make_lora_model(lora_dropout=0.2))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(4)
        results.append(outputs_and_gradients(model, batch))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert relative(results[1][1][name], gradient) < 1e-6, name


def test_dropout_follows_torch_manual_seed(make_lora_model, batch):
    model = fasttune.patch(make_lora_model(lora_dropout=0.5))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(model(**batch).loss))
    assert losses[0] == losses[1] != losses[2]


def test_eval_under_no_grad_is_bit_equal(make_lora_model, batch):
    stock, model = make_lora_model().eval(), fasttune.patch(make_lora_model()).eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, stock(**batch).logits)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 2, 3, 64), (0, 64), (2, 0, 64)])
def test_input_shapes(make_lora_model, shape):
    stock, model = layer_of(make_lora_model()), layer_of(fasttune.patch(make_lora_model()))
    x = torch.randn(shape)
    ours, theirs = model(x), stock(x)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_non_contiguous_input(make_lora_model):
    stock, model = layer_of(make_lora_model()), layer_of(fasttune.patch(make_lora_model()))
    x = torch.randn(64, 6).t()
    assert torch.allclose(model(x), stock(x), atol=1e-6)


def test_errors_are_those_of_stock(make_lora_model):
    stock, model = layer_of(make_lora_model()), layer_of(fasttune.patch(make_lora_model()))
    for x in (torch.randn(2, 63), torch.randn(2, 64, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError) as theirs:
            stock(x)
        with pytest.raises(RuntimeError) as ours:
            model(x)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast", [True, False])
def test_dtypes_of_outputs_and_gradients(make_lora_model, batch, dtype, cast):
    def build():
        model = make_lora_model(dtype)
        return model.to(dtype) if not cast else model

    stock, model = build(), fasttune.patch(build())
    _, theirs = outputs_and_gradients(stock, batch)
    _, ours = outputs_and_gradients(model, batch)
    assert {n: g.dtype for n, g in ours.items()} == {n: g.dtype for n, g in theirs.items()}
    x = torch.randn(2, 64, dtype=dtype)
    assert layer_of(model)(x).dtype == layer_of(stock)(x).dtype


def test_autocast(make_lora_model, batch):
    stock, model = make_lora_model(), fasttune.patch(make_lora_model())
    _, truth = outputs_and_gradients(make_lora_model(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, theirs = outputs_and_gradients(stock, batch)
        ours_loss, ours = outputs_and_gradients(model, batch)
    assert relative(ours_loss, loss) < 2e-3
    assert sum(relative(ours[n], truth[n]) for n in truth) < 1.05 * sum(
        relative(theirs[n], truth[n]) for n in truth
    )


def test_gradient_accumulation(make_lora_model, batch):
    stock, model = make_lora_model(), fasttune.patch(make_lora_model())
    for each in (stock, model):
        for _ in range(3):
            (each(**batch).loss / 3).backward()
    theirs, ours = gradients(stock), gradients(model)
    assert max(relative(ours[name], theirs[name]) for name in theirs) < FP32_TOLERANCE


def test_double_backward_raises(make_lora_model):
    layer = layer_of(fasttune.patch(make_lora_model()))
    x = torch.randn(3, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dx.sum().backward()


def test_save_load_merge_round_trip(make_lora_model, batch, tmp_path):
    from peft import PeftModel
    from tiny_models import tiny_llama

    model = fasttune.patch(make_lora_model())
    model(**batch).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(**batch).logits, expected, atol=1e-5)


@pytest.mark.limits
@pytest.mark.parametrize(
    ("rows", "dropout", "dtype", "fused"),
    [
        (16, 0.1, torch.float32, False),
        (64, 0.1, torch.float32, False),
        (256, 0.1, torch.float32, True),
        (256, 0.0, torch.float32, False),
        (256, 0.0, torch.bfloat16, False),
        (512, 0.0, torch.bfloat16, True),
        (1024, 0.0, torch.float32, True),
    ],
)
def test_the_original_path_runs_where_it_is_faster(rows, dropout, dtype, fused):
    from tiny_models import with_lora

    base = nn.Sequential(nn.Linear(512, 512)).to(dtype)
    model = with_lora(base, target_modules=["0"], lora_dropout=dropout).train()
    fasttune.patch(model, kinds={"lora"}, strict=True)
    model(torch.randn(rows, 512, dtype=dtype))
    layer = next(iter(fasttune.explain(model).layers))
    assert layer.path == ("fused" if fused else "original")
    assert fused or "as fast" in next(iter(layer.fallbacks))


@pytest.mark.limits
@pytest.mark.parametrize(
    ("rank", "rows", "dropout", "dtype", "fused"),
    [
        (256, 512, 0.0, torch.bfloat16, False),
        (256, 512, 0.1, torch.bfloat16, False),
        (256, 640, 0.0, torch.bfloat16, True),
        (128, 512, 0.0, torch.bfloat16, True),
        (256, 1280, 0.0, torch.float32, False),
        (256, 1280, 0.1, torch.float32, True),
    ],
)
def test_a_high_rank_takes_rows_where_products_run_on_tiles(
    rank, rows, dropout, dtype, fused, monkeypatch
):
    from tiny_models import with_lora

    for tiles in (True, False):
        monkeypatch.setattr("fasttune._native.has_base_product", lambda own=tiles: own)
        base = nn.Sequential(nn.Linear(768, 768)).to(dtype)
        model = with_lora(base, r=rank, target_modules=["0"], lora_dropout=dropout).train()
        fasttune.patch(model, kinds={"lora"}, strict=True)
        model(torch.randn(rows, 768, dtype=dtype))
        layer = next(iter(fasttune.explain(model).layers))
        assert layer.path == ("fused" if fused or not tiles else "original")
        assert layer.path == "fused" or "this rank" in next(iter(layer.fallbacks))


@pytest.mark.limits
def test_a_tiny_model_is_left_to_torch_bit_for_bit(make_lora_model, batch):
    model = make_lora_model(lora_dropout=0.0)
    stock = copy.deepcopy(model)
    fasttune.patch(model, strict=True)
    for each in (stock, model):
        each(**batch).loss.backward()
    ours, theirs = gradients(model), gradients(stock)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    layers = fasttune.explain(model).layers
    assert {layer.path for layer in layers} == {"original"}
    kinds = {layer.kind for layer in layers if "as fast" in str(layer.fallbacks)}
    assert kinds == {"lora", "loss", "norm", "mlp", "attention"}


def _bias_of_one_element(model):
    layer_of(model).base_layer.bias = nn.Parameter(torch.full((1,), 0.1))


def _factor_of_one_row(model):
    up = layer_of(model).lora_B["default"]
    up.weight = nn.Parameter(up.weight.detach()[:1].clone())


def _head_bias_of_one_element(model):
    bias = nn.Parameter(torch.full((1,), 0.1), requires_grad=False)  # its gradient is 0
    model.get_output_embeddings().bias = bias


@pytest.mark.parametrize(
    "change", [_bias_of_one_element, _factor_of_one_row, _head_bias_of_one_element]
)
def test_tensors_that_torch_broadcasts_never_reach_a_kernel(make_lora_model, batch, change):
    change_all = {"target_modules": ["q_proj", "v_proj"]}  # the head stays plain
    stock, patched = (make_lora_model(**change_all) for _ in range(2))
    fasttune.patch(patched)
    outputs_and_gradients(patched, batch)
    for model in (stock, patched):
        change(model)
    assert_equal_to_stock(stock, patched, batch)


def test_factors_whose_ranks_differ_are_the_error_of_stock(make_lora_model, batch):
    model = fasttune.patch(make_lora_model())
    down = layer_of(model).lora_A["default"]
    down.weight = nn.Parameter(down.weight.detach()[:2].clone())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(**batch)
