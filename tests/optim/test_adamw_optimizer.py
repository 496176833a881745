"""fasttune.optim.AdamW as a drop-in for torch.optim.AdamW."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from fasttune._native import adamw_cuda
from fasttune.ops import _adamw_backends
from fasttune.optim import AdamW
from fasttune.testing import cuda_on_host
from fasttune.testing.conformance import backend
from fasttune_kernels import adamw as adamw_triton
from fasttune_kernels import multi_tensor_tables

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def network(dtype: torch.dtype = FP32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 130)).to(dtype)


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(model: nn.Module, optimizer: Any, steps: range, clip: float | None = None) -> None:
    for step in steps:
        gradients(model, step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def tensors(model: nn.Module, optimizer: Any) -> list[Tensor]:
    states = [optimizer.state[p] for p in model.parameters() if p in optimizer.state]
    return [*model.parameters(), *(own[name] for own in states for name in sorted(own))]


def same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(map(torch.equal, these, those))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": params[:2], "lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6},
        {"params": params[2:], "weight_decay": 0.2, "lr": torch.tensor(2e-3)},
    ]


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0, "eps": 1e-3}]
)
@pytest.mark.parametrize("grouped", [False, True])
def test_steps_are_those_of_torch(options: dict[str, Any], grouped: bool) -> None:
    ours, theirs = network(), network(FP64)
    params: Callable[[nn.Module], Any] = groups_of if grouped else lambda model: model.parameters()
    train(ours, AdamW(params(ours), lr=1e-3, **options), range(20))
    train(theirs, torch.optim.AdamW(params(theirs), lr=1e-3, **options), range(20))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.double(), q, rtol=1e-6, atol=2e-7)


def test_fp64_parameters_take_the_reference() -> None:
    ours, theirs = network(FP64), network(FP64)
    train(ours, AdamW(ours.parameters(), max_grad_norm=0.7), range(20))
    train(theirs, torch.optim.AdamW(theirs.parameters()), range(20), clip=0.7)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)


def test_max_grad_norm_replaces_clip_grad_norm() -> None:
    ours, theirs = network(), network(FP64)
    optimizer = AdamW(ours.parameters(), eps=1e-2, max_grad_norm=0.7)  # eps lets the scale matter
    train(ours, optimizer, range(20))
    train(theirs, torch.optim.AdamW(theirs.parameters(), eps=1e-2), range(20), clip=0.7)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.double(), q, rtol=1e-6, atol=1e-7)
    gradients(ours, 19)
    norm = torch.stack([p.grad.norm() for p in ours.parameters() if p.grad is not None]).norm()
    assert optimizer.grad_norm is not None
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6)


def test_gradients_are_not_written() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1e-3)
    gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert same(before, [p.grad for p in model.parameters() if p.grad is not None])


def test_parameters_without_gradient_are_left_alone() -> None:
    ours, theirs = network(), network()
    mine, other = AdamW(ours.parameters()), torch.optim.AdamW(theirs.parameters())
    for step in range(6):
        for model, optimizer in ((ours, mine), (theirs, other)):
            gradients(model, step)
            if step % 2:
                for param in list(model.parameters())[2:4]:
                    param.grad = None
            optimizer.step()
    steps = [float(mine.state[p]["step"]) for p in ours.parameters()]
    assert steps == [6, 6, 3, 3, 6, 6]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_a_group_may_be_added_later() -> None:
    ours, theirs = network(), network()
    results = []
    for model, cls in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        params = list(model.parameters())
        optimizer = cls(params[:2], lr=1e-3)
        train(model, optimizer, range(3))
        optimizer.add_param_group({"params": params[2:], "lr": 1e-2})
        train(model, optimizer, range(3, 6))
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_hyperparameters_are_read_at_every_step() -> None:
    ours, theirs = network(), network()
    mine, other = AdamW(ours.parameters()), torch.optim.AdamW(theirs.parameters())
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 8) for o in (mine, other)]
    for step in range(8):
        for model, optimizer in ((ours, mine), (theirs, other)):
            gradients(model, step)
            optimizer.param_groups[0]["weight_decay"] = 0.1 * step
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_a_closure_is_evaluated_once_with_gradients() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(torch.ones(2, 24)).square().mean()
        loss.backward()
        return loss.detach()

    loss = optimizer.step(closure)
    assert calls == [True] and isinstance(loss, Tensor) and float(loss) > 0


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("rounding", ["master", "stochastic", "kahan", "nearest"])
def test_resuming_is_bit_equal_to_not_stopping(
    dtype: torch.dtype, moments: str, rounding: str
) -> None:
    options: dict[str, Any] = {"moments": moments, "rounding": rounding, "max_grad_norm": 1.0}
    straight, stopped = network(dtype), network(dtype)
    one = AdamW(straight.parameters(), **options)
    train(straight, one, range(10))
    first = AdamW(stopped.parameters(), **options)
    train(stopped, first, range(5))
    saved = pickle.loads(pickle.dumps((stopped.state_dict(), first.state_dict())))
    resumed = network(dtype)
    resumed.load_state_dict(saved[0])
    second = AdamW(resumed.parameters(), **options)
    second.load_state_dict(saved[1])
    train(resumed, second, range(5, 10))
    assert same(tensors(straight, one), tensors(resumed, second))


def test_8bit_moments_take_a_quarter() -> None:
    def state_bytes(moments: str) -> int:
        param = nn.Parameter(torch.randn(300, 300))
        param.grad = torch.randn(300, 300)
        optimizer = AdamW([param], moments=moments)
        optimizer.step()
        state = optimizer.state[param]
        return sum(t.numel() * t.element_size() for n, t in state.items() if n != "step")

    assert state_bytes("8bit") <= 0.3 * state_bytes("fp32")


def test_states_of_torch_go_both_ways() -> None:
    theirs, ours = network(), network()
    other = torch.optim.AdamW(theirs.parameters(), lr=3e-3, amsgrad=True)
    train(theirs, other, range(4))
    mine = AdamW(ours.parameters(), moments="fp32", max_grad_norm=9.0)
    ours.load_state_dict(theirs.state_dict())
    mine.load_state_dict(other.state_dict())
    assert mine.param_groups[0]["lr"] == 3e-3 and mine.param_groups[0]["amsgrad"]
    assert mine.param_groups[0]["max_grad_norm"] == 9.0
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(mine.state[p][name], other.state[q][name])
    back = torch.optim.AdamW(network().parameters())
    back.load_state_dict(mine.to_torch_state_dict())
    assert back.param_groups[0].keys() == other.param_groups[0].keys()
    for own, q in zip(back.state.values(), theirs.parameters(), strict=True):
        assert own.keys() == other.state[q].keys()
        assert all(torch.equal(own[name], other.state[q][name]) for name in own)


def test_small_moments_widen_exactly_for_torch() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), moments="8bit")
    train(model, optimizer, range(3))
    assert optimizer.state[model[2].weight]["exp_avg"].dtype == torch.uint8
    state = optimizer.to_torch_state_dict()["state"]
    again = AdamW(network().parameters(), moments="8bit")
    again.load_state_dict({**optimizer.to_torch_state_dict(), "state": state})
    (own,) = (s for s in again.state.values() if s["exp_avg"].dtype == torch.uint8)
    kept = optimizer.state[model[2].weight]
    assert torch.equal(own["exp_avg"], kept["exp_avg"])
    assert torch.equal(own["exp_avg_sq"], kept["exp_avg_sq"])


def broken(state: dict[str, Any], how: str) -> dict[str, Any]:
    entry = state["state"][2]
    if how == "shape":
        entry["exp_avg"] = entry["exp_avg"][:-1]
    elif how == "missing":
        del entry["exp_avg_sq"]
    elif how == "step":
        entry["step"] = torch.tensor(-1.0)
    elif how == "low bits":
        entry["master_low_bits"] = entry["master_low_bits"].float()
    elif how == "groups":
        state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))
    elif how == "parameters":
        state["param_groups"][0]["params"].pop()
    elif how == "option":
        state["param_groups"][0]["moments"] = "4bit"
    elif how == "no state":
        del state["state"]
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shape", r"parameter 2: expected exp_avg of shape \[40\], got \[39\]"),
        ("missing", "parameter 2: expected 'exp_avg_sq'"),
        ("step", "parameter 2: expected a whole number as step"),
        ("low bits", "parameter 2: expected master_low_bits in torch.int16"),
        ("groups", "expected 1 groups, got 2"),
        ("parameters", "expected 6 parameters in group 0, got 5"),
        ("option", "moments: expected one of fp32, bf16, 8bit, got '4bit'"),
        ("no state", "expected a dict with 'state' and 'param_groups'"),
    ],
)
def test_a_broken_state_is_refused_before_anything_changes(how: str, message: str) -> None:
    model = network(BF16)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(3))
    state = broken(copy.deepcopy(optimizer.state_dict()), how)
    before = [t.clone() for t in tensors(model, optimizer)]
    options = {n: v for n, v in optimizer.param_groups[0].items() if n != "params"}
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(state)
    assert same(before, tensors(model, optimizer))
    assert options == {n: v for n, v in optimizer.param_groups[0].items() if n != "params"}


def test_replaced_state_is_seen() -> None:
    """Offloading replaces tensors of the state between steps."""
    model, other = network(), network()
    optimizer, plain = AdamW(model.parameters()), AdamW(other.parameters())
    train(model, optimizer, range(2))
    train(other, plain, range(2))
    for own in optimizer.state.values():
        own["exp_avg"] = own["exp_avg"].clone()
    optimizer.state[model[0].weight] = dict(optimizer.state[model[0].weight])
    model[2].weight.data = model[2].weight.data.clone()
    train(model, optimizer, range(2, 4))
    train(other, plain, range(2, 4))
    assert same(tensors(model, optimizer), tensors(other, plain))


def test_state_that_no_longer_fits_is_refused() -> None:
    """A kernel would read beyond it."""
    model = network()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    before = [param.clone() for param in model.parameters()]
    optimizer.param_groups[0]["moments"] = "bf16"
    gradients(model, 2)
    with pytest.raises(ValueError, match=r"state: expected exp_avg in torch.bfloat16 \[40, 24\]"):
        optimizer.step()
    optimizer.param_groups[0]["moments"] = "fp32"
    model[0].weight.data = torch.zeros(50, 24)
    model[0].weight.grad = torch.zeros(50, 24)
    with pytest.raises(ValueError, match=r"got torch.float32 \[40, 24\]; was the parameter"):
        optimizer.step()
    assert same(before[1:], list(model.parameters())[1:])


def test_a_model_may_change_its_dtype_between_steps() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    model.bfloat16()
    train(model, optimizer, range(2, 4))
    own = optimizer.state[model[0].weight]
    assert own["exp_avg"].dtype == FP32 and own["master_low_bits"].any()


def test_copies_and_pickles_go_on_alike() -> None:
    model = network()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    for copied_model, copied in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        assert copied.param_groups[0]["params"][0] is next(copied_model.parameters())
        train(copied_model, copied, range(2, 4))
        reference = copy.deepcopy((model, optimizer))
        train(*reference, range(2, 4))
        assert same(list(copied_model.parameters()), list(reference[0].parameters()))


def test_grad_scaler_unscales_in_the_kernel_and_skips_overflows() -> None:
    ours, theirs = network(), network()
    mine, other = (
        AdamW(ours.parameters(), max_grad_norm=0.5),
        torch.optim.AdamW(theirs.parameters()),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        gradients(theirs, step)
        gradients(ours, step)
        for param in ours.parameters():
            assert param.grad is not None
            param.grad *= 1024.0 if step < 3 else 512.0
        if step == 2:
            ours[0].weight.grad[0, 0] = math.inf
        before = [p.clone() for p in ours.parameters()]
        scaler.scale(torch.zeros(()))
        scaler.step(mine)
        scaler.update()
        if step == 2:
            assert same(before, list(ours.parameters()))
            continue
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        other.step()
    assert float(mine.state[ours[0].weight]["step"]) == 5
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_skip_nonfinite_leaves_everything_as_it_is() -> None:
    model = network()
    optimizer = AdamW(model.parameters(), skip_nonfinite=True)
    train(model, optimizer, range(2))
    before = [t.clone() for t in tensors(model, optimizer)]
    gradients(model, 2)
    model[0].bias.grad[3] = math.nan
    optimizer.step()
    assert same(before, tensors(model, optimizer)) and optimizer.monitor() == {}
    train(model, optimizer, range(3, 4))
    assert float(optimizer.state[model[0].bias]["step"]) == 3


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_max_norm_is_a_bound(dtype: torch.dtype) -> None:
    model = network(dtype)
    params = list(model.parameters())
    optimizer = AdamW([{"params": params[:1], "max_norm": 2.0}, {"params": params[1:]}], lr=1e-2)
    free = network(dtype)
    train(model, optimizer, range(5))
    train(free, AdamW(free.parameters(), lr=1e-2), range(5))
    assert float(params[0].detach().double().norm()) == pytest.approx(
        2.0, rel=2 * torch.finfo(dtype).eps
    )
    assert same(params[1:], list(free.parameters())[1:])


def test_monitor_names_what_it_measured() -> None:
    model = network()
    old = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    assert optimizer.monitor() == {}
    gradients(model, 0)
    optimizer.step()
    found = optimizer.monitor()
    assert list(found) == list(old)
    for name, param in model.named_parameters():
        assert param.grad is not None
        assert found[name].gradient == pytest.approx(float(param.grad.norm()), rel=1e-5)
        assert found[name].weight == pytest.approx(float(param.detach().norm()), rel=1e-5)
        update = float((param.detach() - old[name]).norm())
        assert found[name].update == pytest.approx(update, rel=1e-3)
        assert found[name].update_ratio == found[name].update / found[name].weight
    nameless = AdamW(model.parameters())
    nameless.step()
    assert list(nameless.monitor()) == [f"0.{i}" for i in range(6)]
    nameless.name_parameters(model.named_parameters())
    assert list(nameless.monitor()) == list(old)


def test_non_contiguous_parameters_and_gradients() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(5, 8, 3).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(5, 8, 3)
    plain.load_state_dict(convolution.state_dict())
    optimizers = AdamW(convolution.parameters()), AdamW(plain.parameters())
    for step in range(4):
        for model, optimizer in zip((convolution, plain), optimizers, strict=True):
            gradients(model, step)  # contiguous, also where the weight is not
            optimizer.step()
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(convolution.weight, plain.weight, rtol=1e-6, atol=1e-7)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.clone()
    with pytest.raises(TypeError, match="grad: expected dense gradients, got layout"):
        optimizer.step()
    assert torch.equal(before, embedding.weight) and not optimizer.state


def test_capturable_keeps_the_step_with_the_parameters() -> None:
    """On the CPU both are the same device; the numbers are those of the ordinary step."""
    ours, theirs = network(), network()
    train(ours, AdamW(ours.parameters(), capturable=True, lr=torch.tensor(1e-3)), range(5))
    train(theirs, AdamW(theirs.parameters(), lr=1e-3), range(5))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr: expected a number in \[0, inf\), got -1.0"),
        ({"lr": "fast"}, TypeError, "lr: expected a number, got str"),
        ({"lr": torch.ones(2)}, ValueError, "lr: expected a tensor of one element"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: expected a number in \[0, 1.0\), got 1.0"),
        ({"betas": 0.9}, ValueError, "betas: expected two numbers"),
        ({"eps": -1e-8}, ValueError, "eps: expected"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay: expected"),
        ({"moments": "4bit"}, ValueError, "moments: expected one of fp32, bf16, 8bit, got '4bit'"),
        ({"rounding": "up"}, ValueError, "rounding: expected one of nearest, master"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm: expected a positive number or None"),
        ({"max_norm": -2.0}, ValueError, "max_norm: expected a positive number or None"),
        ({"differentiable": True}, ValueError, "differentiable: expected False"),
        ({"amsgrad": True, "moments": "8bit"}, ValueError, "amsgrad: expected False"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AdamW(network().parameters(), **options)


def test_wrong_groups_are_refused_and_not_added() -> None:
    optimizer = AdamW(network().parameters(), max_grad_norm=1.0)
    extra = nn.Parameter(torch.ones(3))
    for group, message in (
        ({"params": [extra], "moments": "9bit"}, "moments: expected"),
        ({"params": [extra], "max_grad_norm": 2.0}, "max_grad_norm: expected one value"),
        ({"params": [nn.Parameter(torch.ones(3, dtype=torch.complex64))]}, "params: expected real"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.fixture
def two_steps() -> Iterator[tuple[nn.Module, AdamW]]:
    model = network()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    yield model, optimizer


def test_parameters_that_step_together_share_their_step(two_steps: tuple[nn.Module, AdamW]) -> None:
    model, optimizer = two_steps
    assert len({id(optimizer.state[p]["step"]) for p in model.parameters()}) == 1
    saved = optimizer.state_dict()["state"]
    assert all(float(own["step"]) == 2 for own in saved.values())


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize(
    "name",
    [
        "triton",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(
                cuda_on_host.compiler_missing() is not None, reason="the emulator needs g++"
            ),
        ),
    ],
)
@pytest.mark.parametrize("profiled", [False, True])
def test_a_step_that_a_device_decides_copies_one_table(
    profiled: bool, name: str, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of a step on a GPU: counted, copied, summed up, taken."""
    copied = []

    def uploaded(*args: Any) -> Tensor:
        copied.append(args)
        return multi_tensor_tables.uploaded(*args)

    for module in (_adamw_backends, adamw_cuda, adamw_triton):
        monkeypatch.setattr(module, "uploaded", uploaded)
    results = []
    for on_host in (True, False):
        if not on_host:
            monkeypatch.setattr(AdamW, "_reads_on_host", lambda self, plan: False)
            copied.clear()
        model = network()
        optimizer = AdamW(model.parameters(), max_grad_norm=limit)
        with backend(name), profile() if profiled else contextlib.nullcontext():
            train(model, optimizer, range(3))
        results.append(tensors(model, optimizer))
    assert len(copied) == 3
    assert same(*results)
    assert (optimizer.grad_norm is None) == (limit is None)


def test_partial_sums_are_refused_before_anything_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AdamW, "_reads_on_host", lambda self, plan: False)
    model = network()
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)
    train(model, optimizer, range(1))
    before = [tensor.clone() for tensor in tensors(model, optimizer)]

    def refused(*args: Any) -> Any:
        raise ValueError("grad: expected sharded or replicated")

    monkeypatch.setattr("fasttune.optim.adamw.parts_of", refused)
    with pytest.raises(ValueError, match="sharded or replicated"):
        train(model, optimizer, range(1, 2))
    assert same(before, tensors(model, optimizer))
