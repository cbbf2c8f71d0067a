"""Corollary 2.1 on tabular decision processes: potentials keep the optimal policy, actions do not.

Each process is solved exactly, with and without the teacher's signal in its reward. Shown are the
entropy-regularised optimum, which preference losses are about, and the greedy one. That a loss
reaches the optimum is shown in test_language_model.py.
"""

from __future__ import annotations

import pytest
import torch
from decision_process import random_process, teacher_signals
from hypothesis import given
from hypothesis import strategies as st

POTENTIALS = ("logsumexp", "max_prob", "margin", "expected_logit")
ACTION_REWARDS = ("target_logit", "target_logp")

processes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "states": st.integers(1, 6),
        "actions": st.integers(2, 5),
        "gamma": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "temperature": st.sampled_from([0.1, 1.0, 5.0]),
    }
)


def make(seed: int, states: int, actions: int, gamma: float, temperature: float):
    generator = torch.Generator().manual_seed(seed)
    process = random_process(generator, states, actions, max(gamma, 1e-3), temperature)
    return process, teacher_signals(generator, states, actions)


@pytest.mark.parametrize("name", POTENTIALS)
@given(arguments=processes)
def test_a_potential_keeps_the_soft_optimal_policy(name, arguments):
    process, signals = make(**arguments)
    shaped = process.shaped(signals[name])
    (q, error), (shaped_q, shaped_error) = process.solve(), shaped.solve()
    tolerance = error + shaped_error
    # The whole of Q moves by the potential of its state, and so the policy does not.
    torch.testing.assert_close(shaped_q, q - signals[name].unsqueeze(1), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        shaped.policy(), process.policy(), rtol=0, atol=2 * tolerance / process.temperature
    )


@pytest.mark.parametrize("name", POTENTIALS)
@given(arguments=processes)
def test_a_potential_keeps_the_greedy_policy(name, arguments):
    process, signals = make(**arguments)
    process = process._replace(temperature=0.0)
    (q, error), (shaped_q, shaped_error) = process.solve(), process.shaped(signals[name]).solve()
    best_when_shaped = shaped_q.argmax(1, keepdim=True)
    lost = q.amax(1) - q.gather(1, best_when_shaped).squeeze(1)
    assert lost.max() <= 2 * (error + shaped_error)


@pytest.mark.parametrize("name", ACTION_REWARDS)
def test_an_action_dependent_reward_can_change_the_policy(name):
    """A counter-example: the best policy for the changed reward is worse for the true one."""
    for seed in range(100):
        process, signals = make(seed, states=2, actions=2, gamma=0.9, temperature=1.0)
        changed = process.with_added(signals[name])
        greedy, misled = (
            one._replace(temperature=0.0).solve()[0].argmax(1) for one in (process, changed)
        )
        if (greedy != misled).any():
            break
    else:
        pytest.fail("no counter-example among 100 processes")
    best, reached = process.value_of(greedy), process.value_of(misled)
    assert (reached <= best + 1e-12).all() and (best - reached).max() > 0.1
    assert (changed.policy() - process.policy()).abs().max() > 0.1


@given(arguments=processes)
def test_solutions_are_fixed_points(arguments):
    """The solver against the definition: a policy's return solves linear equations."""
    process, _ = make(**arguments)
    greedy = process._replace(temperature=0.0)
    q, error = greedy.solve()
    torch.testing.assert_close(q.amax(1), greedy.value_of(q.argmax(1)), rtol=0, atol=8 * error)
