"""ReFT on whole models: which tokens are edited, training, generation, saving, removal, errors."""

from __future__ import annotations

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
from fasttune.testing.families import FAMILIES, Family

BY_NAME = {family.name: family for family in FAMILIES}
SOME = [BY_NAME[name] for name in ("llama", "gpt2", "gpt_neox", "bert", "distilbert", "vit")]
TWO_STACKS = {"clip", "siglip"}
LENGTHS = (9, 4)  # real tokens of the two rows of a batch
TOKENS = 12
POSITIONS = "f2+l3"


def build(name: str = "llama") -> Any:
    return BY_NAME[name].build().eval()


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.tril(-1) if key.endswith("original") else noise)


def padded(side: str) -> dict[str, Tensor]:
    """The same two sequences, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(2, TOKENS, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(TOKENS - length, TOKENS)
        ids[row, place] = torch.randint(3, 99, (length,), generator=generator)
        mask[row, place] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": mask.cumsum(1).sub(1).clamp(0),
    }


def edits(model: Any, batch: dict[str, Tensor], layer: int = 0) -> set[tuple[int, int]]:
    """(row, token) of what the interventions of one block change."""
    block = model.model.layers[layer]
    seen: dict[str, Tensor] = {}
    before = block.register_forward_hook(
        lambda module, args, output: seen.update(before=output.clone()), prepend=True
    )
    after = block.register_forward_hook(lambda module, args, output: seen.update(after=output))
    try:
        model(**batch)
    finally:
        before.remove()
        after.remove()
    changed = (seen["before"] != seen["after"]).any(-1)
    return {(int(row), int(token)) for row, token in changed.nonzero()}


def expected(side: str, lengths: tuple[int, ...] = LENGTHS) -> set[tuple[int, int]]:
    found = set()
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else TOKENS - LENGTHS[row]
        first, last = min(2, length // 2), min(3, length // 2)
        places = [*range(first), *range(length - last, length)]
        found |= {(row, start + place) for place in places}
    return found


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_from_the_first_and_the_last_real_token(
    side: str, share_weights: bool
) -> None:
    model = build()
    adapters.add_reft(model, "s", positions=POSITIONS, share_weights=share_weights)
    assert edits(model, padded(side)) == expected(side)


def test_both_sides_of_padding_give_the_same_logits() -> None:
    model = build()
    adapters.add_reft(model, "s", positions=POSITIONS)
    perturb(model)
    left, right = (model(**padded(side)).logits for side in ("left", "right"))
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(left[row, TOKENS - length :], right[row, :length])


def test_labels_end_the_prompt_and_a_mask_overrides_them() -> None:
    model = build()
    adapters.add_reft(model, "s", positions=POSITIONS)
    batch = padded("right")
    labels = torch.full((2, TOKENS), -100)
    labels[0, 6:9], labels[1, 3] = 5, 5
    assert edits(model, {**batch, "labels": labels}) == expected("right", (6, 3))
    mask = torch.zeros_like(labels)
    mask[:, :2] = 1
    assert edits(model, {**batch, "labels": labels, "prompt_mask": mask}) == {
        (0, 0), (0, 1), (1, 0), (1, 1)
    }  # fmt: skip


def test_listed_positions_all_and_single_layers() -> None:
    batch = padded("right")
    model = build()
    adapters.add_reft(model, "s", positions=[0, 5, -1], layers=[-1])
    assert edits(model, batch, 0) == set()
    assert edits(model, batch, 1) == {(0, 0), (0, 5), (0, 8), (1, 0), (1, 3)}
    adapters.add_reft(model, "t", positions="all", layers=["model.layers.0"])
    assert edits(model, batch, 1) == set()
    assert edits(model, batch, 0) == {(r, t) for r, n in enumerate(LENGTHS) for t in range(n)}


def test_a_named_layer_is_edited() -> None:
    model = build()
    adapters.add_reft(model, "s", positions="f1", layers=["model.layers.1.mlp.down_proj"])
    layer = model.model.layers[1].mlp.down_proj
    assert set(dict(layer.named_children())) == {"reft"}
    assert layer.reft["s"]["whole"].learned_source.weight.shape == (4, layer.out_features)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_trains_alone_and_removes_exactly(family: Family) -> None:
    model = family.build().eval()
    batch = family.batch()
    labels = batch.get("labels")
    if model.can_generate() and labels is not None and labels.dim() == 2:
        labels[:, :6] = -100
    if family.name in TWO_STACKS or model.config.is_encoder_decoder:
        with pytest.raises(ValueError, match=r"one ModuleList|an encoder or a"):
            adapters.add_reft(model, "s")
        assert "_fasttune_reft" not in model.__dict__
        return
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    plain = model(**batch).loss
    adapters.add_reft(model, "s", positions=POSITIONS, rank=3)
    perturb(model)
    loss = model(**batch).loss
    assert abs(loss - plain) > 1e-6 * plain
    loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".reft.s." in key), key
    adapters.remove_reft(model, "s")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert trained == {key for key, p in model.named_parameters() if p.requires_grad}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model._forward_pre_hooks_with_kwargs and not model._forward_hooks_always_called
    torch.testing.assert_close(model(**batch).loss, plain, rtol=1e-6, atol=0)


def labelled(family: Family) -> dict[str, Tensor]:
    batch = family.batch()
    if batch["labels"].dim() == 2:
        batch["labels"][:, :6] = -100
    return batch


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", SOME, ids=lambda f: f.name)
def test_copies_and_checkpointing_give_the_same_numbers(family: Family, reentrant: bool) -> None:
    model, batch = family.build().eval(), labelled(family)
    adapters.add_reft(model, "s", positions=POSITIONS)
    perturb(model)
    expected = model(**batch).loss
    assert torch.equal(copy.deepcopy(model)(**batch).loss, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).loss, expected)
    expected.backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for module in model.modules():  # without dropout the loss is that of eval mode
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()(**batch).loss.backward()
    for key, grad in grads.items():
        torch.testing.assert_close(model.get_parameter(key).grad, grad)


def test_a_checkpoint_around_a_block_and_its_hooks_is_told() -> None:
    from torch.utils.checkpoint import checkpoint

    model = build()
    adapters.add_reft(model, "s", positions="f2")
    block = model.model.layers[0]
    call = type(block).__call__

    class Checkpointed(type(block)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(lambda *a: call(self, *a, **kwargs), *args, use_reentrant=False)

    block.__class__ = Checkpointed
    embeddings = model.get_input_embeddings()(torch.arange(3, 9).unsqueeze(0)).requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    with pytest.raises(RuntimeError, match="a checkpoint recomputes a block together with its"):
        logits.sum().backward()


@pytest.mark.parametrize("positions", [POSITIONS, "l1"])
def test_generate_edits_the_prompt_only(positions: str) -> None:
    model = build()
    adapters.add_reft(model, "s", positions=positions)
    perturb(model)
    batch = padded("left")
    batch.pop("position_ids")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, **options)
    ones = torch.ones(2, 5, dtype=torch.int64)
    prompt = torch.cat([batch["attention_mask"], 0 * ones], 1)
    mask = torch.cat([batch["attention_mask"], ones], 1)
    places = mask.cumsum(1).sub(1).clamp(0)
    logits = model(
        input_ids=cached, attention_mask=mask, position_ids=places, prompt_mask=prompt
    ).logits
    assert torch.equal(logits[:, TOKENS - 1 : -1].argmax(-1), cached[:, TOKENS:])
    base = build()
    assert not torch.equal(base.generate(**batch, **options), cached)
    beams = model.generate(**batch, **options, num_beams=2)
    assert beams.shape == cached.shape
    with pytest.raises(ValueError, match="use_cache: expected generation with a cache"):
        model.generate(**batch, **options, use_cache=False)


def test_names_are_chosen_and_applied_in_order() -> None:
    model, batch = build(), padded("right")
    plain = model(**batch).logits
    outputs = {}
    for name in ("a", "b"):
        adapters.add_reft(model, name, positions="f2")
        perturb(model)
        outputs[name] = model(**batch).logits
    adapters.activate_reft(model, "a")
    assert torch.equal(model(**batch).logits, outputs["a"])
    adapters.activate_reft(model, "a", "b")
    both = model(**batch).logits
    assert not any(torch.equal(both, other) for other in (plain, *outputs.values()))
    adapters.activate_reft(model)
    assert torch.equal(model(**batch).logits, plain)
    adapters.remove_reft(model, "a")
    adapters.activate_reft(model, "b")
    assert torch.equal(model(**batch).logits, outputs["b"])


def test_one_orthogonalisation_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    family = BY_NAME["llama"]
    model, batch = build(), labelled(family)
    adapters.add_reft(model, "s", positions=POSITIONS, share_weights=True)
    rotations = [m for m in model.modules() if hasattr(m, "orthogonalisations")]
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model.gradient_checkpointing_enable()
    model.train()
    for _ in range(3):
        for _ in range(2):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(rotations) == 2 and {m.orthogonalisations for m in rotations} == {3}


_FRESH = """
import sys, torch
from fasttune import adapters
from fasttune.testing.families import FAMILIES
family = next(f for f in FAMILIES if f.name == "llama")
model = family.build().eval()
adapters.load_reft(model, sys.argv[1])
torch.save(model(input_ids=torch.arange(3, 19).view(2, 8)).logits, sys.argv[2])
"""


@pytest.mark.parametrize("variant", ["loreft", "direft", "noreft", "nodireft"])
def test_a_fresh_process_loads_equal_logits(tmp_path: Path, variant: str) -> None:
    model = build()
    adapters.add_reft(model, "s", positions="f2+l1", variant=variant, activation="silu")
    perturb(model)
    expected = model(input_ids=torch.arange(3, 19).view(2, 8)).logits
    adapters.save_reft(model, "s", tmp_path / "out")
    logits = tmp_path / "logits.pt"
    command = [sys.executable, "-c", _FRESH, str(tmp_path / "out"), str(logits)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert torch.equal(torch.load(logits), expected)


def test_a_wrong_checkpoint_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = build()
    adapters.add_reft(model, "s", layers=["model.layers.0.mlp.down_proj"])
    adapters.save_reft(model, "s", tmp_path)
    family = BY_NAME["llama"]
    other = type(model)(family.config(hidden_size=48, head_dim=12))
    keys = list(other.state_dict())
    with pytest.raises(ValueError, match="directory: expected interventions of such a model"):
        adapters.load_reft(other, tmp_path)
    assert list(other.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_a_trainer_trains_what_was_added() -> None:
    from story import Texts, classifier, texts
    from transformers import Trainer, TrainingArguments

    model = classifier()
    adapters.add_reft(model, "s", positions="f3+l3", train_also=["classifier"])
    args = TrainingArguments(
        "unused", max_steps=40, per_device_train_batch_size=8, learning_rate=5e-3, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=40, seed=1,
    )  # fmt: skip
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    Trainer(model, args, train_dataset=Texts()).train()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    batch, labels = texts(256)
    accuracy = (model.eval()(**batch).logits.argmax(-1) == labels).float().mean()
    assert accuracy > 0.9
    rotations = [m for m in model.modules() if hasattr(m, "orthogonalisations")]
    for rotation in rotations:
        rows = rotation.rows().detach()
        torch.testing.assert_close(rows @ rows.t(), torch.eye(len(rows)), atol=1e-5, rtol=0)


def test_a_trainer_trains_a_causal_model_on_completions() -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = type(build())(BY_NAME["llama"].config(initializer_range=0.3)).eval()
    adapters.add_reft(model, "s", positions="f1+l2", rank=8)
    ids = torch.randint(3, 99, (64, 10), generator=torch.Generator().manual_seed(2))
    ids[:, 6:] = 50 + ids[:, 5:6] % 2  # what the last token of the prompt decides
    labels = ids.clone()
    labels[:, :6] = -100
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": answer}
        for i, answer in zip(ids, labels, strict=True)
    ]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    before = model(**batch).loss
    args = TrainingArguments(
        "unused", max_steps=40, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        gradient_checkpointing=True, learning_rate=2e-2, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_steps=40, seed=1, weight_decay=0.1,
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows).train()
    assert model.eval()(**batch).loss < 0.75 * before


def test_a_peft_model_trains_and_generates() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(build(), config).eval()
    adapters.add_reft(model, "s", positions=POSITIONS)
    perturb(model)
    inner = model.get_base_model()
    assert edits(inner, padded("right")) == expected("right")
    batch = padded("left")
    expected_logits = inner(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected_logits)
    labels = batch["input_ids"].where(torch.arange(TOKENS) >= TOKENS - 2, -100)
    model(**batch, labels=labels).loss.backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None}
    assert trained and all(".reft.s." in key for key in trained)
    batch.pop("position_ids")
    new = model.generate(**batch, max_new_tokens=1, do_sample=False, eos_token_id=None)
    assert torch.equal(new[:, -1], expected_logits[:, -1].argmax(-1))
    adapters.remove_reft(model, "s")
    assert not any(m._forward_pre_hooks for m in (model, inner))


@pytest.mark.parametrize("first", ["patch", "add"])
def test_a_patched_model_is_edited(first: str) -> None:
    family = BY_NAME["llama"]
    stock, model = family.build().eval(), family.build().eval()
    adapters.add_reft(stock, "s", positions=POSITIONS)
    if first == "patch":
        fasttune.patch(model)
    adapters.add_reft(model, "s", positions=POSITIONS)
    model.load_state_dict(stock.state_dict())
    for changed in (stock, model):
        perturb(changed)
    if first == "add":
        fasttune.patch(model)
    batch = labelled(family)
    for mode in (True, False):
        ours, theirs = model.train(mode)(**batch).loss, stock.train(mode)(**batch).loss
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, TOKENS, TOKENS)}, "attention_mask: expected a mask"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask: expected shape \[2, 12\]"),
        ({"attention_mask": None, "position_ids": None}, "attention_mask: expected one, as"),
        ({"prompt_mask": torch.ones(2, 5)}, r"prompt_mask: expected shape \[2, 12\]"),
        ({"labels": torch.ones(2, TOKENS, dtype=torch.int64)}, "labels: expected -100 on the"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "cu_seq_lens_q: expected one sequence a row"),
    ],
)
def test_an_unknown_prompt_is_an_error(change: dict[str, Any], message: str) -> None:
    model = build()
    adapters.add_reft(model, "s")
    with pytest.raises(ValueError, match=message):
        model(**{**padded("right"), **change})
    model(**padded("right"))  # nothing is left of the failed call


def test_what_cannot_be_told_is_an_error() -> None:
    model, batch = build(), padded("right")
    adapters.add_reft(model, "s")
    with pytest.raises(RuntimeError, match="expected a call of the model that add_reft got"):
        model.model(**batch)
    with pytest.raises(RuntimeError, match="expected a call of the model that add_reft got"):
        model.forward(**batch)
    with pytest.raises(ValueError, match="labels: expected ones with -100 on the prompt"):
        model.train()(**batch)
    model.eval()
    packed = {"input_ids": batch["input_ids"][:1], "position_ids": torch.tensor([[0, 1, 2] * 4])}
    packed["input_ids"][:] = 7
    with pytest.raises(ValueError, match="position_ids: expected one sequence a row"):
        model(**packed)
    ids = torch.arange(3, 9).unsqueeze(0)
    output = model(ids, use_cache=True)
    cache = getattr(output, "cache", None) or output.past_key_values
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    with pytest.raises(ValueError, match="cache: expected an empty one, or one new token"):
        model(ids, **{name: cache})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.b", {}, "name: expected letters"),
        ("keys", {}, "name: expected letters"),
        ("training", {}, "name: expected letters"),
        ("s", {"layers": [2]}, "layers: expected numbers below 2, got 2"),
        ("s", {"layers": [0, -2]}, "layers: expected each layer once"),
        ("s", {"layers": ["nowhere"]}, "layers: expected names of modules, got 'nowhere'"),
        ("s", {"layers": "0"}, 'layers: expected "all"'),
        ("s", {"rank": 33}, "rank: expected 1 to 32, got 33"),
        ("s", {"positions": "7"}, "positions: expected"),
        ("s", {"variant": "lora"}, "variant: expected one of"),
        ("s", {"activation": "softplus"}, "activation: expected one of"),
        ("s", {"train_also": ["score"]}, "train_also: expected names of modules, got 'score'"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(name: str, options: Any, message: str) -> None:
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adapters.add_reft(model, name, **options)
    assert list(model.state_dict()) == keys and "_fasttune_reft" not in model.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
