"""Means under the student of what a few tokens are worth, against full logits."""

from __future__ import annotations

import pytest
import torch
from counting import flops_of
from torch import Tensor

from fastpref import linear_divergence, linear_topk_expectation

ROWS, WIDTH, TEACHER, VOCAB, COUNT = 6, 4, 7, 30, 5
LABELS = torch.tensor([3, -100, 0, 10, 29, 7])


def inputs(dtype: torch.dtype = torch.float64, *, trained: bool = False) -> list[Tensor]:
    """Hidden states, a head, tokens and values; some tokens are worth nothing."""
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=trained)
    ids = torch.rand(ROWS, VOCAB).topk(COUNT).indices
    values = torch.randn(ROWS, COUNT, dtype=dtype)
    values[2, 1:] = 0
    return [hidden, weight, ids, values]


def expected(hidden: Tensor, weight: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    q = (hidden @ weight.T / 0.7).softmax(-1)
    return (q.gather(1, ids) * values).sum(1).masked_fill(LABELS == -100, 0)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("compact", [True, False])
def test_equals_full_logits(trained, compact):
    given = inputs(trained=trained)
    found = linear_topk_expectation(*given, LABELS, temperature=0.7, compact=compact)
    naive = expected(*given)
    torch.testing.assert_close(found, naive)
    upstream = torch.randn(ROWS, dtype=torch.float64)
    leaves = given[: 1 + trained]
    ours, theirs = (torch.autograd.grad(one, leaves, upstream) for one in (found, naive))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_ids_of_tokens_that_are_worth_nothing_do_not_matter():
    hidden, weight, ids, values = inputs()
    plain = linear_topk_expectation(hidden, weight, ids, values, LABELS)
    ids[2, 1:] = 10**6
    assert linear_topk_expectation(hidden, weight, ids, values, LABELS).equal(plain)
    ids[2, 0] = VOCAB
    with pytest.raises(ValueError, match="token_ids: expected values in .0, 30. .*, got 1 outside"):
        linear_topk_expectation(hidden, weight, ids, values, LABELS)


def test_all_tokens_are_the_whole_vocabulary():
    """ADPA as released, with as many tokens as there are, is the clamp over the vocabulary."""
    hidden, weight, *_ = inputs()
    teacher, reference = (
        (torch.randn(ROWS, TEACHER).double(), torch.randn(VOCAB, TEACHER).double())
        for _ in range(2)
    )
    log_p, log_ref = ((one[0] @ one[1].T).log_softmax(-1) for one in (teacher, reference))
    values, ids = (log_p - log_ref).clamp(0, 1).topk(VOCAB)
    found = linear_topk_expectation(hidden, weight, ids, values, LABELS)
    whole = linear_divergence(
        hidden, weight, *teacher, LABELS, kind="advantage", clip=(0.0, 1.0),
        reference_hidden=reference[0], reference_head=reference[1],
    )  # fmt: skip
    torch.testing.assert_close(found, whole)


def test_two_products():
    hidden, weight, ids, values = inputs(torch.float32)
    labelled, run = int((LABELS != -100).sum()), linear_topk_expectation
    found = flops_of(lambda: run(hidden, weight, ids, values, LABELS).sum().backward())
    assert found == 2 * (2 * labelled * WIDTH * VOCAB)


def test_an_offset_of_all_logits_costs_nothing():
    """What is left of the vocabulary is no sum of a large logit and a small logarithm."""
    weight = torch.full((VOCAB, 1), 300.0)  # every token has 1/30
    given = torch.ones(1, 1), weight, torch.tensor([[4, 1]]), torch.ones(1, 2), torch.tensor([0])
    found = linear_topk_expectation(*given)
    torch.testing.assert_close(found, torch.tensor([2 / VOCAB]), rtol=1e-6, atol=0)
