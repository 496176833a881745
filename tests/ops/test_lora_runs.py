"""Batches with several adapters in C++: every build, whatever the runs, factors and threads."""

from __future__ import annotations

import pytest
import torch

from fasttune import _native
from fasttune.ops import LoraBranch, lora_segmented
from fasttune.testing.numerics import largest_error

BUILDS = _native.cpu().isa_available().split(",")
WAYS = [
    (isa, how)
    for isa in BUILDS
    for how in ("product", "addend", "alone")
    if how != "product" or isa.startswith("amx")  # the builds with tiles
]
K, N, P = 96, 70, 0.25
# Rows of the runs and their branches; of the ragged ones several end in the last 32 rows.
RUNS = {
    "one": ([130], [0]),
    "repeated": ([64, 33, 70, 31, 64], [0, 1, 0, 2, 1]),
    "ragged": ([66, 3, 2, 7], [0, 1, 0, 2]),
    "many": ([5, 9, 1, 7, 40, 3, 2, 30], [0, 1, 2, 0, 1, 2, 1, 0]),
}
RANKS = (16, 5, 33)


@pytest.fixture
def build():
    previous = _native.cpu().isa_name()
    yield _native.cpu().set_isa
    _native.cpu().set_isa(previous)


@pytest.fixture
def threads():
    previous = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(previous)


def batch(lengths, owners, factors, threshold):
    """Runs, branches and what they mean in fp64: a mask [M, K] of each branch."""
    runs, at = [], 0
    for length, owner in zip(lengths, owners, strict=True):
        runs.append((at, at + length, owner))
        at += length
    used = range(max(owners) + 1)
    a = [torch.randn(RANKS[j], K).div(10).to(factors) for j in used]
    b = [torch.randn(N, RANKS[j]).div(4).to(factors) for j in used]
    biases = [torch.randn(N) if j % 2 else None for j in used]
    scales = [0.5 + j for j in used]
    seed = torch.tensor(7)
    streams = [j + 3 for j in used]
    branches = _native.Branches(a, b, biases, scales, seed, [threshold] * len(used), streams)
    ones = torch.ones(at, K)
    masks = [
        _native.drop(ones, seed=seed, threshold=threshold, branch=stream).double()
        for stream in streams
    ]
    return runs, branches, masks


def truth_of(runs, branches, masks, x, w, dy):
    """y, dx, and dA and dB of every branch in fp64."""
    x, w, dy = x.double(), w.double(), dy.double()
    y, dx = x @ w.t(), dy @ w
    das = [torch.zeros(a.shape, dtype=torch.float64) for a in branches.a]
    dbs = [torch.zeros(b.shape, dtype=torch.float64) for b in branches.b]
    for first, end, j in runs:
        rows = slice(first, end)
        a, b, scale, keep = *(t.double() for t in (branches.a[j], branches.b[j])), *(
            branches.scales[j], masks[j][rows],
        )  # fmt: skip
        kept = x[rows] * keep
        t, d = scale * kept @ a.t(), scale * dy[rows] @ b
        bias = branches.biases[j]
        y[rows] += t @ b.t() + (0 if bias is None else bias)
        dx[rows] += keep * (d @ a)
        das[j] += d.t() @ kept
        dbs[j] += dy[rows].t() @ t
    return [y, dx, *das, *dbs]


