"""Random sums over responses, and losses of them held to their formulas in `looped`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from batches import exact_everywhere, hold_to_reference
from hypothesis import strategies as st
from torch import Tensor

from fastpref import Responses

Drawn = tuple[dict[str, Tensor], Tensor]


@st.composite
def sums(draw: st.DrawFn, *names: str, smallest: float = 0.0) -> Drawn:
    """Numbers (2B,), the first of them log-probabilities below ``-smallest``, and lengths."""
    pairs, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    values = draw(st.sampled_from([0.1, 1.0, 10.0])) * torch.randn(
        1 + len(names), 2 * pairs, generator=generator
    )
    lengths = torch.randint(0, 9, (2 * pairs,), generator=generator)
    values[0] = -values[0].abs() - smallest * lengths.clamp_min(1)
    return dict(zip(("logps", *names), exact_everywhere(values), strict=True)), lengths


def hold(
    loss: Callable[..., Any],
    formula: Callable[..., Tensor],
    drawn: Drawn,
    dtype: torch.dtype,
    options: dict[str, Any],
    *,
    constants: tuple[str, ...] = (),
    size: float,
    **flags: Tensor,
) -> None:
    """Value and gradients, of all numbers but ``constants``, are those of the formula.

    ``size`` is that of the largest number that the loss takes differences of, squares, or puts into
    an exponential. ``flags`` are handed on.
    """
    values, lengths = drawn

    def leaves(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            name: one.to(dtype).clone().requires_grad_(name not in constants)
            for name, one in values.items()
        }

    def ours(leaves: dict[str, Tensor]) -> Tensor:
        logps, *_ = (given := dict(leaves)).values()
        del given["logps"]
        return loss(Responses(logps, lengths), **given, **flags, **options).loss

    hold_to_reference(
        ours,
        lambda leaves: formula(lengths=lengths, **leaves, **flags, **options),
        leaves,
        dtype,
        scale=size,
        sharpness=size,
    )


def largest(drawn: Drawn) -> float:
    """The largest number of them all, twice, as a difference may have it."""
    return 2 * max(float(one.abs().max()) for one in drawn[0].values())
