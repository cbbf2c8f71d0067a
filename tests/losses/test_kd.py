"""Losses of every token of a teacher against their formulas, and from full distributions."""

from __future__ import annotations

import warnings

import formulas
import looped
import pytest
import torch
from batches import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from sums import hold, largest, sums
from torch import Tensor

from fastpref import Responses, linear_logps, linear_token_preference, sum_responses
from fastpref.losses import adpa, dckd, dpkd_token, gkd, sft, vanilla_kd

WEIGHTS = st.sampled_from([0.0, 0.1, 1.0, 1.6])


@pytest.mark.parametrize("loss", [vanilla_kd, gkd, dpkd_token])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    drawn=sums("divergences"),
    options=st.fixed_dictionaries({"weight": WEIGHTS, "sft_weight": WEIGHTS}),
)
def test_kd_equals_a_loop(dtype, loss, drawn, options):
    drawn[0]["divergences"].abs_()
    hold(loss, looped.kd, drawn, dtype, options, size=2 * largest(drawn))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    drawn=sums("divergences"),
    options=st.fixed_dictionaries(
        {"chosen_weight": WEIGHTS, "rejected_weight": WEIGHTS, "sft_weight": WEIGHTS}
    ),
)
def test_dckd_equals_a_loop(dtype, drawn, options):
    drawn[0]["divergences"].abs_()
    hold(dckd, looped.dckd, drawn, dtype, options, size=3 * largest(drawn))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    drawn=sums("advantages"),
    options=st.fixed_dictionaries({"weight": WEIGHTS, "sft_weight": WEIGHTS}),
)
def test_adpa_equals_a_loop(dtype, drawn, options):
    values, _ = drawn
    values["advantages"] = values["advantages"].chunk(2)[1]
    hold(adpa, looped.adpa, drawn, dtype, options, size=3 * largest(drawn))


class Tokens:
    """Two pairs, from three heads on the same hidden states."""

    def __init__(self) -> None:
        self.hidden = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
        self.heads = torch.randn(3, 20, 8, dtype=torch.float64)
        self.labels = torch.randint(20, (4, 6))
        self.labels[:, 0] = self.labels[1, 3:] = self.labels[3, 5:] = -100
        self.mask = self.labels != -100
        self.log_q, self.log_p, self.log_r = (
            (hidden @ head.T).log_softmax(-1)
            for hidden, head in zip(
                (self.hidden, self.hidden.detach(), self.hidden.detach()), self.heads, strict=True
            )
        )

    def responses(self, rows: slice = slice(None)) -> Responses:
        logps = linear_logps(self.hidden[rows], self.heads[0], self.labels[rows])
        return sum_responses(logps, self.labels[rows])

    def sums(self, per_token: Tensor, rows: slice = slice(None)) -> Tensor:
        return sum_responses(per_token[rows], self.labels[rows]).logps

    def forward_kl(self) -> Tensor:
        return (self.log_p.exp() * (self.log_p - self.log_q)).sum(-1)

    def hold(self, found: Tensor, expected: Tensor) -> None:
        """Values and gradients are equal."""
        torch.testing.assert_close(found, expected)
        gradients = (
            torch.autograd.grad(one, self.hidden, retain_graph=True)[0] for one in (found, expected)
        )
        torch.testing.assert_close(*gradients)