@pytest.mark.parametrize(("isa", "how"), WAYS)
@pytest.mark.parametrize("dropped", [0, int(P * 65536)], ids=["", "dropout"])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("lengths", RUNS)
def test_runs_are_exact(how, lengths, count, factors, dropped, isa, build, threads):
    """With the base product beside them, onto it, or without one; outputs have room behind."""
    build(isa)
    threads(count)
    assert how != "product" or _native.has_base_product()
    runs, branches, masks = batch(*RUNS[lengths], factors, dropped)
    dtype = torch.bfloat16 if how == "product" else torch.float32
    rows = runs[-1][1]
    x, dy = torch.randn(rows, K).to(dtype), torch.randn(rows, N).to(dtype)
    w = torch.zeros(N, K) if how == "alone" else torch.randn(N, K).div(10)
    w = w.to(dtype)
    room_y, room_dx = torch.full((rows, N + 3), 7.0), torch.full((rows, K + 5), 7.0)
    y, dx = room_y[:, :N], room_dx[:, :K]
    plain = branches._replace(biases=[None] * len(branches.a))
    right, left = (w.t(), w) if how == "product" else (None, None)
    base, base_dx = (x @ w.t(), dy @ w) if how == "addend" else (None, None)
    ts = _native.runs_forward(x, right, base, runs, branches, y)
    needs = [True] * len(branches.a)
    das, dbs = _native.runs_backward(dy, left, base_dx, x, runs, plain, ts, dx, needs, needs)
    truths = truth_of(runs, branches, masks, x, w, dy)
    bound = 2e-6 if factors == torch.float32 else 2**-8
    for i, (mine, truth) in enumerate(zip([y, dx, *das, *dbs], truths, strict=True)):
        assert largest_error(mine, truth) <= (2e-6 if i < 2 else bound) * float(truth.abs().max())
    assert all(each.dtype == factors for each in (*das, *dbs))
    assert bool((room_y[:, N:] == 7).all()) and bool((room_dx[:, K:] == 7).all())


@pytest.mark.parametrize(("isa", "how"), [way for way in WAYS if way[1] != "addend"])
def test_rows_of_no_run_are_left_as_they_are(isa, how, build):
    """Also those behind a run that does not fill its block of tiles."""
    build(isa)
    runs, branches, _ = batch([70, 40, 3, 37], [0, 1, 0, 2], torch.float32, 0)
    gaps = [run for i, run in enumerate(runs) if i in (1, 3)]
    runs = [run for i, run in enumerate(runs) if i in (0, 2)]
    x = torch.randn(150, K).to(torch.bfloat16 if how == "product" else torch.float32)
    right = torch.randn(N, K).to(x.dtype).t() if how == "product" else None
    y = torch.full((150, N), 7.0)
    _native.runs_forward(x, right, None, runs, branches, y)
    for first, end, _ in gaps:
        assert bool((y[first:end] == 7).all())
    assert all(bool((y[first:end] != 7).any(1).all()) for first, end, _ in runs)


@pytest.mark.parametrize("need_x", [True, False])
def test_only_what_is_wanted_is_made(need_x):
    runs, branches, _ = batch(*RUNS["repeated"], torch.float32, int(P * 65536))
    rows = runs[-1][1]
    x, dy = torch.randn(rows, K), torch.randn(rows, N)
    ts = _native.runs_forward(x, None, None, runs, branches, torch.empty(rows, N))
    dx = torch.empty(rows, K)
    every = _native.runs_backward(dy, None, None, x, runs, branches, ts, dx, [True] * 3, [True] * 3)
    for flags in ([True, False, False], [False, False, False]):
        own = torch.empty(rows, K) if need_x else None
        seen = x if any(flags) else None
        found = _native.runs_backward(
            dy, None, None, seen, runs, branches, ts, own, flags, flags[::-1]
        )
        for mine, all_of_them, wanted in zip(found, every, (flags, flags[::-1]), strict=True):
            for one, other, flag in zip(mine, all_of_them, wanted, strict=True):
                assert torch.equal(one, other) if flag else one is None
        assert own is None or torch.equal(own, dx)


@pytest.mark.parametrize("isa", BUILDS)
def test_the_threads_change_nothing(isa, build, threads):
    build(isa)
    runs, branches, _ = batch(*RUNS["many"], torch.float32, int(P * 65536))
    rows = runs[-1][1]
    x, dy = torch.randn(rows, K), torch.randn(rows, N)
    results = []
    for count in (1, 2, 4):
        threads(count)
        y, dx = torch.empty(rows, N), torch.empty(rows, K)
        ts = _native.runs_forward(x, None, None, runs, branches, y)
        grads = _native.runs_backward(
            dy, None, None, x, runs, branches, ts, dx, [True] * 3, [True] * 3
        )
        results.append([y, dx, *grads[0], *grads[1]])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


