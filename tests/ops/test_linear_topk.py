"""Divergences from a teacher's likeliest tokens, against full logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import formulas
import logit_formulas
import pytest
import torch
from cases import DTYPES, Case, cases, reference_logps, reference_logsumexp
from hypothesis import given
from hypothesis import strategies as st
from two_heads import hold

from fastpref import (
    Head,
    linear_divergence,
    linear_logps_with_stats,
    linear_topk_divergence,
    linear_topk_divergence_with_stats,
)
from fastpref.ops import tiling

TAILS = ["bucket", "drop", "renormalize"]
LABELS = torch.tensor([3, -100, 0, 10])


class TopK(NamedTuple):
    student: Case
    ids: torch.Tensor  # (..., K)
    logps: torch.Tensor  # (..., K)

    def run(self, function: Any = linear_topk_divergence, **more: Any) -> Any:
        hidden, head, labels, options = self.student
        return function(hidden, head, self.ids, self.logps, labels, **options, **more)

    def to(self, dtype: torch.dtype, *, trained: bool) -> TopK:
        return self._replace(student=self.student.to(dtype, trained=trained))

    def nearby(self, *, trained: bool) -> TopK:
        """In float64, but for errors in the inputs that float32 would not notice."""
        generator = torch.Generator().manual_seed(0)

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return tensor.double() * (1 + 2.0**-20 * noise)

        hidden, (weight, bias, *more), *rest = self.student
        head = Head(moved(weight), moved(bias), *more)
        case = Case(moved(hidden), head, *rest)
        return self._replace(student=case).to(torch.float64, trained=trained)

    def expected(self, tail: str) -> torch.Tensor:
        """From all logits."""
        hidden, head, labels, options = self.student
        log_q = formulas.logits(hidden, head, temperature=options["temperature"]).log_softmax(-1)
        found = logit_formulas.topk_divergence(log_q, self.ids, self.logps, tail=tail)
        return torch.where(labels == options["ignore_index"], 0, found)


@st.composite
def topk_cases(draw: st.DrawFn) -> TopK:
    """A teacher that is not the student, and may know fewer tokens at some positions."""
    student = draw(cases(max_vocab=300))
    vocab = student.head.weight.shape[0]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.3, 2.0]))
    shape = student.labels.shape
    teacher = (scale * torch.randn(*shape, vocab, generator=generator)).log_softmax(-1)
    # Where all tokens are known, what is left of 1 is rounding, in whatever computes it.
    count = draw(st.integers(1, min(12, max(1, vocab - 1))))
    logps, ids = teacher.topk(count)
    missing = torch.rand(logps.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    missing[..., 0] = False
    ids = ids.masked_fill(missing, draw(st.sampled_from([0, -1, 10**6])))
    return TopK(student, ids, logps.masked_fill(missing, -torch.inf))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=topk_cases(), tail=st.sampled_from(TAILS), trained=st.booleans(), compact=st.booleans())
def test_equals_the_reference(dtype, case, tail, trained, compact):
    ours, plain = (case.to(dtype, trained=trained) for _ in range(2))
    exact, nearby = ours.to(torch.float64, trained=trained), ours.nearby(trained=trained)
    found = ours.run(tail=tail, compact=compact)
    values = [found, *(one.expected(tail) for one in (plain, nearby, exact))]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    hold(*(one.detach() for one in values), dtype)
    weights = torch.randn(found.shape, dtype=torch.float64)
    for one in values:
        one.backward(weights.to(one.dtype))
    cases = (ours, plain, nearby, exact)
    for gradients in zip(*(one.student.gradients() for one in cases), strict=True):
        assert gradients[0].dtype == dtype
        hold(*gradients, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@given(case=topk_cases(), tail=st.sampled_from(TAILS), trained=st.booleans(), compact=st.booleans())
def test_stats_are_those_of_linear_logps(dtype, case, tail, trained, compact):
    """And every gradient of the divergence, the log-probabilities and the logsumexp at once."""
    ours, plain = (case.to(dtype, trained=trained) for _ in range(2))
    exact, nearby = ours.to(torch.float64, trained=trained), ours.nearby(trained=trained)
    found = ours.run(linear_topk_divergence_with_stats, tail=tail, compact=compact)
    hidden, head, labels, options = ours.student
    stats = linear_logps_with_stats(hidden, head, labels, **options)
    assert not found.entropy.requires_grad and not found.is_top1.requires_grad
    torch.testing.assert_close(found.entropy, stats.entropy, atol=2e-6, rtol=2e-5)
    labelled = labels != options["ignore_index"]
    values = [found[:3]] + [
        (one.expected(tail), reference_logps(one.student), reference_logsumexp(one.student))
        for one in (plain, nearby, exact)
    ]
    for same in zip(*values, strict=True):
        hold(*(one.detach() * labelled for one in same), dtype)
    weights = torch.randn(3, *labels.shape, dtype=torch.float64) * labelled
    for one in values:
        terms = zip(weights, one, strict=True)
        sum((w.to(value.dtype) * value).sum() for w, value in terms).backward()
    cases = (ours, plain, nearby, exact)
    for gradients in zip(*(one.student.gradients() for one in cases), strict=True):
        hold(*gradients, dtype)


@given(case=topk_cases())
def test_is_top1_is_that_of_linear_logps(case):
    """Whole numbers, where no product rounds equal logits apart."""
    case = case.to(torch.float64, trained=False)
    hidden, head, labels, options = case.student
    head = head._replace(weight=head.weight.round(), bias=None, softcap=None)
    case = case._replace(student=Case(hidden.round(), head, labels, options))
    found = case.run(linear_topk_divergence_with_stats)
    stats = linear_logps_with_stats(hidden.round(), head, labels, **options)
    assert torch.equal(found.is_top1, stats.is_top1)


@given(case=topk_cases(), tail=st.sampled_from(TAILS), trained=st.booleans())
def test_is_the_same_for_any_tiling(case, tail, trained):
    def everything() -> list[torch.Tensor]:
        one = case.to(torch.float64, trained=trained)
        found = one.run(linear_topk_divergence_with_stats, tail=tail)
        (found.divergence.sum() + found.logps.sum()).backward()
        return [*(values.detach() for values in found), *one.student.gradients()]

    whole = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "ROWS_PER_TILE", 4)
        patch.setattr(tiling, "CPU_TILE_BYTES", 1)
        patch.setattr(tiling, "CPU_PIECE_BYTES", 1)
        tiled = everything()
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_all_tokens_are_the_whole_divergence(tail):
    hidden, head, teacher = torch.randn(6, 5), torch.randn(11, 5), torch.randn(6, 11)
    hidden.requires_grad_()
    logps, ids = teacher.log_softmax(-1).topk(11)
    labels = torch.arange(6)
    found = linear_topk_divergence(hidden, head, ids, logps, labels, tail=tail)
    expected = linear_divergence(hidden, head, teacher, torch.eye(11), labels, kind="forward_kl")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(one.sum(), hidden)[0] for one in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def of_logits(logits: torch.Tensor, teacher: torch.Tensor, count: int, **more: Any) -> Any:
    """Divergence and gradient of given logits: the head is the identity."""
    logits = logits.clone().requires_grad_()
    logps, ids = teacher.double().log_softmax(-1).topk(count)
    head, labels = torch.eye(logits.shape[1], dtype=logits.dtype), torch.zeros(len(logits)).long()
    logps = logps.to(logits.dtype)
    found = linear_topk_divergence(logits, head, ids, logps, labels, **more)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    return found.detach(), gradient


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("above", [20.0, 60.0])
def test_a_certain_student_keeps_the_digits_of_the_rest(above, tail):
    """Its rest is far below what a sum can lose of 1."""
    logits, teacher = torch.randn(5, 40), torch.randn(5, 40)
    logits.scatter_(1, teacher.topk(2).indices, above)
    found, gradient = of_logits(logits, teacher, 6, tail=tail)
    exact, right = of_logits(logits.double(), teacher, 6, tail=tail)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("distance", [1e-2, 1e-3])
def test_small_divergences_keep_their_digits(distance, tail):
    logits = torch.randn(20, 300)
    teacher = logits + distance * torch.randn(logits.shape)
    found, gradient = of_logits(logits, teacher, 30, tail=tail)
    exact, right = of_logits(logits.double(), teacher, 30, tail=tail)
    assert (found.double() / exact - 1).abs().max() <= 2e-5 / distance
    assert (gradient.double() - right).norm() <= 2e-6 / distance * right.norm()


@pytest.mark.parametrize("tail", TAILS)
def test_tokens_that_the_student_masks(tail):
    logits, teacher = torch.randn(4, 12), torch.randn(4, 12)
    outside = teacher.topk(5).indices
    logits.masked_fill_(torch.ones_like(logits, dtype=torch.bool).scatter(1, outside, False), -99.0)
    bias = torch.zeros(12).masked_fill(torch.arange(12) == 3, -torch.inf)
    logps, ids = teacher.log_softmax(-1).topk(5)
    hidden = logits.clone().requires_grad_()
    labels = torch.full((4,), 4)
    found = linear_topk_divergence(hidden, Head(torch.eye(12), bias), ids, logps, labels, tail=tail)
    assert torch.equal(found.detach().isinf(), (ids == 3).any(1))
    found.masked_fill(found.isinf(), 0).sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("tail", TAILS)
def test_nothing_is_spoiled_by_what_counts_nothing(tail, compact, stats):
    """Ignored rows that are not numbers, and a row of which the teacher says nothing."""
    hidden, weight = torch.randn(4, 5), torch.randn(11, 5)
    logps, ids = torch.randn(4, 11).log_softmax(-1).topk(3)
    hidden[1] = logps[1] = torch.nan
    ids[1] = 99
    logps[2] = -torch.inf
    hidden.requires_grad_()
    function = linear_topk_divergence_with_stats if stats else linear_topk_divergence
    found = function(hidden, weight, ids, logps, LABELS, tail=tail, compact=compact)
    values = found.divergence if stats else found
    assert values[1] == 0 and values[2].abs() < 1e-6 and (values[[0, 3]] != 0).all()
    (sum(one.sum() for one in found[:3]) if stats else found.sum()).backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("trained", [False, True])
def test_no_rows_at_all_and_all_ignored(trained, tail):
    for count, labels in ((0, torch.zeros(0, dtype=torch.int64)), (4, torch.full((4,), -100))):
        hidden = torch.randn(count, 8, requires_grad=True)
        weight = torch.randn(5, 8, requires_grad=trained)
        ids, logps = torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, 1)
        for compact in (True, False):
            given = {"tail": tail, "compact": compact}
            found = linear_topk_divergence_with_stats(hidden, weight, ids, logps, labels, **given)
            assert all(values.tolist() == [0] * count for values in found)
            (found.divergence.sum() + found.logps.sum()).backward()
            assert (hidden.grad == 0).all()
            assert weight.grad is None or (weight.grad == 0).all()


def test_without_compact_what_is_outside_is_nan():
    ids = torch.tensor([[1], [11], [-1], [11]])
    labels = torch.tensor([11, 3, 4, -100])
    given = torch.randn(4, 5), torch.randn(11, 5), ids, torch.full((4, 1), -0.5), labels
    for tail in TAILS:
        found = linear_topk_divergence(*given, tail=tail, compact=False)
        assert found.isnan().tolist() == [True, True, True, False]


def test_the_label_of_a_certain_student_keeps_its_digits():
    logits = torch.randn(5, 40)
    logits[:, 4] = 25.0
    labels, eye = torch.full((5,), 4), torch.eye(40)
    for ids in (labels, labels + 1):  # the teacher's tokens have the label, and do not
        given = logits, eye, ids.unsqueeze(1), torch.full((5, 1), -0.5), labels
        found = linear_topk_divergence_with_stats(*given)
        exact = logits.double().log_softmax(-1)[:, 4]
        torch.testing.assert_close(found.logps.double(), exact, rtol=1e-5, atol=0)


def test_probabilities_that_rounding_sums_to_more_than_one():
    hidden, head, ids = torch.randn(3, 5), torch.randn(11, 5), torch.tensor([[1, 2]] * 3)
    logps = torch.tensor([[0.6, 0.4001]] * 3).log()
    found = linear_topk_divergence(hidden, head, ids, logps, torch.arange(3))
    expected = linear_topk_divergence(hidden, head, ids, logps, torch.arange(3), tail="drop")
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
