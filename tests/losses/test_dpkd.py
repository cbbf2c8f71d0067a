"""DPKD against its formula, and against TRL's DPO losses with the teacher as reference."""

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

from fastpref import Responses
from fastpref.losses import dpkd

OPTIONS = st.fixed_dictionaries(
    {"beta": st.sampled_from([0.1, 1.0]), "length_normalize": st.booleans()}
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(drawn=sums("teacher_logps"), options=OPTIONS)
def test_equals_a_loop(dtype, drawn, options):
    hold(dpkd, looped.dpkd, drawn, dtype, options, size=largest(drawn))


@pytest.mark.parametrize(
    ("length_normalize", "loss_type"), [(True, "sigmoid_norm"), (False, "sigmoid")]
)
def test_equals_trl_with_the_teacher_as_reference(length_normalize, loss_type):
    logps = -torch.rand(4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.6
    teacher_logps = -3 * torch.rand(4, dtype=torch.float64)
    expected = trls_losses.dpo_loss(logps, mask, teacher_logps, loss_type, beta=0.7)
    responses = Responses((logps * mask).sum(1), mask.sum(1))
    found = dpkd(responses, teacher_logps, beta=0.7, length_normalize=length_normalize)
    torch.testing.assert_close(found.loss, expected)


def test_what_the_formula_says():
    responses = Responses(torch.tensor([-1.0, -6.0]), torch.tensor([1, 2]))
    teacher_logps = torch.tensor([-2.0, -4.0])  # log-ratios 1 and -2, per token 1 and -1
    found = dpkd(responses, teacher_logps, beta=0.5)
    torch.testing.assert_close(found.loss.item(), math.log1p(math.exp(-1.0)), rtol=1e-6, atol=0)
    assert found.chosen_rewards == 0.5 and found.rejected_rewards == -0.5
    found = dpkd(responses, teacher_logps, beta=0.5, length_normalize=False)
    torch.testing.assert_close(found.loss.item(), math.log1p(math.exp(-1.5)), rtol=1e-6, atol=0)
