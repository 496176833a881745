"""AdamW over many tensors: the sum of squares of the gradients, and the step. One launch each.

Legend: n tensors, each in blocks of BLOCK elements; a program takes a block. `adamw_tables` names
the columns of the tables; `fasttune.ops.adamw` states the maths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw_storage import (
    load,
    load_codes,
    load_param,
    store,
    store_codes,
    store_param,
    store_stochastic,
)
from .adamw_tables import (
    ADDRESSES,
    BLOCK,
    EXP_AVG_BITS,
    EXP_AVG_SQ_BITS,
    FACTS,
    QUANTISED,
    WEIGHT_BITS,
    StepArguments,
)
from .launch import launch
from .multi_tensor import ELEMENT, is_last, pointer_to, sum_of_column
from .multi_tensor_tables import address_table, aligned, blocks_of, counters, uploaded
from .tables import MAX_REGISTERS, launch_device

# Elements at a time: 16 bytes a thread of the smallest operand. A step has four or more operands of
# them in flight, 14 KB and more a program; a sum has one, so it takes 8 KB at a time.
_STEP_BLOCK = 1024
_SUM_BYTES = 8192
_SUM_BLOCK = 1024  # partial sums at a time
# Room for three programs of four warps a multiprocessor: for 16-bit parameters the compiler takes
# more registers if left to itself, and two fit. (fp32 ones with 8-bit moments would spill.)
_NARROW_REGISTERS = 168


def _step_warps(params: Sequence[Tensor], exp_avgs: Sequence[Tensor]) -> int:
    smallest = min(params[0].element_size(), exp_avgs[0].element_size())
    return 8 if smallest == 4 else 4


_ADDRESS_COLUMNS = tl.constexpr(len(ADDRESSES))
_COLUMNS = tl.constexpr(len(ADDRESSES) + len(FACTS) + 1)  # the last one is the seed
_WEIGHT_BITS = tl.constexpr(WEIGHT_BITS)
_EXP_AVG_BITS = tl.constexpr(EXP_AVG_BITS)
_EXP_AVG_SQ_BITS = tl.constexpr(EXP_AVG_SQ_BITS)


@triton.jit
def _squares_of(pointer, start, numel, MASKED: tl.constexpr, STEP: tl.constexpr):
    i = start + tl.arange(0, STEP)
    g = load(pointer, i, numel, 0.0, MASKED).to(tl.float32)
    return g * g


@triton.jit
def _towards(moment, term, weight):
    """From the nearer end: with beta 0 the term, which rounding of a larger moment would hide."""
    if weight > 0.5:
        moment = term + (term - moment) * (weight - 1.0)
    else:
        moment += (term - moment) * weight
    return moment


# Floor: the gradients are read once, 4 bytes an fp32 element.
@triton.jit(do_not_specialize=["blocks"])
def _sum_of_squares_kernel(
    table_ptr,  # [n, COLUMNS] int64: addresses come first
    blocks_ptr,  # [blocks, 3] int32
    partial_ptr,  # [blocks] fp32
    counter_ptr,
    out_ptr,  # 0-d fp64
    blocks,
    COLUMNS: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(blocks_ptr + program * 3).to(tl.int64)
    first = tl.load(blocks_ptr + program * 3 + 1).to(tl.int64) * BLOCK
    row = table_ptr + tensor * COLUMNS
    pointer = pointer_to(tl.load(row + 1), ELEMENT, ALIGNED)
    numel = tl.load(row + 7)
    acc = tl.zeros((STEP,), dtype=tl.float32)
    for offset in range(0, BLOCK, STEP):
        start = first + offset
        if start + STEP <= numel:
            acc += _squares_of(pointer, start, numel, False, STEP)
        elif start < numel:
            acc += _squares_of(pointer, start, numel, True, STEP)
    tl.store(partial_ptr + program, tl.sum(acc, axis=0))
    if is_last(counter_ptr, blocks):
        tl.store(out_ptr, sum_of_column(partial_ptr, blocks, 1, SUM_BLOCK))


def sum_of_squares(grads: Sequence[Tensor], table: Tensor | None = None) -> Tensor:
    """0-d float64 on the device of the gradients, which are contiguous and of one dtype; ``table``
    is the step_table of a step with these gradients, if it is on the device already.
    """
    device = grads[0].device
    sizes = tuple(grad.numel() for grad in grads)
    blocks = blocks_of(sizes, device)
    if not len(blocks):
        return torch.zeros((), dtype=torch.float64, device=device)
    out = torch.empty((), dtype=torch.float64, device=device)
    if table is None:
        table = uploaded(address_table([(), grads], sizes), device)
    partial = torch.empty(len(blocks), dtype=torch.float32, device=device)
    with launch_device(grads[0]):
        launch(
            _sum_of_squares_kernel,
            (len(blocks),),
            table,
            blocks,
            partial,
            counters(device, 1),
            out,
            len(blocks),
            COLUMNS=table.shape[1],
            ELEMENT=ELEMENT[grads[0].dtype],
            ALIGNED=aligned(grads),
            BLOCK=BLOCK,
            STEP=_SUM_BYTES // grads[0].element_size(),
            SUM_BLOCK=_SUM_BLOCK,
            num_warps=8,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def _fact(row_ptr, index: tl.constexpr):
    return tl.load(row_ptr + _ADDRESS_COLUMNS + index).to(tl.float64, bitcast=True)


@triton.jit
def _fact_or_scalar(row_ptr, index: tl.constexpr, column: tl.constexpr, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        pointer = pointer_to(tl.load(row_ptr + column), tl.float32, False)
        return tl.load(pointer).to(tl.float64)
    else:
        return _fact(row_ptr, index)


@triton.jit
def _power(base, exponent):
    """base^exponent in fp64 for a whole exponent, by squaring: 1 - base^t cancels in fp32."""
    result = base * 0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def _control(
    squares_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    max_grad_norm,
    SKIP_NONFINITE: tl.constexpr,
):
    """The factors that unscale and clip, fp32, and whether the step is skipped."""
    unscale = 1.0
    clip = 1.0
    skip = False
    if grad_scale_ptr is not None:
        unscale = tl.div_rn(1.0, tl.load(grad_scale_ptr).to(tl.float32))
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0
    if squares_ptr is not None:
        norm = tl.sqrt_rn(tl.load(squares_ptr).to(tl.float32)) * unscale
        clip = tl.div_rn(max_grad_norm, norm + 1e-6)
        clip = tl.where(clip > 1.0, 1.0, clip)  # a NaN stays
        if SKIP_NONFINITE:
            skip = skip | (norm - norm != 0)
    return unscale, clip, skip


@triton.jit
def _load_moment(
    pointer, scales, i, start, numel, MASKED: tl.constexpr, MOMENTS: tl.constexpr,
    SIGNED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    if MOMENTS == "8bit":
        return load_codes(load(pointer, i, numel, 0, MASKED), scales, start, numel, SIGNED, STEP)
    return load(pointer, i, numel, 0.0, MASKED).to(tl.float32)


@triton.jit
def _store_moment(
    pointer, scales, value, i, start, numel, stream, step, key0, key1, MASKED: tl.constexpr,
    MOMENTS: tl.constexpr, SIGNED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    purpose: tl.constexpr = _EXP_AVG_BITS if SIGNED else _EXP_AVG_SQ_BITS
    if MOMENTS == "8bit":
        codes = store_codes(
            value, scales, start, numel, stream, step, purpose, key0, key1, SIGNED, STEP
        )
        store(pointer, i, numel, codes, MASKED)
    elif MOMENTS == "bf16":
        rounded = store_stochastic(value, start, stream, step, purpose, key0, key1, STEP)
        store(pointer, i, numel, rounded, MASKED)
    else:
        store(pointer, i, numel, value, MASKED)


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, top, residue, scales, start, numel,
    weight1, weight2, step_size, inverse_root, eps, decay, factor, stream, step, key0, key1,
    MASKED: tl.constexpr, MOMENTS: tl.constexpr, ROUNDING: tl.constexpr, AMSGRAD: tl.constexpr,
    STEP: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """One stretch of STEP elements; returns the squares of gradient, update and parameter."""
    i = start + tl.arange(0, STEP)
    raw = load(grad, i, numel, 0.0, MASKED).to(tl.float32)
    g = raw * factor
    p = load_param(param, residue, i, numel, MASKED, ROUNDING)
    sq_scales = scales
    if MOMENTS == "8bit":
        sq_scales = scales + tl.cdiv(numel, QUANTISED)
    m = _load_moment(exp_avg, scales, i, start, numel, MASKED, MOMENTS, True, STEP)
    v = _load_moment(exp_avg_sq, sq_scales, i, start, numel, MASKED, MOMENTS, False, STEP)
    m += (g - m) * weight1
    v = _towards(v, g * g, weight2)
    _store_moment(
        exp_avg, scales, m, i, start, numel, stream, step, key0, key1, MASKED, MOMENTS, True, STEP
    )
    _store_moment(
        exp_avg_sq, sq_scales, v, i, start, numel, stream, step, key0, key1, MASKED, MOMENTS,
        False, STEP,
    )  # fmt: skip
    if AMSGRAD:
        old = _load_moment(top, scales, i, start, numel, MASKED, MOMENTS, False, STEP)
        v = tl.where(old > v, old, v)
        _store_moment(
            top, scales, v, i, start, numel, stream, step, key0, key1, MASKED, MOMENTS, False, STEP
        )
    root = tl.sqrt_rn(v) * inverse_root + eps
    if MASKED:
        root = tl.where(i < numel, root, 1.0)
    down = tl.div_rn(m * step_size, root) + p * decay
    updated = p - down
    if ROUNDING == "stochastic":
        weight = store_stochastic(updated, start, stream, step, _WEIGHT_BITS, key0, key1, STEP)
        store(param, i, numel, weight, MASKED)
    else:
        store_param(param, residue, i, numel, updated, MASKED, ROUNDING)
    return raw * raw, down * down, updated * updated


# Floor: gradient, parameter and two moments are read and three of them written, 28 bytes an fp32
# element, against about 30 operations: bound by memory.
@triton.jit(do_not_specialize=["max_grad_norm", "sign"])
def _adamw_step_kernel(
    table_ptr,  # [n, 19] int64: addresses, facts as bits of fp64, the seed
    blocks_ptr,  # [blocks, 3] int32
    partial_ptr,  # [blocks, 3] fp32
    counter_ptr,  # [n]
    norms_ptr,  # [n, 3] fp32
    squares_ptr,  # 0-d fp64, or None
    grad_scale_ptr,  # fp32, or None
    found_inf_ptr,  # fp32, or None
    max_grad_norm,
    sign,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    RESIDUE: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROUNDING: tl.constexpr,
    AMSGRAD: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DECAY_ON_DEVICE: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    QUANTISED: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(blocks_ptr + program * 3).to(tl.int64)
    number = tl.load(blocks_ptr + program * 3 + 1)
    count = tl.load(blocks_ptr + program * 3 + 2)
    row = table_ptr + tensor * _COLUMNS
    unscale, clip, skip = _control(
        squares_ptr, grad_scale_ptr, found_inf_ptr, max_grad_norm, SKIP_NONFINITE
    )
    lr = _fact_or_scalar(row, 0, 8, LR_ON_DEVICE)
    beta1, beta2 = _fact(row, 1), _fact(row, 2)
    decay = (lr * _fact_or_scalar(row, 4, 9, DECAY_ON_DEVICE)).to(tl.float32)
    step = _fact_or_scalar(row, 5, 10, STEP_ON_DEVICE).to(tl.int32)
    stream = _fact(row, 6).to(tl.int32)
    seed = tl.load(row + _COLUMNS - 1)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    step_size = (lr / (1.0 - _power(beta1, step))).to(tl.float32)
    inverse_root = tl.div_rn(1.0, tl.sqrt_rn((1.0 - _power(beta2, step)).to(tl.float32)))
    weight1, weight2 = (1.0 - beta1).to(tl.float32), (1.0 - beta2).to(tl.float32)
    eps = _fact(row, 3).to(tl.float32)
    factor = unscale * clip * sign

    param = pointer_to(tl.load(row), PARAM, ALIGNED)
    grad = pointer_to(tl.load(row + 1), GRAD, ALIGNED)
    exp_avg = pointer_to(tl.load(row + 2), MOMENT, ALIGNED)
    exp_avg_sq = pointer_to(tl.load(row + 3), MOMENT, ALIGNED)
    top = pointer_to(tl.load(row + 4), MOMENT, ALIGNED)
    residue = pointer_to(tl.load(row + 5), RESIDUE, ALIGNED)
    scales = pointer_to(tl.load(row + 6), tl.float32, False)
    numel = tl.load(row + 7)

    grads = tl.zeros((STEP,), dtype=tl.float32)
    updates = tl.zeros((STEP,), dtype=tl.float32)
    params = tl.zeros((STEP,), dtype=tl.float32)
    if not skip:
        for offset in range(0, BLOCK, STEP):
            start = number.to(tl.int64) * BLOCK + offset
            if start + STEP <= numel:
                g2, u2, p2 = _update(
                    param, grad, exp_avg, exp_avg_sq, top, residue, scales, start, numel,
                    weight1, weight2, step_size, inverse_root, eps, decay, factor, stream, step,
                    key0, key1, False, MOMENTS, ROUNDING, AMSGRAD, STEP, QUANTISED,
                )  # fmt: skip
                grads += g2
                updates += u2
                params += p2
            elif start < numel:
                g2, u2, p2 = _update(
                    param, grad, exp_avg, exp_avg_sq, top, residue, scales, start, numel,
                    weight1, weight2, step_size, inverse_root, eps, decay, factor, stream, step,
                    key0, key1, True, MOMENTS, ROUNDING, AMSGRAD, STEP, QUANTISED,
                )  # fmt: skip
                grads += g2
                updates += u2
                params += p2
    tl.store(partial_ptr + program * 3, tl.sum(grads, axis=0))
    tl.store(partial_ptr + program * 3 + 1, tl.sum(updates, axis=0))
    tl.store(partial_ptr + program * 3 + 2, tl.sum(params, axis=0))
    if is_last(counter_ptr + tensor, count):
        mine = partial_ptr + (program - number) * 3
        missing = tl.where(skip, float("nan"), 0.0)
        for column in tl.static_range(3):
            total = sum_of_column(mine + column, count, 3, SUM_BLOCK)
            norm = tl.sqrt_rn(total.to(tl.float32))
            if column == 0:
                norm *= unscale
            tl.store(norms_ptr + tensor * 3 + column, norm + missing)


def step_table(arguments: StepArguments) -> Tensor:
    """[n, 19] int64 on the host: addresses, facts as bits of fp64, the seed."""
    addresses = address_table(arguments.operands, arguments.sizes, arguments.scalars)
    facts = arguments.facts.contiguous().view(torch.int64)
    seeds = addresses.new_full((len(addresses), 1), arguments.seed)
    return torch.cat([addresses, facts, seeds], dim=1)


def adamw_step(arguments: StepArguments) -> Tensor:
    """Norms [n, 3] fp32; the step in place."""
    params, grads, exp_avgs = arguments.params, arguments.grads, arguments.exp_avgs
    sizes, residues = arguments.sizes, arguments.residues
    device, count = params[0].device, len(params)
    # Tensors without elements have no block to write their norms.
    norms = (torch.empty if all(sizes) else torch.zeros)(count, 3, device=device)
    blocks = blocks_of(sizes, device)
    if not len(blocks):
        return norms
    table = arguments.table
    if table is None:
        table = uploaded(step_table(arguments), device)
    partial = torch.empty(len(blocks), 3, dtype=torch.float32, device=device)
    residue = residues[0].dtype if residues else torch.int16
    vectors = [t for tensors in arguments.operands[:6] for t in tensors]
    with launch_device(params[0]):
        launch(
            _adamw_step_kernel,
            (len(blocks),),
            table,
            blocks,
            partial,
            counters(device, count),
            norms,
            arguments.squares,
            arguments.grad_scale,
            arguments.found_inf,
            arguments.max_grad_norm,
            -1.0 if arguments.maximize else 1.0,
            PARAM=ELEMENT[params[0].dtype],
            GRAD=ELEMENT[grads[0].dtype],
            MOMENT=ELEMENT[exp_avgs[0].dtype],
            RESIDUE=ELEMENT[residue],
            MOMENTS=arguments.moments,
            ROUNDING=arguments.rounding,
            AMSGRAD=bool(arguments.max_exp_avg_sqs),
            LR_ON_DEVICE=bool(arguments.lrs),
            DECAY_ON_DEVICE=bool(arguments.decays),
            STEP_ON_DEVICE=bool(arguments.steps),
            SKIP_NONFINITE=arguments.skip_nonfinite,
            ALIGNED=aligned(vectors),
            BLOCK=BLOCK,
            STEP=_STEP_BLOCK,
            QUANTISED=QUANTISED,
            SUM_BLOCK=_SUM_BLOCK,
            num_warps=_step_warps(params, exp_avgs),
            maxnreg=MAX_REGISTERS if params[0].element_size() == 4 else _NARROW_REGISTERS,
            enable_fp_fusion=True,
        )
    return norms
