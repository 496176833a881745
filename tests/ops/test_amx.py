"""The kernels on tiles: as exact as those on vectors, at every edge, whatever the threads.

They run on the CPU's tiles where it has them and otherwise in the emulated build, so that none of
this is skipped on a CPU with AVX-512 and its bf16 instructions.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttune import _native
from fasttune.ops import _dropout, attention
from fasttune.testing.numerics import largest_error

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
from fasttune._native._extension import matrix
def large():
    _native.cpu().lora_reduce(matrix(x), panel.data_ptr(), 16, 1.0, none, t.data_ptr(), 1)
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


@pytest.mark.parametrize("isa", TILES)
def test_out_of_memory_is_an_error_that_can_be_survived(isa):
    run = subprocess.run(
        [sys.executable, "-c", STARVED, isa], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "refused"
