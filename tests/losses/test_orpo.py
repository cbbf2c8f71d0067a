"""ORPO against its formula, against TRL's and Liger's code, and where odds are extreme."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import looped
import pytest
import torch
from batches import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from sums import hold, largest, sums

from fastpref import Responses
from fastpref.losses import orpo, sft

OPTIONS = st.fixed_dictionaries(
    {"beta": st.sampled_from([0.0, 0.1, 1.0]), "sft_weight": st.sampled_from([0.0, 1.0, 0.3])}
)


@pytest.fixture(scope="module")
def trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported package, none of ours
        return pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=sums(smallest=0.5), options=OPTIONS)
def test_equals_a_loop(dtype, drawn, options):
    hold(orpo, looped.orpo, drawn, dtype, options, size=largest(drawn))


@given(drawn=sums(smallest=0.01), beta=st.sampled_from([0.1, 1.0]))
def test_equals_liger_and_trl(trl, drawn, beta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported package, none of ours
        liger = pytest.importorskip("liger_kernel.chunked_loss.orpo_loss")
    (logps,), lengths = drawn[0].values(), drawn[1]
    responses = Responses(logps, lengths)
    found = orpo(responses, beta=beta)
    means = responses.per_token(logps)
    loss, *rewards, log_odds_ratio, log_odds = (
        liger.LigerFusedLinearORPOFunction.preference_loss_fn(*means.chunk(2), logps, beta=beta)
    )
    ours = (found.loss - found.nll_loss, *found[3:5], -found.odds_loss, found.log_odds.mean())
    for one, expected in zip(ours, (loss, *rewards, log_odds_ratio, log_odds), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-10)
    # TRL casts to float32.
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = trl.odds_ratio_loss(trainer, *means.chunk(2))
    torch.testing.assert_close(
        (found.loss - found.nll_loss).float(), -losses.mean(), rtol=1e-4, atol=1e-5
    )


def test_what_the_formula_says():
    logps = torch.tensor([2 * math.log(0.75), math.log(0.2)])  # odds of 3 and of 1/4
    found = orpo(Responses(logps, torch.tensor([2, 1])), beta=0.5)
    torch.testing.assert_close(found.log_odds.item(), math.log(12), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.odds_loss.item(), math.log(13 / 12), rtol=1e-5, atol=0)
    expected = -math.log(0.75) + 0.5 * math.log(13 / 12)
    torch.testing.assert_close(found.loss.item(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.chosen_rewards.item(), 0.5 * math.log(0.75))


def test_the_published_likelihood_covers_the_prompt(trl):
    """TRL's is of prompt and response: `sft` of such labels beside ``sft_weight=0`` is that."""
    logps = -torch.rand(4, 6)  # of two pairs, two prompt tokens each
    response, both = torch.ones(4, 6), torch.ones(4, 6)
    response[:, :2], response[1, 4:], both[1, 4:] = 0, 0, 0
    responses = Responses((logps * response).sum(1), response.sum(1).long())
    whole = Responses((logps * both)[:2].sum(1), both[:2].sum(1).long())
    found = sft(whole).loss + orpo(responses, sft_weight=0.0).loss
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = trl.odds_ratio_loss(trainer, *responses.per_token(responses.logps).chunk(2))
    published = -(logps * both)[:2].sum() / both[:2].sum() - losses.mean()
    torch.testing.assert_close(found, published)
    assert not torch.isclose(orpo(responses).loss, published)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("z", [-1e-30, -1e-10, -1e-3, -1.0, -50.0, -500.0])
def test_odds_are_exact_everywhere(dtype, z, trl):
    """Of a winner or a loser that is all but certain or impossible, against numbers by hand."""
    other = -1.0
    exact_odds = {
        -1e-30: 30 * math.log(10),
        -1e-10: 10 * math.log(10) - 0.5e-10,
        -1e-3: -1e-3 - math.log(-math.expm1(-1e-3)),
        -1.0: -1.0 - math.log(-math.expm1(-1.0)),
    }.get(z, z)
    other_odds = other - math.log(-math.expm1(other))
    for values, sign in (((z, other), 1), ((other, z), -1)):
        logps = torch.tensor(values, dtype=dtype, requires_grad=True)
        found = orpo(Responses(logps, torch.tensor([1, 1])), beta=1.0, sft_weight=0.0)
        x = sign * (exact_odds - other_odds)
        torch.testing.assert_close(found.log_odds.item(), x, rtol=1e-6, atol=1e-6)
        loss = max(-x, 0) + math.log1p(math.exp(-abs(x)))
        torch.testing.assert_close(found.loss.item(), loss, rtol=2e-6, atol=1e-35)
        found.loss.backward()
        # d log(odds) / dz = 1 / (1 - e^z)
        slope = 1 / -math.expm1(z) / (1 + math.exp(min(x, 700)))
        expected = -sign * slope
        torch.testing.assert_close(
            logps.grad[int(sign < 0)].item(), expected, rtol=1e-4, atol=1e-30
        )


def test_certain_and_empty_responses_are_finite(trl):
    for logps in ([0.0, -2.0], [-2.0, 0.0], [0.0, 0.0]):
        leaf = torch.tensor(logps, requires_grad=True)
        found = orpo(Responses(leaf, torch.tensor([0, 2])))
        found.loss.backward()
        assert found.loss.isfinite() and leaf.grad.isfinite().all()
    # TRL's odds of a response that is certain are infinite, and their gradients no numbers.
    certain = torch.tensor([0.0], requires_grad=True)
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = trl.odds_ratio_loss(trainer, certain, torch.tensor([-2.0]))
    losses.sum().backward()
    assert certain.grad.isnan().all()
