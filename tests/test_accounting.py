"""Every number here is worked out by hand; M, K, N and R are the dimensions of a linear layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fasttune.testing import accounting
from fasttune.testing.accounting import Launch, Traffic, count, tensor_bytes

M, K, N, R = 6, 8, 4, 2
FP32, BF16, INT64 = 4, 2, 8
DEVICES = ("cpu", "meta")

on_each_device = pytest.mark.parametrize("device", DEVICES)


def tensor(*shape, device="cpu", dtype=torch.float32, grad=True):
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)


def launches(part):
    return [(launch.name, launch.bytes_read, launch.bytes_written) for launch in part.launches]


@on_each_device
def test_linear_reads_operands_once_and_saves_only_what_the_caller_holds(device):
    x, w, b = (tensor(*shape, device=device) for shape in ((M, K), (N, K), (N,)))
    counts = count(F.linear, x, w, b)
    assert launches(counts.forward) == [
        ("aten::addmm", FP32 * (M * K + N * K + N), FP32 * M * N),
    ]
    assert sorted(launches(counts.backward)) == sorted(
        [
            ("aten::mm", FP32 * (M * N + N * K), FP32 * M * K),  # dx = dy W
            ("aten::mm", FP32 * (M * N + M * K), FP32 * N * K),  # dW = dy^T x
            ("aten::sum", FP32 * M * N, FP32 * N),  # db
        ]
    )
    assert counts.saved_bytes == 0
    assert count(F.linear, x, w, b, include_inputs=True).saved_bytes == FP32 * (M * K + N * K)


@on_each_device
def test_module_parameters_are_left_out_of_saved_bytes_unless_asked_for(device):
    layer = nn.Linear(K, N, device=device)
    x = tensor(M, K, device=device)
    assert count(layer, x).saved_bytes == 0
    assert count(layer, x, include_parameters=True).saved_bytes == FP32 * N * K
    # x reaches the layer through a function: the layer's weight is still recognised.
    assert count(lambda x: layer(x.sin()), x).saved_bytes == FP32 * M * K
    assert count(layer.forward, x).saved_bytes == 0


@on_each_device
def test_dropout_on_cpu_is_three_launches_forward_and_one_backward(device):
    x = tensor(M, K, device=device)
    counts = count(F.dropout, x, p=0.1, training=True)
    size = FP32 * M * K
    assert launches(counts.forward) == [
        ("aten::bernoulli_", 0, size),
        ("aten::div_", size, size),
        ("aten::mul", 2 * size, size),
    ]
    assert launches(counts.backward) == [("aten::mul", 2 * size, size)]
    assert counts.saved_bytes == size  # the mask


@on_each_device
def test_in_place_add_reads_both_and_writes_one(device):
    x, other = (tensor(M, K, device=device, grad=False) for _ in range(2))
    counts = count(x.add_, other, backward=False)
    assert counts.forward.launches == (Launch("aten::add_", 2 * FP32 * M * K, FP32 * M * K),)


@on_each_device
def test_writes_that_do_not_read(device):
    x, y = (tensor(M, K, device=device, grad=False) for _ in range(2))
    size = FP32 * M * K

    def fn():
        x.zero_()
        x.copy_(y)
        torch.empty_like(x)
        torch.zeros_like(x)
        torch.sin(x, out=y)

    assert launches(count(fn, backward=False).forward) == [
        ("aten::zero_", 0, size),
        ("aten::copy_", size, size),
        ("aten::zeros_like", 0, size),
        ("aten::sin", size, size),
    ]


@on_each_device
def test_layer_norm(device):
    layer = nn.LayerNorm(K, device=device)
    counts = count(layer, tensor(M, K, device=device))
    x, statistics, weights = FP32 * M * K, FP32 * 2 * M, FP32 * 2 * K
    assert launches(counts.forward) == [
        ("aten::native_layer_norm", x + weights, x + statistics),
    ]
    assert launches(counts.backward) == [
        ("aten::native_layer_norm_backward", 2 * x + statistics + weights, x + weights),
    ]
    assert counts.saved_bytes == statistics


@on_each_device
def test_views_and_allocations_cost_nothing(device):
    def fn(x):
        x.detach()
        x.new_empty(5).unsqueeze_(0).t_()
        y = x.view(2, 3, K)[..., ::2].transpose(0, 1).unsqueeze(0).expand(7, 3, 2, K // 2)
        return y.as_strided((3,), (1,)).select(0, 1).squeeze().flatten().t()

    counts = count(fn, tensor(M, K, device=device), backward=False)
    assert counts.forward.launches == ()
    assert counts.saved_bytes == 0


@on_each_device
def test_expanded_and_sliced_tensors_count_the_elements_they_address(device):
    x = tensor(M, K, device=device, grad=False)
    assert tensor_bytes(x[0].expand(100, K)) == FP32 * K
    assert tensor_bytes(x[:, :R]) == FP32 * M * R
    assert tensor_bytes(x[:, :R].expand(5, M, R)) == FP32 * M * R
    assert tensor_bytes(x.flatten().unfold(0, 4, 1)) == FP32 * M * K
    assert tensor_bytes(x[:0]) == 0
    added = count(lambda: x + x[0].expand(M, K), backward=False).forward
    assert launches(added) == [("aten::add", FP32 * (M * K + K), FP32 * M * K)]


@on_each_device
def test_arguments_that_are_the_same_memory_are_read_once(device):
    x = tensor(M, K, device=device, grad=False)
    gram = count(lambda: x @ x.t(), backward=False).forward
    assert launches(gram) == [("aten::mm", FP32 * M * K, FP32 * M * M)]
    other = x.clone()
    product = count(lambda: x @ other.t(), backward=False).forward
    assert launches(product) == [("aten::mm", 2 * FP32 * M * K, FP32 * M * M)]


@on_each_device
def test_lookups_read_what_they_fetch(device):
    table = nn.Embedding(1000, K, device=device)
    ids = torch.zeros(M, dtype=torch.int64, device=device)
    fetched = FP32 * M * K
    counts = count(table, ids)
    assert launches(counts.forward) == [("aten::embedding", fetched + INT64 * M, fetched)]


@on_each_device
def test_cross_entropy_picks_one_probability_per_row(device):
    logits = tensor(M, 100, device=device)
    targets = torch.zeros(M, dtype=torch.int64, device=device)
    counts = count(F.cross_entropy, logits, targets)
    size = FP32 * M * 100
    assert launches(counts.forward) == [
        ("aten::_log_softmax", size, size),
        ("aten::nll_loss_forward", FP32 * M + INT64 * M, 2 * FP32),  # loss, total weight
    ]
    assert launches(counts.backward) == [
        ("aten::nll_loss_backward", FP32 + INT64 * M + FP32, size),
        ("aten::_log_softmax_backward_data", 2 * size, size),
    ]
    assert counts.saved_bytes == size + FP32  # log-probabilities, total weight


@on_each_device
def test_relu_saves_its_result(device):
    counts = count(F.relu, tensor(M, K, device=device))
    assert counts.saved_bytes == FP32 * M * K


@on_each_device
def test_a_storage_saved_twice_is_counted_once(device):
    counts = count(lambda x: x.exp().square(), tensor(M, K, device=device))
    assert counts.saved_bytes == FP32 * M * K  # exp saves its result, square the same as its input


@on_each_device
def test_a_graph_dropped_in_forward_keeps_nothing(device):
    def fn(x):
        x.exp().sum()
        return x.relu()

    assert count(fn, tensor(M, K, device=device)).saved_bytes == FP32 * M * K


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x * 2
        ctx.save_for_backward(y)
        ctx.row_sums = x.sum(1)  # past save_for_backward
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return dy * y


@on_each_device
def test_custom_function_saves_are_seen_also_past_save_for_backward(device):
    counts = count(_Scaled.apply, tensor(M, K, device=device))
    assert counts.saved_bytes == FP32 * (M * K + M)
    assert [launch.name for launch in counts.backward.launches] == ["aten::mul"]


def test_checkpointing_saves_nothing_and_runs_forward_again():
    x = tensor(M, K)
    counts = count(lambda x: checkpoint(lambda x: x.exp().exp(), x, use_reentrant=False), x)
    assert counts.saved_bytes == 0
    assert counts.forward.by_op["aten::exp"].calls == 2
    assert counts.backward.by_op["aten::exp"].calls == 2
    assert count(lambda x: x.exp().exp(), x).saved_bytes == 2 * FP32 * M * K


def lora_layer(device, dropout):
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(K, N, bias=False, dtype=torch.bfloat16, device=device))
    config = peft.LoraConfig(r=R, lora_alpha=4, lora_dropout=dropout, target_modules=["0"])
    layer = peft.get_peft_model(base, config).base_model.model[0].to(device)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    return layer


@on_each_device
def test_peft_lora_linear_is_7_launches_forward_and_10_backward(device):
    x = tensor(M, K, device=device, dtype=torch.bfloat16)
    counts = count(lora_layer(device, dropout=0.0), x)
    a, b, t = FP32 * R * K, FP32 * N * R, FP32 * M * R
    weight, x16, x32 = BF16 * N * K, BF16 * M * K, FP32 * M * K
    y16, y32 = BF16 * M * N, FP32 * M * N
    assert launches(counts.forward) == [
        ("aten::mm", x16 + weight, y16),  # base
        ("aten::_to_copy", x16, x32),
        ("aten::mm", x32 + a, t),
        ("aten::mm", t + b, y32),
        ("aten::mul", y32, y32),  # scaling
        ("aten::add", y16 + y32, y32),
        ("aten::_to_copy", y32, y16),
    ]
    assert sorted(launches(counts.backward)) == sorted(
        [
            ("aten::_to_copy", y16, y32),
            ("aten::_to_copy", y32, y16),  # dy of the base layer
            ("aten::mul", y32, y32),
            ("aten::mm", y32 + t, b),  # dB
            ("aten::mm", y32 + b, t),
            ("aten::mm", t + x32, a),  # dA
            ("aten::mm", t + a, x32),
            ("aten::_to_copy", x32, x16),
            ("aten::mm", y16 + weight, x16),
            ("aten::add", 2 * x16, x16),
        ]
    )
    assert counts.saved_bytes == x32 + t  # PEFT's private fp32 copy of x, and x A^T
    assert (counts.forward.outside_gemm.calls, counts.backward.outside_gemm.calls) == (4, 5)


@on_each_device
def test_peft_lora_dropout_adds_3_launches_forward_and_1_backward(device):
    x = tensor(M, K, device=device, dtype=torch.bfloat16)
    counts = count(lora_layer(device, dropout=0.05), x)
    assert (counts.forward.calls, counts.backward.calls) == (10, 11)
    # The fp32 copy of x is no longer saved: its dropped-out copy and the fp32 mask are.
    assert counts.saved_bytes == 2 * FP32 * M * K + FP32 * M * R


def attention_block(device):
    return nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, device=device)


def test_meta_and_real_give_the_same_counts_for_a_whole_block():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        real, meta = (
            count(attention_block(device), tensor(2, 5, 64, device=device)) for device in DEVICES
        )
    assert real == meta
    assert real.calls > 40
    assert real.saved_bytes > 0


def test_parts_add_up_and_gemm_separates():
    counts = count(nn.Linear(K, N), tensor(M, K))
    assert counts.calls == counts.forward.calls + counts.backward.calls == 4
    assert counts.bytes_moved == counts.bytes_read + counts.bytes_written
    assert counts.bytes_moved == counts.total.gemm.bytes_moved + counts.outside_gemm.bytes_moved
    assert launches(counts.outside_gemm) == [("aten::sum", FP32 * M * N, FP32 * N)]
    assert counts.by_op["aten::sum"] == Traffic(1, FP32 * M * N, FP32 * N)
    assert counts.total.opaque.calls == 0
    assert next(iter(counts.by_op)) == "aten::mm"  # moves most


def test_the_table_names_operators_and_totals():
    text = str(count(nn.Linear(1024, 1024), tensor(256, 1024)))
    assert "aten::addmm" in text
    assert "outside GEMM" in text
    assert "6.004" in text  # forward MiB: x, W and y of 1 + 4 + 1, and the 4 KiB bias
    assert "saved for backward: 0.000 MiB" in text


def test_gradients_and_leaves_are_left_as_they_were():
    layer, x = nn.Linear(K, N), tensor(M, K)
    layer.weight.grad = before = torch.full_like(layer.weight, 3.0)
    counts = count(layer, x)
    assert layer.weight.grad is before
    assert torch.equal(before, torch.full_like(before, 3.0))
    assert layer.bias.grad is None
    assert x.grad is None
    # Nothing is added to the old gradient either.
    assert "aten::add_" not in counts.by_op


def test_backward_without_a_differentiable_output_is_refused():
    with pytest.raises(ValueError, match="requires a gradient"):
        count(F.relu, tensor(M, K, grad=False))


def _fill_rows(x, row):
    x.copy_(row)


@pytest.fixture(scope="module")
def library():
    library = torch.library.Library("fasttune_accounting", "FRAGMENT")
    for name, arguments in (("opaque", "Tensor x, Tensor w"), ("declared", "Tensor x, Tensor w")):
        library.define(f"{name}({arguments}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
        library.impl(name, lambda x, w: (x + 1) @ w.t(), "CPU")
        torch.library.register_fake(
            f"fasttune_accounting::{name}",
            lambda x, w: x.new_empty(x.shape[0], w.shape[0]),
            lib=library,
        )
    library.define("fill_rows_(Tensor(a!) x, Tensor row) -> ()")
    library.impl("fill_rows_", _fill_rows, "CPU")
    torch.library.register_fake("fasttune_accounting::fill_rows_", lambda x, row: None, lib=library)
    yield torch.ops.fasttune_accounting
    library._destroy()


@on_each_device
def test_a_library_operator_is_one_call(library, device):
    x, w = (tensor(*shape, device=device, grad=False) for shape in ((M, K), (N, K)))
    counts = count(library.opaque, x, w, backward=False)
    assert counts.forward.launches == (
        Launch("fasttune_accounting::opaque", FP32 * (M * K + N * K), FP32 * M * N, opaque=True),
    )
    assert counts.total.opaque == counts.total
    assert "fasttune_accounting::opaque (opaque)" in str(counts)
    mutating = count(library.fill_rows_, x, x[0].clone(), backward=False)
    size = FP32 * M * K
    assert launches(mutating.forward) == [
        ("fasttune_accounting::fill_rows_", size + FP32 * K, size)
    ]


@pytest.fixture
def declared_cost():
    def cost(args, kwargs, result):
        x, w = args
        size = tensor_bytes(x)
        return (
            Launch("increment", size, size),
            Launch("gemm", size + tensor_bytes(w), tensor_bytes(result), gemm=True),
        )

    accounting.register_cost("fasttune_accounting::declared", cost)
    yield cost
    del accounting._costs["fasttune_accounting::declared"]


@on_each_device
def test_a_registered_cost_opens_a_library_operator(library, declared_cost, device):
    x, w = (tensor(*shape, device=device, grad=False) for shape in ((M, K), (N, K)))
    forward = count(library.declared, x, w, backward=False).forward
    assert [launch.name for launch in forward.launches] == ["increment", "gemm"]
    assert launches(forward.outside_gemm) == [("increment", FP32 * M * K, FP32 * M * K)]
    assert forward.gemm.bytes_written == FP32 * M * N
    assert forward.opaque.calls == 0


def test_register_cost_refuses_bad_names_and_duplicates(declared_cost):
    for name in ("declared", "::op", "space::", "aten::add.Tensor"):
        with pytest.raises(ValueError, match="namespace::op"):
            accounting.register_cost(name, declared_cost)
    with pytest.raises(ValueError, match="has a cost already"):
        accounting.register_cost("fasttune_accounting::declared", declared_cost)


def test_a_llama_sized_layer_is_counted_on_meta_tensors():
    layer = nn.Linear(4096, 14336, bias=False, dtype=torch.bfloat16, device="meta")
    counts = count(layer, tensor(4096, 4096, device="meta", dtype=torch.bfloat16))
    x, w, y = BF16 * 4096 * 4096, BF16 * 4096 * 14336, BF16 * 4096 * 14336
    assert counts.forward.bytes_moved == x + w + y
    assert counts.backward.bytes_moved == 2 * (x + w + y)
