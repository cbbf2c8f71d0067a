"""Every loss of sums, with responses and options of any size, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from every_function import flat, loss_batch
from torch import Tensor

from fastpref import Responses
from fastpref.checks import Bounds, options_of
from fastpref.losses import METHODS

# Next to 0 the odds of these are infinite: `log1mexp` ends at the smallest normal number.
OF_ODDS = ("drdo", "orpo")
CERTAIN, UNCERTAIN = (0.0, 1e-45, 1e-39), (1e-10, 1.0, 1e4)


def pairs(sizes: tuple[float, ...]) -> Tensor:
    """Log-probabilities of pairs: both alike, and one of them certain."""
    both = [(-size, other) for size in sizes for other in (-size, -sizes[0])]
    both += [(other, mine) for mine, other in both[1::2]]
    return torch.tensor(both).T.flatten()


def arguments(method: str, sizes: tuple[float, ...]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Responses, and what else a loss reads of them: numbers that float32 subtracts exactly."""
    (few, _), given = loss_batch(method, torch.float32)
    logps = pairs(sizes)
    count = len(logps) // 2
    logps = logps[: len(few) // 2 * count]
    random = torch.Generator().manual_seed(1)
    for name, one in given.items():
        if isinstance(one, Tensor):
            size = len(one) // 2 * count
            numbers = torch.randint(-96, 97, (size,), generator=random) / 64
            given[name] = numbers > 0 if one.dtype == torch.bool else numbers
    return logps, torch.tensor([7, 1, 0, 3]).repeat(len(logps))[: len(logps)], given


def options(method: str) -> Iterator[dict[str, Any]]:
    """Each option at its ends, alone."""
    yield {}
    for name, annotation in options_of(METHODS[method]).items():
        if annotation is bool:
            values: tuple[Any, ...] = (False, True)
        elif get_origin(annotation) is Literal:
            values = get_args(annotation)
        else:
            (bounds,) = (one for one in get_args(annotation) if isinstance(one, Bounds))
            values = (1e-6, 1e3) if bounds.at_most is None else (1e-6, 0.9 * bounds.at_most)
            values += (0.0,) if bounds.at_least == 0 else ()
        yield from ({name: value} for value in values)


def run(
    method: str, dtype: torch.dtype, logps: Tensor, lengths: Tensor, given: dict[str, Any]
) -> list[Tensor]:
    """Everything that a loss returns, and its gradients."""
    cast = {
        name: one.to(dtype).requires_grad_()
        if isinstance(one, Tensor) and one.is_floating_point()
        else one
        for name, one in given.items()
    }
    leaves = [logps.to(dtype).clone().requires_grad_()]
    leaves += [one for one in cast.values() if isinstance(one, Tensor) and one.requires_grad]
    found = METHODS[method](Responses(leaves[0], lengths), **cast)
    gradients = torch.autograd.grad(found.loss, leaves, materialize_grads=True)
    return [*(one.detach() for one in flat(found)), *gradients]


@pytest.mark.parametrize("method", METHODS)
def test_responses_and_options_of_any_size(method):
    for sizes in (CERTAIN, UNCERTAIN):
        logps, lengths, given = arguments(method, sizes)
        # What an error of the inputs that float32 would not notice may change.
        noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
        nearby = logps.double() * (1 + 2.0**-23 * noise)
        for more in options(method):
            ours, exact, near = (
                run(method, dtype, one, lengths, given | more)
                for dtype, one in (
                    (torch.float32, logps), (torch.float64, logps), (torch.float64, nearby)
                )
            )  # fmt: skip
            for one, right, other in zip(ours, exact, near, strict=True):
                assert one.isfinite().all(), more
                if sizes == CERTAIN and method in OF_ODDS:
                    continue  # float64 has smaller numbers to end at
                right, other = right.double(), other.double()
                # The tail of a sigmoid has the error of its logarithm.
                relative = 2e-6 * (1 + right.abs().clamp_min(1e-30).log().abs())
                allowed = relative * right.abs() + 8 * (other - right).abs() + 1e-30
                if right.dim() == 0:  # a mean, of numbers that may cancel
                    allowed = allowed + 2e-7 * max(sizes)
                error = (one.double() - right).abs()
                assert (error <= allowed).all(), (more, one, right)


@pytest.mark.parametrize("method", METHODS)
def test_a_pair_that_is_no_number(method):
    logps, lengths, given = arguments(method, UNCERTAIN)
    clean = run(method, torch.float32, logps, lengths, given)
    spoiled = logps.clone()
    spoiled[0] = torch.nan
    found = run(method, torch.float32, spoiled, lengths, given)
    assert found[0].isnan()
    count = len(pairs(UNCERTAIN)) // 2
    for one, other in zip(found, clean, strict=True):
        if one.dim() == 1:
            kept = torch.arange(len(one)) % count != 0
            assert torch.equal(one[kept], other[kept])
