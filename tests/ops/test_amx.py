"""The kernels on tiles: as exact as those on vectors, at every edge, whatever the threads.

They run on the CPU's tiles where it has them and otherwise in the emulated build, so that none of
this is skipped on a CPU with AVX-512 and its bf16 instructions.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttune import _native
from fasttune.ops import (
    LoraBranch,
    LoraProjection,
    _dropout,
    _gemm,
    attention,
    bottleneck,
    lora_linear,
    lora_linear_group,
    lora_segmented,
)
from fasttune.testing.numerics import check, largest_error

AVAILABLE = _native.cpu().isa_available().split(",")
TILES = [isa for isa in ("amx", "amxemulated") if isa in AVAILABLE]

if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
    pytest.skip("this CPU has no avx512_bf16, on which these kernels rest", allow_module_level=True)


def test_a_build_with_tiles_is_there():
    assert TILES, "build with FASTTUNE_EMULATED_AMX=1, as make does"
    assert AVAILABLE[0] != "amxemulated"


@contextlib.contextmanager
def build(isa):
    previous = _native.cpu().isa_name()
    _native.cpu().set_isa(isa)
    try:
        yield
    finally:
        _native.cpu().set_isa(previous)


@contextlib.contextmanager
def threads(count):
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def draws(p):
    return {"seed": torch.tensor(77), "threshold": _dropout.threshold(p), "branch": 1}


def products(x, t, a, b, addend, p):
    """Every product of a LoRA layer: t, dx, dA, y0, d, dB."""
    kept = draws(p)
    down = _native.lora_down(x, a, 0.5, None, **kept)
    backward = {"dx_dtype": torch.bfloat16, "need_dx": True, "need_da": True, "addend": addend}
    dx, da = _native.lora_down_backward(t, a, x, **kept, **backward)
    up = _native.lora_up(t, b, b[:, 0], out_dtype=torch.bfloat16)
    d, db = _native.lora_up_backward(x, t, b, 2.0, None, need_d=True, need_db=True)
    return {"t": down, "dx": dx, "da": da, "y0": up, "d": d, "db": db}


def exact_products(x, t, a, b, addend, p):
    kept = draws(p)
    keep = _dropout.keep_mask(
        kept["seed"], kept["threshold"], *x.shape, branch=kept["branch"], row_offset=0
    )
    x, t, a, b = (v.double() for v in (x, t, a, b))
    masked = x * keep
    dx = t @ a * keep + (0 if addend is None else addend.double())
    up = t @ b.T + b[:, 0]
    return {"t": 0.5 * masked @ a.T, "dx": dx, "da": t.T @ masked, "y0": up, "d": 2 * x @ b,
            "db": x.T @ t}  # fmt: skip


def operands(rows, features, rank):
    x = torch.randn(rows, features).bfloat16()
    return x, torch.randn(rows, rank), torch.randn(rank, features), torch.randn(features, rank)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("addend", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "features", "rank"),
    [(64, 64, 16), (66, 70, 4), (65, 31, 33), (300, 576, 16), (289, 1, 1), (97, 130, 256)],
)
def test_lora_is_as_exact_as_on_vectors(rows, features, rank, addend, p, isa):
    given = operands(rows, features, rank)
    extra = None if addend is None else torch.randn(rows, features).to(addend)
    with build(isa):
        ours = products(*given, extra, p)
    with build("avx512"):
        vectors = products(*given, extra, p)
    exact = exact_products(*given, extra, p)
    for name, truth in exact.items():
        bar = 1.1 * largest_error(vectors[name], truth) + 1e-7
        assert largest_error(ours[name], truth) <= bar, name


@pytest.mark.parametrize("isa", TILES)
def test_few_rows_run_on_vectors(isa):
    given = operands(63, 96, 16)
    with build(isa):
        ours = products(*given, None, 0.05)
    with build("avx512"):
        vectors = products(*given, None, 0.05)
    assert all(torch.equal(value, ours[name]) for name, value in vectors.items())


@pytest.mark.parametrize("isa", TILES)
def test_the_addend_is_scaled_by_column(isa):
    t, b = torch.randn(70, 8), torch.randn(75, 8)
    addend, scale = torch.randn(70, 75).bfloat16(), torch.randn(75)
    with build(isa):
        y = _native.lora_up(t, b, None, out_dtype=torch.bfloat16, addend=addend, addend_scale=scale)
    exact = t.double() @ b.double().T + addend.double() * scale.double()
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("isa", TILES)
def test_lora_does_not_depend_on_the_threads(isa):
    given = operands(330, 200, 16)
    runs = []
    for count in (1, 2, 5):
        with build(isa), threads(count):
            runs.append(products(*given, None, 0.05))
    for name, value in runs[0].items():
        assert all(torch.equal(value, run[name]) for run in runs[1:]), name


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["x", "t", "a"])
def test_what_is_not_finite_stays_visible(place, value, isa):
    x, t, a, _ = operands(64, 96, 16)
    {"x": x, "t": t, "a": a}[place][5, 7] = value
    call = {"dx_dtype": torch.bfloat16, "need_dx": True, "need_da": True}
    with build(isa):
        down = _native.lora_down(x, a, 1.0, None, **draws(0.0))
        dx, da = _native.lora_down_backward(t, a, x, **draws(0.0), **call)
    touched = {"x": (down[5], da[:, 7]), "t": (dx[5], da[7]), "a": (down[:, 5], dx[:, 7])}
    for part in touched[place]:
        assert not part.isfinite().any()
    if place == "a" and value == value:  # an infinite factor has no lower terms
        assert down[:, 5].isinf().all()
    rest = {"x": torch.cat([down[:5], down[6:]]), "t": torch.cat([dx[:5], dx[6:]]), "a": da}
    assert rest[place].isfinite().all()


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("p", [0.0, 0.05])
def test_nothing_is_read_beyond_the_matrix(p, isa):
    """x and the addend are parts of wider and longer tensors that are not numbers elsewhere."""
    rows, features = 70, 50
    around = torch.full((rows + 4, features + 20), torch.nan).bfloat16()
    around[:rows, :features] = torch.randn(rows, features).bfloat16()
    x = around[:rows, :features]
    _, t, a, b = operands(rows, features, 16)
    with build(isa):
        inside = products(x, t, a, b, x, p)
        alone = products(x.contiguous(), t, a, b, x.contiguous(), p)
    for name, value in alone.items():
        assert torch.equal(value, inside[name]), name


@pytest.mark.parametrize("isa", TILES)
def test_a_dropped_value_that_is_not_finite_is_zero(isa):
    """Dropout selects; it does not multiply."""
    x, _, a, _ = operands(64, 96, 16)
    keep = _dropout.keep_mask(draws(0.5)["seed"], draws(0.5)["threshold"], 64, 96, branch=1,
                              row_offset=0)  # fmt: skip
    clean = x.clone()
    x[keep == 0] = torch.nan
    with build(isa):
        assert torch.equal(
            _native.lora_down(x, a, 1.0, None, **draws(0.5)),
            _native.lora_down(clean, a, 1.0, None, **draws(0.5)),
        )


def layouts(w, layout):
    """w [K, N], by rows or as the transpose of a weight, in the middle of what is not a number."""
    around = torch.full((w.shape[0] + 3, w.shape[1] + 5), torch.nan).bfloat16()
    around[1:-2, 2:-3] = w
    inside = around[1:-2, 2:-3]
    if layout == "rows":
        return inside
    flipped = torch.full((w.shape[1] + 3, w.shape[0] + 5), torch.nan).bfloat16()
    flipped[1:-2, 2:-3] = w.t()
    return flipped[1:-2, 2:-3].t()


def base_operands(rows, depth, columns, rank, layout="rows"):
    x = torch.randn(rows, depth).bfloat16()
    w = layouts((torch.randn(depth, columns) / depth**0.5).bfloat16(), layout)
    return x, w, torch.randn(rows, rank), torch.randn(columns, rank)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("addend", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "depth", "columns", "rank"),
    [(64, 32, 32, 16), (66, 70, 131, 4), (65, 31, 33, 33), (300, 576, 192, 16), (97, 1, 7, 0),
     (70, 2000, 40, 256), (2500, 700, 64, 1)],
)  # fmt: skip
def test_a_base_product_joins_in_one_rounding(rows, depth, columns, rank, addend, layout, isa):
    x, w, t, b = base_operands(rows, depth, columns, rank, layout)
    extra = None if addend is None else torch.randn(rows, columns).to(addend)
    bias = torch.randn(columns)
    with build(isa):
        assert _native.takes_product(x, w)
        y = _native.lora_up(t, b, bias, out_dtype=torch.bfloat16, addend=extra, product=(x, w))
    parts = [t.double() @ b.double().T + bias.double(), x.double() @ w.double()]
    parts += [] if extra is None else [extra.double()]
    exact = sum(parts)
    # One rounding to bf16, and sums of fp32 that are as long as x is wide.
    size = sum(part.abs() for part in parts)
    allowed = 2**-8 * exact.abs() + 2**-24 * depth * size
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("need_da", [False, True])
def test_only_the_branch_of_a_base_product_is_dropped(need_da, dtype, isa):
    dy, w, d, a = base_operands(130, 96, 200, 16)
    x, addend = torch.randn(130, 200).bfloat16(), torch.randn(130, 200).to(dtype)
    call = {**draws(0.3), "dx_dtype": dtype, "need_dx": True, "need_da": need_da}
    with build(isa):
        dx, da = _native.lora_down_backward(
            d, a.t().contiguous(), x, **call, addend=addend, product=(dy, w)
        )
        _, alone = _native.lora_down_backward(
            d, a.t().contiguous(), x, **{**call, "need_dx": False}
        )
    keep = _dropout.keep_mask(
        call["seed"], call["threshold"], 130, 200, branch=call["branch"], row_offset=0
    )
    exact = d.double() @ a.double().T * keep + addend.double() + dy.double() @ w.double()
    rtol = 2**-8 if dtype == torch.bfloat16 else 2**-16
    torch.testing.assert_close(dx.double(), exact, rtol=rtol, atol=1e-4)
    assert (da is None) == (not need_da)
    assert da is None or torch.equal(da, alone)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("rows", "features", "rank"), [(70, 96, 16), (600, 130, 33), (64, 31, 1)])
def test_a_layer_in_one_pass_equals_its_two_products(rows, features, rank, count, p, isa):
    """Few rows share out the columns, and then several threads make the same rows of t."""
    x, w, _, b = base_operands(rows, features, 250, rank, "transposed")
    a, bias, scale = torch.randn(rank, features), torch.randn(250), torch.tensor(0.5)
    with build(isa), threads(count):
        y, t = _native.lora_layer((x, w), a, b, bias, 3.0, scale, **draws(p), out_dtype=x.dtype)
        down = _native.lora_down(x, a, 3.0, scale, **draws(p))
        up = _native.lora_up(down, b, bias, out_dtype=x.dtype, product=(x, w))
    assert torch.equal(t, down) and torch.equal(y, up)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kept_dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "columns", "rank"), [(70, 96, 250, 16), (600, 130, 64, 33), (64, 31, 9, 0)]
)
def test_a_product_is_kept_before_it_is_scaled(
    rows, features, columns, rank, kept_dtype, count, isa
):
    """``kept`` has its bits without a branch; a row of it has room behind."""
    x, w, _, b = base_operands(rows, features, columns, rank, "transposed")
    a, bias, scale = torch.randn(rank, features), torch.randn(columns), torch.randn(columns)
    room = torch.full((rows, columns + 3), 7.0, dtype=kept_dtype or torch.float32)
    kept = room[:, :columns]
    extra = {"kept": kept if kept_dtype else None, "product_scale": scale}
    with build(isa), threads(count):
        y, t = _native.lora_layer(
            (x, w), a, b, bias, 3.0, None, **draws(0.0), out_dtype=torch.float32, **extra
        )
        nothing = (torch.empty(rows, 0), torch.empty(columns, 0), None)
        plain = _native.lora_up(*nothing, out_dtype=kept.dtype, product=(x, w))
    assert torch.equal(kept, plain) if kept_dtype else bool((room == 7).all())
    assert bool((room[:, columns:] == 7).all())
    base = x.double() @ w.double()
    truth = scale * base + t.double() @ b.double().t() + bias
    assert largest_error(y, truth) < 2e-6 * float(truth.abs().max())
    reduced = 3 * x.double() @ a.double().t()
    assert rank == 0 or largest_error(t, reduced) < 2e-6 * float(reduced.abs().max())


@pytest.mark.parametrize("isa", AVAILABLE)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("few", [1, 16, 32])
@pytest.mark.parametrize(
    ("rows", "features", "rank"), [(70, 96, 16), (300, 1000, 5), (64, 290, 33), (9, 31, 1)]
)
def test_norms_and_products_of_a_few_rows(rows, features, rank, few, dtype, count, isa):
    """In one pass over a weight whose rows have room behind them, as has x."""
    weight = torch.randn(rows, features + 7).to(dtype)[:, :features]
    x = torch.randn(few, 2 * features).to(dtype)[:, :features]
    a, b = torch.randn(rank, features), torch.randn(rows, rank) / rank
    with build(isa), threads(count):
        norms, product = _native.row_norms(weight, a, b, 0.7, x)
        alone, nothing = _native.row_norms(weight, a, b, 0.7)
    truth = torch.linalg.vector_norm(weight.double() + 0.7 * b.double() @ a.double(), dim=1)
    assert float(((norms - truth) / truth).abs().max()) < 1e-6
    assert torch.equal(norms, alone) and nothing is None
    exact = x.double() @ weight.double().t()
    assert _native.takes_few_rows(x, weight, a)
    assert largest_error(product, exact) < 2e-6 * float(exact.abs().max())


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("rows", [70, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_of_a_layer_in_one_pass_equals_its_two(dtype, rows, count, p, isa):
    """Also where A is converted for the call alone."""
    dy, w, _, _ = base_operands(rows, 250, 1300, 16)
    b, a = torch.randn(250, 16, dtype=dtype), torch.randn(16, 1300, dtype=dtype)
    x = torch.randn(rows, 1300).bfloat16()
    call = {**draws(p), "dx_dtype": x.dtype, "need_dx": True, "need_da": True, "product": (dy, w)}
    with build(isa), threads(count):
        fused = _native.lora_down_backward(None, a, x, **call, up=(b, 2.0, None))
        d, _ = _native.lora_up_backward(dy, None, b, 2.0, None, need_d=True, need_db=False)
        apart = _native.lora_down_backward(d, a, x, **call)
    assert all(torch.equal(one, two) for one, two in zip(fused, apart, strict=True))


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("depth", [1500, 5000])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_a_deep_product_is_a_sum_in_fp32(depth, layout, isa):
    x, w, _, _ = base_operands(70, depth, 96, 0, layout)
    with build(isa):
        assert _native.takes_product(x, w, deep=True)
        y = _native.deep_product(x, w)
    exact = x.double() @ w.double()
    stock = x.float() @ w.float()
    assert y.dtype == torch.float32
    assert largest_error(y, exact) <= 4 * largest_error(stock, exact)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_parts_of_the_depth_add_up_to_a_deep_product_on_any_number_of_threads(layout, isa):
    x, w, _, _ = base_operands(300, 7000, 70, 0, layout)  # five passes, the last one not whole
    runs = []
    for count in (1, 2, 3, 9):
        with build(isa), threads(count):
            runs.append(_native.deep_product(x, w))
    exact = x.double() @ w.double()
    assert largest_error(runs[0], exact) <= 4 * largest_error(x.float() @ w.float(), exact)
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize("isa", TILES)
def test_a_wide_weight_is_shared_out_by_its_columns(isa):
    x, w, t, b = base_operands(600, 64, 8000, 16, "transposed")
    with build(isa), threads(2):
        y = _native.lora_up(t, b, None, out_dtype=torch.bfloat16, product=(x, w))
    exact = x.double() @ w.double() + t.double() @ b.double().T
    assert largest_error(y, exact) <= 2 * largest_error(exact.bfloat16(), exact)


@pytest.mark.parametrize("isa", TILES)
def test_a_base_product_does_not_depend_on_the_threads(isa):
    x, w, t, b = base_operands(330, 200, 230, 16)
    runs = []
    for count in (1, 2, 5):
        with build(isa), threads(count):
            runs.append(_native.lora_up(t, b, None, out_dtype=torch.bfloat16, product=(x, w)))
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["x", "w", "t"])
def test_what_is_not_finite_in_a_base_product_stays_in_its_row_or_column(place, value, isa):
    x, w, t, b = base_operands(70, 96, 100, 16)
    {"x": x, "w": w, "t": t}[place][5, 7] = value
    with build(isa):
        y = _native.lora_up(t, b, None, out_dtype=torch.bfloat16, product=(x, w))
    touched = y[:, 7] if place == "w" else y[5]
    assert not touched.isfinite().any()
    rows = torch.arange(70) != 5 if place != "w" else slice(None)
    columns = torch.arange(100) != 7 if place == "w" else slice(None)
    assert y[rows][:, columns].isfinite().all()


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("depth", "columns"), [(0, 40), (40, 0)])
def test_empty_base_products(depth, columns, rank, isa):
    x, w = torch.empty(70, depth).bfloat16(), torch.empty(depth, columns).bfloat16()
    x.zero_(), w.zero_()
    t, b = torch.randn(70, rank), torch.randn(columns, rank)
    with build(isa):
        y = _native.lora_up(t, b, None, out_dtype=torch.bfloat16, product=(x, w))
        assert torch.equal(_native.deep_product(x, w), torch.zeros(70, columns))
    torch.testing.assert_close(y.float(), t @ b.T, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_wide_model_under_autocast_multiplies_on_tiles(dtype, isa, monkeypatch):
    """The products go in rounded to bf16; the branch reads x as it came."""
    monkeypatch.setattr(_gemm, "bf16_products_are_fast", lambda: True)
    x = torch.randn(80, 96, dtype=dtype, requires_grad=True)
    w, a, b = torch.randn(72, 96, dtype=dtype), torch.randn(4, 96), torch.randn(72, 4)
    dy = torch.randn(80, 72).bfloat16()
    with build(isa), torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, w, a, b)
    with build(isa):
        (dx,) = torch.autograd.grad(y, x, dy)
    rounded, weight = x.detach().bfloat16().double(), w.bfloat16().double()
    exact = rounded @ weight.T + x.detach().double() @ a.double().T @ b.double().T
    backward = dy.double() @ weight + dy.double() @ b.double() @ a.double()
    assert y.dtype == torch.bfloat16 and dx.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)
    rtol, atol = {torch.float32: (2**-16, 1e-3)}.get(dtype, (2**-7, 0.1))
    torch.testing.assert_close(dx.double(), backward, rtol=rtol, atol=atol)


@pytest.mark.parametrize("isa", TILES)
def test_a_group_with_an_opaque_base_in_fp16_counts_each_product_once(isa):
    x = torch.randn(80, 96).bfloat16().requires_grad_()
    branches = [(LoraBranch(torch.randn(4, 96), torch.randn(72, 4)),) for _ in range(2)]
    base, w = torch.randn(80, 72).half(), torch.randn(72, 96).bfloat16()
    group = [
        LoraProjection(None, None, branches[0], base),
        LoraProjection(w, None, branches[1]),
    ]
    dys = [torch.randn(80, 72).half(), torch.randn(80, 72).bfloat16()]
    with build(isa):
        (dx,) = torch.autograd.grad(lora_linear_group(x, group), x, dys)
    exact = dys[1].double() @ w.double()
    for dy, (branch,) in zip(dys, branches, strict=True):
        exact += dy.double() @ branch.b.double() @ branch.a.double()
    assert largest_error(dx, exact) <= 2**-6 * float(exact.abs().max())


@pytest.mark.parametrize("isa", TILES)
def test_which_base_products_are_taken(isa):
    x, w = torch.randn(64, 96).bfloat16(), torch.randn(96, 80).bfloat16()
    with build("avx512"):
        assert not _native.takes_product(x, w)
    with build(isa):
        assert _native.takes_product(x, w) and _native.takes_product(x, w.t().contiguous().t())
        assert not _native.takes_product(x[:63], w)
        assert not _native.takes_product(x.float(), w)
        assert not _native.takes_product(x, w.half())
        assert _native.takes_product(x, w.half(), cast=True)
        assert not _native.takes_product(x[:, ::2], w[::2])
        assert not _native.takes_product(x, torch.randn(96, 80, 2).bfloat16()[..., 0])
        deep = torch.empty(64, 5000, dtype=torch.bfloat16)
        for right in (torch.empty(5000, 64, dtype=torch.bfloat16), deep.t()):
            assert not _native.takes_product(deep, right)
            assert _native.takes_product(deep, right, deep=True)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("counts", [(1,), (1, 1), (2,), (0, 1)])
def test_lora_linear_takes_each_base_product_once(counts, isa, monkeypatch):
    """With a branch of the projection, in forward and backward, and right either way."""
    x = torch.randn(70, 96).bfloat16().requires_grad_()
    projections = []
    for i, count in enumerate(counts):
        branches = [
            LoraBranch(torch.randn(4, 96).requires_grad_(), torch.randn(40 + i, 4))
            for _ in range(count)
        ]
        projections.append(LoraProjection(torch.randn(40 + i, 96).bfloat16(), None, branches))
    leaves = [x, *(branch.a for p in projections for branch in p.branches)]
    taken = []

    def counted(call):
        def wrapped(*args, **kwargs):
            taken.append(call is layer or kwargs.get("product") is not None)
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(_gemm, "bf16_products_are_fast", lambda: True)  # as on a CPU with tiles

    def run():
        ys = lora_linear_group(x, projections)
        grads = torch.autograd.grad(sum(y.float().square().sum() for y in ys), leaves)
        return [y.detach() for y in ys], grads

    layer = _native.lora_layer
    for name in ("lora_layer", "lora_up", "lora_down_backward"):
        monkeypatch.setattr(_native, name, counted(getattr(_native, name)))
    with build(isa):
        ys, grads = run()
    with_lora = sum(count > 0 for count in counts)
    assert sum(taken) == 2 * with_lora
    with build("avx512"):
        stock_ys, stock_grads = run()
    assert sum(taken) == 2 * with_lora
    for mine, other in zip([*ys, *grads], [*stock_ys, *stock_grads], strict=True):
        assert largest_error(mine, other) <= 2**-6 * float(other.abs().max())


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "autocast"])
@pytest.mark.parametrize(
    ("lengths", "tiled"),
    [((64, 80, 70), True), ((70, 20, 64), True), ((20, 30), False), ((1,) * 70, False)],
    ids=["long", "short", "few", "single"],
)
def test_runs_of_rows_take_the_base_product_with_them(lengths, tiled, dtype, isa, monkeypatch):
    """On tiles where there are rows enough and few of a tile's stay empty; under autocast t is of x
    as it came, which is not the left side.
    """
    x = torch.randn(sum(lengths), 96, dtype=dtype).requires_grad_()
    w = torch.randn(40, 96).bfloat16()
    branches = [
        LoraBranch(torch.randn(4, 96).requires_grad_(), torch.randn(40, 4).requires_grad_())
        for _ in lengths
    ]
    rows_of = [j for j, length in enumerate(lengths) for _ in range(length)]
    leaves = [x, *(f for branch in branches for f in (branch.a, branch.b))]
    taken = {}

    def counted(name):
        own = getattr(_native, name)

        def call(left, product, *args):
            taken[name] = product is not None
            return own(left, product, *args)

        monkeypatch.setattr(_native, name, call)

    counted("runs_forward")
    counted("runs_backward")
    monkeypatch.setattr(_gemm, "bf16_products_are_fast", lambda: True)  # as on a CPU with tiles

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = lora_segmented(x, w, branches, rows_of)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    with build(isa):
        mine = run()
    forward = tiled and dtype == torch.bfloat16
    assert taken == {"runs_forward": forward, "runs_backward": tiled}
    with build("avx512"):
        other = run()
    assert taken == {"runs_forward": False, "runs_backward": False}
    for ours, theirs in zip(mine, other, strict=True):
        assert largest_error(ours, theirs) <= 2**-6 * float(theirs.abs().max())


def heads(batch, count, kv_heads, queries, keys, width):
    shapes = [(queries, count), (keys, kv_heads), (keys, kv_heads)]
    return [
        torch.randn(batch, positions, n, width).bfloat16().transpose(1, 2).requires_grad_()
        for positions, n in shapes
    ]


def run(leaves, dout, **options):
    out = attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def mask_of(kind, queries, keys):
    allowed = torch.rand(2, 1, queries, keys) < 0.7
    allowed[..., 0] = True
    if kind == "none":
        return {}
    if kind == "causal":
        return {"causal": True}
    bias = torch.randn(2, 1, queries, keys).masked_fill(~allowed, -torch.inf)
    return {"mask": allowed if kind == "bool" else bias}


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
@pytest.mark.parametrize(
    ("count", "kv_heads", "queries", "keys", "width"),
    [(6, 2, 150, 150, 64), (3, 3, 70, 300, 40), (2, 1, 33, 129, 16), (2, 2, 65, 65, 256),
     (4, 2, 1, 200, 128), (1, 1, 16, 5, 3)],
)  # fmt: skip
def test_attention_is_as_exact_as_on_vectors(count, kv_heads, queries, keys, width, kind, isa):
    if kind == "causal":
        keys = queries
    leaves = heads(2, count, kv_heads, queries, keys, width)
    options = mask_of(kind, queries, keys)
    dout = torch.randn(2, count, queries, width).bfloat16()
    with build(isa):
        ours = run(leaves, dout, **options)
    with build("avx512"):
        vectors = run(leaves, dout, **options)
        exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
        truth = run(exact, dout.float(), **options)
    for name, mine, other, right in zip(
        ("out", "dq", "dk", "dv"), ours, vectors, truth, strict=True
    ):
        bar = 1.02 * largest_error(other, right) + 2e-5
        assert largest_error(mine, right) <= bar, name


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("keys", [140, 700])
def test_attention_does_not_depend_on_the_threads(keys, isa):
    leaves = heads(1, 6, 2, keys, keys, 64)
    dout = torch.randn(1, 6, keys, 64).bfloat16()
    runs = []
    for count in (1, 2, 5):
        with build(isa), threads(count):
            runs.append(run(leaves, dout, causal=True))
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


@pytest.mark.parametrize("isa", TILES)
def test_rows_that_see_nothing_are_zero(isa):
    leaves = heads(2, 4, 2, 70, 70, 32)
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool).tril()
    mask[0, :, :, :9] = False
    with build(isa):
        out, dq, dk, dv = run(leaves, torch.ones(2, 4, 70, 32).bfloat16(), mask=mask)
    assert not out[0, :, :9].any() and out[0, :, 9:].ne(0).all()
    assert not dq[0, :, :9].any() and not dk[0, :, :9].any() and not dv[0, :, :9].any()
    assert all(value.isfinite().all() for value in (out, dq, dk, dv))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("isa", TILES)
def test_single_gradients_of_attention(wanted, isa):
    leaves = heads(1, 4, 2, 150, 150, 64)
    dout = torch.randn(1, 4, 150, 64).bfloat16()
    with build(isa):
        whole = run(leaves, dout, causal=True)[1:]
        some = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(leaves)]
        chosen = [some[i] for i in wanted]
        grads = torch.autograd.grad(attention(*some, causal=True), chosen, dout)
    for i, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, whole[i])


STARVED = """
import math
import resource, sys, torch
from fasttune import _native
_native.cpu().set_isa(sys.argv[1])
torch.set_num_threads(1)
def down(features):
    a = torch.ones(16, features)
    x, no_dropout = torch.ones(64, features).bfloat16(), dict(seed=None, threshold=0, branch=0)
    return _native.lora_down(x, a, 1.0, None, **no_dropout)
