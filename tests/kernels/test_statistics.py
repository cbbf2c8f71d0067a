"""The kernel under `linear_stats` against its definition: a sorted row of float64 logits."""

from __future__ import annotations

import pytest
import torch
from against_torch import (
    DEVICE,
    FLOATS,
    INF,
    QUIET,
    Transform,
    assert_as_good_as_torch,
    examples,
    randint,
    randn,
    spread,
    transforms,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref.kernels import projection
from fastpref.kernels.statistics import projection_partials
from fastpref.ops.linear_stats_op import Partial, Sums, merge

pytestmark = QUIET

EVERYTHING = Sums(second=True, shortfall=True, squares=True)


def numbers(z: Tensor) -> Partial:
    maximum, *rest = z.sort(-1, descending=True).values.split([1, z.shape[1] - 1], dim=-1)
    rest = torch.nn.functional.pad(rest[0], (0, 1), value=-INF)
    exponentials = torch.where(rest == -INF, 0.0, torch.exp(rest - maximum))
    return Partial(
        maximum.squeeze(-1),
        rest.amax(-1),
        exponentials.sum(-1),
        torch.where(exponentials > 0, exponentials * (maximum - rest), 0.0).sum(-1),
        exponentials.square().sum(-1),
    )


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    rows: Tensor | None,
    transform: Transform = Transform(),  # noqa: B008
    splits: int = 16,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "PROGRAMS", 1)
        patch.setattr(projection, "MIN_SPLITS", splits)
        parts, target = projection_partials(
            hidden, weight, bias, labels, rows, transform, *EVERYTHING
        )
    assert parts.shape[1] <= splits

    def logits(dtype: torch.dtype) -> Tensor:
        chosen = hidden if rows is None else hidden[rows]
        x = chosen.to(dtype) @ weight.to(dtype).T
        return transform(x if bias is None else x + bias.to(dtype))

    exact, by_torch = logits(torch.float64), logits(hidden.dtype)
    largest = exact[exact.isfinite()].abs().amax() if exact.isfinite().any() else torch.tensor(1.0)
    for name, found, one, other in zip(
        Partial._fields, merge(Partial(*parts)), numbers(exact), numbers(by_torch), strict=True
    ):
        assert found.dtype == torch.float32
        assert_as_good_as_torch(name, found, one, other, largest)
    if labels is None:
        assert target.shape == (0,)
    else:
        of_labels = [one.gather(1, labels[:, None])[:, 0] for one in (exact, by_torch)]
        assert_as_good_as_torch("target", target, *of_labels)
        torch.testing.assert_close(target >= merge(Partial(*parts)).maximum, is_top(exact, labels))


def is_top(z: Tensor, labels: Tensor) -> Tensor:
    return z.gather(1, labels[:, None])[:, 0] == z.amax(1)


@examples
@given(
    n=st.integers(1, 70),
    hidden_size=st.sampled_from([1, 7, 32, 64, 100]),
    vocab_size=st.sampled_from([1, 5, 128, 300, 600]),
    splits=st.sampled_from([1, 2, 16]),
    dtype=st.sampled_from(FLOATS),
    has_bias=st.booleans(),
    has_labels=st.booleans(),
    gathers=st.booleans(),
    transform=transforms,
)
def test_equals_the_definition(
    n: int,
    hidden_size: int,
    vocab_size: int,
    splits: int,
    dtype: torch.dtype,
    has_bias: bool,
    has_labels: bool,
    gathers: bool,
    transform: Transform,
) -> None:
    check(
        randn(0, 80 if gathers else n, hidden_size, dtype=dtype),
        randn(1, vocab_size, hidden_size, dtype=dtype),
        randn(2, vocab_size, dtype=dtype) if has_bias else None,
        randint(3, vocab_size, n) if has_labels else None,
        randint(4, 80, n) if gathers else None,
        transform,
        splits,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_more_row_blocks_than_run_together(dtype: torch.dtype) -> None:
    n = 17 * (64 if dtype == torch.float32 else 128) - 3
    hidden, weight = randn(0, n, 16, dtype=dtype), randn(1, 150, 16, dtype=dtype)
    check(hidden, weight, None, randint(2, 150, n), None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strided_inputs(dtype: torch.dtype) -> None:
    hidden = randn(0, 33, 2 * 9, dtype=dtype).T[::2]
    weight = randn(1, 33, 140, dtype=dtype).T
    bias, labels = randn(2, 140, 3, dtype=dtype)[:, 1], randint(3, 140, 9, 2)[:, 0]
    check(hidden, weight, bias, labels, None)


@pytest.mark.parametrize("splits", [1, 3, 16])
@pytest.mark.parametrize("kept", [slice(390, 400), slice(0, 1), slice(60, 70), slice(0, 0)])
def test_masked_vocabulary(kept: slice, splits: int) -> None:
    """Tiles, splits and whole rows of -inf: no NaN anywhere, and nothing in the sums."""
    hidden, weight = randn(0, 3, 8), randn(1, 400, 8)
    bias = torch.full((400,), -INF, device=DEVICE)
    bias[kept] = 0.5
    labels = torch.tensor([399, 0, 390], device=DEVICE)
    check(hidden, weight, bias, labels, None, splits=splits)


@pytest.mark.parametrize("splits", [1, 16])
def test_equal_logits_and_logits_far_apart(splits: int) -> None:
    """Ties within a tile and between tiles and splits; a top that leaves others 1e-17."""
    hidden, weight = torch.ones(1, 1, device=DEVICE), torch.zeros(300, 1, device=DEVICE)
    labels = torch.tensor([299], device=DEVICE)
    for value in (0.0, 1.0, 40.0):
        for columns in ([299], [3, 5], [3, 299], [3, 5, 70, 299]):
            weight.zero_()[columns] = value
            check(hidden, weight, None, labels, None, splits=splits)
            parts, _ = projection_partials(
                hidden, weight, None, None, None, Transform(), *EVERYTHING
            )
            found, exact = merge(Partial(*parts)), numbers(hidden.double() @ weight.double().T)
            for one, other in zip(found, exact, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=0)


def test_what_is_not_wanted_is_not_computed() -> None:
    hidden, weight = randn(0, 70, 8), randn(1, 300, 8)
    whole, _ = projection_partials(hidden, weight, None, None, None, Transform(), *EVERYTHING)
    for wanted in range(3):
        sums = Sums(*(wanted == flag for flag in range(3)))
        parts, _ = projection_partials(hidden, weight, None, None, None, Transform(), *sums)
        written = {0, 2, (1, 3, 4)[wanted]}
        for number in range(5):
            expected = whole[number] if number in written else torch.zeros_like(whole[number])
            torch.testing.assert_close(parts[number], expected, rtol=0, atol=0)


def test_labels_outside_the_vocabulary() -> None:
    labels = torch.tensor([-100, -1, 5, 7, 128, 2**32 + 1, 4], device=DEVICE)
    hidden, weight = randn(0, 7, 8), randn(1, 5, 8)
    parts, target = projection_partials(
        hidden, weight, None, labels, None, Transform(), *EVERYTHING
    )
    assert target.isnan().tolist() == [True] * 6 + [False]
    assert parts.isfinite().all()


def test_offsets_past_32_bits() -> None:
    hidden, weight = randn(0, 3, 16, dtype=torch.float16), randn(1, 3, 16, dtype=torch.float16)
    labels, rows = randint(2, 3, 3), torch.tensor([2, 0, 1], device=DEVICE)
    check(spread(hidden), weight, None, labels, rows)
    check(hidden, spread(weight), None, labels, None)
