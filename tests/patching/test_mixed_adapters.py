"""A mixed batch is the batches of its adapters, side by side: outputs, gradients, recomputation."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from mixed_batches import ADAPTERS, NAMES, incoming, inputs, mixed_run, q_proj, separate_runs
from tiny_models import gradients, relative
from torch import nn
from torch.utils.checkpoint import checkpoint

import fasttune
from fasttune.patching import assignment, state

FP32_TOLERANCE = 2e-5


@pytest.mark.parametrize(
    "names",
    [NAMES, ["it", "it", "de"], ["__base__", "fr", "__base__"], ["fr"]],
    ids=",".join,
)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_equals_separate_runs_of_stock(make_model, names, lora_bias):
    model = fasttune.patch(make_model(lora_bias=lora_bias), strict=True)
    logits, ours = mixed_run(model, names)
    expected, theirs = separate_runs(make_model(lora_bias=lora_bias), names)
    truth, exact = separate_runs(make_model(lora_bias=lora_bias).double(), names)
    assert relative(logits, truth) < 2 * relative(expected, truth) + 1e-7
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, gradient in exact.items():
        error, allowed = relative(ours[name], gradient), 2 * relative(theirs[name], gradient)
        assert error < allowed + FP32_TOLERANCE, name
    assert fasttune.report(model)["lora"].original == {}


def test_bf16_base_with_fp32_adapters(make_model):
    model = fasttune.patch(make_model(torch.bfloat16))
    logits, ours = mixed_run(model)
    expected, theirs = separate_runs(make_model(torch.bfloat16))
    truth, exact = separate_runs(make_model(torch.bfloat16).double())
    assert logits.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    assert relative(logits, truth) < 1.1 * relative(expected, truth)
    errors = [sum(relative(g[n], exact[n]) for n in exact) for g in (ours, theirs)]
    assert errors[0] < 1.05 * errors[1]


def test_base_samples_have_the_bits_of_the_base_layer(make_model):
    model = fasttune.patch(make_model(torch.bfloat16))
    x = torch.randn(5, 7, 64).bfloat16()
    with fasttune.mixed_adapters(model, NAMES):
        y = q_proj(model)(x)
    base = q_proj(model).base_layer(x)
    assert torch.equal(y[2:4], base[2:4])  # "__base__", and "it", which q_proj lacks
    assert not torch.equal(y[:2], base[:2]) and not torch.equal(y[4], base[4])


def test_eight_adapters(make_model):
    adapters = {f"a{i}": ((4, 8, 16)[i % 3], "all-linear") for i in range(8)}
    names = ["a3", "a0", "a7", "a1", "a2", "a6", "a5", "a4", "a3"]
    logits, ours = mixed_run(fasttune.patch(make_model(adapters=adapters)), names)
    expected, theirs = separate_runs(make_model(adapters=adapters), names)
    assert relative(logits, expected) < 1e-6 and ours.keys() == theirs.keys()
    assert max(relative(ours[name], theirs[name]) for name in theirs) < FP32_TOLERANCE


def test_dropout_follows_the_seed_and_keeps_the_expectation(make_model):
    model = fasttune.patch(make_model(lora_dropout=0.5))
    x, layer = torch.randn(5, 40, 64), q_proj(model)
    ys = []
    with fasttune.mixed_adapters(model, NAMES):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            ys.append(layer(x))
        mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
        model.eval()
        exact = layer(x)
    assert torch.equal(ys[0], ys[1]) and not torch.equal(ys[0], ys[2])
    assert relative(mean, exact) < 0.1 * relative(ys[0], exact)


def test_the_fused_loss_of_a_mixed_batch(make_model):
    """Also with adapters on the head, whose logits then go through stock's loss."""
    labels = inputs()["input_ids"]
    for head in (False, True):
        targets = ["q_proj", "lm_head"] if head else ["q_proj"]
        adapters = {"de": (4, targets), "fr": (8, targets)}
        names = ["de", "fr", "fr", "__base__", "de"]
        model = fasttune.patch(make_model(adapters=adapters))
        with fasttune.mixed_adapters(model, names):
            loss = model(**inputs(), labels=labels).loss
            logits = model(**inputs()).logits
        expected = nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 499), labels[:, 1:].reshape(-1)
        )
        assert relative(loss.detach(), expected.detach()) < 1e-6
        loss.backward()
        apart, _ = separate_runs(make_model(adapters=adapters), names)
        assert relative(logits.detach(), apart) < 1e-6


def test_autocast_and_accumulation(make_model):
    model, stock = fasttune.patch(make_model()), make_model()
    _, exact = separate_runs(make_model().double())
    with torch.autocast("cpu", torch.bfloat16):
        _, ours = mixed_run(model)
        _, theirs = separate_runs(stock)
    errors = [sum(relative(g[n], exact[n]) for n in exact) for g in (ours, theirs)]
    assert errors[0] < 1.05 * errors[1]
    once = mixed_run(model)[1]
    with fasttune.mixed_adapters(model, NAMES):
        model(**inputs()).logits.backward(incoming())
    for name, gradient in gradients(model).items():
        assert relative(gradient, 2 * once[name]) < 1e-6


def test_an_adapter_that_is_not_in_the_batch_is_left_alone_by_weight_decay(make_model):
    model = fasttune.patch(make_model())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mixed_run(model, ["de", "it", "__base__"])
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n and (".de." in n or ".it." in n)}


