"""The activations, elementwise in fp32, without libdevice (which has no interpreter).

`fasttune.ops.glu` states the formulas. No finite x gives a NaN: exponentials are of arguments at
or below zero where their overflow could meet a zero, and the cubic of gelu_tanh is clamped.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(u):
    """tanh to a few units in the last place.

    Above 0.5 the exponential formula loses at most 2 bits; below it the Taylor series to u^15
    leaves a relative error of 0.0006 * 0.5^16 = 1e-8, where the formula would cancel.
    """
    size = tl.abs(u)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    large = tl.where(u < 0, -large, large)
    s = u * u
    p = -929569.0 / 638512875.0
    p = p * s + 21844.0 / 6081075.0
    p = p * s - 1382.0 / 155925.0
    p = p * s + 62.0 / 2835.0
    p = p * s - 17.0 / 315.0
    p = p * s + 2.0 / 15.0
    p = p * s - 1.0 / 3.0
    small = u + u * s * p
    return tl.where(size < 0.5, small, large)


@triton.jit
def _sigmoids(x):
    """-> sigmoid(x) and sigmoid(-x) = 1 - sigmoid(x), both with a small relative error."""
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def _normal_distribution(x, gaussian):
    """Phi(x); `gaussian` is e^(-x^2 / 2).

    The tail is the gaussian times a polynomial in (|x| - c) / (|x| + c) over |x| + c, as in
    csrc/cpu/math.h, where the coefficients are explained: 1 - erf would cancel there.
    """
    size = tl.abs(x)
    t = 1.0 / (size + 3.75)
    s = (size - 3.75) * t
    p = 4.43412020e-4 * s + 5.09540958e-4
    p = p * s - 4.16906783e-3
    p = p * s + 1.20009168e-3
    p = p * s + 3.74925248e-2
    p = p * s - 1.51520833e-1
    p = p * s + 3.52939606e-1
    p = p * s - 5.88188291e-1
    p = p * s + 7.50294089e-1
    tail = p * t * gaussian
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _clamped(x):
    """x within [-16, 16], beyond which sigmoid(2 z) of gelu_tanh is 0 or 1; NaN stays NaN."""
    x = tl.where(x > 16.0, 16.0, x)
    return tl.where(x < -16.0, -16.0, x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) of fp32 x."""
    value, _ = activate_with_slope(x, ACTIVATION)
    return value


@triton.jit
def activate_with_slope(x, ACTIVATION: tl.constexpr):
    """-> act(x) and act'(x) of fp32 x."""
    if ACTIVATION == "silu":
        plus, minus = _sigmoids(x)
        value = x * plus
        slope = plus + value * minus
    elif ACTIVATION == "gelu":
        gaussian = tl.exp(-0.5 * x * x)
        phi = _normal_distribution(x, gaussian)
        value = x * phi
        slope = phi + x * (0.3989422804014327 * gaussian)
    elif ACTIVATION == "gelu_tanh":
        bounded = _clamped(x)
        square = bounded * bounded
        # 2 sqrt(2 / pi) = 1.5957691216057308, times 0.044715, times 3
        plus, minus = _sigmoids(bounded * (1.5957691216057308 + 0.07135481627260025 * square))
        value = x * plus
        slope = plus + value * minus * (1.5957691216057308 + 0.21406444881780076 * square)
    elif ACTIVATION == "quick_gelu":
        plus, minus = _sigmoids(1.702 * x)
        value = x * plus
        slope = plus + 1.702 * (value * minus)
    elif ACTIVATION == "relu":
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        positive = tl.where(x <= 0, 0.0, x)
        value = positive * positive
        slope = positive + positive
    elif ACTIVATION == "tanh":
        value = tanh(x)
        slope = 1.0 - value * value
    elif ACTIVATION == "leaky_relu":
        value = tl.where(x <= 0, 0.01 * x, x)
        slope = tl.where(x <= 0, 0.01, 1.0)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        value, minus = _sigmoids(x)
        slope = value * minus
    return value, slope
