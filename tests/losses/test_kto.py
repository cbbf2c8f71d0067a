"""KTO against its formula, and against Liger's and TRL's code."""

from __future__ import annotations

import math
import warnings

import looped
import pytest
import torch
import trls_losses
from batches import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from sums import hold, largest, sums

from fastpref import Responses
from fastpref.losses import kto

OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.1, 1.0]),
        "desirable_weight": st.sampled_from([1.0, 0.0, 1.33]),
        "undesirable_weight": st.sampled_from([1.0, 0.0, 0.25]),
    }
)
NAMES = ("ref_logps", "kl_log_ratios")


def flags(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=sums(*NAMES), options=OPTIONS, seed=st.integers(0, 99))
def test_equals_a_loop(dtype, drawn, options, seed):
    desirable = flags(len(drawn[1]), seed)
    hold(
        kto, looped.kto, drawn, dtype, options,
        constants=("kl_log_ratios",), size=largest(drawn), desirable=desirable,
    )  # fmt: skip


@given(drawn=sums(*NAMES), beta=st.sampled_from([0.1, 1.0]), seed=st.integers(0, 99))
def test_equals_liger(drawn, beta, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported package, none of ours
        liger = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    logps, ref_logps, ratios = drawn[0].values()
    desirable = flags(len(logps), seed)
    found = kto(Responses(logps, drawn[1]), ref_logps, desirable, ratios, beta=beta)
    assert found.kl == ratios.mean().clamp_min(0)
    loss, chosen_rewards, rejected_rewards = liger.LigerFusedLinearKTOFunction.preference_loss_fn(
        logps, desirable, logps, ref_logps, beta=beta, kl=found.kl
    )
    # 1 - sigmoid(x), as Liger has it, has an absolute error of a unit roundoff.
    torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close((found.rewards * desirable).sum(), chosen_rewards)
    torch.testing.assert_close((found.rewards * ~desirable).sum(), rejected_rewards)


@given(beta=st.sampled_from([0.1, 1.0]), seed=st.integers(0, 99), shift=st.sampled_from([-3, 3]))
def test_equals_trl(beta, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    logps, kl_logps = (
        -torch.rand(4, length, generator=generator, dtype=torch.float64) for length in (6, 8)
    )
    mask, kl_mask = logps < -0.3, kl_logps < -0.2
    sums, kl_sums = (logps * mask).sum(1), (kl_logps * kl_mask).sum(1)
    ref_logps, ref_kl_logps = sums + torch.tensor([-2.0, 1.0, 0.5, -0.5]), kl_sums + shift
    desirable = flags(4, seed)
    weights = {"desirable_weight": 1.33, "undesirable_weight": 0.5}
    expected = trls_losses.kto_loss(
        logps, mask, ref_logps, desirable, kl_logps, kl_mask, ref_kl_logps, beta=beta, **weights
    )
    found = kto(
        Responses(sums, mask.sum(1)), ref_logps, desirable, kl_sums - ref_kl_logps,
        beta=beta, **weights,
    )  # fmt: skip
    torch.testing.assert_close(found.kl.item(), float(max(-shift, 0)))
    torch.testing.assert_close(found.loss, expected)


def test_what_the_formula_says():
    responses = Responses(torch.tensor([-1.0, -6.0, -4.0]), torch.tensor([1, 2, 2]))
    ref_logps = torch.tensor([-2.0, -4.0, -4.0])  # log-ratios 1, -2 and 0
    desirable = torch.tensor([True, False, True])
    options = {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0}

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for ratios, z0 in (([2.0, 0.0], 1.0), ([-2.0, 0.0], 0.0), (1.0, 1.0)):
        found = kto(responses, ref_logps, desirable, torch.tensor(ratios), **options)
        assert found.kl == z0
        terms = [
            2 * (1 - sigmoid(0.5 * (1 - z0))),
            3 * (1 - sigmoid(0.5 * (z0 + 2))),
            2 * (1 - sigmoid(0.5 * (0 - z0))),
        ]
        torch.testing.assert_close(found.loss.item(), sum(terms) / 3, rtol=1e-6, atol=0)
        assert found.rewards.tolist() == [0.5, -1.0, 0.0] and found.desirable is desirable


def test_the_reference_point_gets_no_gradient():
    ratios = torch.ones(3, requires_grad=True)
    logps = torch.zeros(2, requires_grad=True)
    flags = torch.tensor([True, False])
    found = kto(Responses(logps, torch.ones(2, dtype=torch.int64)), torch.zeros(2), flags, ratios)
    found.loss.backward()
    assert ratios.grad is None and logps.grad.ne(0).all()


@pytest.mark.parametrize("good", [True, False])
def test_digits_of_responses_that_are_all_good_or_all_bad(good):
    logps = torch.tensor([0.0, -400.0], requires_grad=True)
    responses = Responses(logps, torch.tensor([9, 9]))
    desirable = torch.tensor([good, not good])
    found = kto(responses, torch.tensor([-400.0, 0.0]), desirable, torch.zeros(()), beta=0.1)
    torch.testing.assert_close(found.loss.item(), math.exp(-40) if good else 1.0, rtol=1e-5, atol=0)
    found.loss.backward()
    slope = 0.05 * math.exp(-40) * (1 if good else -1)
    torch.testing.assert_close(logps.grad, torch.tensor([-slope, slope]), rtol=1e-5, atol=0)
