"""Table 5: the other potentials, and the rewards that depend on the action."""

from __future__ import annotations

import formulas
import pytest
import torch
from batches import DTYPES, batches, hold_difference, hold_equal
from hypothesis import given
from hypothesis import strategies as st

from fastpref import teacher_shaping
from fastpref.teacher import action_rewards

POTENTIALS = ["value", "max", "margin", "expectation"]
REWARDS = ["logit", "logp"]
OPTIONS = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([1.0, 0.9]),
        "terminal": st.sampled_from(["bootstrap", "zero"]),
        "form": st.sampled_from(["difference", "next_value"]),
    }
)


def run(function, batch, dtype, **options):
    leaves = batch.leaves(dtype, set())
    return function(
        leaves["states"],
        batch.head(leaves),
        batch.labels,
        ignore_index=batch.ignore_index,
        temperature=batch.temperature,
        **options,
    )


def largest_logit_sum(batch) -> float:
    logits = formulas.logits(batch.states, batch.head(batch._asdict()))
    return float(logits.abs().amax(-1).sum(1).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("potential", POTENTIALS)
@given(batch=batches(), options=OPTIONS, compact=st.booleans())
def test_shaping_by_any_potential_equals_the_reference(potential, dtype, batch, options, compact):
    options = {**options, "potential": potential}
    found = run(teacher_shaping, batch, dtype, compact=compact, **options)
    plain, exact = (
        run(formulas.teacher_shaping, batch, one, **options) for one in (dtype, torch.float64)
    )
    probabilities = potential in ("max", "margin")
    scale = float(batch.labels.shape[1]) if probabilities else largest_logit_sum(batch)
    hold_difference(found, plain, exact, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reward", REWARDS)
@given(batch=batches(), compact=st.booleans())
def test_action_rewards_equal_the_reference(reward, dtype, batch, compact):
    found = run(action_rewards, batch, dtype, reward=reward, compact=compact)
    plain, exact = (
        run(formulas.action_rewards, batch, one, reward=reward) for one in (dtype, torch.float64)
    )
    hold_difference(found, plain, exact, dtype, largest_logit_sum(batch))


@pytest.mark.parametrize("name", POTENTIALS + REWARDS)
@given(batch=batches())
def test_packed_equals_padded(name, batch):
    function, option = (
        (teacher_shaping, "potential") if name in POTENTIALS else (action_rewards, "reward")
    )
    leaves = batch.leaves(torch.float64, set())
    packed = function(
        batch.pack(leaves["states"]),
        batch.head(leaves),
        batch.packed_labels(),
        cu_seqlens=batch.cu_seqlens(),
        ignore_index=batch.ignore_index,
        temperature=batch.temperature,
        **{option: name},
    )
    padded = run(function, batch, torch.float64, **{option: name})
    hold_equal({name: packed}, {name: padded})


def test_unknown_names_are_refused():
    states, weight, labels = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 2).long()
    with pytest.raises(ValueError, match="potential: expected .*margin"):
        teacher_shaping(states, weight, labels, potential="luck")
    with pytest.raises(ValueError, match="reward: expected .*logp"):
        action_rewards(states, weight, labels, reward="luck")


def test_action_rewards_refuse_states_without_the_last_one():
    states, weight, labels = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match=r"hidden: expected shape \(2, 4, H\) .*last token"):
        action_rewards(states, weight, labels, reward="logp")


@pytest.mark.parametrize("potential", POTENTIALS)
def test_every_token_of_the_vocabulary_is_inside(potential):
    """There are more tokens than hidden units."""
    states, weight = torch.randn(2, 3, 4), torch.randn(9, 4)
    labels = torch.tensor([[3, 8], [7, -100]])
    given = {"potential": potential}
    found = teacher_shaping(states, weight, labels, compact=False, **given)
    torch.testing.assert_close(found, teacher_shaping(states, weight, labels, **given))
    outside = teacher_shaping(states, weight, labels + (labels == 8), compact=False, **given)
    assert outside[0].isnan() and torch.equal(outside[1], found[1])
