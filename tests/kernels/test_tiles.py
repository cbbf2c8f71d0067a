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
    offsets,
    randint,
    randn,
    rounded,
    spread,
    sum_above,
    transforms,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref.kernels import tiles
from fastpref.kernels.tiles import fold_tile, gradient_of_kept_tile, gradient_tile

pytestmark = QUIET
SHIPPED = (tiles.ROW_BLOCK, tiles.WIDE_ROW_BLOCK)
# Rows of one block or of several; blocks that are full, and some that are not.
blocks = st.sampled_from([SHIPPED, (128, 128), (128, 256)])
WIDTHS = [1, 6, 40, 128, 1030]
HEADROOM = 10.0


def logits_around(offset: float, transform: Transform, n: int, width: int) -> Tensor:
    """Projections (n, width). A soft cap would flatten an offset, and all differences with it."""
    return 5 * randn(0, n, width) + (offset if transform.softcap is None else 0.0)


def exponents(z: Tensor, transform: Transform) -> Tensor:
    """What goes into `exp`: differences, but a soft cap rounds the logits themselves."""
    return z if transform.softcap else (z - z.amax(1, keepdim=True)).nan_to_num(neginf=0.0)


def with_damping(transform: Transform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and what a soft cap leaves of their slope."""
    x = x.detach().requires_grad_()
    z = transform(x)
    (slope,) = torch.autograd.grad(z.sum(), x)
    return z.detach(), slope * (transform.temperature / transform.logit_scale)


def rest_and_shortfall(z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of exponentials but one of the largest, and of these times what they are below it."""
    _, z = label_and_rest(z, labels)
    difference = torch.where(z.isneginf(), LOWEST, z - z.amax(1, keepdim=True))
    exponentials = difference.exp().scatter(1, z.argmax(1, keepdim=True), 0)
    return exponentials.sum(1), -(difference * exponentials).sum(1)


def start(n: int, stats: bool = False) -> list[Tensor]:
    """The running numbers before the first tile."""
    first = torch.tensor([LOWEST, 0.0, NAN, 0.0, 0.0], device=DEVICE)
    return [number.repeat(n) for number in first[: 5 if stats else 3]]


@examples
@given(
    n=st.integers(1, 4),
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=3),
    block=blocks,
    dtype=st.sampled_from([None, *FLOATS, "tile"]),
    has_labels=st.booleans(),
    masked=st.booleans(),
    stats=st.booleans(),
    offset=offsets,
    transform=transforms,
)
def test_fold_tile(
    n: int,
    widths: list[int],
    block: tuple[int, int],
    dtype: torch.dtype | str | None,
    has_labels: bool,
    masked: bool,
    stats: bool,
    offset: float,
    transform: Transform,
) -> None:
    """Tile after tile, and beside the exponentials a product with them, as callers make it."""
    vocab_size = sum(widths)
    x = logits_around(offset, transform, n, vocab_size)
    if masked:
        x[:, : vocab_size // 2 + 1] = -INF
    weight = randn(5, vocab_size, 3)
    # One past either end: labels that no tile has.
    labels = randint(1, vocab_size + 2, n) - 1 if has_labels else None
    numbers = start(n, stats)
    product = torch.zeros(n, 3, device=DEVICE)
    written = torch.empty(n, vocab_size, device=DEVICE)
    end = 0
    for width in widths:
        columns = slice(end, end + width)
        # Views with row strides of their own.
        earlier = (product, written[:, :end]) if end else ()
        tile, exponentials = x[:, columns], None
        if dtype == "tile":
            tile = exponentials = written[:, columns].copy_(tile)
        elif dtype is not None:
            exponentials = torch.empty_like(tile, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "ROW_BLOCK", block[0])
            patch.setattr(tiles, "WIDE_ROW_BLOCK", block[1])
            five = numbers if stats else [*numbers, None, None]
            fold_tile(tile, labels, end, transform, *five, exponentials, earlier)
        if exponentials is not None:
            written[:, columns] = exponentials
            product += written[:, columns] @ weight[columns]
        end += width

    reference, sum_exp, target_logit = numbers[:3]
    target, z = label_and_rest(transform(x.double()), labels)
    own_target, own_z = label_and_rest(transform(x), labels)
    if labels is not None:
        assert_as_good_as_torch("target_logit", target_logit, target, own_target)
    below = (z.amax(1) - reference)[z.amax(1) > -INF]
    allowed = 1e-6 * z[z.isfinite()].abs().amax() if z.isfinite().any() else 0.0
    assert (below <= (0.0 if stats else HEADROOM) + allowed).all()
    assert (below >= (0.0 if stats else LOWEST) - allowed).all()
    sums = sum_above(reference, z), sum_above(reference, own_z)
    assert_as_good_as_torch("sum_exp", sum_exp, *sums, exponents(z, transform))
    if stats:
        for name, found, exact, own in zip(
            ("rest", "shortfall"),
            numbers[3:],
            rest_and_shortfall(transform(x.double()), labels),
            rest_and_shortfall(transform(x), labels),
            strict=True,
        ):
            assert_as_good_as_torch(name, found, exact, own, exponents(z, transform))
    if dtype is not None:

        def shares(of: Tensor) -> Tensor:
            z, damping = with_damping(transform, of)
            share = torch.exp(label_and_rest(z, labels)[1] - reference[:, None]) * damping
            return share.masked_fill(of.isneginf(), 0.0)

        exact, own = shares(x.double()), shares(x)
        if isinstance(dtype, torch.dtype):
            own = rounded(own, dtype).float()
        products = exact @ weight.double(), own @ weight
        assert_as_good_as_torch("product", product, *products, exponents(z, transform))
        assert_as_good_as_torch("exponentials", written, exact, own, exponents(z, transform))


@examples
@given(
    n=st.integers(1, 4),
    width=st.sampled_from(WIDTHS),
    block=blocks,
    dtype=st.sampled_from([*FLOATS, "tile"]),
    has_labels=st.booleans(),
    masked=st.booleans(),
    offset=offsets,
    transform=transforms,
)
def test_gradient_tile(
    n: int,
    width: int,
    block: tuple[int, int],
    dtype: torch.dtype | str,
    has_labels: bool,
    masked: bool,
    offset: float,
    transform: Transform,
) -> None:
    vocab_start = 48
    tile = logits_around(offset, transform, n, width + 3)[:, 1 : width + 1]
    if masked:
        tile[:, : width // 2] = -INF
    # Some labels are in other tiles.
    labels = randint(1, width + 4, n) + vocab_start - 2 if has_labels else None
    reference = transform(tile).amax(1).clamp(min=LOWEST) - 3.0
    # A loss that sums hands out one number to all rows.
    coefficients, label_gradients = randn(2, n), randn(3, 1).expand(n)

    def plain(x: Tensor) -> Tensor:
        z, damping = with_damping(transform, x)
        gradient = coefficients[:, None] * torch.exp(z - reference[:, None]) * damping
        if labels is not None:
            is_label = torch.arange(width, device=DEVICE) + vocab_start == labels[:, None]
            gradient = torch.where(is_label, label_gradients[:, None], gradient)
        return gradient

    exact, own = plain(tile.double()), plain(tile)
    argument = exponents(transform(tile.double()), transform)
    out = tile if dtype == "tile" else torch.empty(n, width, device=DEVICE, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROW_BLOCK", block[0])
        gradient_tile(
            tile, labels, vocab_start, transform, reference, coefficients, label_gradients, out
        )
    assert_as_good_as_torch("gradient", out, exact, rounded(own, out.dtype), argument)


@examples
@given(
    n=st.integers(1, 4),
    width=st.sampled_from([1, 6, 40, 1030]),
    dtype=st.sampled_from(FLOATS),
    has_labels=st.booleans(),
    transform=transforms,
)
def test_a_kept_tile_has_the_gradient_of_one_that_is_computed_again(
    n: int, width: int, dtype: torch.dtype, has_labels: bool, transform: Transform
) -> None:
    """But for the rounding of what was kept; the reference has risen since."""
    vocab_start = 48
    tile = 5 * randn(0, n, width + 3)[:, 1 : width + 1]
    labels = randint(1, width + 4, n) + vocab_start - 2 if has_labels else None
    kept_reference, sum_exp, target_logit = tile.new_tensor([[LOWEST] * n, [0.0] * n, [NAN] * n])
    coefficients, label_gradients = randn(2, n), randn(3, 1).expand(n)
    kept = torch.empty(n, width, device=DEVICE, dtype=dtype)
    fold_tile(
        tile.clone(), labels, vocab_start, transform, kept_reference, sum_exp, target_logit,
        exponentials=kept,
    )  # fmt: skip
    reference = kept_reference + randn(4, n).abs()

    def plain(kept: Tensor, reference: Tensor) -> Tensor:
        scale = coefficients * torch.exp(kept_reference.to(reference.dtype) - reference)
        gradient = kept * scale[:, None]
        if labels is None:
            return gradient
        is_label = torch.arange(width, device=DEVICE) + vocab_start == labels[:, None]
        return torch.where(is_label, label_gradients[:, None].to(gradient.dtype), gradient)

    out = torch.empty(n, width, device=DEVICE, dtype=dtype)
    gradient_of_kept_tile(
        kept, labels, vocab_start, kept_reference, reference, coefficients, label_gradients, out
    )
    exact, own = plain(kept.double(), reference.double()), plain(kept.float(), reference)
    assert_as_good_as_torch("gradient", out, exact, rounded(own, dtype))


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0, -300.0, 3000.0])
def test_an_offset_of_all_logits_costs_no_digit(offset: float) -> None:
    """Each exponential has the error of its own difference, whatever the logits have in common."""
    tile = randn(0, 2, 500) + offset
    reference, sum_exp, target_logit = start(2)
    exponentials, gradient = torch.empty_like(tile), torch.empty_like(tile)
    fold_tile(
        tile, None, 0, Transform(), reference, sum_exp, target_logit, exponentials=exponentials
    )
    ones = torch.ones(2, device=DEVICE)
    gradient_tile(tile, None, 0, Transform(), reference, ones, ones, gradient)
    exact = torch.exp(tile.double() - reference.double()[:, None])
    for found in (exponentials, gradient):
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(sum_exp.double(), exact.sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [40, 600])
def test_only_rows_whose_reference_rises_are_touched(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(tiles, "ELEMENTS", 512)  # of `earlier`: one block or two
    tops = torch.tensor([9.0, 11.0, 200.0, -INF], device=DEVICE)
    tile = torch.full((4, 30), -20.0, device=DEVICE)
    tile[:, 7] = tops
    reference, sum_exp, target_logit = start(4)
    reference.zero_(), sum_exp.fill_(3.0)
    before = randn(1, 4, columns), randn(2, 4, 2 * columns, dtype=torch.bfloat16)[:, columns:]
    after = tuple(one.clone() for one in before)
    fold_tile(tile, None, 0, Transform(), reference, sum_exp, target_logit, earlier=after)
    rise = torch.tensor([0.0, 11.0, 200.0, 0.0], device=DEVICE)
    assert reference.tolist() == rise.tolist()
    for was, found in zip(before, after, strict=True):
        exact = was.double() * torch.exp(-rise.double())[:, None]
        torch.testing.assert_close(found[::3], was[::3], rtol=0, atol=0)
        tolerance = 2e-6 if found.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found[1:3].double(), exact[1:3], rtol=tolerance, atol=1e-30)


def test_before_the_first_logit_there_is_nothing() -> None:
    """What memory held in rows that have had no finite logit is gone with their first."""
    tile = torch.tensor([[1.0, 2.0], [-INF, -INF]], device=DEVICE)
    memory = torch.full((2, 5), NAN, device=DEVICE)
    fold_tile(tile, None, 0, Transform(), *start(2), earlier=(memory,))
    assert memory.isnan().tolist() == [[False] * 5, [True] * 5]
    assert memory[0].tolist() == [0.0] * 5


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_shows(value: float, stats: bool) -> None:
    """In the sum of its row, from the tile that has it to the last."""
    for column in (0, 10, 39):
        x = randn(0, 2, 40)
        x[0, column] = value
        numbers = start(2, stats)
        for part, first in zip(x.split(20, dim=1), (0, 20), strict=True):
            fold_tile(part, None, first, Transform(), *numbers)
        assert numbers[1].isnan().tolist() == [True, False]


def test_a_label_without_bounds_stays_out() -> None:
    """Neither the sum nor its own gradient sees how large the label's logit is."""
    x = randn(0, 3, 300)
    labels = torch.tensor([299, 0, 130], device=DEVICE)
    rows = torch.arange(3, device=DEVICE)
    x[rows, labels] = torch.tensor([500.0, INF, -INF], device=DEVICE)
    reference, sum_exp, target_logit = start(3)
    _, z = label_and_rest(x.double(), labels)
    fold_tile(x, labels, 0, Transform(), reference, sum_exp, target_logit)
    assert target_logit.tolist() == [500.0, INF, -INF]
    torch.testing.assert_close(sum_exp.double(), sum_above(reference, z), rtol=1e-6, atol=0)
    gradient_tile(x, labels, 0, Transform(), reference, reference, 2 * sum_exp, x)
    assert x.isfinite().all()
    torch.testing.assert_close(x[rows, labels], 2 * sum_exp, rtol=0, atol=0)


@pytest.mark.parametrize("width", [30, 128])
def test_labels_of_other_tiles(width: int) -> None:
    """They leave the label's logit as it is, and no column out."""
    tile = randn(0, 5, 2 * width)[:, :width]
    labels = 64 + torch.tensor([-164, -1, width, width + 1, 2**32 + 1], device=DEVICE)
    reference, sum_exp, target_logit = start(5)
    fold_tile(tile, labels, 64, Transform(), reference, sum_exp, target_logit)
    assert target_logit.isnan().all()
    exact = sum_above(reference, tile)
    torch.testing.assert_close(sum_exp.double(), exact, rtol=1e-6, atol=0)
    gradient, expected = torch.empty_like(tile), torch.empty_like(tile)
    gradient_tile(tile, labels, 64, Transform(), reference, sum_exp, sum_exp, gradient)
    gradient_tile(tile, None, 64, Transform(), reference, sum_exp, sum_exp, expected)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("gap", [9.0, 22.0, 40.0, 80.0])
def test_the_rest_keeps_its_digits_beside_the_largest(gap: float) -> None:
    """In one tile and in two; equal largest ones and the largest in the first or second tile."""
    for tops in ([0], [40], [0, 40], [3, 4]):
        tile = torch.zeros(1, 60, device=DEVICE)
        tile[:, tops] = gap
        exact = rest_and_shortfall(tile.double(), None)
        for widths in ([60], [30, 30]):
            numbers = start(1, stats=True)
            for part, first in zip(tile.clone().split(widths, dim=1), (0, 30), strict=False):
                fold_tile(part.clone(), None, first, Transform(), *numbers)
            for found, one in zip(numbers[3:], exact, strict=True):
                torch.testing.assert_close(found.double(), one, rtol=4e-6, atol=0)


def test_offsets_past_32_bits() -> None:
    tile, vector = randn(3, 3, 16), randn(4, 3)
    labels = randint(2, 3, 3)
    out, earlier = spread(torch.zeros_like(tile, dtype=torch.float16)), spread(tile.half())
    gradient_tile(tile, labels, 0, Transform(), vector, vector, vector, out)
    expected = torch.empty_like(tile)
    gradient_tile(tile, labels, 0, Transform(), vector, vector, vector, expected)
    torch.testing.assert_close(out, expected.half())
    reference, sum_exp, target_logit = start(3)
    fold_tile(
        tile + 40.0, labels, 0, Transform(), reference.zero_(), sum_exp, target_logit,
        exponentials=out, earlier=(earlier,),
    )  # fmt: skip
    assert earlier.count_nonzero() == 0
    _, z = label_and_rest(tile + 40.0, labels)
    torch.testing.assert_close(out, (z - z.amax(1, keepdim=True)).exp().half())
