"""Deferred groups: siblings that share an input are computed together, under every rule."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import gradients, loss_of, relative, tiny_llama, with_lora
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fasttune
from fasttune.patching import groups

K = 24


class Parent(nn.Module):
    """Three projections of one input, combined; ``meddle`` runs after q."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q = nn.Linear(K, 20, bias=bias)
        self.k = nn.Linear(K, 20, bias=bias)
        self.v = nn.Linear(K, 20, bias=bias)
        self.used = "qkv"
        self.meddle: Callable[[Tensor], Any] = type

    def forward(self, x: Tensor) -> Tensor:
        total = 0.0
        for weight, name in enumerate(self.used, start=1):
            total = total + weight * getattr(self, name)(x).square()
            if name == "q":
                self.meddle(x)
        return total  # type: ignore[return-value]


def pair(**changes: Any) -> tuple[Any, Any]:
    """(stock, patched): the same weights."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        options = {"r": 4, "target_modules": ["q", "k", "v"], **changes}
        made.append(with_lora(nn.Sequential(Parent()), **options).train())
    fasttune.patch(made[1], strict=True)
    return made[0], made[1]


def parent_of(model: Any) -> Parent:
    found: Parent = model.base_model.model[0]
    return found


def make_x(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, K, generator=generator).requires_grad_()


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x.grad = None
    model(x).sum().backward()
    assert x.grad is not None
    return {"x": x.grad.clone(), **gradients(model)}


def agree(model: nn.Module, stock: nn.Module, seed: int = 0) -> None:
    ours, theirs = step(model, make_x(seed)), step(stock, make_x(seed))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert relative(ours[name], value) < 1e-5, name


def group_names(model: nn.Module, of: str = "q") -> list[str]:
    layer = fasttune.explain(model)[f"0.{of}"]
    return [name.rpartition(".")[2] for name in layer.group]


def calls_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many projections each call of the op computes from now on."""
    from fasttune.patching import lora

    sizes: list[int] = []
    original = lora.apply_group

    def counted(x: Tensor, projections: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(projections))
        return original(x, projections, *args, **kwargs)

    monkeypatch.setattr(lora, "apply_group", counted)
    return sizes


# ---------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank_pattern": {"k": 8, "v": 3}, "alpha_pattern": {"v": 2}},
        {"use_rslora": True},
        {"lora_bias": True, "bias": "lora_only"},
    ],
)
def test_a_group_computes_what_its_members_compute(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, patched = pair(**changes)
    sizes = calls_of(patched, monkeypatch)
    for seed in range(3):
        agree(patched, stock, seed)
    assert sizes == [1, 1, 1, 3, 3]
    assert group_names(patched) == ["k", "q", "v"]
    assert fasttune.explain(patched)["0.v"].fused_calls == 3


def test_several_adapters_and_members_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    stock, patched = pair()
    for model in (stock, patched):
        torch.manual_seed(5)
        model.add_adapter(
            "other", LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "other"])
    sizes = calls_of(patched, monkeypatch)
    for seed in range(3):
        agree(patched, stock, seed)
    for model in (stock, patched):
        model.base_model.set_adapter(["other"])  # k has none of it
    for seed in range(3):
        agree(patched, stock, seed)
    assert sizes[3:5] == [3, 3] and sizes[5:] == [3, 3, 3]


def test_whole_models_agree_with_stock() -> None:
    stock, patched = (with_lora(tiny_llama(attention_bias=True)).train() for _ in range(2))
    fasttune.patch(patched, strict=True)
    for seed in range(3):
        for model in (stock, patched):
            model.zero_grad()
            loss_of(model, seed).backward()
        ours, theirs = gradients(patched), gradients(stock)
        assert all(relative(ours[name], value) < 1e-5 for name, value in theirs.items())
    assert len(fasttune.explain(patched)["layers.1.mlp.up_proj"].group) == 2
    tokens = torch.arange(3, 40)[None]
    fasttune.verify(patched, {"input_ids": tokens, "labels": tokens})


def test_masks_are_those_of_members_called_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, patched = pair(lora_dropout=0.5)
    sizes = calls_of(patched, monkeypatch)
    results = []
    for _ in range(3):
        torch.manual_seed(3)
        results.append(step(patched, make_x()))
    assert sizes == [1, 1, 1, 3, 3]
    for other in results[1:]:
        assert all(relative(other[name], value) < 1e-6 for name, value in results[0].items())


