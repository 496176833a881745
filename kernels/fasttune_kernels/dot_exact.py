"""Products of operands of different dtypes, accumulated in fp32, no operand rounded.

A product that has to be as exact as fp32 is summed in two levels: a tile's terms on their own, the
tiles by additions that round to nearest. Tensor cores cut off what they add to an accumulator
instead of rounding it, which drifts in one long chain: five times cuBLAS's error in fp32 over 300
rows on an H100. Multiply-adds do round, but a chain of hundreds is as far off.
"""

import triton
import triton.language as tl


@triton.jit
def _leading_bf16(x):
    """The fp32 x cut to its leading 8 significant bits: exactly representable in bf16."""
    bits = x.to(tl.uint32, bitcast=True) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _dot_terms(lhs, rhs, acc, SPLIT_LHS: tl.constexpr, SPLIT_RHS: tl.constexpr):
    """lhs @ rhs + acc on bf16 tensor cores; the operand marked SPLIT is fp32, the other is bf16.

    24 significant bits are three times 8, so three terms cut by truncation are the operand itself:
    the differences are exact, nothing overflows, and bf16 has the exponent range of fp32. Only
    parts below 2^-133 are lost, and an infinite operand gives NaN. The smallest terms are added
    first.
    """
    if SPLIT_LHS:
        high = _leading_bf16(lhs)
        rest = lhs - high
        middle = _leading_bf16(rest)
        acc = tl.dot((rest - middle).to(tl.bfloat16), rhs, acc)
        acc = tl.dot(middle.to(tl.bfloat16), rhs, acc)
        acc = tl.dot(high.to(tl.bfloat16), rhs, acc)
    elif SPLIT_RHS:
        high = _leading_bf16(rhs)
        rest = rhs - high
        middle = _leading_bf16(rest)
        acc = tl.dot(lhs, (rest - middle).to(tl.bfloat16), acc)
        acc = tl.dot(lhs, middle.to(tl.bfloat16), acc)
        acc = tl.dot(lhs, high.to(tl.bfloat16), acc)
    return acc


@triton.jit
def _dot_split(lhs, rhs, acc):
    """acc + lhs @ rhs of fp32 operands on bf16 tensor cores: six of the nine products of their
    terms, which leaves out less than 2^-22 of |lhs| @ |rhs|.
    """
    lhs_high, rhs_high = _leading_bf16(lhs), _leading_bf16(rhs)
    lhs_rest, rhs_rest = lhs - lhs_high, rhs - rhs_high
    lhs_middle, rhs_middle = _leading_bf16(lhs_rest), _leading_bf16(rhs_rest)
    lhs_low, rhs_low = (lhs_rest - lhs_middle).to(tl.bfloat16), (rhs_rest - rhs_middle)
    lhs_high, lhs_middle = lhs_high.to(tl.bfloat16), lhs_middle.to(tl.bfloat16)
    rhs_high, rhs_middle = rhs_high.to(tl.bfloat16), rhs_middle.to(tl.bfloat16)
    acc = tl.dot(lhs_low, rhs_high, acc)
    acc = tl.dot(lhs_high, rhs_low.to(tl.bfloat16), acc)
    acc = tl.dot(lhs_middle, rhs_middle, acc)
    acc = tl.dot(lhs_middle, rhs_high, acc)
    acc = tl.dot(lhs_high, rhs_middle, acc)
    return tl.dot(lhs_high, rhs_high, acc)


@triton.jit
def dot_exact(lhs, rhs, acc, TENSOR_CORES: tl.constexpr, ROUNDED: tl.constexpr = False):
    """acc + lhs @ rhs in fp32 without rounding an operand, whatever the two dtypes are.

    - one 16-bit dtype on both sides: tensor cores, whose products of 16-bit operands are exact;
    - bf16 with fp32: the fp32 operand in three bf16 terms;
    - fp16 with fp32: as above, the fp16 operand being two bf16 terms (11 bits are 8 + 3). Scaling
      the fp32 operand into the range of fp16 instead would need a maximum and lose small values;
    - fp32 on both sides, if the result is ROUNDED to 16 bits afterwards: in bf16 terms, off by less
      than 2^-22 of its parts, where the rounding is 2^-9. Multiply-adds take four times as long as
      writing the result does (H100);
    - anything else, or without TENSOR_CORES: fp32 multiply-adds.
    """
    if TENSOR_CORES and lhs.dtype == rhs.dtype and lhs.dtype != tl.float32:
        acc = tl.dot(lhs, rhs, acc)
    elif TENSOR_CORES and lhs.dtype == tl.bfloat16 and rhs.dtype == tl.float32:
        acc += _dot_terms(lhs, rhs, tl.zeros_like(acc), False, True)
    elif TENSOR_CORES and lhs.dtype == tl.float32 and rhs.dtype == tl.bfloat16:
        acc += _dot_terms(lhs, rhs, tl.zeros_like(acc), True, False)
    elif TENSOR_CORES and lhs.dtype == tl.float16 and rhs.dtype == tl.float32:
        wide = lhs.to(tl.float32)
        high = _leading_bf16(wide)
        low = _dot_terms((wide - high).to(tl.bfloat16), rhs, tl.zeros_like(acc), False, True)
        acc += _dot_terms(high.to(tl.bfloat16), rhs, low, False, True)
    elif TENSOR_CORES and lhs.dtype == tl.float32 and rhs.dtype == tl.float16:
        wide = rhs.to(tl.float32)
        high = _leading_bf16(wide)
        low = _dot_terms(lhs, (wide - high).to(tl.bfloat16), tl.zeros_like(acc), True, False)
        acc += _dot_terms(lhs, high.to(tl.bfloat16), low, True, False)
    elif TENSOR_CORES and ROUNDED and lhs.dtype == tl.float32 and rhs.dtype == tl.float32:
        acc = _dot_split(lhs, rhs, acc)
    else:
        # max_num_imprecise_acc means nothing in fp32, but keeps Triton from making the sum of acc
        # and a product the chain again.
        acc += tl.dot(
            lhs.to(tl.float32), rhs.to(tl.float32), input_precision="ieee", max_num_imprecise_acc=1
        )
    return acc