small = down(256)
x, panel = torch.ones(64, 20000).bfloat16(), torch.ones(20000, 16)
t, none = torch.empty(64, 16), _native.cpu().Dropout(0, 0, 0, 0)
def large():
    _native.cpu().lora_reduce(x, panel.data_ptr(), 16, 1.0, none, t.data_ptr(), 1)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held, resource.RLIM_INFINITY))
try:
    large()
    print("had room")
except MemoryError:
    print("refused")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(down(256), small)
large()
assert t.eq(20000).all()
"""


def adapter_operands(rows, features, outputs, rank, dtype=torch.bfloat16):
    torch.manual_seed(0)
    shapes = {
        "x": (rows, features), "residual": (rows, outputs), "down": (rank, features),
        "up": (outputs, rank), "down_bias": (rank,), "up_bias": (outputs,),
    }  # fmt: skip
    drawn = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in drawn.items()}


def adapter_results(given, dy, **options):
    for leaf in given.values():
        leaf.grad = None
    y = bottleneck(*(given[name] for name in ("x", "down", "up")), **{
        name: given[name] for name in ("residual", "down_bias", "up_bias")
    }, **options)  # fmt: skip
    y.backward(dy)
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in given.items()}}


ADAPTERS = [
    (64, 64, 64, 16, 0.0),
    (65, 1, 1, 1, 0.0),
    (70, 77, 45, 5, 0.1),
    (300, 130, 1030, 33, 0.1),  # beyond 256 rows sums go on in memory
    (96, 1024, 96, 40, 0.0),  # rows of x that share lines of the caches
    (530, 96, 96, 256, 0.0),
]
ADAPTERS_FP32 = [  # wider than LoRA's products take
    (64, 64, 64, 64, 0.0),
    (65, 1, 1, 49, 0.0),
    (70, 77, 45, 50, 0.1),
    (300, 130, 1030, 72, 0.1),
    (96, 1024, 96, 100, 0.0),  # sums over the features in three parts
    (530, 96, 96, 256, 0.0),
]


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize(
    ("rows", "features", "outputs", "rank", "p", "dtype"),
    [(*sizes, torch.bfloat16) for sizes in ADAPTERS]
    + [(*sizes, torch.float32) for sizes in ADAPTERS_FP32],
)
def test_a_whole_bottleneck_adapter_is_as_exact_as_its_products(
    rows, features, outputs, rank, p, dtype, isa, monkeypatch
):
    given = adapter_operands(rows, features, outputs, rank, dtype)
    dy = torch.randn(rows, outputs).to(dtype)
    options = {"activation": "silu", "scale": 0.75, "dropout_p": p, "seed": torch.tensor(7)}
    with build(isa):
        ours = adapter_results(given, dy, **options)
        monkeypatch.setattr(_native, "takes_bottleneck", lambda *_: False)
        theirs = adapter_results(given, dy, **options)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in given.items()}
    exact = adapter_results(wide, dy.double(), **options)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)  # two ways, not one
    for name, truth in exact.items():
        check(name, ours[name], theirs[name], truth)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize(("rank", "dtype"), [(24, torch.bfloat16), (56, torch.float32)], ids=str)
def test_a_bottleneck_adapter_does_not_depend_on_the_threads(rank, dtype, isa):
    given = adapter_operands(330, 200, 230, rank, dtype)
    dy = torch.randn(330, 230).to(dtype)
    runs = []
    for count in (1, 2, 5):
        with build(isa), threads(count):
            runs.append(adapter_results(given, dy, dropout_p=0.1, seed=torch.tensor(7)))
    assert all(torch.equal(runs[0][name], run[name]) for run in runs[1:] for name in run)


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize(("rank", "dtype"), [(16, torch.bfloat16), (56, torch.float32)], ids=str)
@pytest.mark.parametrize("wanted", ["x", "residual", "down", "up", "down_bias", "up_bias"])
def test_single_gradients_of_a_bottleneck_adapter(wanted, rank, dtype, isa):
    given = adapter_operands(70, 64, 96, rank, dtype)
    dy = torch.randn(70, 96).to(dtype)
    with build(isa):
        everything = adapter_results(given, dy)
        for name, leaf in given.items():
            leaf.requires_grad_(name == wanted)
        alone = adapter_results(given, dy)
    assert [name for name in given if alone[name] is not None] == [wanted]
    assert torch.equal(alone[wanted], everything[wanted])


@pytest.mark.parametrize("isa", TILES)
def test_rows_beyond_the_last_one_add_nothing(isa):
    given = adapter_operands(65, 64, 64, 16)
    with torch.no_grad():
        given["up"][3, 5] = torch.inf  # times the zeros beyond the last row a NaN
        given["x"].fill_(1.0)
    with build(isa):
        found = adapter_results(given, torch.ones(65, 64).bfloat16(), activation="identity")
    assert bool((found["down"][5] == torch.inf).all())
    assert bool(found["down"][:5].isfinite().all() and found["down"][6:].isfinite().all())


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("value", [3.4e38, -3.39e38, 1e38, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", ["x", "down", "up", "dy"])
def test_the_largest_numbers_and_those_that_are_none(place, value, isa):
    """A term that is rounded would be infinite above the largest bf16, and an infinity times a term
    that is zero is a NaN."""
    given, dy = adapter_operands(70, 64, 64, 64, torch.float32), torch.rand(70, 64)
    with torch.no_grad():
        given["x"].mul_(1e-3)  # so that no sum of finite products overflows
        given["down"].mul_(1e-3)
        (dy if place == "dy" else given[place])[5, 7] = value
    with build(isa):
        found = adapter_results(given, dy, activation="identity")

    def plain(dtype):
        own = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in given.items()}
        h = torch.nn.functional.linear(own["x"], own["down"], own["down_bias"])
        y = own["residual"] + torch.nn.functional.linear(h, own["up"], own["up_bias"])
        y.backward(dy.to(dtype))
        return {"y": y.detach(), **{name: leaf.grad for name, leaf in own.items()}}

    truths = plain(torch.float64)
    for name, stock in plain(torch.float32).items():
        ours, finite = found[name], stock.isfinite()
        assert torch.equal(ours.isfinite(), finite), name
        torch.testing.assert_close(ours[~finite], stock[~finite], equal_nan=True)
        check(name, ours[finite], stock[finite], truths[name][finite])


@pytest.mark.parametrize("isa", TILES)
def test_which_bottleneck_adapters_are_taken(isa):
    x, down, up = torch.randn(64, 40), torch.randn(8, 40), torch.randn(24, 8)
    residual, half = torch.randn(64, 24), torch.float16
    with build(isa):
        takes = _native.takes_bottleneck
        assert takes(x, down, up, torch.bfloat16, residual, 0)
        assert takes(x.bfloat16().view(4, 16, 40), down, up, torch.bfloat16, None, 0)
        assert not takes(x, down, up, torch.float32, residual, 0)
        wide = torch.randn(49, 40), torch.randn(24, 49)
        assert takes(x, *wide, torch.float32, residual, 6554)
        assert not takes(x[:63], *wide, torch.float32, None, 0)
        assert not takes(x, *wide, torch.float32, residual.bfloat16(), 0)
        assert not takes(x.bfloat16(), *wide, torch.float32, None, 0)
        assert not takes(x[:63], down, up, torch.bfloat16, None, 0)
        assert not takes(x.to(half), down, up, torch.bfloat16, None, 0)
        assert not takes(x, down, up, torch.bfloat16, residual.to(half), 0)
        assert not takes(x, torch.randn(257, 40), torch.randn(24, 257), torch.bfloat16, None, 0)
    with build("avx512"):
        assert not _native.takes_bottleneck(x, down, up, torch.bfloat16, residual, 0)
        assert not _native.takes_bottleneck(x, *wide, torch.float32, residual, 0)


@pytest.mark.parametrize("isa", TILES)
def test_out_of_memory_is_an_error_that_can_be_survived(isa):
    run = subprocess.run(
        [sys.executable, "-c", STARVED, isa], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "refused"


class _Named:
    """The extension under the name of another build."""

    def __init__(self, name):
        self.isa_name = lambda: name

    def __getattr__(self, name):
        return getattr(_native.cpu(), name)


@pytest.mark.parametrize(
    ("rank", "dtype", "p", "expected"),
    [
        (64, torch.float32, 0.0, ["mm"] * 3 + ["addmm"] * 2 + ["mm"]),
        (70, torch.float32, 0.0, ["mm"] * 3 + ["addmm"] * 2 + ["mm"]),
        (64, torch.float32, 0.3, ["mm"] * 2 + ["addmm"]),
        (63, torch.float32, 0.0, []),
        (64, torch.bfloat16, 0.0, []),
    ],
)
def test_wide_fp32_products_are_the_vendors_where_they_are_faster(
    rank, dtype, p, expected, monkeypatch
):
    torch.manual_seed(0)
    x, dy = torch.randn(37, 90).to(dtype), torch.randn(37, 50).to(dtype)
    a, b, t = torch.randn(rank, 90), torch.randn(50, rank), torch.randn(37, rank)
    called = []

    def all_products():
        down = _native.lora_down(x, a, 0.5, None, **draws(p))
        d, db = _native.lora_up_backward(dy, t, b, 2.0, None, need_d=True, need_db=True)
        up = _native.lora_up(t, b, None, out_dtype=dtype, addend=dy)
        dx, da = _native.lora_down_backward(
            t, a, x, **draws(p), dx_dtype=dtype, need_dx=True, need_da=True, addend=x
        )
        return {"t": down, "d": d, "db": db, "y": up, "dx": dx, "da": da}

    monkeypatch.setattr(_native.lora_linear, "cpu", lambda: _Named("avx512"))
    ours = all_products()
    monkeypatch.setattr(_native.lora_linear, "cpu", lambda: _Named("amx"))
    for name in ("mm", "addmm"):
        product = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, name=name, f=product, **k: called.append(name) or f(*a, **k)
        )
    vendors = all_products()
    assert called == expected
    for name, product in ours.items():
        torch.testing.assert_close(vendors[name], product, rtol=1e-5, atol=1e-4)
