"""Projection and logsumexp in one kernel, against a few lines of float64 torch."""

import pytest
import torch
from against_torch import (
    DEVICE,
    FLOATS,
    INF,
    NAN,
    QUIET,
    Transform,
    assert_as_good_as_torch,
    examples,
    label_and_rest,
    offsets,
    randint,
    randn,
    spread,
    sum_above,
    transforms,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref.kernels.logsumexp import projection_logsumexp

pytestmark = QUIET


def check_projection(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    rows: Tensor | None,
    transform: Transform = Transform(),  # noqa: B008
) -> None:
    reference, sum_exp, target = projection_logsumexp(hidden, weight, bias, labels, rows, transform)
    assert reference.dtype == sum_exp.dtype == target.dtype == torch.float32
    assert (sum_exp >= 1).logical_or(sum_exp == 0).all(), "the reference is the largest logit"

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        chosen = hidden if rows is None else hidden[rows]
        x = chosen.to(dtype) @ weight.to(dtype).T
        return label_and_rest(transform(x if bias is None else x + bias.to(dtype)), labels)

    (exact_target, exact), (torch_target, own) = plain(torch.float64), plain(hidden.dtype)
    assert_as_good_as_torch("target_logit", target, exact_target, torch_target)
    sums = sum_above(reference, exact), sum_above(reference, own)
    # A soft cap rounds the logits themselves.
    argument = exact if transform.softcap else None
    assert_as_good_as_torch("sum_exp", sum_exp, *sums, argument)


@examples
@given(
    n=st.integers(1, 70),
    hidden_size=st.sampled_from([1, 7, 32, 64, 100]),
    vocab_size=st.sampled_from([1, 5, 128, 300]),
    dtype=st.sampled_from(FLOATS),
    offset=st.none() | offsets,
    has_labels=st.booleans(),
    gathers=st.booleans(),
    transform=transforms,
)
def test_projection_logsumexp(
    n: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    offset: float | None,
    has_labels: bool,
    gathers: bool,
    transform: Transform,
) -> None:
    check_projection(
        randn(0, 80 if gathers else n, hidden_size, dtype=dtype),
        randn(1, vocab_size, hidden_size, dtype=dtype),
        None if offset is None else randn(2, vocab_size, dtype=dtype) + offset,
        randint(3, vocab_size, n) if has_labels else None,
        randint(4, 80, n) if gathers else None,
        transform,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_projection_of_many_rows(dtype: torch.dtype) -> None:
    """More row blocks than run together, of the tile shape for many rows, the last one ragged."""
    n = 17 * 128 - 3 if dtype == torch.bfloat16 else 140
    hidden, weight = randn(0, n, 16, dtype=dtype), randn(1, 150, 16, dtype=dtype)
    check_projection(hidden, weight, None, randint(2, 150, n), None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_projection_of_strided_inputs(dtype: torch.dtype) -> None:
    hidden = randn(0, 33, 2 * 9, dtype=dtype).T[::2]
    weight = randn(1, 33, 140, dtype=dtype).T
    bias, labels = randn(2, 140, 3, dtype=dtype)[:, 1], randint(3, 140, 9, 2)[:, 0]
    check_projection(hidden, weight, bias, labels, None)


def test_projection_of_labels_outside_the_vocabulary() -> None:
    labels = torch.tensor([-100, -1, 5, 7, 128, 2**32 + 1, 4], device=DEVICE)
    hidden, weight = randn(0, 7, 8), randn(1, 5, 8)
    check_projection(hidden, weight, None, labels, None)
    _, sum_exp, target = projection_logsumexp(hidden, weight, None, labels, None, Transform())
    assert target.isnan().tolist() == [True] * 6 + [False]
    assert sum_exp.isfinite().all()


def test_projection_with_masked_vocabulary() -> None:
    """Tiles, splits and whole rows of -inf: no NaN, and their probability is 0."""
    hidden, weight = randn(0, 3, 8), randn(1, 400, 8)
    labels = torch.tensor([399, 0, 390], device=DEVICE)
    for kept in (slice(390, 400), slice(0, 1), slice(0, 0)):
        bias = torch.full((400,), -INF, device=DEVICE)
        bias[kept] = 0.5
        for row_labels in (None, labels):
            check_projection(hidden, weight, bias, row_labels, None)


def test_labels_far_above_the_rest() -> None:
    """The other logits keep their logsumexp where `exp(other - label)` is 0."""
    hidden, weight = randn(0, 2, 8), randn(1, 300, 8)
    labels = torch.tensor([299, 299], device=DEVICE)
    bias = torch.zeros(300, device=DEVICE)
    bias[labels] = 500.0
    check_projection(hidden, weight, bias, labels, None)


def test_projection_of_a_vocabulary_of_one() -> None:
    labels = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    reference, sum_exp, target = projection_logsumexp(
        randn(0, 2, 4), randn(1, 1, 4), None, labels, None, Transform()
    )
    assert reference.isfinite().all()
    assert target.isfinite().all()
    assert sum_exp.tolist() == [0.0, 0.0]


def test_projection_of_no_rows() -> None:
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    hidden, weight = randn(0, 3, 4), randn(1, 5, 4)
    found = projection_logsumexp(hidden, weight, None, nothing, nothing, Transform())
    assert [one.shape for one in found] == [(0,)] * 3


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_shows(value: float) -> None:
    """In the sum of its row, wherever its tile and split are."""
    hidden, weight = randn(0, 3, 8), randn(1, 400, 8)
    for column in (0, 130, 399):
        bias = torch.zeros(400, device=DEVICE)
        bias[column] = value
        _, sum_exp, _ = projection_logsumexp(hidden, weight, bias, None, None, Transform())
        assert sum_exp.isnan().all()


def test_offsets_past_32_bits() -> None:
    hidden, weight = randn(0, 3, 16, dtype=torch.float16), randn(1, 3, 16, dtype=torch.float16)
    labels, rows = randint(2, 3, 3), torch.tensor([2, 0, 1], device=DEVICE)
    check_projection(spread(hidden), weight, None, labels, rows)
    check_projection(hidden, spread(weight), None, labels, None)
