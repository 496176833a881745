"""Products of operands of different dtypes, accumulated in fp32, no operand rounded."""

import triton
import triton.language as tl


@triton.jit
def _leading_bf16(x):
    """The fp32 x cut to its leading 8 significant bits: exactly representable in bf16."""
    bits = x.to(tl.uint32, bitcast=True) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _dot_terms(lhs, rhs, acc, SPLIT_LHS: tl.constexpr, SPLIT_RHS: tl.constexpr):
    """acc + lhs @ rhs on bf16 tensor cores; the operand marked SPLIT is fp32, the other is bf16.

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
def dot_exact(lhs, rhs, acc, TENSOR_CORES: tl.constexpr):
    """acc + lhs @ rhs in fp32 without rounding an operand, whatever the two dtypes are.

    - one 16-bit dtype on both sides: tensor cores, whose products of 16-bit operands are exact;
    - bf16 with fp32: the fp32 operand in three bf16 terms;
    - fp16 with fp32: as above, the fp16 operand being two bf16 terms (11 bits are 8 + 3). Scaling
      the fp32 operand into the range of fp16 instead would need a maximum and lose small values;
    - anything else, or without TENSOR_CORES: fp32 multiply-adds.
    """
    if TENSOR_CORES and lhs.dtype == rhs.dtype and lhs.dtype != tl.float32:
        acc = tl.dot(lhs, rhs, acc)
    elif TENSOR_CORES and lhs.dtype == tl.bfloat16 and rhs.dtype == tl.float32:
        acc = _dot_terms(lhs, rhs, acc, False, True)
    elif TENSOR_CORES and lhs.dtype == tl.float32 and rhs.dtype == tl.bfloat16:
        acc = _dot_terms(lhs, rhs, acc, True, False)
    elif TENSOR_CORES and lhs.dtype == tl.float16 and rhs.dtype == tl.float32:
        wide = lhs.to(tl.float32)
        high = _leading_bf16(wide)
        acc = _dot_terms((wide - high).to(tl.bfloat16), rhs, acc, False, True)
        acc = _dot_terms(high.to(tl.bfloat16), rhs, acc, False, True)
    elif TENSOR_CORES and lhs.dtype == tl.float32 and rhs.dtype == tl.float16:
        wide = rhs.to(tl.float32)
        high = _leading_bf16(wide)
        acc = _dot_terms(lhs, (wide - high).to(tl.bfloat16), acc, True, False)
        acc = _dot_terms(lhs, high.to(tl.bfloat16), acc, True, False)
    else:
        acc = tl.dot(lhs.to(tl.float32), rhs.to(tl.float32), acc, input_precision="ieee")
    return acc
