"""rope beyond conformance: transformers' own functions, memory order, arguments, the dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import fasttune
from fasttune import _native
from fasttune.ops import rope
from fasttune.ops.rope import BACKWARD, FORWARD
from fasttune.testing.accounting import count
from fasttune.testing.conformance import backend

BACKENDS = [
    "reference",
    *(f"cpu:{isa}" for isa in _native.cpu().isa_available().split(",")),
    "triton",
]


def arguments(batch=2, heads=6, kv_heads=2, positions=5, features=64, rotary=None):
    """q and k as views of [B, S, H, D] memory, and random angles."""
    q = torch.randn(batch, positions, heads, features).transpose(1, 2)
    k = torch.randn(batch, positions, kv_heads, features).transpose(1, 2)
    return q, k, *torch.randn(2, batch, positions, rotary or features)


def angles(positions: int, rotary: int) -> Tensor:
    """The R / 2 angles of each position, as a rotary embedding computes them."""
    inverse = 10000 ** (-torch.arange(0, rotary, 2) / rotary)
    return torch.arange(positions)[:, None] * inverse


def halves(function):
    """cos and sin [1, S, R] as llama's rotary embedding: the angles twice, one after the other."""
    return lambda a: function(a).repeat(1, 2)[None]


def neighbours(function):
    """As cohere's: every angle twice in a row."""
    return lambda a: function(a).repeat_interleave(2, dim=-1)[None]


def transformers_function(model: str):
    import importlib

    return importlib.import_module(
        f"transformers.models.{model}.modeling_{model}"
    ).apply_rotary_pos_emb


