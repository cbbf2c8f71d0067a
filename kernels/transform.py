"""What a model does to raw projections before the softmax: scale, softcap, temperature."""

from typing import Protocol

import triton
import triton.language as tl

from .numerics import tanh


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