def test_contexts_nest_and_end_with_exceptions(make_model):
    model = fasttune.patch(make_model())
    layer, x = q_proj(model), torch.randn(2, 3, 64)
    plain = layer(x)

    def run(names):
        with fasttune.mixed_adapters(model, names):
            return layer(x)

    inner_alone, outer_alone = run(["fr", "de"]), run(["de", "__base__"])
    with fasttune.mixed_adapters(model, ["de", "__base__"]):
        with fasttune.mixed_adapters(model, ["fr", "de"]):
            assert torch.equal(layer(x), inner_alone)
        assert torch.equal(layer(x), outer_alone)
        with pytest.raises(ZeroDivisionError), fasttune.mixed_adapters(model, ["fr", "de"]):
            raise ZeroDivisionError
        assert torch.equal(layer(x), outer_alone)
    assert torch.equal(layer(x), plain)
    assert not torch.equal(inner_alone, outer_alone)


def test_two_models_and_two_threads_do_not_meet(make_model):
    model = fasttune.patch(make_model())
    other = copy.deepcopy(model)
    x, results = torch.randn(2, 3, 64), {}
    plain = q_proj(model)(x)
    start = threading.Barrier(2)

    def run(name):
        with fasttune.mixed_adapters(model, [name, name]):
            start.wait()
            results[name] = q_proj(model)(x)
            start.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("de", "fr")]
    with fasttune.mixed_adapters(model, ["de", "fr"]):
        assert torch.equal(q_proj(other)(x), plain)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in ("de", "fr"):
        with fasttune.mixed_adapters(model, [name, name]):
            assert torch.equal(q_proj(model)(x), results[name])


def test_disabled_adapters_give_the_base_model(make_model):
    model = fasttune.patch(make_model())
    x = torch.randn(5, 3, 64)
    with fasttune.mixed_adapters(model, NAMES), model.disable_adapter():
        assert torch.equal(q_proj(model)(x), q_proj(model).base_layer(x))


def test_inference_in_the_context(make_model):
    model = fasttune.patch(make_model()).eval()
    with torch.no_grad(), fasttune.mixed_adapters(model, NAMES):
        logits = model(**inputs()).logits
    assert relative(logits, separate_runs(make_model())[0]) < 1e-6


def test_pickles_and_copies_leave_the_context_behind(make_model):
    model = fasttune.patch(make_model())
    x = torch.randn(2, 3, 64)
    plain = q_proj(model)(x)
    with fasttune.mixed_adapters(model, ["de", "fr"]):
        copied = copy.deepcopy(model)
        assert torch.equal(q_proj(copied)(x), plain)
    fasttune.unpatch(model)
    assert torch.allclose(q_proj(model)(x), plain, atol=1e-6)


@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.limits)])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_assignment(
    make_model, use_reentrant, small, monkeypatch
):
    """Backward outside the context, after another batch with another assignment; also where the
    layers had stopped asking, because their inputs are small."""

    def run(checkpointing):
        monkeypatch.setattr(assignment, "seen", False)
        model = fasttune.patch(make_model(lora_dropout=0.0 if small else 0.2))
        model.set_requires_grad("default")
        model(**inputs())
        assert (state.of(q_proj(model), "lora").small is not None) == small
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        total = 0
        for names in (NAMES, NAMES[::-1]):
            torch.manual_seed(6)
            with fasttune.mixed_adapters(model, names):
                total = total + (model(**inputs()).logits * incoming()).sum()
        total = total + model(**inputs()).logits.square().mean()  # the active adapter
        total.backward()
        return total.detach(), gradients(model)

    expected, theirs = run(False)
    total, ours = run(True)
    assert torch.equal(total, expected) and ours.keys() == theirs.keys()
    assert {name.split(".")[-2] for name in ours} == {"default", *ADAPTERS}
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) < 1e-6, name


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_direct_checkpoint_raises_in_backward_or_enters_inside(make_model, use_reentrant):
    model = fasttune.patch(make_model())
    layer, x = q_proj(model), torch.randn(5, 3, 64, requires_grad=True)
    with fasttune.mixed_adapters(model, NAMES):
        direct = checkpoint(layer, x, use_reentrant=use_reentrant)
        within = layer(x)
    with pytest.raises(fasttune.PatchError, match=r"q_proj is recomputed in backward without"):
        direct.sum().backward()
    with fasttune.mixed_adapters(model, NAMES):
        direct = checkpoint(layer, x, use_reentrant=use_reentrant)
        with pytest.raises(fasttune.PatchError, match="is recomputed in backward without"):
            direct.sum().backward()

    def block(x):
        with fasttune.mixed_adapters(model, NAMES):
            return layer(x)

    x.grad = None
    expected = torch.autograd.grad(within.square().sum(), x)[0]
    checkpoint(block, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.allclose(x.grad, expected, atol=1e-6)


def test_the_checkpointing_function_is_put_back(make_model):
    model = fasttune.patch(make_model())
    model.gradient_checkpointing_enable()
    block = model.base_model.model.model.layers[0]
    before = block._gradient_checkpointing_func
    with fasttune.mixed_adapters(model, NAMES):
        assert block._gradient_checkpointing_func is not before
        with fasttune.mixed_adapters(model, NAMES):
            pass
        assert block._gradient_checkpointing_func is not before
    assert block._gradient_checkpointing_func is before