@pytest.mark.parametrize(
    ("model", "theirs", "ours", "rotary"),
    [
        ("llama", halves, halves, 64),
        ("gpt_neox", halves, halves, 16),
        ("cohere", neighbours, neighbours, 64),
        # glm4 gets llama's tables and interleaves them itself.
        ("glm4", halves, neighbours, 32),
    ],
)
def test_the_reference_gives_the_bits_of_transformers(model, theirs, ours, rotary):
    q, k, *_ = arguments(positions=33)
    q.requires_grad_()
    k.requires_grad_()
    a = angles(33, rotary)
    dq, dk = torch.randn(2, 6, 33, 64), torch.randn(2, 2, 33, 64)
    expected = transformers_function(model)(q, k, theirs(torch.cos)(a), theirs(torch.sin)(a))
    with fasttune.use_backend("reference"):
        found = rope(q, k, ours(torch.cos)(a), ours(torch.sin)(a), interleaved=ours is neighbours)
    for mine, stock in zip(found, expected, strict=True):
        assert torch.equal(mine, stock)
    gradients = torch.autograd.grad(found, (q, k), (dq, dk))
    for mine, stock in zip(gradients, torch.autograd.grad(expected, (q, k), (dq, dk)), strict=True):
        assert torch.equal(mine, stock)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_rounded_once(name, interleaved, dtype):
    """Half a unit in the last place, and the fp32 error of two products and their sum."""
    q, _, cos, sin = arguments(positions=9, features=80)
    x, dy = q.to(dtype).requires_grad_(), torch.randn_like(q).to(dtype)
    with backend(name):
        y, _ = rope(x, None, cos, sin, interleaved=interleaved)
        (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().double().requires_grad_()
    with backend("reference"):
        truth, _ = rope(exact, None, cos.double(), sin.double(), interleaved=interleaved)
        (gradient,) = torch.autograd.grad(truth, exact, dy.double())
    largest = max(float(t.detach().abs().max()) for t in (x, dy))
    products = 2 * largest * max(float(t.abs().max()) for t in (cos, sin))
    info = torch.finfo(dtype)
    for mine, true in ((y, truth), (dx, gradient)):
        half_unit = (info.eps / 2 * true.abs()).clamp(min=info.tiny * info.eps / 2)
        allowed = half_unit + 2 * torch.finfo(torch.float32).eps * products
        assert ((mine.double() - true).abs() <= allowed).all()


def packed_queries(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 5, 3, 4, 64, dtype=dtype)[:, :, 1].transpose(1, 2)


LAYOUTS = {
    "transposed": lambda dtype: torch.randn(2, 5, 4, 64, dtype=dtype).transpose(1, 2),
    "contiguous": lambda dtype: torch.randn(2, 4, 5, 64, dtype=dtype),
    "positions-first": lambda dtype: torch.randn(5, 2, 4, 64, dtype=dtype).permute(1, 2, 0, 3),
    "packed": packed_queries,
    "expanded-heads": lambda dtype: torch.randn(2, 1, 5, 64, dtype=dtype).expand(2, 4, 5, 64),
    "sliced-features": lambda dtype: torch.randn(2, 4, 5, 77, dtype=dtype)[..., 9:73],
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_have_the_memory_order_of_the_inputs(name, layout, monkeypatch):
    q = LAYOUTS[layout](torch.float32).requires_grad_()
    cos, sin = torch.randn(2, 1, 5, 64)
    expected = torch.empty_like(q).stride()
    dy = torch.randn(2, 4, 5, 64)  # as eager attention returns it

    def refuse(*args, **kwargs):
        raise AssertionError("an input was copied")

    with backend(name):
        monkeypatch.setattr(Tensor, "contiguous", refuse)
        y, _ = rope(q, None, cos, sin)
        monkeypatch.undo()
        captured = []
        y.grad_fn.register_hook(lambda inputs, outputs: captured.append(inputs[0]))
        y.backward(dy)
    assert y.stride() == expected and captured[0].stride() == expected
    with backend("reference"):
        other, _ = rope(q.detach().contiguous(), None, cos, sin)
    assert torch.allclose(y, other, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_features_that_lie_elsewhere_are_copied(name):
    q = torch.randn(2, 4, 64, 5).transpose(2, 3).requires_grad_()
    cos, sin = torch.randn(2, 64, 5).transpose(1, 2)
    with backend(name):
        y, _ = rope(q, None, cos, sin)
        y.sum().backward()  # an expanded gradient
    with backend("reference"):
        expected, _ = rope(q.detach().contiguous(), None, cos.contiguous(), sin.contiguous())
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.allclose(
        q.grad[..., :32], (cos[:, :32] + sin[:, 32:]).expand(2, 4, 5, 32), atol=1e-6
    )


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_strides_beyond_32_bits(name):
    """Three batch rows 2^30 elements apart, in memory that is reserved and hardly touched."""
    far = torch.empty(2**31 + 4 * 3 * 8, dtype=torch.bfloat16)
    q = far.as_strided((3, 3, 4, 8), (2**30, 8, 3 * 8, 1))
    q.copy_(torch.randn(3, 3, 4, 8))
    cos, sin = torch.randn(2, 3, 4, 8)
    with backend("reference"):
        expected, _ = rope(q.contiguous(), None, cos, sin)
    with backend(name):
        y, _ = rope(q, None, cos, sin)
    assert torch.allclose(y.float(), expected.float(), atol=1e-2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
        ({"q": torch.ones(2, 6, 5, 64, dtype=torch.int64)}, TypeError, "q: expected fp32, bf16"),
        ({"q": torch.ones(6, 5, 64)}, ValueError, r"q: expected shape \[B, H, S, D\], got \[6, 5"),
        ({"k": torch.ones(2, 2, 6, 64)}, ValueError, r"k: expected shape \[2, any, 5, 64\]"),
        ({"k": torch.ones(2, 2, 5, 32)}, ValueError, r"k: expected shape .* got \[2, 2, 5, 32\]"),
        ({"cos": 1.0}, TypeError, "cos: expected a tensor, got float"),
        ({"cos": torch.ones(2, 6, 64)}, ValueError, r"cos: expected shape \[2 or 1, 5, R\]"),
        ({"sin": torch.ones(3, 5, 64)}, ValueError, r"sin: expected shape .* got \[3, 5, 64\]"),
        ({"cos": torch.ones(2, 5, 1, 64)}, ValueError, "cos: expected shape"),
        ({"sin": torch.ones(1, 5, 64)}, ValueError, "sin: expected the shape of cos"),
        ({"sin": torch.ones(2, 5, 64).half()}, TypeError, "sin: expected the dtype of cos"),
        (
            {"sin": torch.ones(2, 5, 64, requires_grad=True)},
            ValueError,
            "sin: expected a tensor without requires_grad",
        ),
        (
            {"cos": torch.ones(2, 5, 65), "sin": torch.ones(2, 5, 65)},
            ValueError,
            r"cos: expected an even width R in \[2, 64\], got 65",
        ),
        (
            {"cos": torch.ones(2, 5, 66), "sin": torch.ones(2, 5, 66)},
            ValueError,
            r"cos: expected an even width R in \[2, 64\], got 66",
        ),
        (
            {"cos": torch.ones(2, 5, 0), "sin": torch.ones(2, 5, 0)},
            ValueError,
            "cos: expected an even width",
        ),
        (
            {"k": torch.ones(2, 2, 5, 64, device="meta")},
            ValueError,
            "k: expected device cpu as q, got meta",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    q, k, cos, sin = arguments()
    with pytest.raises(error, match=message):
        rope(**{"q": q, "k": k, "cos": cos, "sin": sin, **change})


def test_angles_without_a_batch_are_shared():
    q, k, cos, sin = arguments()
    shared = rope(q, k, cos[0], sin[0])
    same = rope(q, k, cos[:1].expand(2, -1, -1), sin[:1].expand(2, -1, -1))
    for one, other in zip(shared, same, strict=True):
        assert torch.equal(one, other)


def test_no_keys():
    q, _, cos, sin = arguments()
    y, nothing = rope(q.requires_grad_(), None, cos, sin)
    assert nothing is None
    y.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_has_no_gradient(used):
    q, k, cos, sin = arguments()
    q.requires_grad_()
    k.requires_grad_()
    outputs = rope(q, k, cos, sin)
    gradients = torch.autograd.grad(outputs[used].sum(), (q, k), allow_unused=True)
    assert gradients[1 - used] is None
    together = torch.autograd.grad(sum(out.sum() for out in rope(q, k, cos, sin)), (q, k))
    assert torch.equal(gradients[used], together[used])


def test_a_frozen_input_gives_a_frozen_output():
    q, k, cos, sin = arguments()
    rotated_q, rotated_k = rope(q.requires_grad_(), k, cos, sin)
    assert rotated_q.requires_grad and not rotated_k.requires_grad


def test_outputs_own_their_memory_and_can_be_changed_in_place():
    q, k, cos, sin = arguments()
    q.requires_grad_()
    y, _ = rope(q, k, cos, sin)
    assert not y._is_view()
    y *= 2
    (doubled,) = torch.autograd.grad(y.sum(), q)
    (single,) = torch.autograd.grad(rope(q, k, cos, sin)[0].sum(), q)
    assert torch.allclose(doubled, 2 * single)


def test_only_cos_and_sin_are_saved():
    q, k, cos, sin = arguments(batch=2, positions=7)
    q.requires_grad_()
    node = rope(q, k, cos, sin)[0].grad_fn
    assert {t.data_ptr() for t in node.saved_tensors} == {cos.data_ptr(), sin.data_ptr()}
    assert node.saved_bytes == 0


def test_counted_traffic_is_one_read_and_one_write():
    q, k, cos, sin = (t.to("meta", torch.bfloat16) for t in arguments(positions=1024))
    counts = count(lambda x, y: rope(x, y, cos, sin), q.requires_grad_(), k.requires_grad_())
    rows, tables = 2 * (q.numel() + k.numel()), 2 * 2 * cos.numel()
    for part, name in ((counts.forward, "rope_forward"), (counts.backward, "rope_backward")):
        (launch,) = part.launches
        assert launch.name == f"fasttune::{name}"
        assert (launch.bytes_read, launch.bytes_written) == (rows + tables, rows)
    assert counts.total.opaque.calls == 0


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("layout", ["transposed", "sliced-features"])
def test_opcheck(keys, layout):
    q = LAYOUTS[layout](torch.float32)
    k = torch.randn(2, 5, 2, 64).transpose(1, 2) if keys else None
    cos, sin = torch.randn(2, 2, 5, 64)
    opcheck(FORWARD.registered, (q, k, cos, sin, True))
    rotated = FORWARD.registered(q, k, cos, sin, True)
    strides = [list(y.stride()) for y in rotated] + ([] if keys else [[]])
    opcheck(BACKWARD.registered, (q, k, cos, sin, False, *strides))
    if keys:
        opcheck(BACKWARD.registered, (None, k, cos, sin, False, *strides))


def test_shows_in_profiles_and_dispatch_modes():
    from torch.profiler import profile
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, cos, sin = arguments()
    q.requires_grad_()
    with Log():
        rope(q, k, cos, sin)[0].sum().backward()
    assert {"fasttune.rope_fwd.default", "fasttune.rope_bwd.default"} <= set(seen)
    with profile() as recorded:
        rope(q, k, cos, sin)
    assert "fasttune::rope_fwd" in {event.key for event in recorded.key_averages()}


def test_compiles_with_changing_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, cos, sin: rope(q, k, cos, sin), backend="aot_eager", fullgraph=True
    )
    for positions in (5, 9, 14):
        q, k, cos, sin = arguments(positions=positions)
        q.requires_grad_()
        for mine, eager in zip(compiled(q, k, cos, sin), rope(q, k, cos, sin), strict=True):
            assert torch.equal(mine, eager) and mine.stride() == eager.stride()
        gradients = [
            torch.autograd.grad(function(q, k, cos, sin)[0].sum(), q)[0]
            for function in (compiled, rope)
        ]
        assert torch.equal(*gradients)


def test_meta_tensors_have_the_right_shapes():
    q, k, cos, sin = (t.to("meta") for t in arguments())
    rotated = rope(q.requires_grad_(), k.requires_grad_(), cos, sin)
    assert [y.shape for y in rotated] == [q.shape, k.shape]
    sum(y.sum() for y in rotated).backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


@pytest.mark.parametrize("interleaved", [False, True])
def test_vmap_and_grad_of_torch_func(interleaved):
    q, k, cos, sin = arguments(rotary=32)
    alone = torch.vmap(
        lambda x, c, s: rope(x[None], None, c[None], s[None], interleaved=interleaved)[0][0]
    )(q, cos, sin)
    assert torch.allclose(alone, rope(q, k, cos, sin, interleaved=interleaved)[0], atol=1e-6)
    weight = torch.randn(q.shape)
    gradient = torch.func.grad(
        lambda x: (rope(x, None, cos, sin, interleaved=interleaved)[0] * weight).sum()
    )(q)
    q.requires_grad_()
    (rope(q, None, cos, sin, interleaved=interleaved)[0] * weight).sum().backward()
    assert torch.allclose(gradient, q.grad, atol=1e-6)


def test_backward_runs_on_the_backend_of_the_forward():
    q, k, cos, sin = arguments()
    q.requires_grad_()
    with fasttune.use_backend("reference"):
        y, _ = rope(q, k, cos, sin)
    assert y.grad_fn.backend.name == "reference"
    with fasttune.use_backend("cuda"):  # would raise if it were asked again
        y.sum().backward()
    assert rope(q, k, cos, sin)[0].grad_fn.backend.name == "cpu"


def test_double_backward_raises():
    q, k, cos, sin = arguments()
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(rope(q, k, cos, sin)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_thread_counts_give_the_same_bits(threads):
    before = torch.get_num_threads()
    args = arguments(heads=9, positions=211, features=80)
    try:
        torch.set_num_threads(1)
        expected = rope(*args)
        torch.set_num_threads(threads)
        for mine, single in zip(rope(*args), expected, strict=True):
            assert torch.equal(mine, single)
    finally:
        torch.set_num_threads(before)


def test_autocast_changes_nothing():
    q, k, cos, sin = arguments()
    expected = rope(q, k, cos, sin)
    with torch.autocast("cpu", torch.bfloat16):
        found = rope(q, k, cos, sin)
    for mine, plain in zip(found, expected, strict=True):
        assert torch.equal(mine, plain)
