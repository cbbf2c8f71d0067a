"""Logits that are infinite, or whose exponentials are: by PyTorch and by kernels."""

from __future__ import annotations

import pytest
import torch
from cases import Case

from fastpref import (
    Head,
    linear_cached_kl,
    linear_divergence,
    linear_logps_with_stats,
    linear_stats,
    linear_token_preference,
    teacher_means,
)
from fastpref.ops.linear_stats import FORMULAS

# Triton's interpreter computes in numpy, which warns of what a GPU just gives.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ROWS, VOCAB, WIDTH = 6, 150, 8
LABELS = torch.tensor([3, -100, 140, -100, 0, 70])
BAD = torch.arange(ROWS) == 2


@pytest.mark.parametrize(("dtype", "scratch_bytes"), [(torch.bfloat16, 0), (torch.float32, 10**6)])
def test_without_compaction_a_large_bias_spoils_no_gradient(dtype, scratch_bytes):
    """Of an ignored row the bias is what is left, at a temperature of 1e-3 some thousands."""
    head = Head(torch.randn(VOCAB, WIDTH), torch.randn(VOCAB))
    case = Case(torch.randn(ROWS, WIDTH), head, LABELS)
    found = []
    for compact in (False, True):
        one = case.to(dtype, trained=True)
        logps, lse, *_ = linear_logps_with_stats(
            one.hidden, one.head, LABELS, temperature=1e-3, compact=compact,
            scratch_bytes=scratch_bytes,
        )  # fmt: skip
        (logps.sum() + lse.sum()).backward()
        found.append(one.gradients())
    for one, other in zip(*found, strict=True):
        assert other.isfinite().all() and other.abs().max() > 1
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("at", [2, 149])
def test_statistics_of_an_infinite_logit(at):
    hidden, bias = torch.rand(ROWS, WIDTH) + 0.1, torch.zeros(VOCAB)
    weight = torch.zeros(VOCAB, WIDTH)
    hidden[2] *= 1e20
    weight[at] = 1e20  # beyond float32 in one row, at most 1e21 in the others
    names = [name for name in FORMULAS if name not in ("logsumexp", "target_logit", "is_top1")]
    found = linear_stats(hidden, Head(weight, bias), LABELS.abs() % 50 + 50, stats=names)
    for name in names:
        assert torch.equal(found[name].isnan(), BAD), name


@pytest.mark.parametrize(
    ("what", "trained", "scratch_bytes"),
    [(torch.nan, False, 0), (torch.nan, True, 0), (torch.inf, True, 10**6)],
)
@pytest.mark.parametrize("kind", ["jsd", "advantage"])
def test_a_teachers_row_that_is_no_number_is_seen_in_the_gradient(
    kind, scratch_bytes, trained, what
):
    labels, teacher = LABELS.abs() % 50, torch.randn(ROWS, 5)
    spoiled = teacher.clone()
    spoiled[2, 1] = what
    case = Case(torch.randn(ROWS, WIDTH), Head(torch.randn(VOCAB, WIDTH)), labels)
    of_teacher = torch.randn(VOCAB, 5)
    given = {"kind": kind, "scratch_bytes": scratch_bytes}
    if kind == "advantage":
        given |= {"reference_hidden": torch.randn(ROWS, 3), "reference_head": torch.randn(VOCAB, 3)}

    def gradient(teacher: torch.Tensor) -> torch.Tensor:
        one = case.to(torch.float32, trained=trained)
        models = one.hidden, one.head, teacher, of_teacher
        linear_divergence(*models, labels, **given).sum().backward()
        return one.hidden.grad

    found, clean = gradient(spoiled), gradient(teacher)
    assert found[BAD].isnan().all()
    assert torch.equal(found[~BAD], clean[~BAD])


@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("what", [torch.nan, 1e20])
def test_token_preferences_of_a_row_with_an_infinite_logit(what, of):
    models = {"student": torch.randn(ROWS, WIDTH), "teacher": torch.randn(ROWS, WIDTH)}
    heads = torch.randn(VOCAB, WIDTH), torch.randn(VOCAB, WIDTH)
    for hidden, weight in zip(models.values(), heads, strict=True):
        hidden[:, 0] = weight[:, 0] = 0
        weight[5, 0] = 1e20  # what one token reads alone
    models[of][2, 0] = what
    student = models["student"].requires_grad_()
    labels = LABELS.abs() % 50
    found = linear_token_preference(student, heads[0], models["teacher"], heads[1], labels)
    assert torch.equal(found.isnan(), BAD)
    found.sum().backward()
    assert torch.equal(student.grad.isnan().all(1), BAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means_of_a_masked_bias(dtype):
    """Tokens that both models mask count for nothing; what the teacher alone has is infinite."""
    hidden, teacher = (torch.randn(ROWS, WIDTH, dtype=dtype) for _ in range(2))
    weight, of_teacher = (torch.randn(VOCAB, WIDTH, dtype=dtype) for _ in range(2))
    masked = torch.arange(VOCAB) >= 100
    bias = torch.randn(VOCAB, dtype=dtype).masked_fill(masked, -torch.inf)
    head, labels = Head(weight, bias), LABELS.clamp_max(90)
    with_mask = Head(of_teacher, torch.zeros(VOCAB, dtype=dtype).masked_fill(masked, -torch.inf))
    means = teacher_means(teacher, with_mask, head, labels)
    found = linear_cached_kl(hidden, head, means, labels)
    expected = linear_divergence(hidden, head, teacher, with_mask, labels, kind="forward_kl")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    means = teacher_means(teacher, of_teacher, head, labels)
    found = linear_cached_kl(hidden, head, means, labels)
    assert torch.equal(found, torch.where(labels == -100, 0.0, torch.inf))
