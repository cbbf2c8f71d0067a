"""Kernels that work on a tile of logits, against a few lines of float64 torch."""

import pytest
import torch
from against_torch import (
    DEVICE,
    FLOATS,
    INF,
    LOWEST,
    NAN,
    QUIET,
    Transform,
    assert_as_good_as_torch,
    examples,
    label_and_rest,
    randint,
    randn,
    rounded,
    spread,
    transforms,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref.kernels.tiles import fold_tile, gradient_tile

pytestmark = QUIET


def rest_and_shortfall(z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of exponentials but one of the largest, and of these times what they are below it."""
    z = z.clone()
    if labels is not None:
        z[torch.arange(z.shape[1], device=DEVICE) == labels[:, None]] = -INF
    difference = torch.where(z.isneginf(), LOWEST, z - z.amax(1, keepdim=True))
    exponentials = difference.exp().scatter(1, z.argmax(1, keepdim=True), 0)
    return exponentials.sum(1), -(difference * exponentials).sum(1)


@examples
@given(
    n=st.integers(1, 4),
    widths=st.lists(st.sampled_from([1, 6, 40, 1030]), min_size=1, max_size=3),
    dtype=st.sampled_from([None, *FLOATS, "tile"]),
    has_labels=st.booleans(),
    masked=st.booleans(),
    stats=st.booleans(),
    transform=transforms,
)
def test_fold_tile(
    n: int,
    widths: list[int],
    dtype: torch.dtype | str | None,
    has_labels: bool,
    masked: bool,
    stats: bool,
    transform: Transform,
) -> None:
    """Tile after tile, caller-style: the exponentials of earlier tiles are rescaled."""
    vocab_size = sum(widths)
    x = 5 * randn(0, n, vocab_size)
    if masked:
        x[:, : vocab_size // 2 + 1] = -INF
    # One past either end: labels that no tile has.
    labels = randint(1, vocab_size + 2, n) - 1 if has_labels else None
    maximum = torch.full((n,), LOWEST, device=DEVICE)
    sum_exp = torch.zeros(n, device=DEVICE)
    target_logit = torch.full((n,), NAN, device=DEVICE)
    rest, shortfall = torch.zeros(2, n, device=DEVICE) if stats else (None, None)
    accumulated = torch.zeros(n, vocab_size, device=DEVICE)
    start = 0
    for width in widths:
        # A view with a row stride of its own.
        tile = x[:, start : start + width].clone() if dtype == "tile" else x[:, start:][:, :width]
        exponentials = rescale = None
        if dtype is not None:
            rescale = torch.empty(n, device=DEVICE)
            exponentials = tile if dtype == "tile" else torch.empty_like(tile, dtype=dtype)
        fold_tile(
            tile, labels, start, transform, maximum, sum_exp, target_logit, rest, shortfall,
            exponentials, rescale,
        )  # fmt: skip
        if exponentials is not None and rescale is not None:
            accumulated *= rescale[:, None]
            accumulated[:, start : start + width] = exponentials
        start += width

    exact_target, exact_lse = label_and_rest(transform(x.double()), labels)
    torch_target, torch_lse = label_and_rest(transform(x), labels)
    if labels is not None:
        assert_as_good_as_torch("target_logit", target_logit, exact_target, torch_target)
    lse = maximum + sum_exp.log()
    assert_as_good_as_torch("logsumexp", lse, exact_lse, torch_lse)
    if rest is not None and shortfall is not None:
        for name, found, exact, own in zip(
            ("rest", "shortfall"),
            (rest, shortfall),
            rest_and_shortfall(transform(x.double()), labels),
            rest_and_shortfall(transform(x), labels),
            strict=True,
        ):
            assert_as_good_as_torch(name, found, exact, own, transform(x.double()))
    if dtype is not None:
        is_label = torch.zeros_like(x, dtype=torch.bool)
        if labels is not None:
            is_label = torch.arange(vocab_size, device=DEVICE) == labels[:, None]

        def shares(of: Tensor) -> Tensor:
            of = of.detach().requires_grad_()
            z = transform(of)
            (slope,) = torch.autograd.grad(z.sum(), of)
            share = torch.exp(z - maximum[:, None]) * slope
            return share.masked_fill(is_label | of.isneginf(), 0.0).detach()

        exact, own = shares(x.double()), shares(x)
        if isinstance(dtype, torch.dtype):
            own = rounded(own, dtype)
        argument = transform(x.double())
        assert_as_good_as_torch("exponentials", accumulated, exact, own, argument)


@examples
@given(
    n=st.integers(1, 4),
    width=st.sampled_from([1, 6, 40, 1030]),
    dtype=st.sampled_from([*FLOATS, "tile"]),
    has_labels=st.booleans(),
    masked=st.booleans(),
    transform=transforms,
)
def test_gradient_tile(
    n: int,
    width: int,
    dtype: torch.dtype | str,
    has_labels: bool,
    masked: bool,
    transform: Transform,
) -> None:
    vocab_start = 48
    tile = 5 * randn(0, n, width + 3)[:, 1 : width + 1]
    if masked:
        tile[:, : width // 2] = -INF
    # Some labels are in other tiles.
    labels = randint(1, width + 4, n) + vocab_start - 2 if has_labels else None
    lse = transform(tile.double()).logsumexp(-1).float()
    # A loss that sums hands out one number to all rows.
    by_probability, by_label = randn(2, n), randn(3, 1).expand(n)

    def plain(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        z = transform(x)
        (slope,) = torch.autograd.grad(z.sum(), x)
        gradient = by_probability[:, None] * torch.exp(z - lse[:, None]) * slope
        if labels is not None:
            is_label = torch.arange(width, device=DEVICE) + vocab_start == labels[:, None]
            gradient = torch.where(is_label, by_label[:, None] * slope, gradient)
        return gradient.detach()

    argument, exact, own = transform(tile.double()), plain(tile.double()), plain(tile)
    out = tile if dtype == "tile" else torch.empty(n, width, device=DEVICE, dtype=dtype)
    gradient_tile(tile, labels, vocab_start, transform, lse, by_probability, by_label, out)
    assert_as_good_as_torch("gradient", out, exact, rounded(own, out.dtype), argument)


def test_labels_far_above_the_rest() -> None:
    """The other logits keep their logsumexp where `exp(other - label)` is 0."""
    tile = randn(0, 2, 300)
    labels = torch.tensor([299, 299], device=DEVICE)
    tile[:, 299] += 500.0
    maximum, sum_exp, target_logit = tile.new_tensor([[LOWEST] * 2, [0.0] * 2, [NAN] * 2])
    exact = label_and_rest(tile.double(), labels)
    fold_tile(tile, labels, 0, Transform(), maximum, sum_exp, target_logit)
    torch.testing.assert_close(target_logit.double(), exact[0])
    torch.testing.assert_close((maximum + sum_exp.log()).double(), exact[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [9.0, 22.0, 40.0, 80.0])
def test_the_rest_keeps_its_digits_beside_the_largest(gap: float) -> None:
    """In one tile and in two; equal largest ones and the largest in the first or second tile."""
    for tops in ([0], [40], [0, 40], [3, 4]):
        tile = torch.zeros(1, 60, device=DEVICE)
        tile[:, tops] = gap
        exact = rest_and_shortfall(tile.double(), None)
        for widths in ([60], [30, 30]):
            numbers = tile.new_tensor([[LOWEST], [0.0], [NAN], [0.0], [0.0]])
            for part, start in zip(tile.clone().split(widths, dim=1), (0, 30), strict=False):
                fold_tile(part.clone(), None, start, Transform(), *numbers)
            for found, one in zip(numbers[3:], exact, strict=True):
                torch.testing.assert_close(found.double(), one, rtol=4e-6, atol=0)


def test_offsets_past_32_bits() -> None:
    tile, lse = randn(3, 3, 16), randn(4, 3)
    labels = randint(2, 3, 3)
    out = spread(torch.zeros_like(tile, dtype=torch.float16))
    gradient_tile(tile, labels, 0, Transform(), lse, lse, lse, out)
    expected = torch.empty_like(tile)
    gradient_tile(tile, labels, 0, Transform(), lse, lse, lse, expected)
    torch.testing.assert_close(out, expected.half())