# ---------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_what_the_forward_did(reentrant: bool) -> None:
    """With dropout: the masks of the recomputation are those of the forward, at every step."""
    _, plain = pair(lora_dropout=0.5)
    _, saving = pair(lora_dropout=0.5)
    for seed in range(4):
        results = []
        for model, wrap in ((plain, False), (saving, True)):
            torch.manual_seed(seed)
            x = make_x(seed)
            model.zero_grad()
            y = checkpoint(model, x, use_reentrant=reentrant) if wrap else model(x)
            y.sum().backward()
            results.append({"x": x.grad, **gradients(model)})
        for name, value in results[0].items():
            assert relative(results[1][name], value) < 1e-6, (seed, name)
    assert group_names(plain) == group_names(saving) == ["k", "q", "v"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_groups_do_not_form_while_a_backward_is_to_come(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, patched = pair()
    sizes = calls_of(patched, monkeypatch)
    for model in (stock, patched):
        outputs = [checkpoint(model, make_x(seed), use_reentrant=reentrant) for seed in range(2)]
        (outputs[0].sum() + outputs[1].sum()).backward()
    assert sizes == [1] * 12  # two forwards and their recomputations
    assert all(
        relative(value, gradients(stock)[name]) < 1e-5 for name, value in gradients(patched).items()
    )
    agree(patched, stock)  # adds nothing to what zero_grad cleared
    assert sizes[12:] == [3]


def test_groups_do_not_shrink_while_a_backward_is_to_come() -> None:
    stock, patched = pair()
    agree(patched, stock)
    agree(patched, stock)
    first, second = make_x(1), make_x(2)
    patched.zero_grad()
    parent_of(patched).used = "qv"  # k is not fetched
    one = checkpoint(patched, first, use_reentrant=False)
    two = checkpoint(patched, second, use_reentrant=False)
    (one.sum() + two.sum()).backward()
    parent_of(stock).used = "qv"
    stock.zero_grad()
    (stock(first.detach()).sum() + stock(second.detach()).sum()).backward()
    theirs, ours = gradients(stock), gradients(patched)
    assert theirs.keys() == ours.keys()
    assert all(relative(ours[name], value) < 1e-5 for name, value in theirs.items())
    assert group_names(patched) == ["k", "q", "v"]
    agree(patched, stock)
    assert group_names(patched) == ["q", "v"] and group_names(patched, "k") == []


# ---------------------------------------------------------------------------- between the calls


def test_outputs_may_be_changed_in_place() -> None:
    stock, patched = pair()
    agree(patched, stock)
    results = []
    for model in (stock, patched):
        x = make_x()
        parent = parent_of(model)
        model.zero_grad()
        q, k, v = parent.q(x), parent.k(x), parent.v(x)
        q *= 2
        k[..., 0] = 0
        (q * k + v).sum().backward()
        results.append({"x": x.grad, **gradients(model)})
    assert all(relative(results[1][name], value) < 1e-5 for name, value in results[0].items())
    assert group_names(patched) == ["k", "q", "v"]


def test_an_output_without_gradient_gives_its_parameters_none() -> None:
    stock, patched = pair()
    agree(patched, stock)
    for model in (stock, patched):
        model.zero_grad()
        parent, x = parent_of(model), make_x()
        q, k, _ = parent.q(x), parent.k(x), parent.v(x)
        (q * k).sum().backward()
    theirs, ours = gradients(stock), gradients(patched)
    assert theirs.keys() == ours.keys() and not any(".v." in name for name in ours)
    assert all(relative(ours[name], value) < 1e-5 for name, value in theirs.items())


def change_input(parent: Parent, x: Tensor) -> None:
    with torch.no_grad():
        x.add_(0.5)


def change_parameter(parent: Parent, x: Tensor) -> None:
    with torch.no_grad():
        parent.k.lora_B["default"].weight.mul_(1.5)  # type: ignore[union-attr, index]


def change_scaling(parent: Parent, x: Tensor) -> None:
    parent.k.scaling["default"] = 0.25  # type: ignore[union-attr, index]


def change_mode(parent: Parent, x: Tensor) -> None:
    parent.v.enable_adapters(False)  # type: ignore[operator]


@pytest.mark.parametrize("change", [change_input, change_parameter, change_scaling, change_mode])
def test_what_changes_between_members_is_seen(change: Callable[[Parent, Tensor], None]) -> None:
    stock, patched = pair()
    agree(patched, stock)
    outputs = []
    for model in (stock, patched):
        parent, x = parent_of(model), make_x().detach()
        parent.meddle = lambda x, parent=parent: change(parent, x)
        outputs.append(model(x))
    assert relative(outputs[1].detach(), outputs[0].detach()) < 1e-5


def test_the_modes_of_autocast_and_autograd_are_seen() -> None:
    stock, patched = pair()
    agree(patched, stock)
    for model in (stock, patched):
        parent, x = parent_of(model), make_x()
        q = parent.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert parent.k(x).dtype == torch.bfloat16
        with torch.no_grad():
            assert not parent.v(x).requires_grad
        assert q.dtype == torch.float32 and q.requires_grad


def test_another_input_is_no_claim() -> None:
    stock, patched = pair()
    agree(patched, stock)
    outputs = []
    for model in (stock, patched):
        parent, x = parent_of(model), make_x()
        outputs.append(torch.stack([parent.q(x), parent.k(x + 1), parent.v(x)]))
    assert relative(outputs[1].detach(), outputs[0].detach()) < 1e-5


def test_whoever_is_called_first_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, patched = pair()
    agree(patched, stock)
    sizes = calls_of(patched, monkeypatch)
    for order in ("vkq", "kqv"):
        for model in (stock, patched):
            parent_of(model).used = order
        agree(patched, stock)
    assert sizes == [3, 3]


def test_a_hook_on_a_member_keeps_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, patched = pair()
    agree(patched, stock)
    seen: list[Any] = []
    for model in (stock, patched):
        parent_of(model).k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        parent_of(model).k.register_forward_hook(lambda module, args, y: seen.append(y))
    sizes = calls_of(patched, monkeypatch)
    agree(patched, stock)
    assert sizes == [2, 1] and len(seen) == 2


# ---------------------------------------------------------------------------- where groups live


def test_copies_and_pickles_have_no_groups_and_the_same_results() -> None:
    stock, patched = pair()
    agree(patched, stock)
    agree(patched, stock)
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert group_names(other) == []
        agree(other, stock)
        agree(other, stock)
    assert group_names(patched) == ["k", "q", "v"]
    assert stock.state_dict().keys() == patched.state_dict().keys()


def test_unpatch_and_groups_false_end_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    stock, patched = pair()
    agree(patched, stock)
    agree(patched, stock)
    fasttune.patch(patched, groups=False)
    sizes = calls_of(patched, monkeypatch)
    agree(patched, stock)
    agree(patched, stock)
    assert sizes == [1] * 6 and group_names(patched) == []
    fasttune.patch(patched)
    agree(patched, stock)
    agree(patched, stock)
    assert sizes[6:] == [1, 1, 1, 3]
    layer = parent_of(patched).q
    fasttune.unpatch(patched)
    assert groups.members_of(layer) == []


def test_separate_backwards_need_retain_graph_or_groups_off() -> None:
    _, patched = pair()
    step(patched, make_x())
    parent, x = parent_of(patched), make_x()
    q, k = parent.q(x), parent.k(x)
    q.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        k.sum().backward()
    fasttune.patch(patched, groups=False)
    q, k = parent.q(x), parent.k(x)
    q.sum().backward()
    k.sum().backward()


def test_outputs_that_nobody_fetches_are_let_go() -> None:
    stock, patched = pair()
    agree(patched, stock)
    agree(patched, stock)
    parent = parent_of(patched)
    waiting = groups._siblings[parent.q].waiting
    assert not waiting  # all were fetched
    parent.used = "q"
    y = checkpoint(patched, make_x(), use_reentrant=False)
    kept = [weakref.ref(y) for y, *_ in waiting[threading.get_ident()].outputs.values()]
    assert len(kept) == 2
    y.sum().backward()  # the recomputation leaves two more
    assert not waiting and all(ref() is None for ref in kept)


def test_threads_do_not_share_outputs() -> None:
    stock, patched = pair()
    agree(patched, stock)
    agree(patched, stock)
    expected = {seed: stock(make_x(seed)).detach() for seed in range(8)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(20):
            y = patched(make_x(seed))
            if relative(y.detach(), expected[seed]) > 1e-5:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_takes_no_groups() -> None:
    stock, patched = pair()
    agree(patched, stock)
    patched.eval()
    stock.eval()
    with torch.inference_mode():
        assert torch.equal(patched(make_x().detach()), stock(make_x().detach()))


def test_a_wrong_output_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: outputs handed to the wrong member do not pass."""
    stock, patched = pair()
    agree(patched, stock)
    original = groups.keep

    def swapped(members: Any, x: Tensor, ys: Any) -> None:
        original(members, x, [ys[0], *reversed(ys[1:])])

    monkeypatch.setattr(groups, "keep", swapped)
    with pytest.raises(AssertionError):
        agree(patched, stock)
