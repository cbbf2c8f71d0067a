"""Scalar functions that stay accurate in float32, and what turns projections into logits."""

from typing import Protocol

import triton
import triton.language as tl

# A finite start keeps `maximum - maximum` from being NaN while every logit so far is -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# So far below the maximum an exponential is 0; and twice it is finite, so that 0 times it is 0.
FAR = tl.constexpr(1e30)
# How far a logit may lie above a row's reference before the reference follows it, in nats: its
# exponential, below 22 027, still fits into float16, and most tiles move no reference.
HEADROOM = tl.constexpr(10.0)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """`exp(x)` in two instructions, as `tl.exp` but 0 where the result is below `2 ** -126`.

    `x` is a difference of logits. Multiplied by `LOG2E` before they are subtracted, logits that
    share an offset would each be rounded relative to that offset.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to a few ulp of its own size, and 1 minus its square.

    `tanh = s / sqrt(1 + s ** 2)` with `s = sinh(x)`. Of the Taylor series of `sinh` eight terms are
    enough: where more would count, `tanh` is too close to one to see it.
    """
    # So that no infinity meets a zero below. A NaN stays one.
    x = tl.clamp(x, -40.0, 40.0, propagate_nan=tl.PropagateNan.ALL)
    square = x * x
    series = 1.0 / 6227020800.0 + square * (1.0 / 1307674368000.0)
    series = 1.0 / 39916800.0 + square * series
    series = 1.0 / 362880.0 + square * series
    series = 1.0 / 5040.0 + square * series
    series = 1.0 / 120.0 + square * series
    series = 1.0 / 6.0 + square * series
    sinh = x + x * square * series
    decay = tl.rsqrt(1.0 + sinh * sinh)
    return sinh * decay, decay * decay


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
def log1p(u):
    """`log(1 + u)` for `u >= 0`."""
    return tl.where(u > 1.0, tl.log(1.0 + u), log1p_bounded(tl.minimum(u, 1.0)))


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
    """`transform` for a kernel: `z = outer * tanh(inner * x)`, without a soft cap `outer * x`."""
    inner, outer = 1.0, float(transform.logit_scale)
    if transform.softcap is not None:
        inner, outer = outer / transform.softcap, float(transform.softcap)
    outer /= transform.temperature
    return {
        "inner": inner,
        "outer": outer,
        "HAS_SOFTCAP": transform.softcap is not None,
        "HAS_FACTOR": outer != 1.0,
    }


@triton.jit
def transform_logits(x, inner, outer, HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr):
    """Logits `z = T(x)` of raw projections `x`, any shape, float32, and their damping.

    The damping is what a soft cap leaves of the slope `dz/dx`: the slope is `outer * inner` times
    it, a number that is the same everywhere and is left to the caller.
    """
    damping = 1.0
    if HAS_SOFTCAP:
        # A launch under torch.compile may hand Python floats over as float64.
        x, damping = tanh(x * tl.cast(inner, tl.float32))
    if HAS_FACTOR:
        x *= tl.cast(outer, tl.float32)
    return x, damping
