"""A mixed batch is the batches of its adapters, side by side: outputs, gradients, errors."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import LoraConfig
from tiny_models import gradients, relative
from torch import nn
from torch.utils.checkpoint import checkpoint

import fasttune

ADAPTERS = {  # rank and targets
    "de": (4, "all-linear"),
    "fr": (8, ["q_proj", "down_proj"]),
    "it": (16, ["v_proj", "up_proj", "o_proj"]),
}
NAMES = ["de", "fr", "__base__", "it", "de"]
FP32_TOLERANCE = 2e-5


@pytest.fixture
def make_model(make_lora_model):
    """``make(dtype, **LoraConfig arguments)``: three adapters beside the active "default"."""

    def make(dtype=torch.float32, adapters=ADAPTERS, **changes):
        model = make_lora_model(dtype)
        for seed, (name, (rank, targets)) in enumerate(adapters.items()):
            options = {"r": rank, "lora_alpha": 2 * rank + seed, "target_modules": targets}
            torch.manual_seed(50 + seed)
            model.add_adapter(name, LoraConfig(**{**options, **changes}))
            for parameter_name, parameter in model.named_parameters():
                if f"lora_B.{name}" in parameter_name:
                    nn.init.normal_(parameter, std=0.05)
        model.set_requires_grad("default", False)
        model.set_requires_grad(list(adapters))
        return model.train()

    return make


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


# ------------------------------------------------------------------------------ equality


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


# ------------------------------------------------------------------------------ the context


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


# ------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_assignment(make_model, use_reentrant):
    """Backward outside the context, after another batch with another assignment."""

    def run(checkpointing):
        model = fasttune.patch(make_model(lora_dropout=0.2))
        model.set_requires_grad("default")
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


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["de", "xx"], ValueError, "names: no adapter 'xx' in the model; it has .*'de', 'default'"),
        ("de", TypeError, "names: expected a sequence of adapter names, got str"),
        ([1], TypeError, "names: expected strings, got int"),
        (["default"], ValueError, "names: no parameter of adapter 'default' requires a gradient"),
    ],
    ids=str,
)
def test_wrong_names_are_named(make_model, names, error, message):
    model = fasttune.patch(make_model())
    with pytest.raises(error, match=message), fasttune.mixed_adapters(model, names):
        pass


def test_frozen_adapters_may_be_named(make_model):
    model = fasttune.patch(make_model())
    with fasttune.mixed_adapters(model, ["default", "de"], frozen=["default"]):
        model(**inputs(2)).logits.sum().backward()
    assert all(".de." in name for name in gradients(model))
    with torch.no_grad(), fasttune.mixed_adapters(model, ["default"]):
        pass


def test_a_batch_of_another_size_raises_at_the_first_forward(make_model):
    model = fasttune.patch(make_model())
    message = r"names: expected one per sample, got 2 for the 3 samples of .*layers\.0"
    with fasttune.mixed_adapters(model, ["de", "fr"]), pytest.raises(ValueError, match=message):
        model(**inputs(3))


def test_unpatched_and_merged_models(make_model):
    model = make_model()
    with (
        pytest.raises(fasttune.PatchError, match="model: no patched LoRA layer; call fasttune"),
        fasttune.mixed_adapters(model, NAMES),
    ):
        pass
    fasttune.patch(model)
    with fasttune.mixed_adapters(model, NAMES):
        model.merge_adapter()
        with pytest.raises(fasttune.PatchError, match="adapters are merged"):
            model(**inputs())
    with (
        pytest.raises(fasttune.PatchError, match=r"q_proj .* call unmerge_adapter first"),
        fasttune.mixed_adapters(model, NAMES),
    ):
        pass
    model.unmerge_adapter()
    mixed_run(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "q_proj cannot run a mixed batch: LoRA variant DoraLinearVariant"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "embed_tokens cannot run a mixed batch: LoRA on Embedding is not fused",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "lm_head cannot run a mixed batch: modules_to_save .* of adapter 'de'",
        ),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
            "embed_tokens cannot run a mixed batch: .* trainable tokens of adapter 'de'",
        ),
    ],
    ids=str,
)
def test_layers_that_cannot_be_mixed_are_named(make_model, change, message):
    model = fasttune.patch(make_model(adapters={"de": (4, ["q_proj"])}, **change))
    with (
        pytest.raises(fasttune.PatchError, match=message),
        fasttune.mixed_adapters(model, ["de", "__base__"]),
    ):
        pass


def test_layers_left_out_by_patch_are_named(make_model):
    model = fasttune.patch(make_model(), exclude=["k_proj"])
    with (
        pytest.raises(fasttune.PatchError, match=r"k_proj cannot .* fasttune.patch left it out"),
        fasttune.mixed_adapters(model, NAMES),
    ):
        pass


def test_a_hook_inside_a_layer_raises_instead_of_being_skipped(make_model):
    model = fasttune.patch(make_model())
    q_proj(model).lora_A["de"].register_forward_hook(lambda *a: None)
    with (
        pytest.raises(fasttune.PatchError, match=r"q_proj .* a hook on lora_A\['de'\]"),
        fasttune.mixed_adapters(model, NAMES),
    ):
        pass
    with fasttune.mixed_adapters(model, ["fr", "__base__"]):
        model(**inputs(2))


def test_a_data_parallel_replica_raises_instead_of_running_the_active_adapter(make_model):
    model = fasttune.patch(make_model())
    replica, x = q_proj(model)._replicate_for_data_parallel(), torch.randn(5, 3, 64)
    with (
        fasttune.mixed_adapters(model, NAMES),
        pytest.raises(fasttune.PatchError, match=r"q_proj: a DataParallel replica"),
    ):
        replica(x)


def test_quantised_base_layers_are_named(make_model):
    model = fasttune.patch(make_model())
    layer = q_proj(model)
    layer.base_layer.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), False)
    with (
        fasttune.mixed_adapters(model, NAMES),
        pytest.raises(fasttune.PatchError, match=r"q_proj: no mixed batch: dtype torch.float32"),
    ):
        model(**inputs())


def test_torch_compile_raises(make_model):
    model = fasttune.patch(make_model())
    layer, x = q_proj(model), torch.randn(5, 3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer.forward, backend="eager", fullgraph=True)
    plain = compiled(x)
    with fasttune.mixed_adapters(model, NAMES), pytest.raises(Exception, match="mixed batch"):
        compiled(x)
    assert torch.equal(compiled(x), plain)
    whole = torch.compile(model, backend="eager")
    with (
        pytest.raises(fasttune.PatchError, match="a compiled model cannot run mixed batches"),
        fasttune.mixed_adapters(whole, NAMES),
    ):
        pass


# ------------------------------------------------------------------------------ adapter_names


def test_adapter_names_of_peft_equal_stock(make_model):
    stock, model = make_model().eval(), fasttune.patch(make_model()).eval()
    with torch.no_grad():
        expected = stock(**inputs(), adapter_names=NAMES).logits
        logits = model(**inputs(), adapter_names=NAMES).logits
    assert relative(logits, expected) < 1e-6
    layers = [layer for layer in fasttune.explain(model).layers if layer.kind == "lora"]
    assert all(layer.path == "fused" for layer in layers)


def test_adapter_names_of_peft_in_generate(make_model):
    stock, model = make_model().eval(), fasttune.patch(make_model()).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "adapter_names": NAMES}
    assert torch.equal(model.generate(**inputs(), **options), stock.generate(**inputs(), **options))


def test_adapter_names_errors_are_those_of_stock(make_model):
    for train, merge, names, dora in (
        (True, False, NAMES, False),
        (False, True, NAMES, False),
        (False, False, NAMES[:2], False),
        (False, False, ["xx"] * 5, False),
        (False, False, ["de"] * 5, True),
    ):
        messages = []
        for patched in (False, True):
            model = make_model(adapters={"de": (4, "all-linear"), **ADAPTERS}, use_dora=dora)
            model = (fasttune.patch(model) if patched else model).train(train)
            if merge:
                model.merge_adapter()
            with pytest.raises(ValueError) as error, torch.no_grad():
                model(**inputs(), adapter_names=names)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.limits
def test_adapter_names_of_small_inputs_take_peft_s_own_path(make_model):
    stock, model = make_model().eval(), fasttune.patch(make_model()).eval()
    with torch.no_grad():
        logits = model(**inputs(), adapter_names=NAMES).logits
        assert torch.equal(logits, stock(**inputs(), adapter_names=NAMES).logits)
    reasons = fasttune.report(model)["lora"].original
    assert list(reasons) == ["the original forward is as fast for an input this small"]


def test_pickles_and_copies_leave_the_context_behind(make_model):
    model = fasttune.patch(make_model())
    x = torch.randn(2, 3, 64)
    plain = q_proj(model)(x)
    with fasttune.mixed_adapters(model, ["de", "fr"]):
        copied = copy.deepcopy(model)
        assert torch.equal(q_proj(copied)(x), plain)
    fasttune.unpatch(model)
    assert torch.allclose(q_proj(model)(x), plain, atol=1e-6)
