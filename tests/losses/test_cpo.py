"""CPO and CPO-SimPO against their formulas, and against Liger's and TRL's code."""

from __future__ import annotations

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
from fastpref.losses import cpo, simpo

OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.1, 1.0]),
        "sft_weight": st.sampled_from([0.0, 1.0, 0.3]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.5]),
    }
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=sums(), options=OPTIONS)
def test_equals_a_loop(dtype, drawn, options):
    hold(cpo, looped.cpo, drawn, dtype, options, size=largest(drawn))


@given(drawn=sums(), options=OPTIONS)
def test_equals_liger_and_trl(drawn, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported packages, none of ours
        liger = pytest.importorskip("liger_kernel.chunked_loss.cpo_loss")
        trl = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    (logps,), lengths = drawn[0].values(), drawn[1]
    found = cpo(Responses(logps, lengths), **options)
    preference = found.loss - options["sft_weight"] * found.nll_loss
    shared = {name: options[name] for name in ("beta", "label_smoothing")}
    loss, *rewards = liger.LigerFusedLinearCPOFunction.preference_loss_fn(
        *logps.chunk(2), logps, **shared
    )
    for one, expected in zip((preference, *found[3:5]), (loss, *rewards), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-12)
    trainer = SimpleNamespace(
        alpha=0.0, loss_type="sigmoid", accelerator=SimpleNamespace(device="cpu"), **shared
    )
    losses, *_ = trl.CPOTrainer.cpo_loss(trainer, *logps.chunk(2))
    torch.testing.assert_close(preference, losses.mean(), rtol=1e-10, atol=1e-12)


def test_what_the_formula_says():
    responses = Responses(torch.tensor([-2.0, -6.0, -3.0, -5.0]), torch.tensor([1, 3, 2, 2]))
    found = cpo(responses, beta=0.5, sft_weight=0.0)
    expected = torch.log1p(torch.exp(torch.tensor([-0.5, 0.5]))).mean()
    torch.testing.assert_close(found.loss, expected)
    assert found.nll_loss == 2.0 and found.chosen_rewards.tolist() == [-1.0, -3.0]
    # The released mean over all tokens of the batch, and not the paper's sum over a response.
    torch.testing.assert_close(cpo(responses, beta=0.5).loss, expected + 8.0 / 4)


def test_cpo_simpo_is_simpo_with_the_likelihood():
    responses = Responses(torch.tensor([-2.0, -6.0, -3.0, -5.0]), torch.tensor([1, 3, 2, 2]))
    options = {"beta": 0.1, "gamma": 0.5}
    found, plain = simpo(responses, sft_weight=1.0, **options), simpo(responses, **options)
    torch.testing.assert_close(found.loss, plain.loss + 2.0)
