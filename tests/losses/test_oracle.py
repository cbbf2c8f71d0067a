from __future__ import annotations

import math

import formulas
import pytest
import torch
from batches import DTYPES, exact_everywhere, hold_to_reference, some_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import Responses
from fastpref.losses import oracle

NAMES = ("chosen_rewards", "rejected_rewards", "chosen_logps")


def chosen(logps: Tensor, length: int = 1) -> Responses:
    return Responses(logps, torch.full(logps.shape, length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    pairs=st.integers(1, 5),
    length=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1.0, 4.0]),
    sft_weight=st.sampled_from([0.0, 0.1, 2]),
    trains=some_of(*NAMES),
)
def test_equals_the_reference(dtype, pairs, length, seed, scale, sft_weight, trains):
    values = scale * torch.randn(3, pairs, generator=torch.Generator().manual_seed(seed))
    values[2] = -values[2].abs()

    def leaves(dtype: torch.dtype) -> dict[str, Tensor]:
        rows = zip(NAMES, exact_everywhere(values), strict=True)
        return {name: row.to(dtype).clone().requires_grad_(name in trains) for name, row in rows}

    def ours(leaves: dict[str, Tensor]) -> Tensor:
        rewards = torch.cat([leaves["chosen_rewards"], leaves["rejected_rewards"]])
        return oracle(chosen(leaves["chosen_logps"], length), rewards, sft_weight=sft_weight).loss

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        means = {**leaves, "chosen_logps": leaves["chosen_logps"] / length}
        return formulas.oracle_loss(**means, sft_weight=sft_weight)

    hold_to_reference(ours, plain, leaves, dtype)


def test_what_the_formula_says():
    rewards = torch.tensor([math.log(3), 0.0, 0.0, math.log(3)])
    found = oracle(chosen(torch.tensor([-2.0, -6.0]), 2), rewards, sft_weight=0.5)
    # The winner wins with 3/4 in one pair and 1/4 in the other.
    bradley_terry = -(math.log(0.75) + math.log(0.25)) / 2
    torch.testing.assert_close(found.preference_loss.item(), bradley_terry, rtol=1e-6, atol=0)
    assert found.nll_loss == 2.0
    torch.testing.assert_close(found.loss.item(), bradley_terry + 1.0, rtol=1e-6, atol=0)


def test_metrics_are_detached():
    rewards = torch.randn(4, requires_grad=True)
    found = oracle(chosen(torch.randn(2, requires_grad=True)), rewards, sft_weight=0.5)
    assert found.loss.requires_grad
    assert not any(values.requires_grad for values in found[1:])


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_a_certain_oracle_is_finite(gap):
    rewards = torch.tensor([gap, 0.0], requires_grad=True)
    logps = torch.tensor([-1.0], requires_grad=True)
    found = oracle(chosen(logps), rewards, sft_weight=0.1)
    found.loss.backward()
    torch.testing.assert_close(found.loss.item(), max(-gap, 0) + 0.1, rtol=1e-6, atol=0)
    assert rewards.grad.isfinite().all() and logps.grad.isfinite().all()
