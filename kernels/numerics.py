"""Scalar functions that stay accurate in float32 where the textbook form cancels."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """`tanh(x)`, to a few ulp of its own size."""
    # 1 - exp(-2|x|) cancels near zero, where the Taylor series is short.
    square = x * x
    series = 62.0 / 2835.0
    series = -17.0 / 315.0 + square * series
    series = 2.0 / 15.0 + square * series
    series = -1.0 / 3.0 + square * series
    series = x + x * square * series
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -ratio, ratio))


@triton.jit
def log1p_bounded(u):
    """`log(1 + u)` for `u` in [-1/2, 1]: `2 atanh(s)` with `s = u / (2 + u)`, `|s| <= 1/3`."""
    s = u / (2.0 + u)
    square = s * s
    series = 1.0 / 13.0
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    return 2.0 * (s + s * square * series)


@triton.jit
def logsigmoid(x):
    """`log(1 / (1 + exp(-x)))`."""
    return tl.minimum(x, 0.0) - log1p_bounded(tl.exp(-tl.abs(x)))


@triton.jit
def expm1_negative(x):
    """`exp(x) - 1` for `x <= 0`."""
    near = tl.maximum(x, -0.6931472)
    series = 1.0 + near / 10.0
    series = 1.0 + near / 9.0 * series
    series = 1.0 + near / 8.0 * series
    series = 1.0 + near / 7.0 * series
    series = 1.0 + near / 6.0 * series
    series = 1.0 + near / 5.0 * series
    series = 1.0 + near / 4.0 * series
    series = 1.0 + near / 3.0 * series
    series = 1.0 + near / 2.0 * series
    return tl.where(x > -0.6931472, near * series, tl.exp(x) - 1.0)


@triton.jit
def log1mexp(x):
    """`log(1 - exp(x))` for `x < 0`."""
    near = tl.log(-expm1_negative(x))
    # The bound only keeps the branch that is not taken inside the domain of its series.
    far = log1p_bounded(-tl.exp(tl.minimum(x, -0.6931472)))
    return tl.where(x > -0.6931472, near, far)
