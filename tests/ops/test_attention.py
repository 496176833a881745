"""attention beyond conformance: arguments, layouts, masked rows, dispatcher, threads."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention

import fasttune
from fasttune import _native
from fasttune.ops import attention
from fasttune.ops.attention import BACKWARD, FORWARD
from fasttune.testing import numerics
from fasttune.testing.accounting import count
from fasttune.testing.conformance import backend as backend_of


def tensors(batch=2, heads=4, kv_heads=2, queries=70, keys=70, width=32, dtype=torch.float32):
    """q, k, v as a model makes them: transposed views of [B, S, H, D]."""
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads)]
    return [
        torch.randn(batch, positions, count, width).to(dtype).transpose(1, 2).requires_grad_()
        for positions, count in shapes
    ]


def results(function, leaves, dout):
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def assert_close(ours, theirs, truth):
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        numerics.check(name, *values)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"k": torch.ones(2, 2, 70, 32, dtype=torch.int64)}, TypeError, "k: expected fp32"),
        ({"q": torch.ones(4, 70, 32)}, ValueError, r"q: expected shape \[batch, heads"),
        ({"v": torch.ones(2, 2, 70, 32).bfloat16()}, TypeError, "v: expected q's dtype"),
        ({"k": torch.ones(2, 2, 70, 16)}, ValueError, r"k: expected shape \[2, any, any, 32\]"),
        ({"k": torch.ones(1, 2, 70, 32)}, ValueError, r"k: expected shape \[2, any, any, 32\]"),
        ({"v": torch.ones(2, 2, 71, 32)}, ValueError, r"v: expected the shape of k \[2, 2, 70"),
        ({"q": torch.ones(2, 5, 70, 32)}, ValueError, "q: expected a multiple of k's 2 heads"),
        ({"k": torch.ones(2, 2, 70, 32, device="meta")}, ValueError, "k: expected device cpu"),
        ({"mask": [True]}, TypeError, "mask: expected a tensor, got list"),
        ({"mask": torch.ones(70, 70, dtype=torch.int64)}, TypeError, "mask: expected fp32"),
        (
            {"mask": torch.ones(2, 3, 70, 70)},
            ValueError,
            r"mask: expected a shape that broadcasts to \[2, 4, 70, 70\], got \[2, 3, 70, 70\]",
        ),
        ({"mask": torch.ones(1, 1, 1, 1, 70)}, ValueError, "mask: expected a shape"),
        ({"mask": torch.ones(70, device="meta")}, ValueError, "mask: expected device cpu"),
        ({"mask": torch.ones(70, requires_grad=True)}, ValueError, "mask: .* requires_grad"),
        ({"mask": torch.ones(70), "causal": True}, ValueError, "causal: expected no mask"),
        ({"q": torch.ones(2, 4, 69, 32), "causal": True}, ValueError, "69 queries and 70 keys"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    q, k, v = (t.detach() for t in tensors())
    given = {"q": q, "k": k, "v": v, **change}
    with pytest.raises(error, match=message):
        attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive", "none"])
def test_equals_sdpa(kind, dtype):
    leaves = tensors(dtype=dtype, queries=130, keys=130)
    allowed = torch.rand(2, 1, 130, 130) < 0.7
    allowed[..., 0] = True
    mask = {
        "bool": allowed,
        "additive": torch.randn(2, 1, 130, 130).masked_fill(~allowed, -torch.inf).to(dtype),
    }.get(kind)
    causal = kind == "causal"
    dout = torch.randn(2, 4, 130, 32).bfloat16()

    def stock(q, k, v):
        bias = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
        return scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=True)

    truth = results(stock, [t.detach().double().requires_grad_() for t in leaves], dout)
    ours = results(lambda *t: attention(*t, mask=mask, causal=causal), leaves, dout)
    assert_close(ours, results(stock, leaves, dout), truth)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("additive", [False, True])
def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient(backend, additive):
    q, k, v = tensors()
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool).tril()
    mask[0, :, :, :9] = False  # left padding: the first nine rows see nothing
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    with fasttune.use_backend(backend):
        out = attention(q, k, v, mask=mask)
    assert not out[0, :, :9].any() and out[0, :, 9:].ne(0).all()
    dq, dk, dv = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    assert not dq[0, :, :9].any() and not dk[0, :, :9].any() and not dv[0, :, :9].any()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_a_row_with_a_low_finite_mask_attends_evenly(backend, low):
    """log l is lost beside a maximum of -1e9; the gradients must not be."""
    leaves = tensors(queries=20, keys=100)
    mask = torch.zeros(20, 100)
    mask[3] = low
    dout = torch.randn(2, 4, 20, 32)

    def even(q, k, v):
        scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 32**-0.5
        scores = torch.where(torch.arange(20).view(-1, 1) == 3, 0 * scores, scores)
        return scores.softmax(-1) @ v.repeat_interleave(2, 1)

    truth = results(even, [t.detach().double().requires_grad_() for t in leaves], dout.double())
    with fasttune.use_backend(backend):
        ours = results(lambda *t: attention(*t, mask=mask), leaves, dout)
    # In fp32, beside -1e9, the scores of the row vanish: dq of the row is that of equal scores.
    ours[1][:, :, 3] = 0
    for name, value, exact in zip(("out", "dq", "dv"), [*ours[:2], ours[3]], [*truth[:2], truth[3]],
                                  strict=True):  # fmt: skip
        assert numerics.largest_error(value, exact) < 1e-5, name


@pytest.mark.parametrize("make", ["transposed", "contiguous", "packed", "expanded"])
def test_layouts(make):
    """The output lies as the model reads it on, gradients as their inputs, and values agree."""
    q, k, v = (t.detach() for t in tensors())
    expected = attention(q, k, v, causal=True)
    if make == "contiguous":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    elif make == "packed":
        packed = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous()
        q, k, v = (part.transpose(1, 2) for part in packed.split([4, 2, 2], dim=2))
    elif make == "expanded":
        k = k[:, :1].expand(-1, 2, -1, -1)
        expected = attention(q, k.contiguous(), v, causal=True)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, causal=True)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous() and not out._is_view()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        if make != "expanded":
            assert grad.stride() == torch.empty_like(leaf).stride()
        assert grad.isfinite().all()


def test_transposed_features_are_copied():
    q, k, v = (t.detach() for t in tensors())
    across = [
        t.transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for t in (q, k, v)
    ]
    out = attention(*across)
    assert torch.equal(out, attention(q, k, v))
    dout = torch.randn(2, 4, 32, 70).transpose(-1, -2)
    for grad in torch.autograd.grad(out, across, dout):
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("queries", "keys"), [(0, 5), (5, 0), (0, 0)], ids=["no queries", "no keys", "nothing"]
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_lengths(queries, keys, backend):
    leaves = tensors(queries=queries, keys=keys)
    with fasttune.use_backend(backend):
        out = attention(*leaves)
    assert out.shape == (2, 4, queries, 32) and not out.any()
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_not_a_number_does_not_vanish():
    q, k, v = (t.detach() for t in tensors(queries=130, keys=130))
    k[0, 0, 100, 3] = torch.nan
    out = attention(q, k, v, causal=True)
    seen = out.isnan().any(-1)
    expected = torch.zeros(2, 4, 130, dtype=torch.bool)
    expected[0, :2, 100:] = True
    assert torch.equal(seen, expected)


def causal_mask(rows):
    return torch.ones(rows, rows, dtype=torch.bool).tril()


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"batch": 1, "heads": 9, "kv_heads": 3, "queries": 333, "keys": 333},
        {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 700, "keys": 700, "width": 16},
        {"batch": 3, "heads": 2, "kv_heads": 1, "queries": 2100, "keys": 130, "width": 128},
        {"batch": 1, "heads": 8, "kv_heads": 1, "queries": 600, "keys": 600, "width": 128},
    ],
    ids=["small", "units left over", "one unit", "few key blocks", "unit beyond a cache"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_thread_counts_give_the_same_bits(threads, case, masked):
    leaves = tensors(**case)
    square = leaves[0].shape[2] == leaves[1].shape[2]
    options = {"mask": causal_mask(leaves[0].shape[2])} if masked else {"causal": True}
    options = options if square else {}
    dout = torch.randn(leaves[0].shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results(lambda *t: attention(*t, **options), leaves, dout)
        torch.set_num_threads(threads)
        for _ in range(3):
            ours = results(lambda *t: attention(*t, **options), leaves, dout)
            for value, other in zip(ours, expected, strict=True):
                assert torch.equal(value, other)
    finally:
        torch.set_num_threads(before)


def test_a_causal_mask_gives_the_bits_of_causal():
    leaves = tensors(queries=200, keys=200)
    dout = torch.randn(2, 4, 200, 32)
    ours = results(lambda *t: attention(*t, mask=causal_mask(200)), leaves, dout)
    causal = results(lambda *t: attention(*t, causal=True), leaves, dout)
    assert all(map(torch.equal, ours, causal))


def kept_keys(kind, rows=200, keys=300):
    """How many keys each row keeps, from the first on, [rows]."""
    row = torch.arange(rows)
    return {
        "padding": torch.full((rows,), 137),
        "one key": torch.ones(rows, dtype=torch.int64),
        "causal and padding": (row + 1).clamp(max=137),
        "later rows keep more": torch.randint(0, keys, (rows,)).sort().values,
        "later rows keep fewer": torch.randint(0, keys, (rows,)).sort(descending=True).values,
        "any": torch.randint(0, keys + 1, (rows,)),
        "a gap": torch.where((row % 64 >= 20) & (row % 64 < 40), 0, keys),
        "nothing": torch.zeros(rows, dtype=torch.int64),
    }[kind]


@pytest.mark.parametrize("name", [f"cpu:{isa}" for isa in _native.cpu().isa_available().split(",")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        "padding", "one key", "causal and padding", "later rows keep more",
        "later rows keep fewer", "any", "a gap", "nothing",
    ],
)  # fmt: skip
def test_a_boolean_mask_gives_the_bits_of_the_additive_one(kind, dtype, name):
    """What a mask of leading keys turns into limits, the additive one gives each score."""
    leaves = tensors(queries=200, keys=300, dtype=dtype)
    dout = torch.randn(2, 4, 200, 32)
    kept = torch.arange(300) < kept_keys(kind).view(-1, 1)
    added = torch.zeros(kept.shape).masked_fill(~kept, -torch.inf)
    spread = torch.stack([kept, ~kept], -1)[..., 0]  # the same, its keys two bytes apart
    with backend_of(name):
        expected = results(lambda *t: attention(*t, mask=added), leaves, dout)
        for mask in (kept, spread):
            ours = results(lambda *t, mask=mask: attention(*t, mask=mask), leaves, dout)
            if "amx" in name:  # with a bias, compilers round a score once more or less
                for value, other in zip(ours, expected, strict=True):
                    largest = float(other.abs().max())
                    assert numerics.largest_error(value, other) <= 2**-8 * largest
            else:
                assert all(map(torch.equal, ours, expected))
    truth = results(
        lambda *t: scaled_dot_product_attention(*t, kept, enable_gqa=True).nan_to_num(),
        [t.detach().double().requires_grad_() for t in leaves], dout,
    )  # fmt: skip
    worst = max(map(numerics.largest_error, ours[:1], truth[:1]))
    assert worst < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.slow
def test_long_sequences():
    """4096 x 4096 scores: many key blocks in flight, and no score matrix in memory."""
    leaves = tensors(batch=1, heads=3, kv_heads=1, queries=4096, keys=4096, width=64)
    dout = torch.randn(1, 3, 4096, 64)

    def stock(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    truth = results(stock, [t.detach().double().requires_grad_() for t in leaves], dout)
    ours = results(lambda *t: attention(*t, causal=True), leaves, dout)
    assert_close(ours, results(stock, leaves, dout), truth)


def op_arguments(mask=None, causal=True):
    q, k, v = (t.detach() for t in tensors(queries=20, keys=20, width=16))
    return q, k, v, mask, causal, 0.25


@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False]])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend, needs):
    with fasttune.use_backend(backend):
        for args in (op_arguments(), op_arguments(causal_mask(20), causal=False)):
            opcheck(FORWARD.registered, args)
            out, row_max, row_sum = FORWARD.registered(*args)
            *tensors_in, causal, scale = args
            given = (torch.randn_like(out), *tensors_in, out, row_max, row_sum)
            opcheck(BACKWARD.registered, (*given, causal, scale, needs))


def test_meta_tensors_have_the_right_shapes_and_strides():
    q, k, v = (t.detach().to("meta").requires_grad_() for t in tensors())
    out = attention(q, k, v, causal=True)
    real = attention(*(t.detach() for t in tensors()), causal=True)
    assert (out.shape, out.stride(), out.device.type) == (real.shape, real.stride(), "meta")
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in (q, k, v))


def test_vmap_and_grad_of_torch_func():
    q, k, v = (t.detach() for t in tensors())
    stacked = torch.stack([q, 2 * q])
    batched = torch.vmap(lambda one: attention(one, k, v, causal=True))(stacked)
    assert torch.allclose(batched[1], attention(2 * q, k, v, causal=True), atol=1e-5)
    gradient = torch.func.grad(lambda t: attention(q, t, v, causal=True).square().sum())(k)
    k.requires_grad_()
    attention(q, k, v, causal=True).square().sum().backward()
    assert torch.allclose(gradient, k.grad, atol=1e-4)


def test_a_second_derivative_raises():
    leaves = tensors()
    out = attention(*leaves, causal=True)
    (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_wide_heads_and_fp64_give_a_reason():
    q, k, v = (t.detach() for t in tensors(width=320, queries=9, keys=9))
    assert "up to 256 features" in FORWARD.reasons(q, k, v, None, False, 1.0)["cpu"]
    with fasttune.use_backend("cpu"), pytest.raises(fasttune.BackendError, match="256 features"):
        attention(q, k, v)
    assert attention(q, k, v).isfinite().all()  # the reference takes it
    mask = torch.zeros(9, 9, dtype=torch.float64)
    assert "float64" in FORWARD.reasons(q, k, v, mask, False, 1.0)["cpu"]


def test_what_is_saved_and_moved_is_declared():
    leaves = [t.to("meta").detach().requires_grad_() for t in tensors(dtype=torch.bfloat16)]
    counts = count(lambda *t: attention(*t, causal=True), *leaves)
    assert counts.total.opaque.calls == 0 and counts.total.calls == 2
    rows = 2 * 4 * 70
    assert counts.saved_bytes == rows * (32 * 2 + 2 * 4)  # out and two fp32 statistics


def _child(connection, args):
    connection.send(attention(*args, causal=True).detach().numpy())


def test_works_after_fork():
    args = [t.detach() for t in tensors()]
    expected = attention(*args, causal=True)
    here, there = multiprocessing.Pipe()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a DataLoader worker does
    try:
        process = multiprocessing.get_context("fork").Process(target=_child, args=(there, args))
        process.start()
        assert here.poll(60), "the forked child hangs"
        assert torch.equal(torch.from_numpy(here.recv()), expected)
        process.join(10)
        assert process.exitcode == 0
    finally:
        torch.set_num_threads(threads)
