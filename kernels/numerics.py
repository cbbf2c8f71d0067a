"""Scalar functions that stay accurate in float32, and what turns projections into logits."""

from typing import Protocol

import triton
import triton.language as tl

# A finite start keeps `maximum - maximum` from being NaN while every logit so far is -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# So far below the maximum an exponential is 0; and twice it is finite, so that 0 times it is 0.
FAR = tl.constexpr(1e30)


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


class Transform(Protocol):
    """`z = T(x)`: `y = logit_scale * x`; `y = softcap * tanh(y / softcap)`; `y / temperature`."""

    @property
    def logit_scale(self) -> float:
        """Factor of the projections."""

    @property
    def softcap(self) -> float | None:
        """Bound on the scaled projections, if any."""

    @property
    def temperature(self) -> float:
        """Divisor of the logits."""


def transform_arguments(transform: Transform) -> dict[str, float | bool]:
    """`transform` as the keyword arguments of a kernel; without a softcap its value is not read."""
    return {
        "logit_scale": float(transform.logit_scale),
        "softcap": 1.0 if transform.softcap is None else float(transform.softcap),
        "temperature": float(transform.temperature),
        "HAS_SOFTCAP": transform.softcap is not None,
    }


@triton.jit
def transform_logits(x, logit_scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """Logits `z = T(x)` of raw projections `x`, any shape, float32, and the slope `dz/dx`."""
    # A launch under torch.compile may hand Python floats over as float64.
    logit_scale = tl.cast(logit_scale, tl.float32)
    temperature = tl.cast(temperature, tl.float32)
    factor = logit_scale / temperature
    if HAS_SOFTCAP:
        softcap = tl.cast(softcap, tl.float32)
        saturation = tanh(x * (logit_scale / softcap))
        slope = factor * (1.0 - saturation * saturation)
        return saturation * (softcap / temperature), slope
    else:
        return x * factor, factor
