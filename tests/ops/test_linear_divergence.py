from __future__ import annotations

import os

import formulas
import pytest
import torch
from cases import DTYPES, Case, reference_logps, reference_logsumexp
from hypothesis import given, settings
from hypothesis import strategies as st
from two_heads import EVERY, TwoHeads, hold, two_heads

from fastpref import Head, linear_logps_with_stats
from fastpref.ops import linear_divergence, linear_divergence_with_stats, tiling

# The interpreter takes many seconds for each: there tests/kernels looks at every kind.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SOME = ("forward_kl", "jsd", "advantage") if INTERPRETED else EVERY


def small_tiles(patch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, pieces of one, tiles of 16 columns."""
    patch.setattr(tiling, "ROWS_PER_TILE", 4)
    patch.setattr(tiling, "CPU_TILE_BYTES", 1)
    patch.setattr(tiling, "CPU_PIECE_BYTES", 1)
    patch.setattr(tiling, "COLUMN_MULTIPLE", 16)


def sign_is_clear(case: TwoHeads) -> bool:
    """Whether no rounding decides which of the two probabilities of a token is larger."""

    def log_ratio(one: TwoHeads) -> torch.Tensor:
        (hidden, head, _, options), teacher = one.student, one.teacher
        of_student = formulas.logits(hidden, head, temperature=options["temperature"])
        temperature = one.teacher_temperature or options["temperature"]
        of_teacher = formulas.logits(*teacher, temperature=temperature)
        return of_teacher.log_softmax(-1) - of_student.log_softmax(-1)

    exact = log_ratio(case.to(torch.float64, trained=False))
    error = (log_ratio(case.to(torch.float32, trained=False)) - exact).abs().max()
    return bool((exact.abs() > 8 * error).all())


@pytest.mark.parametrize("name", SOME)
@settings(max_examples=10 if INTERPRETED else 60)
@given(
    case=two_heads(),
    dtype=st.sampled_from(DTYPES),
    trained=st.booleans(),
    compact=st.booleans(),
    scratch_bytes=st.sampled_from([0, 4000, 10**7]),
)
def test_equals_the_reference(dtype, name, case, trained, compact, scratch_bytes):
    ours, plain = (case.to(dtype, trained=trained) for _ in range(2))
    exact, nearby = ours.to(torch.float64, trained=trained), ours.nearby()
    found = ours.run(name, compact=compact, scratch_bytes=scratch_bytes)
    values = [found, *(one.expected(name) for one in (plain, nearby, exact))]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    hold(*(one.detach() for one in values), dtype)
    assert (found[~case.labelled()] == 0).all()
    if name == "total_variation" and not sign_is_clear(ours):
        return
    incoming = torch.randn(found.shape, dtype=torch.float64)
    for one in values:
        one.backward(incoming.to(one.dtype))
    cases = (ours, plain, nearby, exact)
    for gradients in zip(*(one.student.gradients() for one in cases), strict=True):
        assert gradients[0].dtype == dtype
        hold(*gradients, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    case=two_heads(),
    name=st.sampled_from(EVERY),
    trained=st.booleans(),
    compact=st.booleans(),
    scratch_bytes=st.sampled_from([0, 9000, 10**7]),
)
def test_stats_are_those_of_linear_logps(dtype, case, name, trained, compact, scratch_bytes):
    """And every gradient of the divergence, the log-probabilities and the logsumexp at once."""
    ours, plain = (case.to(dtype, trained=trained) for _ in range(2))
    exact, nearby = ours.to(torch.float64, trained=trained), ours.nearby()
    found = ours.run(
        name, linear_divergence_with_stats, compact=compact, scratch_bytes=scratch_bytes
    )
    (hidden, head, labels, options), labelled = ours.student, case.labelled()
    stats = linear_logps_with_stats(hidden, head, labels, **options)
    assert not found.entropy.requires_grad and not found.is_top1.requires_grad
    torch.testing.assert_close(found.entropy, stats.entropy, atol=2e-6, rtol=2e-5)
    values = [found[:3]] + [
        (one.expected(name), reference_logps(one.student), reference_logsumexp(one.student))
        for one in (plain, nearby, exact)
    ]
    for same in zip(*values, strict=True):
        hold(*(one.detach() * labelled for one in same), dtype)
    if name == "total_variation" and not sign_is_clear(ours):
        return
    weights = torch.randn(3, *labels.shape, dtype=torch.float64) * labelled
    for one in values:
        terms = zip(weights, one, strict=True)
        sum((w.to(value.dtype) * value).sum() for w, value in terms).backward()
    cases = (ours, plain, nearby, exact)
    for gradients in zip(*(one.student.gradients() for one in cases), strict=True):
        hold(*gradients, dtype)


@given(case=two_heads())
def test_is_top1_is_that_of_linear_logps(case):
    """Equal logits and labels of every rank; float64, where no product rounds them apart."""
    case = case.to(torch.float64, trained=False)
    (hidden, head, labels, options) = case.student
    head = head._replace(weight=head.weight.round(), bias=None)
    case = case._replace(student=case.student._replace(hidden=hidden.round(), head=head))
    found = case.run("forward_kl", linear_divergence_with_stats)
    stats = linear_logps_with_stats(hidden.round(), head, labels, **options)
    assert torch.equal(found.is_top1, stats.is_top1)


@given(case=two_heads(), name=st.sampled_from(EVERY), weights=st.sets(st.integers(0, 2)))
@pytest.mark.parametrize(("trained", "scratch_bytes"), [(False, 0), (True, 0), (True, 10**7)])
def test_any_of_the_outputs_may_have_a_gradient(trained, scratch_bytes, case, name, weights):
    def gradients(function: object) -> list[torch.Tensor]:
        one = case.to(torch.float64, trained=trained)
        values = function(one)
        sum(
            (values[k].square().sum() for k in sorted(weights)), one.student.hidden.sum()
        ).backward()
        leaves = (one.student.hidden, *one.student.head[:2])
        return [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]

    def ours(one: TwoHeads) -> tuple[torch.Tensor, ...]:
        return one.run(name, linear_divergence_with_stats, scratch_bytes=scratch_bytes)

    def reference(one: TwoHeads) -> tuple[torch.Tensor, ...]:
        lse = reference_logsumexp(one.student) * case.labelled()
        return one.expected(name), reference_logps(one.student), lse

    for found, expected in zip(gradients(ours), gradients(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(
    case=two_heads(),
    name=st.sampled_from(EVERY),
    trained=st.booleans(),
    scratch_bytes=st.sampled_from([0, 20000, 10**7]),
)
def test_is_the_same_for_any_tiling(case, name, trained, scratch_bytes):
    def everything() -> list[torch.Tensor]:
        one = case.to(torch.float64, trained=trained)
        found = one.run(name, linear_divergence_with_stats, scratch_bytes=scratch_bytes)
        (found.divergence.sum() + found.logps.sum()).backward()
        return [*(values.detach() for values in found), *one.student.gradients()]

    whole = everything()
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch)
        tiled = everything()
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other)


@given(case=two_heads(), name=st.sampled_from(EVERY), dtype=st.sampled_from(DTYPES[1:]))
@pytest.mark.parametrize("trained", [False, True])
def test_narrow_operands_are_cast_column_by_column(trained, case, name, dtype):
    def everything() -> list[torch.Tensor]:
        one = case.to(dtype, trained=trained)
        found = one.run(name)
        found.sum().backward()
        return [found.detach(), *one.student.gradients()]

    whole = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "CPU_TILE_BYTES", 1)
        tiled = everything()
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@given(case=two_heads(), name=st.sampled_from(EVERY), extra=st.integers(1, 9))
@pytest.mark.parametrize("longer", ["student", "teacher", "reference"])
@pytest.mark.parametrize("trained", [False, True])
def test_tokens_of_one_vocabulary_alone_are_left_out(trained, longer, case, name, extra):
    """As padded vocabularies have them: also in the gradients, which are 0 there."""
    case = case.to(torch.float64, trained=trained)
    vocab = case.student.head.weight.shape[0]

    def padded(head: Head) -> Head:
        def more(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            rows = torch.cat((tensor.detach(), 3 * torch.randn(extra, *tensor.shape[1:]).double()))
            return rows.requires_grad_(tensor.requires_grad)

        return head._replace(weight=more(head.weight), bias=more(head.bias))

    longer_case = case.to(torch.float64, trained=trained)
    if longer == "student":
        student = longer_case.student
        longer_case = longer_case._replace(student=student._replace(head=padded(student.head)))
    else:
        hidden, head = getattr(longer_case, longer)
        longer_case = longer_case._replace(**{longer: (hidden, padded(head))})
    expected, found = case.run(name), longer_case.run(name)
    torch.testing.assert_close(found, expected)
    expected.sum().backward()
    found.sum().backward()
    for one, other in zip(longer_case.student.gradients(), case.student.gradients(), strict=True):
        if len(one) != len(other):
            assert (one[vocab:] == 0).all()
        torch.testing.assert_close(one[: len(other)], other)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str)
def test_the_teacher_may_have_another_dtype(dtypes):
    own, other = dtypes
    student, teacher = torch.randn(5, 8).to(own), torch.randn(5, 6).to(other)
    weight, teacher_weight = torch.randn(30, 8).to(own), torch.randn(30, 6).to(other)
    head, labels = Head(teacher_weight, torch.randn(30).to(other)), torch.arange(5)
    found = linear_divergence(student, weight, teacher, head, labels, kind="jsd")
    wide = Head(*(one.double() for one in head[:2]))
    expected = linear_divergence(
        student.double(), weight.double(), teacher.double(), wide, labels, kind="jsd"
    )
    assert found.dtype == (torch.float64 if own == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_the_teacher_and_the_reference_are_constants(trained):
    leaves = [torch.randn(4, 8), torch.randn(11, 8), torch.randn(4, 6), torch.randn(11, 6)]
    hidden, weight, *teacher = (one.requires_grad_() for one in leaves)
    weight.requires_grad_(trained)
    labels = torch.arange(4)
    found = linear_divergence(
        hidden, weight, *teacher, labels, kind="advantage",
        reference_hidden=teacher[0], reference_head=teacher[1] * 2,
    )  # fmt: skip
    found.sum().backward()
    assert hidden.grad is not None and all(one.grad is None for one in teacher)
    values = linear_divergence(hidden.detach(), weight.detach(), *teacher, labels, kind="jsd")
    assert not values.requires_grad


@pytest.mark.skipif(INTERPRETED, reason="runs no kernel")
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("trained", [False, True])
def test_no_rows_at_all_and_all_ignored(trained, compact, name):
    for count, labels in ((0, torch.zeros(0, dtype=torch.int64)), (4, torch.full((4,), -100))):
        hidden = torch.randn(count, 8, requires_grad=True)
        weight = torch.randn(5, 8, requires_grad=trained)
        model = torch.randn(count, 3), Head(torch.randn(5, 3))
        student = Case(hidden, Head(weight), labels, {"ignore_index": -100})
        case = TwoHeads(student, model, model, None)
        found = case.run(name, linear_divergence_with_stats, compact=compact)
        for values in found:
            assert values.tolist() == [0] * count
        (found.divergence.sum() + found.logps.sum()).backward()
        assert (hidden.grad == 0).all()
        assert weight.grad is None or (weight.grad == 0).all()
