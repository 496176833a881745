"""Every Triton primitive in the interpreter against plain torch formulas in fp64.

Tolerances follow one rule, `assert_accurate`: the error may be `c` = 2 times the greatest error of
torch in the same dtypes (two roundings to the output dtype may fall on opposite sides of a tie, and
a different order of summation is as good as another), plus a floor of sqrt(n) * 2^-24 * the sum of
the sizes of the n products, which is the typical error of an fp32 sum in some other order (the
worst case has n in place of its root) and covers the cases where torch happens to be exact.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from fasttune.testing.triton_interpreter import interpreted
from fasttune_kernels.linear_cross_entropy import cross_entropy_rows_
from fasttune_kernels.lora_linear import lora_down, lora_down_backward, lora_up, lora_up_backward
from fasttune_kernels.tables import Gpu, assume_gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = 0x0123456789ABCDEF
THRESHOLD = 3277  # round(65536 * 0.05)

pytestmark = pytest.mark.usefixtures("nan_filled_allocations")


# --- An independent Philox4x32-7 -----------------------------------------------------------------


def philox4x32_7(counter: list[npt.NDArray[np.uint64]], key: tuple[int, int]) -> list[np.ndarray]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        product0 = np.uint64(0xD2511F53) * c0
        product1 = np.uint64(0xCD9E8D57) * c2
        low = np.uint64(0xFFFFFFFF)
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def keep_mask(
    m: int, k: int, seed: int, threshold: int, branch: int, row_offset: int = 0
) -> Tensor:
    """[m, k] bool from the definition in docs/design.md, element by element."""
    row, column = np.meshgrid(np.arange(m), np.arange(k), indexing="ij")
    row = row.astype(np.uint64) + np.uint64(row_offset)
    column = column.astype(np.uint64)
    words = philox4x32_7(
        [
            column // np.uint64(8),
            row & np.uint64(0xFFFFFFFF),
            row >> np.uint64(32),
            np.full_like(row, branch),
        ],
        (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF),
    )
    word = np.choose((column % np.uint64(8) // np.uint64(2)).astype(int), words)
    lane = np.where(column % np.uint64(2) == 0, word & np.uint64(0xFFFF), word >> np.uint64(16))
    return torch.from_numpy(lane >= threshold)


def test_reference_generator_matches_the_published_vectors() -> None:
    # Random123 1.14, kat_vectors, "philox4x32 7".
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ([0, 0, 0, 0], (0, 0), [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([ones] * 4, (ones, ones), [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ):
        words = philox4x32_7([np.array([c], dtype=np.uint64) for c in counter], key)
        assert [int(word[0]) for word in words] == expected


# --- The mask, bit for bit -----------------------------------------------------------------------


def seed_tensor(seed: int) -> Tensor:
    return torch.tensor(seed, dtype=torch.int64)


MASKS = pytest.mark.parametrize(
    ("seed", "threshold", "branch", "row_offset"),
    [
        (0, THRESHOLD, 0, 0),
        (SEED, THRESHOLD, 3, 5),
        (-1, 32768, 1, 2**32 - 3),  # rows on both sides of 2^32
        (-(2**63), 1, 0, 7 * 2**32 + 11),
        (2**63 - 1, 65535, 2, 2**40),
        (1, 65536, 0, 0),  # p = 1: nothing is kept
    ],
)


@MASKS
def test_mask_of_lora_down(seed: int, threshold: int, branch: int, row_offset: int) -> None:
    x = torch.ones(70, 136)
    with interpreted():
        t = lora_down(
            x,
            torch.eye(136),
            1.0,
            None,
            seed=seed_tensor(seed),
            threshold=threshold,
            branch=branch,
            row_offset=row_offset,
        )
    assert torch.equal(t.bool(), keep_mask(70, 136, seed, threshold, branch, row_offset))


@MASKS
def test_mask_of_lora_down_backward(
    seed: int, threshold: int, branch: int, row_offset: int
) -> None:
    expected = keep_mask(70, 203, seed, threshold, branch, row_offset)
    options = dict(
        seed=seed_tensor(seed), threshold=threshold, branch=branch, row_offset=row_offset
    )
    with interpreted():
        dx, _ = lora_down_backward(
            torch.ones(70, 1),
            torch.ones(1, 203),
            None,
            **options,
            dx_dtype=BF16,
            need_dx=True,
            need_da=False,
        )
        _, da = lora_down_backward(
            torch.eye(70),
            torch.ones(70, 203),
            torch.ones(70, 203, dtype=BF16),
            **options,
            dx_dtype=BF16,
            need_dx=False,
            need_da=True,
        )
    assert dx is not None and torch.equal(dx.bool(), expected)
    assert da is not None and torch.equal(da.bool(), expected)


def test_rows_in_chunks_see_the_mask_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x, a = torch.randn(100, 72, generator=generator), torch.randn(8, 72, generator=generator)
    options = dict(seed=seed_tensor(SEED), threshold=THRESHOLD, branch=0)
    with interpreted():
        whole = lora_down(x, a, 1.0, None, **options)
        parts = [
            lora_down(x[start:stop], a, 1.0, None, **options, row_offset=start)
            for start, stop in ((0, 33), (33, 100))
        ]
    assert torch.equal(whole, torch.cat(parts))


# --- Values --------------------------------------------------------------------------------------


def assert_accurate(
    actual: Tensor,
    truth: Tensor,  # fp64
    in_dtype: Tensor,  # torch's result in the dtypes of the call
    sizes: Tensor,  # fp64: the same formula over absolute values
    terms: int,
) -> None:
    assert actual.dtype == in_dtype.dtype
    assert actual.shape == truth.shape
    if truth.numel() == 0:
        return
    torch_error = (in_dtype.double() - truth).abs().max()
    floor = math.sqrt(terms) * 2.0**-24 * sizes.max()
    error = (actual.double() - truth).abs().max()
    assert error <= 2 * torch_error + floor, (float(error), float(torch_error), float(floor))


DTYPES = [(FP32, FP32), (FP16, FP16), (BF16, BF16), (BF16, FP32), (FP16, FP32), (FP32, BF16)]
RANKS = [1, 3, 8, 16, 17, 64]


def dtype_name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


each_dtype_and_rank = pytest.mark.parametrize(
    ("x_dtype", "a_dtype", "r"),
    [(x, a, r) for x, a in DTYPES for r in RANKS],
    ids=dtype_name,
)


class Case:
    """Operands of one LoRA layer with their fp64 copies' products at hand."""

    def __init__(
        self, m: int, k: int, n: int, r: int, x_dtype: torch.dtype, a_dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(m * 1000 + r)

        def randn(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        # Rows of x and dy lie further apart than they are long.
        self.x = randn(m, k + 5, dtype=x_dtype)[:, :k]
        self.dy = randn(m, n + 3, dtype=x_dtype)[:, 1 : n + 1]
        self.a = randn(r, k, dtype=a_dtype)
        self.b = randn(n, r, dtype=a_dtype)
        self.bias = randn(n, dtype=x_dtype)
        self.t = randn(m, r, dtype=FP32)
        self.d = randn(m, r, dtype=FP32)
        self.scale_tensor = torch.tensor(0.75)

    def tensors(self) -> list[Tensor]:
        return [self.x, self.dy, self.a, self.b, self.bias, self.t, self.d, self.scale_tensor]


def check_lora_down(case: Case, threshold: int, *, row_offset: int = 0) -> None:
    m, k = case.x.shape
    with interpreted():
        t = lora_down(
            case.x,
            case.a,
            1.5,
            case.scale_tensor,
            seed=seed_tensor(SEED),
            threshold=threshold,
            branch=1,
            row_offset=row_offset,
        )
    keep = keep_mask(m, k, SEED, threshold, 1, row_offset)

    def product(x: Tensor, a: Tensor) -> Tensor:
        return 1.5 * 0.75 * (x * keep) @ a.T

    x64, a64 = case.x.double(), case.a.double()
    in_dtype = product(case.x.float(), case.a.float())
    assert_accurate(t, product(x64, a64), in_dtype, product(x64.abs(), a64.abs()), k)


def check_lora_up(
    case: Case, bias: Tensor | None, out_dtype: torch.dtype, addend: Tensor | None = None
) -> None:
    with interpreted():
        y = lora_up(case.t, case.b, bias, out_dtype=out_dtype, addend=addend)

    def product(t: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        y = t @ b.T if bias is None else t @ b.T + bias
        return y if addend is None else y + addend.to(y.dtype)

    t64, b64 = case.t.double(), case.b.double()
    assert_accurate(
        y,
        product(t64, b64, None if bias is None else bias.double()),
        product(case.t, case.b.float(), None if bias is None else bias.float()).to(out_dtype),
        product(t64.abs(), b64.abs(), None if bias is None else bias.double().abs()),
        case.t.shape[1] + 1,
    )


def check_lora_up_backward(case: Case, *, need_d: bool = True, need_db: bool = True) -> None:
    m, n = case.dy.shape
    with interpreted():
        d, db = lora_up_backward(
            case.dy, case.t, case.b, 1.5, case.scale_tensor, need_d=need_d, need_db=need_db
        )
    assert (d is not None, db is not None) == (need_d, need_db)
    dy64, t64, b64 = case.dy.double(), case.t.double(), case.b.double()
    if d is not None:
        assert_accurate(
            d,
            1.125 * dy64 @ b64,
            1.125 * case.dy.float() @ case.b.float(),
            1.125 * dy64.abs() @ b64.abs(),
            n,
        )
    if db is not None:
        in_dtype = (case.dy.float().T @ case.t).to(case.b.dtype)
        assert_accurate(db, dy64.T @ t64, in_dtype, dy64.abs().T @ t64.abs(), m)


def check_lora_down_backward(
    case: Case, threshold: int, *, need_dx: bool = True, need_da: bool = True, row_offset: int = 0
) -> None:
    m, k = case.x.shape
    with interpreted():
        dx, da = lora_down_backward(
            case.d,
            case.a,
            case.x if need_da else None,
            seed=seed_tensor(SEED),
            threshold=threshold,
            branch=2,
            row_offset=row_offset,
            dx_dtype=case.x.dtype,
            need_dx=need_dx,
            need_da=need_da,
        )
    assert (dx is not None, da is not None) == (need_dx, need_da)
    keep = keep_mask(m, k, SEED, threshold, 2, row_offset)
    d64, a64, x64 = case.d.double(), case.a.double(), case.x.double()
    if dx is not None:
        in_dtype = (keep * (case.d @ case.a.float())).to(case.x.dtype)
        assert_accurate(dx, keep * (d64 @ a64), in_dtype, d64.abs() @ a64.abs(), case.a.shape[0])
        assert (dx[~keep] == 0).all()
    if da is not None:
        in_dtype = (case.d.T @ (case.x.float() * keep)).to(case.a.dtype)
        sizes = d64.abs().T @ x64.abs()
        assert_accurate(da, d64.T @ (x64 * keep), in_dtype, sizes, m)


def check_all(case: Case, threshold: int, *, row_offset: int = 0) -> None:
    before = [tensor.clone() for tensor in case.tensors()]
    check_lora_down(case, threshold, row_offset=row_offset)
    check_lora_up(case, case.bias, case.x.dtype)
    check_lora_up(case, case.bias, case.x.dtype, addend=case.dy)
    check_lora_up_backward(case)
    check_lora_down_backward(case, threshold, row_offset=row_offset)
    for tensor, copy in zip(case.tensors(), before, strict=True):
        assert torch.equal(tensor, copy), "an input was changed"


@each_dtype_and_rank
@pytest.mark.parametrize("threshold", [0, THRESHOLD])
def test_primitives_are_accurate(
    x_dtype: torch.dtype, a_dtype: torch.dtype, r: int, threshold: int
) -> None:
    # No size is a multiple of a tile; 70 rows and 134 columns are one tile and a part.
    check_all(Case(70, 203, 134, r, x_dtype, a_dtype), threshold, row_offset=2**33 + 7)


@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize(("x_dtype", "a_dtype"), DTYPES, ids=dtype_name)
def test_no_row_and_one_row(x_dtype: torch.dtype, a_dtype: torch.dtype, m: int) -> None:
    check_all(Case(m, 48, 40, 8, x_dtype, a_dtype), THRESHOLD)


def test_no_row_gives_zero_weight_gradients() -> None:
    case = Case(0, 48, 40, 8, BF16, BF16)
    with interpreted():
        _, db = lora_up_backward(case.dy, case.t, case.b, 1.0, None, need_d=True, need_db=True)
    assert db is not None and torch.equal(db, torch.zeros(40, 8, dtype=BF16))


@pytest.mark.parametrize("r", [130, 256])
@pytest.mark.parametrize(("x_dtype", "a_dtype"), DTYPES, ids=dtype_name)
def test_high_ranks_in_chunks(x_dtype: torch.dtype, a_dtype: torch.dtype, r: int) -> None:
    check_all(Case(33, 96, 72, r, x_dtype, a_dtype), THRESHOLD)


@pytest.mark.parametrize("r", [3, 16, 33])
@pytest.mark.parametrize(("x_dtype", "a_dtype"), [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
def test_split_reductions(x_dtype: torch.dtype, a_dtype: torch.dtype, r: int) -> None:
    # Two splits of the features; then two of the rows and of the columns, the last ones partial.
    check_lora_down(Case(20, 1100, 40, r, x_dtype, a_dtype), THRESHOLD)
    rows = Case(530, 72, 270, r, x_dtype, a_dtype)
    check_lora_up_backward(rows)
    check_lora_down_backward(rows, THRESHOLD, need_dx=False)


@pytest.mark.parametrize(("x_dtype", "a_dtype"), [(FP16, FP16), (FP16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("r", [8, 40])
def test_without_bf16_tensor_cores(x_dtype: torch.dtype, a_dtype: torch.dtype, r: int) -> None:
    with assume_gpu(Gpu(capability=75, multiprocessors=40)):
        check_all(Case(70, 203, 134, r, x_dtype, a_dtype), THRESHOLD)


@pytest.mark.parametrize("need_first", [True, False])
def test_only_what_is_needed(need_first: bool) -> None:
    case = Case(70, 80, 90, 8, BF16, FP32)
    check_lora_up_backward(case, need_d=need_first, need_db=not need_first)
    check_lora_down_backward(case, THRESHOLD, need_dx=need_first, need_da=not need_first)


@pytest.mark.parametrize("out_dtype", [FP32, FP16, BF16], ids=dtype_name)
@pytest.mark.parametrize("bias_dtype", [None, FP32, FP16, BF16], ids=dtype_name)
def test_lora_up_bias_and_output_types(
    out_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    case = Case(70, 80, 134, 8, BF16, FP32)
    check_lora_up(case, None if bias_dtype is None else case.bias.to(bias_dtype), out_dtype)


def test_fp32_adapters_are_not_rounded_to_bf16() -> None:
    # 1 + 2^-20 is 1 in bf16 (and in tf32): the third of the bf16 terms carries the difference.
    x = torch.ones(16, 64, dtype=BF16)
    a = torch.full((16, 64), 1.0 + 2.0**-20)
    with interpreted():
        t = lora_down(x, a, 1.0, None, seed=None, threshold=0, branch=0)
    assert torch.equal(t, torch.full((16, 16), 64.0 + 64 * 2.0**-20))


def test_expanded_rows_have_stride_zero() -> None:
    # What the gradient of a sum over rows looks like.
    case = Case(70, 80, 90, 8, FP32, FP32)
    case.dy = torch.randn(1, 90, generator=torch.Generator().manual_seed(0)).expand(70, 90)
    case.x = torch.randn(1, 80, generator=torch.Generator().manual_seed(1)).expand(70, 80)
    check_all(case, THRESHOLD)


@pytest.mark.parametrize(("x_dtype", "a_dtype"), [(BF16, BF16), (BF16, FP32)], ids=dtype_name)
def test_two_runs_are_bit_equal(x_dtype: torch.dtype, a_dtype: torch.dtype) -> None:
    case = Case(530, 1030, 270, 8, x_dtype, a_dtype)
    few = case.x[:20]

    def run() -> list[Tensor | None]:
        options = dict(seed=seed_tensor(SEED), threshold=THRESHOLD, branch=0)
        with interpreted():
            return [
                lora_down(few, case.a, 1.0, None, **options),
                *lora_up_backward(case.dy, case.t, case.b, 1.0, None, need_d=True, need_db=True),
                *lora_down_backward(
                    case.d,
                    case.a[:, :72].contiguous(),
                    case.x[:, :72],
                    **options,
                    dx_dtype=x_dtype,
                    need_dx=True,
                    need_da=True,
                ),
            ]

    for first, second in zip(run(), run(), strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


# --- Cross-entropy -------------------------------------------------------------------------------

IGNORE = -100
PLAIN: dict[str, float] = dict(logit_scale=1.0, softcap=0.0, label_smoothing=0.0, z_loss=0.0)


def reference_cross_entropy(
    logits: Tensor, targets: Tensor, dtype: torch.dtype, options: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, gradient (in `dtype`), correct, entropy, computed in `dtype` with autograd."""
    z0 = logits.to(dtype, copy=True).requires_grad_()
    z = options["logit_scale"] * z0
    if options["softcap"] > 0:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    lse = z.logsumexp(-1)
    counted = targets != IGNORE
    z_target = z.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    eps = options["label_smoothing"]
    loss = (1 - eps) * (lse - z_target) + options["z_loss"] * lse**2
    if eps:
        loss = loss + eps * (lse - z.mean(-1))
    loss = torch.where(counted, loss, 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), z0)
    p = (z - lse[:, None]).exp()
    entropy = lse - torch.where(p > 0, p * z, 0.0).sum(-1)
    first = (z == z.max(-1, keepdim=True).values).to(torch.uint8).argmax(-1)
    correct = (first == targets).to(dtype)
    with torch.no_grad():
        return loss, gradient, correct * counted, torch.where(counted, entropy, 0.0)


def assert_close_to_truth(actual: Tensor, truth: Tensor, in_dtype: Tensor, size: float) -> None:
    """|error| <= 2 * torch's + 8 * 2^-24 * size.

    `size` bounds the values that are added and subtracted on the way; 8 roundings separate the
    logits from the result: scale, softcap's three, the exponential, the logarithm, two sums.
    """
    error = (actual.double() - truth).abs().max()
    torch_error = (in_dtype.double() - truth).abs().max()
    assert error <= 2 * torch_error + 8 * 2.0**-24 * size, (float(error), float(torch_error))


def check_cross_entropy(logits: Tensor, targets: Tensor, **changes: float) -> None:
    options = PLAIN | changes
    kept, rows = logits.clone(), targets.clone()
    with interpreted():
        loss, correct, entropy = cross_entropy_rows_(
            logits, targets, ignore_index=IGNORE, **options, need_grad=True, need_stats=True
        )
    truth = reference_cross_entropy(kept, targets, torch.float64, options)
    same = reference_cross_entropy(kept, targets, FP32, options)
    assert torch.equal(targets, rows)
    assert loss.dtype == FP32 and correct is not None and entropy is not None
    largest = float(kept.double().abs().max()) * abs(options["logit_scale"])
    lse_size = largest + math.log(kept.shape[1])
    loss_size = lse_size + options["z_loss"] * lse_size**2
    assert_close_to_truth(loss, truth[0], same[0], loss_size)
    # A probability has the relative error of its exponent, whose absolute error is that of z - lse.
    slope = (1 + 2 * options["z_loss"] * lse_size) * abs(options["logit_scale"])
    assert_close_to_truth(logits, truth[1], same[1].to(kept.dtype), slope * (1 + lse_size))
    assert torch.equal(correct, truth[2].float())
    assert_close_to_truth(entropy, truth[3], same[3], 2 * lse_size)
    ignored = targets == IGNORE
    for value in (loss, logits, correct, entropy):
        assert (value[ignored] == 0).all()


def random_rows(c: int, v: int, dtype: torch.dtype, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(c + v)
    logits = (torch.randn(c, v, generator=generator) * scale).to(dtype)
    targets = torch.randint(0, v, (c,), generator=generator)
    targets[::2] = logits[::2].float().argmax(-1)  # half of them right
    return logits, targets


@pytest.mark.parametrize("v", [1, 7, 256, 1000, 9001])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=dtype_name)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 30.0},
        {"softcap": 2.0, "logit_scale": 0.25},
        {"logit_scale": -0.5},
        {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 10.0, "logit_scale": 1.5},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_cross_entropy_is_accurate(changes: dict[str, float], dtype: torch.dtype, v: int) -> None:
    logits, targets = random_rows(5, v, dtype)
    targets[1] = IGNORE
    check_cross_entropy(logits, targets, **changes)


def test_cross_entropy_of_large_logits() -> None:
    logits, targets = random_rows(4, 5000, FP32, scale=50.0)
    check_cross_entropy(logits + 300.0, targets)


def test_cross_entropy_of_masked_vocabulary() -> None:
    logits, targets = random_rows(4, 5000, FP32)
    logits[:, ::3] = float("-inf")
    logits[:, 4096:] = torch.finfo(FP32).min
    targets[:] = 1
    kept = logits.clone()
    with interpreted():
        loss, _, entropy = cross_entropy_rows_(
            logits, targets, ignore_index=IGNORE, **PLAIN, need_grad=True, need_stats=True
        )
    log_p = kept.double().log_softmax(-1)
    p = log_p.exp()
    truth = -log_p[:, 1]
    assert torch.allclose(loss.double(), truth, rtol=1e-6)
    assert entropy is not None
    expected = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    assert torch.allclose(entropy.double(), expected, rtol=1e-5)
    p[:, 1] -= 1
    assert torch.allclose(logits.double(), p, atol=1e-6)


def test_nan_logit_gives_nan_loss() -> None:
    logits, targets = random_rows(3, 5000, FP32)
    logits[1, 4999] = float("nan")
    with interpreted():
        loss, _, _ = cross_entropy_rows_(
            logits, targets, ignore_index=IGNORE, **PLAIN, need_grad=True, need_stats=True
        )
    assert loss.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all() and not logits[[0, 2]].isnan().any()


@pytest.mark.parametrize("second", [7, 300, 4500])
def test_ties_go_to_the_lowest_index(second: int) -> None:
    logits = torch.zeros(2, 5000, dtype=BF16)
    logits[:, 3] = 2.0
    logits[:, second] = 2.0
    targets = torch.tensor([3, second])
    with interpreted():
        _, correct, _ = cross_entropy_rows_(
            logits, targets, ignore_index=IGNORE, **PLAIN, need_grad=False, need_stats=True
        )
    assert correct is not None and correct.tolist() == [1.0, 0.0]


def test_without_gradient_logits_stay_and_statistics_are_none() -> None:
    logits, targets = random_rows(3, 300, BF16)
    kept = logits.clone()
    with interpreted():
        loss, correct, entropy = cross_entropy_rows_(
            logits, targets, ignore_index=IGNORE, **PLAIN, need_grad=False, need_stats=False
        )
    assert correct is None and entropy is None
    assert torch.equal(logits, kept)
    expected = torch.nn.functional.cross_entropy(kept.double(), targets, reduction="none")
    # lse and z_target of size 20 are subtracted: an absolute error of 2 * 20 * 2^-24.
    assert torch.allclose(loss.double(), expected, rtol=0, atol=2.5e-6)


def test_strided_logits_keep_what_lies_between_rows() -> None:
    wide = torch.randn(4, 310, generator=torch.Generator().manual_seed(0))
    kept = wide.clone()
    targets = torch.tensor([0, 299, 7, IGNORE])
    check_cross_entropy(wide[:, :300], targets)
    assert torch.equal(wide[:, 300:], kept[:, 300:])
    assert not torch.equal(wide[:, :300], kept[:, :300])


def test_other_ignore_index_and_no_rows() -> None:
    logits, _ = random_rows(2, 50, FP32)
    with interpreted():
        loss, _, _ = cross_entropy_rows_(
            logits,
            torch.tensor([0, 5]),
            ignore_index=0,
            **PLAIN,
            need_grad=False,
            need_stats=False,
        )
        empty = cross_entropy_rows_(
            logits[:0],
            torch.empty(0, dtype=torch.int64),
            ignore_index=0,
            **PLAIN,
            need_grad=True,
            need_stats=True,
        )
    assert loss[0] == 0 and loss[1] > 0
    assert [tensor.shape for tensor in empty if tensor is not None] == [(0,)] * 3