def test_vanilla_kd_is_the_mean_over_tokens():
    tokens, chosen = Tokens(), slice(2)
    mask = tokens.mask[chosen]
    expected = torch.nn.functional.kl_div(
        tokens.log_q[chosen][mask], tokens.log_p[chosen][mask], log_target=True, reduction="sum"
    ) / int(mask.sum())
    nll = torch.nn.functional.nll_loss(tokens.log_q[chosen][mask], tokens.labels[chosen][mask])
    found = vanilla_kd(
        tokens.responses(chosen), tokens.sums(tokens.forward_kl(), chosen), sft_weight=0.5
    )
    torch.testing.assert_close(found.chosen_divergence, expected.detach())
    tokens.hold(found.loss, expected + 0.5 * nll)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_equals_trl(beta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported package, none of ours
        trl = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    tokens = Tokens()
    expected = trl.GKDTrainer.generalized_jsd_loss(
        tokens.log_q, tokens.log_p, labels=tokens.labels, beta=beta
    )
    log_q, log_p = tokens.log_q, tokens.log_p
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    divergence = {
        0.0: tokens.forward_kl(),
        1.0: (log_q.exp() * (log_q - log_p)).sum(-1),
        0.5: (0.5 * log_p.exp() * (log_p - log_m) + 0.5 * log_q.exp() * (log_q - log_m)).sum(-1),
    }[beta]
    tokens.hold(gkd(tokens.responses(), tokens.sums(divergence)).loss, expected)


def test_dckd_is_three_token_means():
    tokens = Tokens()
    per_token, mask = tokens.forward_kl(), tokens.mask
    nll = torch.nn.functional.nll_loss(tokens.log_q[:2][mask[:2]], tokens.labels[:2][mask[:2]])
    expected = nll + 0.1 * per_token[:2][mask[:2]].mean() + 0.1 * per_token[2:][mask[2:]].mean()
    tokens.hold(dckd(tokens.responses(), tokens.sums(per_token)).loss, expected)


def test_adpa_is_an_expectation_over_the_students_tokens():
    tokens = Tokens()
    per_token = (tokens.log_q.exp() * (tokens.log_p - tokens.log_r)).sum(-1)
    mask = tokens.mask
    nll = torch.nn.functional.nll_loss(tokens.log_q[:2][mask[:2]], tokens.labels[:2][mask[:2]])
    expected = nll - 1.6 * per_token[2:][mask[2:]].mean()
    found = adpa(tokens.responses(), tokens.sums(per_token, slice(2, None)))
    tokens.hold(found.loss, expected)


def test_adpa_as_released_punishes_nothing():
    """That code clamps advantages to 1e-8 and 1: of a token that the teacher dislikes, nothing."""
    tokens = Tokens()
    advantage = tokens.log_p - tokens.log_r
    released, paper = (
        adpa(
            tokens.responses(),
            tokens.sums((tokens.log_q.exp() * one).sum(-1), slice(2, None)),
        )
        for one in (advantage.clamp(1e-8, 1), advantage)
    )
    assert 0 < released.rejected_advantage < 1 and not released.loss.isclose(paper.loss)


def test_dpkd_token_is_that_of_log_probabilities():
    """Without the normalisers that cancel in it."""
    tokens, chosen = Tokens(), slice(2)
    hidden, labels, mask = tokens.hidden[chosen], tokens.labels[chosen], tokens.mask[chosen]
    student, teacher = ((hidden, head) for head in tokens.heads[:2])
    losses = formulas.linear_token_preference(student, teacher, labels, beta=0.3)[mask]
    nll = torch.nn.functional.nll_loss(tokens.log_q[chosen][mask], labels[mask])
    per_token = linear_token_preference(*student, *teacher, labels, beta=0.3)
    sums = sum_responses(per_token, labels).logps
    found = dpkd_token(tokens.responses(chosen), sums)
    tokens.hold(found.loss, 0.5 * losses.mean() + 0.5 * nll)


def test_what_the_formulas_say():
    chosen = Responses(torch.tensor([-1.0, -7.0]), torch.tensor([1, 3]))
    sums = torch.tensor([0.5, 1.5])
    found = vanilla_kd(chosen, sums, weight=2.0, sft_weight=0.25)
    assert found.loss == 2 * 0.5 + 0.25 * 2.0 and found.chosen_divergence == 0.5
    assert vanilla_kd(chosen, sums, weight=0.0, sft_weight=1.0).loss == sft(chosen).loss
    pairs = Responses(torch.tensor([-1.0, -7.0, -9.0, -9.0]), torch.tensor([1, 3, 1, 1]))
    found = dckd(pairs, torch.tensor([0.5, 1.5, 3.0, 1.0]), chosen_weight=0.5, rejected_weight=0.25)
    assert found.loss == 2.0 + 0.5 * 0.5 + 0.25 * 2.0 and found.rejected_divergence == 2.0
    found = adpa(pairs, torch.tensor([3.0, 1.0]), weight=0.5)
    assert found.loss == 2.0 - 0.5 * 2.0 and found.rejected_advantage == 2.0
