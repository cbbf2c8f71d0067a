"""SimPO against its formula, pair by pair, and against Liger's and TRL's code."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from batches import DTYPES, exact_everywhere, hold_to_reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref import Responses
from fastpref.losses import simpo

OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.1, 2.0, 10.0]),
        "gamma": st.sampled_from([0.0, 0.5, 5.0]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.5]),
    }
)


@st.composite
def sums(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (2B,), and lengths."""
    pairs, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    logps = -draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.rand(2 * pairs, generator=generator)
    return exact_everywhere(logps), torch.randint(0, 9, (2 * pairs,), generator=generator)


def looped(logps, lengths, *, beta, gamma, label_smoothing, sft_weight):
    """The formula, pair by pair."""
    pairs, losses = len(logps) // 2, []
    rewards = [beta * one / max(int(n), 1) for one, n in zip(logps, lengths, strict=True)]
    for p in range(pairs):
        d = rewards[p] - rewards[pairs + p] - gamma
        losses.append(-(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d))
    nll = -logps[:pairs].sum() / max(int(lengths[:pairs].sum()), 1)
    return torch.stack(losses).mean() + sft_weight * nll


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=sums(), options=OPTIONS, sft_weight=st.sampled_from([0.0, 0.3]))
def test_equals_a_loop(dtype, drawn, options, sft_weight):
    logps, lengths = drawn
    options = {**options, "sft_weight": sft_weight}
    size = options["beta"] * float(logps.abs().max()) + options["gamma"]
    hold_to_reference(
        lambda leaves: simpo(Responses(leaves["logps"], lengths), **options).loss,
        lambda leaves: looped(leaves["logps"], lengths, **options),
        lambda dtype: {"logps": logps.to(dtype).clone().requires_grad_()},
        dtype,
        scale=size,
        sharpness=size,
    )


@given(drawn=sums(), options=OPTIONS)
def test_equals_liger_and_trl(drawn, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported packages, none of ours
        chunked_loss = pytest.importorskip("liger_kernel.chunked_loss.simpo_loss")
        cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    responses = Responses(*drawn)
    means = responses.per_token(responses.logps).chunk(2)
    found = simpo(responses, **options)
    loss, *rewards = chunked_loss.LigerFusedLinearSimPOFunction.preference_loss_fn(
        *means, drawn[0], **options
    )
    for one, expected in zip((found.loss, *found[3:5]), (loss, *rewards), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)
    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        beta=options["beta"],
        simpo_gamma=options["gamma"],
        label_smoothing=options["label_smoothing"],
        accelerator=SimpleNamespace(device="cpu"),
    )
    losses, *_ = cpo.CPOTrainer.cpo_loss(trainer, *means)
    torch.testing.assert_close(found.loss, losses.mean(), rtol=1e-12, atol=1e-12)


def test_what_the_formula_says():
    responses = Responses(torch.tensor([-1.0, -6.0]), torch.tensor([1, 2]))  # means -1 and -3
    found = simpo(responses, beta=0.5, gamma=0.25)
    torch.testing.assert_close(found.loss.item(), math.log1p(math.exp(-0.75)), rtol=1e-6, atol=0)
    assert found.chosen_rewards == -0.5 and found.rejected_rewards == -1.5
    assert found.nll_loss == 1.0
