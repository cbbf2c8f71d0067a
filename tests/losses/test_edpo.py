"""e-DPO and d-DPO against the formula that the docstring gives."""

from __future__ import annotations

import looped
import pytest
import torch
from batches import DTYPES, exact_everywhere
from hypothesis import given
from hypothesis import strategies as st
from sums import hold, largest, sums

from fastpref import Responses
from fastpref.losses import edpo

OPTIONS = st.fixed_dictionaries(
    {
        "beta": st.sampled_from([0.1, 1.0]),
        "gamma": st.sampled_from([0.0, 0.3]),
        "aggregate": st.sampled_from(["min_pair", "min_batch"]),
    }
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    drawn=sums("ref_logps"),
    options=OPTIONS,
    models=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
def test_equals_a_loop(dtype, drawn, options, models, seed):
    count = len(drawn[1])
    shape = (count,) if models is None else (models, count)
    generator = torch.Generator().manual_seed(seed)
    # Far enough apart that rounding leaves the nearest of them the nearest.
    ranks = torch.arange(models or 1).reshape(-1, 1) * torch.tensor([8.0, -8.0])
    rewards = ranks.repeat_interleave(count // 2, 1) + torch.randn(
        models or 1, count, generator=generator
    )
    drawn[0]["oracle_rewards"] = exact_everywhere(rewards.reshape(shape))
    size = largest(drawn)
    hold(edpo, looped.edpo, drawn, dtype, options, size=size + size**2)


def test_what_the_formula_says():
    responses = Responses(torch.tensor([-1.0, -2.0, -6.0, -2.0]), torch.tensor([1, 1, 2, 2]))
    ref_logps = torch.tensor([-2.0, -2.0, -4.0, -2.0])  # the winners are 3 and 0 ahead
    rewards = torch.tensor([[2.0, 1.0, 0.0, 0.0], [5.0, 4.0, 0.0, 0.0]])  # errors 1, 1 and 4, 16
    found = edpo(responses, ref_logps, rewards, beta=1.0)
    assert found.loss == 1.0 and found.reward_loss == 1.0
    assert found.chosen_rewards.tolist() == [1.0, 0.0]
    mixed = rewards.clone()
    mixed[:, 0] = torch.tensor([5.0, 3.0])  # errors 4, 1 and 0, 16
    assert edpo(responses, ref_logps, mixed, beta=1.0).loss == (0 + 1) / 2
    assert edpo(responses, ref_logps, mixed, beta=1.0, aggregate="min_batch").loss == (4 + 1) / 2
    assert edpo(responses, ref_logps, mixed[0], beta=1.0).loss == (4 + 1) / 2  # d-DPO
    found = edpo(responses, ref_logps, mixed[0], beta=1.0, gamma=0.5)
    assert found.kl == (-1 + 0 + 2 + 0) / 4 and found.loss == 2.5 + 0.5 * 0.25


def test_the_mean_over_models_is_one_model_with_the_mean_reward():
    """It has the same gradient, so that a mean over models is no option."""
    logps = torch.randn(4, dtype=torch.float64, requires_grad=True)
    responses, ref_logps = Responses(logps, torch.ones(4).long()), torch.randn(4).double()
    rewards = torch.randn(3, 4).double()
    each = torch.stack([edpo(responses, ref_logps, one).loss for one in rewards])
    of_mean = edpo(responses, ref_logps, rewards.mean(0)).loss
    torch.testing.assert_close(
        *(torch.autograd.grad(one, logps, retain_graph=True)[0] for one in (each.mean(), of_mean))
    )
