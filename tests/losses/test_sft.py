"""SFT and SeqKD: the token mean that TRL's SFTTrainer trains."""

from __future__ import annotations

import looped
import pytest
import torch
from batches import DTYPES
from hypothesis import given
from sums import hold, largest, sums

from fastpref import Responses, linear_logps, sum_responses
from fastpref.losses import seqkd, sft


@pytest.mark.parametrize("loss", [sft, seqkd])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=sums())
def test_equals_a_loop(dtype, loss, drawn):
    hold(loss, looped.sft, drawn, dtype, {}, size=largest(drawn))


@pytest.mark.parametrize("loss", [sft, seqkd])
def test_equals_cross_entropy(loss):
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(20, 8, dtype=torch.float64)
    labels = torch.randint(20, (3, 5))
    labels[:, 0] = labels[1, 3:] = -100
    logits = (hidden @ head.T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten())
    found = loss(sum_responses(linear_logps(hidden, head, labels), labels)).loss
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, hidden)[0] for one in (found, expected)))


@pytest.mark.parametrize("loss", [sft, seqkd])
def test_what_the_formula_says(loss):
    found = loss(Responses(torch.tensor([-1.0, -7.0, 0.0]), torch.tensor([1, 3, 0])))
    assert found.loss == 2.0 and found.nll_loss == 2.0
    assert found.chosen_logps.tolist() == [-1.0, -7.0, 0.0]


def test_weights_count_in_the_loss_alone():
    weighted = Responses(torch.tensor([-1.0, -6.0]), torch.tensor([1, 2]), torch.tensor([-2.0, -4]))
    found = sft(weighted)
    torch.testing.assert_close(found.loss.item(), 7 / 3)
    assert found.nll_loss == 2.0 and found.chosen_logps.tolist() == [-2.0, -4.0]
