"""WPO against its formula, and against TRL's weights, which are not clamped."""

from __future__ import annotations

import math

import looped
import pytest
import torch
import trls_losses
from batches import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from sums import hold, largest, sums

from fastpref import Responses, linear_logps, linear_stats, sum_responses
from fastpref.losses import dpo, wpo

OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.01, 1.0]),
        "clamp": st.booleans(),
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.5]),
    }
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=sums("ref_logps", "log_weights"), options=OPTIONS)
def test_equals_a_loop(dtype, drawn, options):
    values, _ = drawn
    values["log_weights"] = values["log_weights"].clamp(-2, 2)
    hold(
        wpo, looped.wpo, drawn, dtype, options,
        constants=("log_weights",), size=math.exp(4) * largest(drawn),
    )  # fmt: skip


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_equals_trl_where_it_does_not_clamp(scale):
    """From hidden states: log-probabilities and statistics of a head, and the weights of a pair."""
    hidden, head = torch.randn(4, 6, 8).double(), scale * torch.randn(20, 8).double()
    labels = (hidden @ head.T).argmax(-1)  # the likeliest tokens, which weigh more than 1
    labels[:, 0] = labels[2, 4:] = -100
    mask = labels != -100
    logps, ref_logps = linear_logps(hidden, head, labels), -5 * torch.rand(4).double()
    log_sums = linear_stats(hidden, head, labels, stats=["log_sum_squared_probs"])[
        "log_sum_squared_probs"
    ]
    responses = sum_responses(logps, labels)
    log_weights = sum_responses(logps - log_sums, labels)
    log_weights = log_weights.per_token(log_weights.logps)
    given = (responses, ref_logps, log_weights)
    expected = trls_losses.dpo_loss(
        logps, mask, ref_logps, "sigmoid", beta=0.1, log_sum_sq_probs=log_sums
    )
    found = wpo(*given, beta=0.1, clamp=False)
    torch.testing.assert_close(found.loss, expected)
    assert (found.weights > 1).all()
    # The released code does clamp, and is DPO here.
    torch.testing.assert_close(wpo(*given, beta=0.1).loss, dpo(*given[:2], beta=0.1).loss)


def test_what_the_formula_says():
    responses = Responses(torch.tensor([-1.0, -6.0]), torch.tensor([1, 2]))
    ref_logps = torch.tensor([-2.0, -4.0])  # log-ratios 1 and -2
    log_weights = torch.tensor([math.log(0.5), math.log(0.25)])
    found = wpo(responses, ref_logps, log_weights, beta=0.5)
    torch.testing.assert_close(found.loss.item(), math.log1p(math.exp(-1.5)) / 8, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights.item(), 0.125)
    assert found.chosen_rewards == 0.5 and found.rejected_rewards == -1.0


def test_weights_get_no_gradient_and_do_not_overflow():
    log_weights = torch.tensor([300.0, -400.0, 300.0, 400.0], requires_grad=True)
    logps = torch.zeros(4, requires_grad=True)
    responses = Responses(logps, torch.ones(4, dtype=torch.int64))
    found = wpo(responses, torch.zeros(4), log_weights)
    found.loss.backward()
    assert found.weights.tolist() == [1.0, 1.0]
    assert log_weights.grad is None and logps.grad.isfinite().all()
