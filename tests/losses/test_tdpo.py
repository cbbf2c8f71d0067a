"""TDPO1 and TDPO2 against their formulas, and from the reference's distributions."""

from __future__ import annotations

import math

import looped
import pytest
import torch
from batches import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from sums import hold, largest, sums

from fastpref import Responses
from fastpref.losses import dpo, tdpo

OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.1, 1.0]),
        "alpha": st.sampled_from([0.0, 0.5, 1.0]),
        "stop_gradient": st.booleans(),
    }
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=sums("ref_logps", "divergences"), options=OPTIONS)
def test_equals_a_loop(dtype, drawn, options):
    values, _ = drawn
    values["divergences"] = values["divergences"].abs()
    hold(tdpo, looped.tdpo, drawn, dtype, options, size=2 * largest(drawn))


def test_what_the_formula_says():
    responses = Responses(torch.tensor([-1.0, -6.0]), torch.tensor([1, 2]))
    ref_logps = torch.tensor([-2.0, -4.0])  # log-ratios 1 and -2
    divergences = torch.tensor([3.0, 4.0])
    for options, d in (
        ({}, 3 - 0.5 * (4 - 3)),
        ({"alpha": 1.0, "stop_gradient": False}, 3 - (4 - 3)),  # TDPO1
        ({"alpha": 0.0}, 3),
    ):
        found = tdpo(responses, ref_logps, divergences, beta=0.5, **options)
        expected = math.log1p(math.exp(-0.5 * d))
        torch.testing.assert_close(found.loss.item(), expected, rtol=1e-6, atol=0)
        assert found.chosen_rewards - found.rejected_rewards == 0.5 * d
    assert found.chosen_divergences == 3.0 and found.rejected_divergences == 4.0
    assert found.loss == dpo(responses, ref_logps, beta=0.5).loss


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_what_gets_a_gradient(stop_gradient):
    divergences = torch.ones(4, requires_grad=True)
    responses = Responses(torch.zeros(4), torch.ones(4, dtype=torch.int64))
    tdpo(responses, torch.zeros(4), divergences, stop_gradient=stop_gradient).loss.backward()
    chosen, rejected = divergences.grad.chunk(2)
    assert (rejected > 0).all()  # the loser's divergence is pushed down
    assert (chosen == 0).all() if stop_gradient else torch.equal(chosen, -rejected)


def test_the_normaliser_of_tdpo1_cancels():
    """Its logit is linear in the student's logits, as the formula with full distributions is."""
    z, ref = torch.randn(2, 2, 5, 11).double()  # of a pair, five tokens, a vocabulary of eleven
    labels = torch.randint(11, (2, 5, 1))

    def numbers(offset: float) -> torch.Tensor:
        log_q, log_ref = (z + offset).log_softmax(-1), ref.log_softmax(-1)
        divergences = (log_ref.exp() * (log_ref - log_q)).sum((1, 2))
        logps, ref_logps = (one.gather(-1, labels).sum((1, 2)) for one in (log_q, log_ref))
        responses = Responses(logps, torch.tensor([5, 5]))
        options = {"alpha": 1.0, "stop_gradient": False}
        return tdpo(responses, ref_logps, divergences, **options).loss

    logits = (z.gather(-1, labels).squeeze(-1) - (ref.softmax(-1) * z).sum(-1)).sum(1)
    log_ref = ref.log_softmax(-1)
    of_ref = (log_ref.gather(-1, labels).squeeze(-1) - (log_ref.exp() * log_ref).sum(-1)).sum(1)
    rewards = logits - of_ref
    expected = -torch.nn.functional.logsigmoid(0.1 * (rewards[0] - rewards[1]))
    torch.testing.assert_close(numbers(0.0), expected)
