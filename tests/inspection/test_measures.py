"""Statistics against NumPy and their own equations, and what verdict follows from them."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref.inspection.measures import (
    Share,
    SignalMeasures,
    correlation,
    measure,
    share_above_zero,
    wilson_interval,
    without,
)
from fastpref.inspection.signals import Signal
from fastpref.inspection.verdicts import is_length, kind_of, verdict


def test_wilsons_interval_as_published():
    """Newcombe (1998), table I: 81 of 263, 15 of 148 and 0 of 20."""
    for wins, count, low, high in [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)
    ]:  # fmt: skip
        assert wilson_interval(wins, count) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilsons_interval_solves_its_equation(count, part):
    wins = round(part * count)
    share = wins / count
    for end in wilson_interval(wins, count):
        variance = end * (1 - end) / count
        assert (share - end) ** 2 == pytest.approx(1.959963984540054**2 * variance, abs=1e-12)


def test_a_tie_counts_half():
    assert share_above_zero(torch.tensor([1.0, 0.0, -1.0, 2.0])).share == 0.625
    assert share_above_zero(torch.zeros(9)).share == 0.5


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(-20, 20)), min_size=3, max_size=20))
def test_what_lengths_leave_is_what_least_squares_leave(rows):
    gaps, lengths = torch.tensor(rows, dtype=torch.float64).unbind(1)
    if not lengths.any():
        assert torch.equal(without(gaps, lengths), gaps)
        return
    fitted, *_ = numpy.linalg.lstsq(lengths.numpy()[:, None], gaps.numpy())
    expected = gaps.numpy() - fitted[0] * lengths.numpy()
    numpy.testing.assert_allclose(without(gaps, lengths).numpy(), expected, atol=1e-7)


def test_what_is_length_only_leaves_nothing():
    lengths = torch.arange(-5, 9).double()
    left = without(0.1 * lengths, lengths)
    assert not left.any() and share_above_zero(left).share == 0.5


def test_correlation_is_pearsons():
    one, other = torch.randn(2, 30, dtype=torch.float64)
    expected = numpy.corrcoef(one.numpy(), other.numpy())[0, 1]
    assert correlation(one, other) == pytest.approx(expected)
    assert correlation(one, torch.ones(30, dtype=torch.float64)) is None


def measured(gaps, lengths=None, students=None) -> SignalMeasures:
    """Of a signal whose shaping of a chosen response is the gap, of a rejected one 0."""
    curves = [(torch.tensor([1.0, 1.0 + gap]).double(), torch.ones(2).double()) for gap in gaps]
    lengths = torch.zeros(len(gaps)) if lengths is None else lengths
    return measure(Signal("value", curves), lengths.double(), students)


def test_alpha_makes_both_of_one_size():
    gaps, students = torch.randn(2, 40, dtype=torch.float64) * torch.tensor([[3.0], [0.2]])
    found = measured(gaps.tolist(), students=students)
    assert found.alpha is not None
    assert float((found.alpha * gaps).std()) == pytest.approx(float(students.std()))
    assert found.gap_std == pytest.approx(numpy.std(gaps.numpy(), ddof=1))
    assert found.mean_gap == pytest.approx(float(gaps.mean()))


def test_a_signal_without_any_gap_has_no_alpha():
    found = measured([0.0] * 9, students=torch.arange(9).double())
    assert (found.alpha, found.student_correlation, found.ranked_first.share) == (None, None, 0.5)


@pytest.mark.parametrize(
    ("wins", "pairs", "kind", "says"),
    [
        (142, 200, "tells", "`value` tells your pairs apart: it ranks the chosen response first "
         "in 71 % of 200 pairs (95 % interval 64 to 77 %)."),
        (98, 200, "does not tell", "`value` does not tell your pairs apart: it ranks the chosen "
         "response first in 49 % of 200 pairs (95 % interval 42 to 56 %)."),
        (60, 200, "worse than chance", "`value` is worse than chance on your pairs: it ranks the "
         "chosen response first in 30 % of 200 pairs (95 % interval 24 to 37 %)."),
        (5, 8, "too few pairs", "Too few pairs to judge this teacher's `value`: it ranks the "
         "chosen response first in 62 % of 8 pairs (95 % interval 31 to 86 %). About 90 pairs "
         "are needed, and 800 for small effects."),
    ],
)  # fmt: skip
def test_verdicts(wins, pairs, kind, says):
    found = measured([1.0] * wins + [-1.0] * (pairs - wins))
    assert kind_of(found) == kind
    assert verdict(found).endswith(says)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_signal_of_length_is_named_one(sign):
    lengths = (10 * torch.randn(300) + 5).round()
    of_length = measured((sign * (lengths + torch.randn(300))).tolist(), lengths)
    assert kind_of(of_length) == ("tells" if sign > 0 else "worse than chance")
    assert is_length(of_length)
    assert "Length may be all that it sees" in verdict(of_length)
    knows = measured((sign * (lengths + 20)).tolist(), lengths)
    assert not is_length(knows) and "Length" not in verdict(knows)


def test_a_share_has_a_side():
    assert [Share(0.5, *ends).side for ends in [(0.4, 0.6), (0.51, 0.6), (0.3, 0.49)]] == [0, 1, -1]