WRONG = {
    "beyond the rows": {"runs": [(0, 41, 0)]},
    "negative": {"runs": [(-1, 4, 0)]},
    "overlapping": {"runs": [(0, 20, 0), (10, 30, 0)]},
    "no branch": {"runs": [(0, 40, 1)]},
    "A of another depth": {"a": torch.ones(4, K + 1)},
    "B of another rank": {"b": torch.ones(N, 5)},
    "bias of another size": {"bias": torch.ones(N - 1)},
    "y of other rows": {"y": torch.ones(39, N)},
    "an addend of other columns": {"addend": torch.ones(40, N + 1)},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_written(what):
    """The registered op hands on what it gets; the public one has checked it."""
    given = {"a": torch.ones(4, K), "b": torch.ones(N, 4), "bias": torch.ones(N), "addend": None}
    given |= {"y": torch.full((40, N), 7.0), "runs": [(0, 40, 0)]} | WRONG[what]
    branches = _native.Branches([given["a"]], [given["b"]], [given["bias"]], [1.0], None, [0], [0])
    was = given["y"].clone()
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        _native.runs_forward(
            torch.ones(40, K), None, given["addend"], given["runs"], branches, given["y"]
        )
    assert torch.equal(given["y"], was)


@pytest.mark.parametrize("missing", ["x", "t", "dx", "dy"])
def test_a_backward_without_what_it_needs_is_refused(missing):
    runs, branches, _ = batch([40], [0], torch.float32, 0)
    x, dy, dx = torch.ones(40, K), torch.ones(40, N), torch.ones(40, K)
    t = torch.ones(40, RANKS[0])
    changed = {"x": None, "t": None, "dx": dx[:39], "dy": dy[:39]}[missing]
    given = {"x": x, "t": t, "dx": dx, "dy": dy, missing: changed}
    with pytest.raises(ValueError, match=r"shape|rows"):
        _native.runs_backward(
            given["dy"], None, None, given["x"], runs, branches, [given["t"]], given["dx"],
            [True], [True],
        )  # fmt: skip
    assert bool((dx == 1).all())


def test_which_branches_are_taken():
    a, b = torch.randn(4, K), torch.randn(N, 4)
    facts = ([None], [1.0], None, [0], [0])

    def takes(a, b, x=None):
        x = torch.randn(3, K) if x is None else x
        return _native.takes_runs(x, _native.Branches([a], [b], *facts))

    assert takes(a, b) and takes(a[:1], b[:, :1])
    assert takes(torch.randn(256, K), torch.randn(N, 256), torch.randn(3, K).bfloat16())
    assert not takes(torch.randn(257, K), torch.randn(N, 257), torch.randn(3, K).bfloat16())
    assert not takes(torch.randn(64, K), torch.randn(N, 64))  # torch's products are faster
    assert not takes(a[:0], b[:, :0])
    assert not takes(a.t().contiguous().t(), b) and not takes(a, b.repeat(1, 2)[:, ::2])
    negative = torch.view_as_complex(torch.stack((a, -a), -1)).conj().imag
    assert negative.is_neg() and not takes(negative, b)


def test_odd_factors_go_segment_by_segment():
    """Where the kernels do not take them, the results are the same."""
    x, w = torch.randn(8, K), torch.randn(N, K)
    plain = [LoraBranch(torch.randn(4, K), torch.randn(N, 4), 0.5) for _ in range(2)]
    odd = [LoraBranch(p.a.t().contiguous().t(), p.b.t().contiguous().t(), 0.5) for p in plain]
    first, second = (lora_segmented(x, w, each, [0, 1] * 4) for each in (plain, odd))
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-5)
