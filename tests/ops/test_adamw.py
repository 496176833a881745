"""adamw_step, limit_norms and sum_of_squares: every backend and format against the reference, the
reference against fp64 and torch."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttune import BackendError, _native
from fasttune.ops import _adamw_storage as storage
from fasttune.ops.adamw import (
    adamw_step,
    apply_adamw_step,
    apply_sum_of_squares,
    limit_norms,
    sum_of_squares,
    with_table,
)
from fasttune.testing import cuda_on_host
from fasttune.testing.conformance import backend
from fasttune_kernels import adamw_tables as tables

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
needs_emulator = pytest.mark.skipif(
    cuda_on_host.compiler_missing() is not None, reason="the emulator needs g++"
)
KERNELS = ["reference", "cpu", "triton", pytest.param("cuda", marks=needs_emulator)]
BUILDS = [f"cpu:{isa}" for isa in _native.cpu().isa_available().split(",")]
SHAPES = ((576, 16), (9000,), (37,), (1,), (300,), (2048,), (3, 0))
MOMENTS = {"fp32": FP32, "bf16": BF16, "8bit": torch.uint8}

FORMATS = [
    (dtype, moments, rounding, amsgrad)
    for dtype, roundings in (
        (FP32, ("nearest",)),
        (BF16, ("nearest", "master", "stochastic", "kahan")),
        (FP16, ("nearest", "kahan")),
    )
    for rounding in roundings
    for moments in MOMENTS
    for amsgrad in (False, True)
    if not (amsgrad and moments == "8bit")
]


def ids(value: Any) -> str:
    return str(value).removeprefix("torch.")


@dataclass
class Run:
    """Tensors of a few steps on seeded gradients."""

    dtype: torch.dtype = FP32
    moments: str = "fp32"
    rounding: str = "nearest"
    amsgrad: bool = False
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    decay: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.params = [self.random(shape) for shape in self.shapes]
        self.m, self.v = self.zeros(MOMENTS[self.moments]), self.zeros(MOMENTS[self.moments])
        self.top = self.zeros(MOMENTS[self.moments]) if self.amsgrad else []
        residue = {"master": torch.int16, "kahan": self.dtype}.get(self.rounding)
        self.residues = [] if residue is None else self.zeros(residue)
        blocks = [-(-p.numel() // tables.QUANTISED) for p in self.params]
        self.scales = [torch.zeros(2, b) for b in blocks] if self.moments == "8bit" else []
        self.time = 0

    def random(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)

    def zeros(self, dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros_like(param, dtype=dtype) for param in self.params]

    def facts(self, lr: float = 1e-2) -> Tensor:
        rows = [[lr, *self.betas, 1e-8, self.decay, self.time, i] for i in range(len(self.params))]
        return torch.tensor(rows, dtype=FP64)

    def step(self, grads: list[Tensor] | None = None, **options: Any) -> Tensor:
        self.time += 1
        if grads is None:
            grads = [self.random(shape, 0.1) for shape in self.shapes]
        return adamw_step(
            self.params, grads, self.m, self.v, self.facts(),
            max_exp_avg_sqs=self.top, residues=self.residues, scales=self.scales,
            rounding=self.rounding, seed=5, **{**self.options, **options},
        )  # fmt: skip


def after(name: str, steps: int, *format: Any) -> tuple[Run, Tensor]:
    run = Run(*format)
    with backend(name):
        for _ in range(steps):
            grads = [run.random(shape, 0.1) for shape in run.shapes]
            norms = run.step(grads, squares=sum_of_squares(grads), max_grad_norm=1.0)
    return run, norms


def check_equal(name: str, steps: int, *format: Any) -> None:
    """Like the reference but for the last bits, which a rounding may turn into one place.

    Both round a parameter at each step, so that they differ by one place a step at most. With a
    clip the factor of the gradient differs in its last place, so do the moments (2^-22 relative,
    4 roundings) and, through them, the update of at most 1e-2 a step. A moment that is rounded
    stochastically then lands on the other neighbour once in 2^-22 / 2^-8 elements.
    """
    ours, norms = after(name, steps, *format)
    reference, expected = after("reference", steps, *format)
    dtype, moments = format[:2]
    update = 1e-2 * steps * 2**-20
    if moments != "fp32":
        update = 1e-2 * 2**-3  # the other neighbour of one moment of one element
    for p, q in zip(ours.params, reference.params, strict=True):
        place = torch.finfo(dtype).eps * (q.double().abs() + 1e-2 * steps)
        rounded = steps if dtype == FP32 else 1  # 16 bits: a different rounding is rare
        assert ((p.double() - q.double()).abs() <= rounded * place + update).all()
    states = ([*run.m, *run.v, *run.top] for run in (ours, reference))
    for mine, theirs in zip(*states, strict=True):
        if theirs.dtype == FP32:
            assert torch.allclose(mine, theirs, rtol=2**-18, atol=1e-9)
        elif theirs.numel():
            assert (mine != theirs).float().mean() < 0.01
    for mine, theirs in zip(ours.scales, reference.scales, strict=True):
        assert torch.allclose(mine, theirs, rtol=0.2, atol=1e-12)
    tolerance = 2**-10 if moments == "fp32" else 1e-2
    assert torch.allclose(norms, expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("dtype", "moments", "rounding", "amsgrad"), FORMATS, ids=ids)
def test_cpu_matches_reference(
    dtype: torch.dtype, moments: str, rounding: str, amsgrad: bool, build: str
) -> None:
    check_equal(build, 10, dtype, moments, rounding, amsgrad)


@pytest.mark.parametrize(("dtype", "moments", "rounding", "amsgrad"), FORMATS, ids=ids)
def test_triton_interpreter_matches_reference(
    dtype: torch.dtype, moments: str, rounding: str, amsgrad: bool
) -> None:
    check_equal("triton", 2, dtype, moments, rounding, amsgrad)


@needs_emulator
@pytest.mark.parametrize(("dtype", "moments", "rounding", "amsgrad"), FORMATS, ids=ids)
def test_cuda_on_the_emulator_matches_reference(
    dtype: torch.dtype, moments: str, rounding: str, amsgrad: bool
) -> None:
    check_equal("cuda", 2, dtype, moments, rounding, amsgrad)


@needs_emulator
def test_cuda_gives_a_reason_for_what_it_does_not_take() -> None:
    run = Run(shapes=((8,),))
    with (
        backend("cuda"),
        pytest.raises(BackendError, match=r"it takes grads in params' .*bfloat16"),
    ):
        run.step([torch.ones(8).bfloat16()])
    small = Run(BF16, "8bit", shapes=((8,),))
    small.top = small.zeros(torch.uint8)
    with backend("cuda"), pytest.raises(BackendError, match="max_exp_avg_sqs with fp32 or bf16"):
        small.step()
    wide = [torch.ones(3, dtype=FP64)]
    with backend("cuda"), pytest.raises(BackendError, match=r"fp16, got .*float64"):
        sum_of_squares(wide)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_second_moment_without_a_memory_is_the_gradient_squared(kernel: str) -> None:
    """beta2 0: v + (g^2 - v) would be the rounding error of a far larger v, and u without bound."""
    run = Run(shapes=((300,),), betas=(0.9, 0.0))
    with backend(kernel):
        for scale in (1e3, 1e-4):
            grad = run.random((300,)).sign() * scale
            run.step([grad])
    assert torch.allclose(run.v[0], grad.square(), rtol=1e-6, atol=0)


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _native.adamw_step

    def wrong(*args: Any, grad_factor: float, **options: Any) -> Tensor:
        return original(*args, grad_factor=grad_factor * 1.001, **options)

    monkeypatch.setattr(_native, "adamw_step", wrong)
    with pytest.raises(AssertionError):
        check_equal("cpu", 10, FP32, "fp32", "nearest", False)


def test_tables_of_all_tiers_agree() -> None:
    cpu = _native.cpu()
    assert cpu.adamw_address_columns == len(tables.ADDRESSES)
    assert cpu.adamw_fact_columns == len(tables.FACTS)
    assert cpu.adamw_block == tables.BLOCK and tables.BLOCK % tables.QUANTISED == 0
    assert cpu.adamw_quantised == tables.QUANTISED


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_fp32_error_is_at_most_that_of_torch_fused(name: str) -> None:
    torch.manual_seed(0)
    start = torch.randn(20000)
    ours, theirs, exact = start.clone(), start.clone().requires_grad_(), start.double()
    m, v = torch.zeros_like(start), torch.zeros_like(start)
    fused = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1, fused=True)
    exact.requires_grad_()
    truth = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.1)
    errors = {"ours": 0.0, "theirs": 0.0}
    for time in range(1, 201):
        grad = torch.randn(20000) * 10 ** torch.empty(20000).uniform_(-6, 0)
        theirs.grad, exact.grad = grad.clone(), grad.double()
        facts = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 0.1, time, 0]], dtype=FP64)
        with backend(name):
            adamw_step([ours], [grad], [m], [v], facts)
        fused.step()
        truth.step()
        for key, value in (("ours", ours), ("theirs", theirs.detach())):
            errors[key] += float((value.double() - exact.detach()).square().mean().sqrt())
    assert errors["ours"] <= errors["theirs"]


def trajectory(rounding: str, steps: int) -> tuple[Tensor, Tensor]:
    """A bf16 parameter and the fp32 one with the same gradients."""
    torch.manual_seed(0)
    run = Run(BF16, "fp32", rounding, shapes=((4096,),), decay=0.01)
    wide = Run(FP32, shapes=((4096,),), decay=0.01)
    wide.params[0].copy_(run.params[0].float())
    for _ in range(steps):
        grad = torch.randn(4096).add_(0.1).bfloat16()
        for which, own in ((run, grad), (wide, grad.float())):
            which.time += 1
            adamw_step(
                which.params, [own], which.m, which.v, which.facts(1e-4),
                residues=which.residues, rounding=which.rounding,
            )  # fmt: skip
    return run.params[0].float(), wide.params[0]


def test_bf16_parameters_stay_within_a_rounding_of_the_fp32_trajectory() -> None:
    ours, wide = trajectory("master", 1000)
    half_place = torch.finfo(BF16).eps / 2 * wide.abs() * 1.001  # bf16's ulp is eps * 2^exponent
    assert ((ours - wide).abs() <= half_place + 1e-7).all()
    lost, _ = trajectory("nearest", 1000)  # what torch does: the same test sees it fail
    assert ((lost - wide).abs() > half_place + 1e-7).float().mean() > 0.5


@pytest.mark.parametrize(("rounding", "places"), [("kahan", 1.0), ("stochastic", 3.0)])
def test_other_roundings_follow_the_fp32_trajectory(rounding: str, places: float) -> None:
    ours, wide = trajectory(rounding, 300)
    place = torch.finfo(BF16).eps * wide.abs().clamp(min=2**-7)
    assert ((ours - wide).abs() / place).square().mean().sqrt() <= places


def test_a_master_loses_nothing() -> None:
    values = torch.randn(4096) * 10 ** torch.empty(4096).uniform_(-30, 30)
    ties = (torch.arange(64, dtype=torch.int32) << 16 | 0x8000).add_(0x3F800000)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, 3.3895e38])
    master = torch.cat([values, ties.view(FP32), -ties.view(FP32), special])
    weight, low = torch.empty_like(master, dtype=BF16), torch.empty_like(master, dtype=torch.int16)
    storage.store_master(master, weight, low)
    assert torch.equal(storage.load_master(weight, low).view(torch.int32), master.view(torch.int32))
    away = (weight.float() - master).abs() <= (master.bfloat16().float() - master).abs()
    assert away[master.isfinite()].all()  # as near as rounding to nearest gets
    storage.store_master(torch.tensor([math.nan]), weight[:1], low[:1])
    assert weight[0].isnan()


def test_stochastic_rounding_keeps_the_mean() -> None:
    value = torch.full((1 << 16,), 1 + 2**-10)  # an eighth of the way to the next bf16
    random = torch.arange(1 << 16)
    rounded = storage.round_stochastically(value, random).float()
    assert rounded.mean() == value[0] and set(rounded.tolist()) == {1.0, 1.0078125}
    special = torch.tensor([math.inf, -math.inf, math.nan])
    kept = storage.round_stochastically(special, torch.full((3,), 0xFFFF))
    assert torch.equal(kept[:2], special[:2].bfloat16()) and kept[2].isnan()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_relative_to_their_block(signed: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(1000) * 10 ** torch.empty(1000).uniform_(-3, 3)
    values[256:512] = 0
    values = values if signed else values.square()
    codes, scales = storage.store_codes(values, torch.full((1000,), 1 << 15), signed=signed)
    again = storage.load_codes(codes, scales, signed=signed)
    floor = scales.repeat_interleave(256)[:1000] * 2.0 ** (-15 if signed else -31)
    assert ((again - values).abs() <= values.abs() * 2**-4 + floor * 1.13).all()
    assert (again[256:512] == 0).all()
    largest = values.abs()[:256].argmax()
    assert again[largest] == values[largest]
    if not signed:
        assert ((again > 0) == (values > 0)).all()  # it divides: it must not vanish
    values[3] = math.nan
    codes, scales = storage.store_codes(values, torch.zeros(1000, dtype=torch.int64), signed=signed)
    decoded = storage.load_codes(codes, scales, signed=signed)
    assert decoded[:256].isnan().all() and not decoded[256:].isnan().any()


def test_random_bits_are_the_same_in_every_backend() -> None:
    results = []
    emulated = [] if cuda_on_host.compiler_missing() else ["cuda"]
    for name in ("reference", *BUILDS, "triton", *emulated):
        run = Run(BF16, "fp32", "stochastic", shapes=((300,), (2048,)), decay=0.0)
        with backend(name):
            run.step([torch.ones(300).bfloat16(), torch.ones(2048).bfloat16()])
        results.append([param.clone() for param in run.params])
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_seed_step_and_stream_change_the_random_bits(name: str) -> None:
    def params(seed: int, time: int, stream: int) -> Tensor:
        param, grad = torch.ones(512).bfloat16(), torch.ones(512).bfloat16()
        facts = torch.tensor([[1e-3, 0.0, 0.0, 1e-8, 0.0, time, stream]], dtype=FP64)
        m, v = torch.zeros(512), torch.zeros(512)
        with backend(name):
            adamw_step([param], [grad], [m], [v], facts, rounding="stochastic", seed=seed)
        return param

    first = params(-3, 1, 0)
    assert torch.equal(first, params(-3, 1, 0))
    for other in ((1 << 62, 1, 0), (-3, 2, 0), (-3, 1, 1)):
        assert not torch.equal(first, params(*other))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run = Run(shapes=((50000,), (100001,), (7,)))
            grads = [run.random(shape) for shape in run.shapes]
            squares = sum_of_squares(grads)
            norms = run.step(grads, squares=squares, max_grad_norm=0.5)
            results.append((squares, norms, *run.params, *run.m, *run.v))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_clipping_and_unscaling_are_torchs(name: str) -> None:
    run, scaled = Run(shapes=((300,), (5, 7))), Run(shapes=((300,), (5, 7)))
    grads = [run.random(shape) for shape in run.shapes]
    clipped = [torch.nn.Parameter(param.clone()) for param in run.params]
    for param, grad in zip(clipped, grads, strict=True):
        param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(clipped, 0.5)
    run.step([param.grad for param in clipped])  # type: ignore[misc]
    larger = [grad * 1024 for grad in grads]
    with backend(name):
        squares = sum_of_squares(larger)
        norms = scaled.step(
            larger, squares=squares, max_grad_norm=0.5, grad_scale=torch.tensor(1024.0),
            found_inf=torch.zeros(()),
        )  # fmt: skip
    assert float(squares) ** 0.5 / 1024 == pytest.approx(float(norm), rel=1e-6)
    assert torch.allclose(norms[:, 0], torch.stack([g.norm() for g in grads]), rtol=1e-6)
    for p, q in zip([*run.params, *run.m], [*scaled.params, *scaled.m], strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("why", ["found_inf", "skip_nonfinite"])
def test_a_skipped_step_changes_nothing(name: str, why: str) -> None:
    run = Run(BF16, "8bit", "master")
    run.step()
    before = [t.clone() for t in (*run.params, *run.m, *run.v, *run.residues, *run.scales)]
    grads = [run.random(shape) for shape in run.shapes]
    options: dict[str, Any] = {"found_inf": torch.ones(())}
    if why == "skip_nonfinite":
        grads[1][5] = math.inf
        options = {"squares": sum_of_squares(grads), "skip_nonfinite": True}
    with backend(name):
        norms = run.step(grads, **options)
    now = (*run.params, *run.m, *run.v, *run.residues, *run.scales)
    assert all(torch.equal(p, q) for p, q in zip(before, now, strict=True))
    assert norms[:-1].isnan().all()  # the last tensor is empty


@pytest.mark.parametrize("name", KERNELS)
def test_a_gradient_that_is_not_finite_reaches_its_parameter(name: str) -> None:
    run = Run(shapes=((300,), (5,)))
    grads = [run.random(shape) for shape in run.shapes]
    grads[0][7] = math.nan
    with backend(name):
        run.step(grads)
    assert run.params[0].isnan().sum() == 1 and run.params[1].isfinite().all()
    with backend(name):
        assert not sum_of_squares(grads).isfinite()
        run.step(grads, squares=sum_of_squares(grads), max_grad_norm=1.0)
    assert run.params[1].isnan().all()  # as clip_grad_norm_: the norm is NaN


@pytest.mark.parametrize("name", KERNELS)
def test_scalars_may_lie_on_the_device(name: str) -> None:
    host, device = Run(decay=0.3), Run(decay=99.0)
    grads = [host.random(shape) for shape in host.shapes]
    host.step(grads)
    count = len(device.params)
    device.time = 41  # what the table says does not count then
    with backend(name):
        device.step(
            grads,
            lrs=[torch.tensor(1e-2)] * count,
            decays=[torch.tensor(0.3)] * count,
            steps=[torch.tensor(1.0)] * count,
        )
    for p, q in zip(host.params, device.params, strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)


def test_maximize_climbs() -> None:
    down, up = Run(decay=0.0), Run(decay=0.0)
    grads = [down.random(shape) for shape in down.shapes]
    down.step(grads)
    up.step([-grad for grad in grads], maximize=True)
    assert all(torch.equal(p, q) for p, q in zip(down.params, up.params, strict=True))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_sum_of_squares_is_that_of_fp64(name: str, dtype: torch.dtype) -> None:
    run = Run(dtype, shapes=((9000,), (1,), (37,), (0,), (20000,)))
    exact = sum(float(param.double().square().sum()) for param in run.params)
    with backend(name):
        assert float(sum_of_squares(run.params)) == pytest.approx(exact, rel=2e-7)
    assert float(sum_of_squares([])) == 0


LIMITED = [form for form in FORMATS if form[1] == "fp32" and not form[3]]
LIMITED.append((FP32, "fp32", "kahan", False))


@pytest.mark.parametrize("name", ["reference", *BUILDS, *KERNELS[2:]])
@pytest.mark.parametrize(("dtype", "moments", "rounding", "amsgrad"), LIMITED, ids=ids)
def test_a_norm_is_scaled_down_to_its_limit(
    dtype: torch.dtype, moments: str, rounding: str, amsgrad: bool, name: str
) -> None:
    """Each element within a rounding of the dtype (of its residue too) of fp64, and untouched
    bits below the limit; one tensor has a norm that is not finite."""
    run = Run(dtype, moments, rounding, amsgrad)
    norms = run.step()
    norms[4, 2] = math.inf
    limits = torch.full((len(SHAPES),), 1e4, dtype=FP64)
    limits[0], limits[1], limits[2], limits[4], limits[5] = 3.0, math.inf, 1.5, 1.0, 0.1
    before = [exact(run, i) for i in range(len(SHAPES))]
    stored = [t.clone() for t in (*run.params, *run.residues)]
    with backend(name):
        limit_norms(run.params, norms, limits, residues=run.residues, rounding=rounding)
    for i in (0, 2, 5):
        factor = float(limits[i]) / float(norms[i, 2])
        eps = {"master": 2**-24, "kahan": torch.finfo(dtype).eps ** 2}.get(rounding, 0.0)
        error = (exact(run, i) - before[i] * factor).abs()
        place = max(eps, 2**-23) if rounding in ("master", "kahan") else torch.finfo(dtype).eps
        floor = 2**-24 if dtype == FP16 else 0.0  # half the smallest subnormal
        assert (error <= (place + 2**-23) * before[i].abs() * factor + floor).all()
        assert (run.params[i].double() - exact(run, i)).abs().max() <= torch.finfo(dtype).eps
    now = [*run.params, *run.residues]
    for i in {1, 3, 4, 6}:
        for offset in (0, len(SHAPES)) if run.residues else (0,):
            assert torch.equal(stored[i + offset], now[i + offset])


def exact(run: Run, i: int) -> Tensor:
    """A parameter with what is kept beside it, in fp64."""
    if run.rounding == "master":
        return storage.load_master(run.params[i], run.residues[i]).double()
    value = run.params[i].double()
    return value + run.residues[i].double() if run.rounding == "kahan" else value


@pytest.mark.parametrize("name", [*BUILDS, *KERNELS[2:]])
@pytest.mark.parametrize(("dtype", "moments", "rounding", "amsgrad"), LIMITED, ids=ids)
def test_limits_have_the_bits_of_the_reference(
    dtype: torch.dtype, moments: str, rounding: str, amsgrad: bool, name: str
) -> None:
    results = []
    for which in ("reference", name):
        run = Run(dtype, moments, rounding, amsgrad)
        norms = run.step()
        limits = torch.full((len(SHAPES),), 1.25, dtype=FP64)
        with backend(which):
            limit_norms(run.params, norms, limits, residues=run.residues, rounding=rounding)
        results.append([*run.params, *run.residues])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["cpu", *KERNELS[2:]])
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1023), (torch.bfloat16, 2047)])
def test_a_limit_stops_at_the_last_element(dtype: torch.dtype, count: int, name: str) -> None:
    """One element less than a stretch of a kernel: its neighbour in memory is not a parameter."""
    memory = torch.ones(count + 1, dtype=dtype)
    norms = torch.tensor([[0.0, 0.0, 4.0]])
    with backend(name):
        limit_norms([memory[:count]], norms, torch.tensor([2.0], dtype=FP64))
    assert torch.equal(memory[:count], torch.full((count,), 0.5, dtype=dtype))
    assert memory[count] == 1


def test_fp64_parameters_have_limits_too() -> None:
    param, norms = torch.full((4,), 2.0, dtype=FP64), torch.tensor([[0.0, 0.0, 4.0]])
    limit_norms([param], norms, torch.tensor([1.0], dtype=FP64))
    assert torch.equal(param, torch.full((4,), 0.5, dtype=FP64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": torch.zeros(2, 2)}, r"norms: expected \[2, 3\] torch.float32 on cpu"),
        ({"limits": torch.zeros(2)}, r"limits: expected \[2\] torch.float64 on cpu, got \[2\]"),
        ({"residues": []}, "residues: expected 2 tensors for rounding 'master', got none"),
        ({"residues": [torch.zeros(3, dtype=torch.int16)]}, "residues: expected 2 tensors as"),
        ({"rounding": "up"}, "rounding: expected one of nearest"),
        ({"params": [torch.ones(3), torch.ones(3)]}, "rounding: 'master' takes bf16"),
    ],
)
def test_wrong_limits_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "params": [torch.ones(3).bfloat16() for _ in range(2)],
        "norms": torch.full((2, 3), 9.0),
        "limits": torch.ones(2, dtype=FP64),
        "residues": [torch.zeros(3, dtype=torch.int16) for _ in range(2)],
        "rounding": "master",
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        limit_norms(**arguments)
    assert all((param == 1).all() for param in arguments["params"])


def test_the_arguments_of_a_step_are_those_of_the_schema() -> None:
    schema = torch.ops.fasttune.adamw_step.default._schema
    assert tuple(a.name for a in schema.arguments) == tables.StepArguments._fields
    function = [*inspect.signature(adamw_step).parameters, "table"]  # which it makes itself
    assert sorted(function) == sorted(tables.StepArguments._fields)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("format", [(FP32, "fp32", "nearest"), (BF16, "8bit", "master")], ids=ids)
def test_one_table_serves_both_kernels(name: str, format: Any) -> None:
    results = []
    for shared in (False, True):
        run = Run(*format)
        run.time = 1
        grads = [run.random(shape, 0.1) for shape in run.shapes]
        arguments = tables.StepArguments(
            run.params, grads, run.m, run.v, run.top, run.residues, run.scales, run.facts(),
            max_grad_norm=1.0, rounding=run.rounding, seed=7,
        )  # fmt: skip
        with backend(name):
            if shared:
                arguments = with_table(arguments)
                assert (arguments.table is not None) == (name in ("triton", "cuda"))
            squares = apply_sum_of_squares(grads, arguments.table)
            norms = apply_adamw_step(arguments._replace(squares=squares))
        results.append([squares, norms, *run.params, *run.m, *run.v, *run.residues, *run.scales])
    assert all(map(torch.equal, *results))
    assert float(results[0][0]) == pytest.approx(
        sum(float(g.double().square().sum()) for g in grads)
    )


def test_torch_sees_the_op() -> None:
    run = Run(BF16, "fp32", "master", shapes=((32,), (5, 3)))
    run.time = 1
    grads = [run.random(shape) for shape in run.shapes]
    args = (
        run.params, grads, run.m, run.v, run.top, run.residues, run.scales, run.facts(),
        [], [], [], sum_of_squares(grads), None, None, 1.0, False, "master", False, 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fasttune.adamw_step.default, args)
    torch.library.opcheck(torch.ops.fasttune.sum_of_squares.default, (grads,))
    limited = (run.params, run.residues, run.step(grads), torch.ones(2, dtype=FP64), "master")
    torch.library.opcheck(torch.ops.fasttune.limit_norms.default, limited)


def test_autograd_sees_that_parameters_changed() -> None:
    run = Run(shapes=((4,),))
    version = run.params[0]._version
    norms = run.step()
    stepped = run.params[0]._version
    limit_norms(run.params, norms, torch.ones(1, dtype=FP64))
    assert run.params[0]._version > stepped > version


def test_dense_tensors_of_any_order_are_taken_as_they_lie() -> None:
    usual, turned = Run(shapes=((6, 50),)), Run(shapes=((6, 50),))
    for name in ("params", "m", "v"):
        setattr(turned, name, [t.t().contiguous().t() for t in getattr(turned, name)])
    grad = usual.random((6, 50))
    usual.step([grad])
    turned.step([grad.t().contiguous().t()])
    assert not turned.params[0].is_contiguous()
    assert torch.equal(usual.params[0], turned.params[0])


def wrong(**changes: Any) -> dict[str, Any]:
    run = Run(BF16, "fp32", "master", shapes=((32,), (5, 3)))
    run.time = 1
    arguments: dict[str, Any] = {
        "params": run.params, "grads": [torch.zeros_like(p) for p in run.params],
        "exp_avgs": run.m, "exp_avg_sqs": run.v, "facts": run.facts(),
        "residues": run.residues, "rounding": "master",
    }  # fmt: skip
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rounding": "up"}, ValueError, "rounding: expected one of nearest"),
        ({"grads": []}, ValueError, "grads: expected 2 tensors as params, got 0"),
        ({"grads": [torch.zeros(32), torch.zeros(3, 5)]}, ValueError, r"grads: expected shape \(5"),
        ({"grads": [torch.zeros(32), 3]}, TypeError, "grads: expected tensors, got int"),
        ({"facts": torch.zeros(2, 6)}, ValueError, r"facts: expected \[2, 7\] float64"),
        ({"residues": []}, ValueError, "residues: expected 2 tensors for rounding 'master'"),
        ({"residues": [torch.zeros(32), torch.zeros(5, 3)]}, ValueError, "residues: expect"),
        ({"exp_avgs": [torch.zeros(32).half(), torch.zeros(5, 3)]}, ValueError, "exp_avgs: exp"),
        ({"scales": [torch.zeros(2, 1)] * 2}, ValueError, "scales: expected with 8-bit moments"),
        ({"params": [torch.zeros(32), torch.zeros(5, 3)]}, ValueError, "'master' takes bf16"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = wrong(**changes)
    before = [param.clone() for param in arguments["params"]]
    with pytest.raises(error, match=message):
        adamw_step(**arguments)
    assert all(torch.equal(p, q) for p, q in zip(before, arguments["params"], strict=True))
