"""Each kind of divergence, elementwise, as Triton functions of two distributions.

`fastpref.ops.divergences` has the same in PyTorch, and says why the formulas are written this way.
With the student's probabilities `q` and the teacher's `p`, each function returns three numbers of a
token, `value`, `g` and `direct`: the divergence is the sum of `value`, and its gradient with
respect to the student's logits is `q * (g - sum(q * g)) + direct`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import exp, log1p, tanh


@triton.jit
def times(weights, logs):
    """`weights * logs`, 0 where the weight is 0 and the logarithm infinite."""
    return no_nan(weights * logs)


@triton.jit
def no_nan(x):
    """`x` with 0 for NaN."""
    return tl.where(x == x, x, 0.0)


@triton.jit
def _half_tanh(log_ratio):
    """`tanh(log(p/q) / 2) = (p - q) / (p + q)`, with all its digits where p is close to q."""
    half, _ = tanh(0.5 * log_ratio)
    return half


@triton.jit
def _excess(q, p, half_tanh):
    """`p - q`."""
    return (p + q) * half_tanh


@triton.jit
def _larger_over_mixture(half_tanh, share):
    """`log(max(p, q) / m)`, `m = share * p + (1 - share) * q`."""
    tilted = (2.0 * share - 1.0) * half_tanh
    # Where all of the mixture is of the smaller, less a rounding.
    above = tl.maximum(tl.abs(half_tanh) - tilted, 0.0)
    return log1p(above / (1.0 + tilted))


@triton.jit
def forward_kl(q, p, log_ratio, share, lowest, highest):
    """`sum p log(p/q)`: the gradient is `q - p`."""
    excess = _excess(q, p, _half_tanh(log_ratio))
    return times(p, log_ratio) - excess, 0.0, -excess


@triton.jit
def reverse_kl(q, p, log_ratio, share, lowest, highest):
    """`sum q log(q/p)`, `g = log(q/p)`."""
    value = _excess(q, p, _half_tanh(log_ratio)) - times(q, log_ratio)
    return value, -log_ratio, 0.0


@triton.jit
def jeffreys(q, p, log_ratio, share, lowest, highest):
    """`sum (p - q) log(p/q)`, `g = -p/q + log(q/p)`."""
    excess = _excess(q, p, _half_tanh(log_ratio))
    return times(excess, log_ratio), -log_ratio, -excess


@triton.jit
def total_variation(q, p, log_ratio, share, lowest, highest):
    """`1/2 sum abs(p - q)`, `g = 1/2 sign(q - p)`."""
    value = 0.5 * tl.abs(_excess(q, p, _half_tanh(log_ratio)))
    half_sign = tl.where(log_ratio > 0.0, 0.5, tl.where(log_ratio < 0.0, -0.5, 0.0))
    return value, -half_sign, 0.0


@triton.jit
def jsd(q, p, log_ratio, share, lowest, highest):
    """`b sum p log(p/m) + (1-b) sum q log(q/m)`, `g = (1-b) log(q/m)`."""
    larger = _larger_over_mixture(_half_tanh(log_ratio), share)
    log_p = tl.minimum(log_ratio, 0.0) + larger
    log_q = larger - tl.maximum(log_ratio, 0.0)
    value = share * times(p, log_p) + (1.0 - share) * times(q, log_q)
    return value, (1.0 - share) * log_q, 0.0


@triton.jit
def skew_kl(q, p, log_ratio, share, lowest, highest):
    """`sum p log(p/m)`, `m = a p + (1-a) q`, `g = -(1-a) p/m`."""
    half_tanh = _half_tanh(log_ratio)
    log_p = tl.minimum(log_ratio, 0.0) + _larger_over_mixture(half_tanh, share)
    value = times(p, log_p) - (1.0 - share) * _excess(q, p, half_tanh)
    return value, (share - 1.0) * exp(log_p), 0.0


@triton.jit
def skew_reverse_kl(q, p, log_ratio, share, lowest, highest):
    """`sum q log(q/m)`, `m = (1-a) p + a q`, `g = log(q/m) - a q/m`."""
    value, log_q, direct = skew_reverse_kl_detached(q, p, log_ratio, share, lowest, highest)
    half_tanh = _half_tanh(log_ratio)
    # (p - q) / m = (1 - q/m) / (1-a)
    over_mixture = 2.0 * half_tanh / (1.0 + (2.0 * share - 1.0) * half_tanh)
    return value, log_q + share * (1.0 - share) * over_mixture, direct


@triton.jit
def skew_reverse_kl_detached(q, p, log_ratio, share, lowest, highest):
    """The same with `g = log(q/m)`."""
    half_tanh = _half_tanh(log_ratio)
    log_q = _larger_over_mixture(half_tanh, share) - tl.maximum(log_ratio, 0.0)
    value = times(q, log_q) + share * _excess(q, p, half_tanh)
    return value, log_q, 0.0


@triton.jit
def advantage(q, p, log_ratio, share, lowest, highest):
    """`sum q A`, `g = A`: `log_ratio`, clipped."""
    return 0.0, tl.minimum(tl.maximum(log_ratio, lowest), highest), 0.0


class Kind(NamedTuple):
    """A kind's function, and what to make of what it returns."""

    function: Any  # triton.JITFunction
    centred: bool = True  # whether there is a `g`
    is_mean: bool = False  # whether the divergence is `sum(q * g)`, and there is no `value`


KINDS = {
    "forward_kl": Kind(forward_kl, centred=False),
    "reverse_kl": Kind(reverse_kl),
    "jsd": Kind(jsd),
    "skew_kl": Kind(skew_kl),
    "skew_reverse_kl": Kind(skew_reverse_kl),
    "total_variation": Kind(total_variation),
    "jeffreys": Kind(jeffreys),
    "advantage": Kind(advantage, is_mean=True),
}
DETACHED = Kind(skew_reverse_kl_detached)
