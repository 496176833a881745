"""Bottleneck adapters on whole models: families, training, saving, removal, errors."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasttune
from fasttune import adapters
from fasttune.adapters import _sites
from fasttune.testing.families import FAMILIES, Family

EXPERTS = {"mixtral", "qwen3_moe", "gpt_oss"}
BY_NAME = {family.name: family for family in FAMILIES}
SOME = [BY_NAME[name] for name in ("llama", "gpt2", "gpt_neox", "bert", "distilbert", "t5", "vit")]


def loss_of(model: nn.Module, family: Family) -> Tensor:
    loss: Tensor = model(**family.batch()).loss
    return loss


def perturb(model: nn.Module) -> None:
    """Noise, not a constant: a norm takes a constant out of its input."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def set_scales(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".adapters.s.scale"):
                parameter.fill_(value)


@pytest.mark.parametrize("placement", ["seq_bn", "double_seq_bn", "par_bn", "adapter_plus"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_fresh_is_identity_trains_and_removes_exactly(family: Family, placement: str) -> None:
    model = family.build().eval()
    if family.name in EXPERTS:
        with pytest.raises(ValueError, match="model: expected"):
            adapters.add(model, "s", placement)
        assert "_fasttune_bottlenecks" not in model.__dict__
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        plain, logits = model(**family.batch())[:2]
    adapters.add(model, "s", placement, reduction_factor=4)
    set_scales(model, 0.0)  # adapter_plus starts with no zeros
    # Vendor products may round otherwise where a tensor lies at another address.
    torch.testing.assert_close(loss_of(model, family), plain, rtol=1e-6, atol=0)
    set_scales(model, 1.0)
    perturb(model)
    loss, changed = model(**family.batch())[:2]
    assert (changed - logits).abs().max() > 1e-3 * logits.abs().max()
    loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapters.s." in key), key
    adapters.remove(model, "s")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert trained == {key for key, p in model.named_parameters() if p.requires_grad}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(loss_of(model, family), plain, rtol=1e-6, atol=0)


def test_a_parallel_adapter_takes_the_input_of_the_mlp() -> None:
    family = BY_NAME["llama"]
    model = family.build().eval()
    adapters.add(model, "s", "par_bn", reduction_factor=4)
    perturb(model)
    mlp, seen = model.model.layers[1].mlp, {}
    mlp.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    loss_of(model, family)
    adapter = mlp.down_proj.adapters["s"]
    inner = mlp.act_fn(mlp.gate_proj(seen["x"])) * mlp.up_proj(seen["x"])
    plain = nn.functional.linear(inner, mlp.down_proj.weight)
    expected = plain + adapter.up(adapter.down(seen["x"]).relu())
    torch.testing.assert_close(seen["y"], expected)


@pytest.mark.parametrize("name", ["vit", "bert", "bart", "whisper", "t5"])
def test_adapter_plus_takes_and_replaces_the_output_of_a_block(name: str) -> None:
    family = BY_NAME[name]
    model, seen = family.build().eval(), {}
    blocks = {key: m for key, m in model.named_modules() if key.split(".")[-1].isdigit()}

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    for key, block in blocks.items():  # before the adapter's own hook
        block.register_forward_hook(lambda m, a, y, key=key: seen.update({key: first(y).clone()}))
    adapters.add(model, "s", "adapter_plus", reduction_factor=4)
    sites = {key: block for key, block in blocks.items() if hasattr(block, "adapters")}
    stacks = {key.rpartition(".")[0] for key in sites}
    assert len(sites) == 2 * len(stacks)
    assert len(stacks) == (2 if family.name in ("bart", "whisper", "t5") else 1)
    after = {}
    for key, block in sites.items():
        adapter = block.adapters["s"]
        assert adapter.activation == "gelu" and torch.equal(adapter.scale, torch.ones(32))
        assert not adapter.down.bias.any() and not adapter.up.bias.any()
        weights = torch.cat([adapter.down.weight.flatten(), adapter.up.weight.flatten()])
        assert weights.abs().max() <= 0.02 and 0.007 < weights.std() < 0.010
        block.register_forward_hook(lambda m, a, y, key=key: after.update({key: first(y).clone()}))
    perturb(model)
    loss_of(model, family)
    assert set(after) == set(sites)
    for key, block in sites.items():
        x, adapter = seen[key], block.adapters["s"]
        inner = nn.functional.gelu(adapter.down(x))
        torch.testing.assert_close(after[key], x + adapter.scale * adapter.up(inner))


@pytest.mark.parametrize("placement", _sites.PLACEMENTS[1:])
@pytest.mark.parametrize("family", SOME, ids=lambda f: f.name)
def test_copies_and_checkpointing_give_the_same_numbers(family: Family, placement: str) -> None:
    model = family.build().eval()
    adapters.add(model, "s", placement, reduction_factor=4)
    perturb(model)
    expected = loss_of(model, family)
    assert torch.equal(loss_of(copy.deepcopy(model), family), expected)
    assert torch.equal(loss_of(pickle.loads(pickle.dumps(model)), family), expected)
    expected.backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(model.train(), family).backward()
    for key, grad in grads.items():
        torch.testing.assert_close(model.get_parameter(key).grad, grad)


@pytest.mark.parametrize("placement", _sites.PLACEMENTS)
def test_activate_stack_and_deactivate_choose_what_is_applied(placement: str) -> None:
    family = BY_NAME["llama"]
    model = family.build().eval()
    plain = loss_of(model, family)
    losses = {}
    for name in ("a", "b"):
        adapters.add(model, name, placement, reduction_factor=4)
        perturb(model)
        losses[name] = loss_of(model, family)
    sites = {key.split(".adapters.")[0] for key in model.state_dict() if ".adapters.a." in key}
    assert sites == {key.split(".adapters.")[0] for key in model.state_dict() if ".b." in key}
    adapters.activate(model, "a")
    assert torch.equal(loss_of(model, family), losses["a"])
    adapters.stack(model, "a", "b")
    both = loss_of(model, family)
    different = [plain, losses["a"], losses["b"], both]
    assert len({loss.item() for loss in different}) == 4
    adapters.deactivate(model)
    assert torch.equal(loss_of(model, family), plain)
    adapters.remove(model, "a")
    adapters.activate(model, "b")
    assert torch.equal(loss_of(model, family), losses["b"])
    adapters.remove(model, "b")
    assert torch.equal(loss_of(model, family), plain)


_FRESH = """
import sys, torch
from fasttune import adapters
from fasttune.adapters import _sites
from fasttune.testing.families import FAMILIES
family = next(f for f in FAMILIES if f.name == "llama")
model = family.build().eval()
adapters.load(model, sys.argv[1])
torch.save(model(**family.batch()).logits, sys.argv[2])
"""


def test_a_fresh_process_loads_equal_logits(tmp_path: Path) -> None:
    family = BY_NAME["llama"]
    model = family.build().eval()
    adapters.add(model, "s", reduction_factor=4)
    perturb(model)
    expected = model(**family.batch()).logits
    adapters.save(model, "s", tmp_path / "out")
    logits = tmp_path / "logits.pt"
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "out"), str(logits)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert torch.equal(torch.load(logits), expected)


def test_a_wrong_checkpoint_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = BY_NAME["llama"].build()
    adapters.add(model, "s", reduction_factor=4)
    adapters.save(model, "s", tmp_path)
    other = BY_NAME["gpt2"].build()
    keys = list(other.state_dict())
    with pytest.raises(ValueError, match="directory: expected"):
        adapters.load(other, tmp_path)
    assert list(other.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.b", {}, "name: expected letters"),
        ("keys", {}, "name: expected letters"),
        ("training", {}, "name: expected letters"),
        ("s", {"placement": "lora"}, "placement: expected one of"),
        ("s", {"reduction_factor": 0}, "reduction_factor: expected"),
        ("s", {"reduction_factor": "16"}, "reduction_factor: expected"),
        ("s", {"activation": "softplus"}, "activation: expected one of"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(name: str, options: dict, message: str) -> None:
    model = BY_NAME["llama"].build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adapters.add(model, name, **options)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_generate_uses_the_adapter() -> None:
    model = BY_NAME["llama"].build().eval()
    ids = torch.arange(3, 9).unsqueeze(0)
    adapters.add(model, "s", reduction_factor=4)
    perturb(model)
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    logits = model(cached[:, :-1]).logits[:, ids.shape[1] - 1 :]
    assert torch.equal(logits.argmax(-1), cached[:, ids.shape[1] :])


@pytest.mark.parametrize("placement", _sites.PLACEMENTS[1:])
@pytest.mark.parametrize("first", ["patch", "add"])
@pytest.mark.parametrize("family", SOME, ids=lambda f: f.name)
def test_a_patched_model_applies_the_adapters(family: Family, first: str, placement: str) -> None:
    stock, model = family.build().eval(), family.build().eval()
    adapters.add(stock, "s", placement, reduction_factor=4)
    if first == "patch":
        fasttune.patch(model)
    adapters.add(model, "s", placement, reduction_factor=4)
    model.load_state_dict(stock.state_dict())
    for changed in (stock, model):
        perturb(changed)
    if first == "add":
        fasttune.patch(model)
    torch.testing.assert_close(loss_of(model, family), loss_of(stock, family), rtol=1e-5, atol=0)


_CLASSIFY = """
import sys, torch
from fasttune import adapters
from story import classifier, texts
model = classifier()
adapters.load(model, sys.argv[1])
torch.save(model.eval()(**texts(8)[0]).logits, sys.argv[2])
"""


def test_a_trainer_trains_saves_and_a_fresh_process_has_equal_logits(tmp_path: Path) -> None:
    from story import Texts, classifier, texts
    from transformers import Trainer, TrainingArguments

    model = classifier()
    adapters.add(model, "s", "seq_bn", reduction_factor=16, train_also=["classifier"])
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=30, per_device_train_batch_size=8, learning_rate=5e-3,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=30, seed=1,
    )  # fmt: skip
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    Trainer(model, args, train_dataset=Texts()).train()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    batch, labels = texts(256)
    accuracy = (model.eval()(**batch).logits.argmax(-1) == labels).float().mean()
    assert accuracy > 0.9
    adapters.save(model, "s", tmp_path / "out")
    expected, logits = model(**texts(8)[0]).logits, tmp_path / "logits.pt"
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", _CLASSIFY, str(tmp_path / "out"), str(logits)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": folders})
    assert torch.equal(torch.load(logits), expected)
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    assert written < 0.05 * whole


def test_heads_follow_their_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    from story import classifier

    model = classifier()
    adapters.add(model, "a", train_also="classifier")
    adapters.add(model, "b")
    assert not model.classifier.weight.requires_grad
    adapters.activate(model, "a")
    assert model.classifier.weight.requires_grad
    adapters.print_trainable_parameters(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trainable params: {trained:,} || all params: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="train_also: expected names of modules, got 'score'"):
        adapters.add(model, "c", train_also=["score"])
    assert not any(".adapters.c." in name for name, _ in model.named_parameters())
