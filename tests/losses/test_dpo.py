"""DPO, cDPO and IPO against their formulas, pair by pair, and against TRL's code."""

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
from fastpref.losses import dpo, ipo

NAMES = ("logps", "ref_logps")


@st.composite
def sums(draw: st.DrawFn) -> tuple[dict[str, Tensor], Tensor]:
    """Summed log-probabilities (2B,) of policy and reference, and lengths."""
    pairs, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    values = -draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.rand(
        2, 2 * pairs, generator=generator
    )
    lengths = torch.randint(0, 9, (2 * pairs,), generator=generator)
    return dict(zip(NAMES, exact_everywhere(values), strict=True)), lengths


def hold(loss, formula, drawn, trains, dtype, options):
    values, lengths = drawn

    def leaves(dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            name: one.to(dtype).clone().requires_grad_(name in trains)
            for name, one in values.items()
        }

    largest = float(values["logps"].abs().max() + values["ref_logps"].abs().max())
    hold_to_reference(
        lambda leaves: (
            loss(Responses(leaves["logps"], lengths), leaves["ref_logps"], **options).loss
        ),
        lambda leaves: formula(leaves["logps"], leaves["ref_logps"], lengths, **options),
        leaves,
        dtype,
        scale=options["beta"] * largest + (largest**2 if loss is ipo else 0),
        sharpness=options["beta"] * largest + largest,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    drawn=sums(),
    trains=some_of(*NAMES),
    options=st.fixed_dictionaries(
        {
            "beta": st.sampled_from([0.1, 1.0]),
            "label_smoothing": st.sampled_from([0.0, 0.1, 0.5]),
        }
    ),
)
def test_dpo_equals_the_reference(dtype, drawn, trains, options):
    hold(dpo, formulas.dpo, drawn, trains, dtype, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    drawn=sums(),
    trains=some_of(*NAMES),
    options=st.fixed_dictionaries(
        {"beta": st.sampled_from([0.1, 1.0]), "length_normalize": st.booleans()}
    ),
)
def test_ipo_equals_the_reference(dtype, drawn, trains, options):
    hold(ipo, formulas.ipo, drawn, trains, dtype, options)


def test_what_the_formulas_say():
    responses = Responses(torch.tensor([-1.0, -6.0]), torch.tensor([1, 2]))
    ref_logps = torch.tensor([-2.0, -4.0])  # log-ratios 1 and -2, per token 1 and -1
    found = dpo(responses, ref_logps, beta=0.5)
    torch.testing.assert_close(found.loss.item(), math.log1p(math.exp(-1.5)), rtol=1e-6, atol=0)
    assert found.chosen_rewards == 0.5 and found.rejected_rewards == -1.0
    smoothed = dpo(responses, ref_logps, beta=0.5, label_smoothing=0.25).loss.item()
    torch.testing.assert_close(smoothed, found.loss.item() + 0.25 * 1.5, rtol=1e-6, atol=0)
    found = ipo(responses, ref_logps, beta=0.5)
    assert found.loss == (2.0 - 1.0) ** 2
    assert found.chosen_rewards == 0.5 and found.rejected_rewards == -0.5
    found = ipo(responses, ref_logps, beta=0.5, length_normalize=False)
    assert found.loss == (3.0 - 1.0) ** 2
    assert found.chosen_rewards == 0.5 and found.rejected_rewards == -1.0


def test_metrics_are_detached():
    responses = Responses(torch.randn(4, requires_grad=True), torch.ones(4, dtype=torch.int64))
    for loss in (dpo, ipo):
        found = loss(responses, torch.randn(4))
        assert found.loss.requires_grad and not any(one.requires_grad for one in found[1:])


def test_a_reference_is_no_option():
    with pytest.raises(TypeError, match="ref_logps"):
        dpo(Responses(torch.zeros(2), torch.ones(2, dtype=torch.int64)))


@pytest.mark.parametrize("loss", [dpo, ipo])
def test_rewards_are_of_the_likelihood_whatever_the_tokens_weigh(loss):
    weighted = Responses(torch.tensor([-1.0, -6.0]), torch.tensor([1, 2]), torch.tensor([-2.0, -4]))
    plain = Responses(weighted.unweighted_logps, weighted.lengths)
    ref_logps = torch.tensor([-2.0, -3.0])
    found, expected = loss(weighted, ref_logps), loss(plain, ref_logps)
    assert found.loss != expected.loss
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(one, other)
