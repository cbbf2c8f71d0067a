"""Corollary 2.1 on tabular decision processes: potentials keep the optimal policy, actions do not.

Each process is solved exactly, with and without the teacher's signal in its reward: discounted ones
that may go on for ever, and undiscounted ones that end, where the potential of the end is zero.
Shown are the entropy-regularised optimum, which preference losses are about, and the greedy one.
For rewards that depend on the action one process where the optimum changes is all that is shown:
they can keep it too. That a loss reaches the optimum is shown in test_language_model.py.
"""

from __future__ import annotations

import pytest
import torch
from decision_process import random_process, teacher_signals
from hypothesis import given
from hypothesis import strategies as st

POTENTIALS = ("logsumexp", "max_prob", "margin", "expected_logit", "random")
ACTION_REWARDS = ("target_logit", "target_logp")

processes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "states": st.integers(1, 6),
        "actions": st.integers(2, 5),
        "gamma": st.sampled_from([0.1, 0.5, 0.9, 1.0]),
        "temperature": st.sampled_from([0.1, 1.0, 5.0]),
    }
)


def make(seed: int, states: int, actions: int, gamma: float, temperature: float):
    generator = torch.Generator().manual_seed(seed)
    process = random_process(generator, states, actions, gamma, temperature)
    signals = teacher_signals(generator, states, actions)
    signals["random"] = 30 * torch.randn(states, generator=generator, dtype=torch.float64)
    return process, signals


@given(arguments=processes)
def test_solutions_are_optimal(arguments):
    """The solver against the definition: no policy's return, from linear equations, is larger."""
    soft, signals = make(**arguments)
    for process in (soft, soft.greedy()):
        q, error = process.solve()
        values = process.state_values(q)
        # The linear equations round as much as the solver does.
        reached = process.value_of(process.policy())
        torch.testing.assert_close(values, reached, rtol=0, atol=2 * error)
        other = (signals["target_logp"] / arguments["temperature"]).softmax(1)
        assert (process.value_of(other) <= values + 2 * error).all()


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
        shaped.policy().log(),
        process.policy().log(),
        rtol=0,
        atol=2 * tolerance / process.temperature,
    )


@pytest.mark.parametrize("name", POTENTIALS)
@given(arguments=processes)
def test_a_potential_keeps_the_greedy_policy(name, arguments):
    process, signals = make(**arguments)
    process = process.greedy()
    (q, error), (shaped_q, shaped_error) = process.solve(), process.shaped(signals[name]).solve()
    best_when_shaped = shaped_q.argmax(1, keepdim=True)
    lost = q.amax(1) - q.gather(1, best_when_shaped).squeeze(1)
    assert lost.max() <= 2 * (error + shaped_error)


@pytest.mark.parametrize("gamma", [0.9, 1.0])
@pytest.mark.parametrize("name", ACTION_REWARDS)
def test_an_action_dependent_reward_can_change_the_policy(name, gamma):
    """A counter-example: the best policy for the changed reward is worse for the true one."""
    for seed in range(100):
        process, signals = make(seed, states=2, actions=2, gamma=gamma, temperature=1.0)
        changed = process.with_added(signals[name])
        best, misled = process.greedy().policy(), changed.greedy().policy()
        if not torch.equal(best, misled):
            break
    else:
        pytest.fail("no counter-example among 100 processes")
    for true, other in ((process.greedy(), misled), (process, changed.policy())):
        error = 2 * true.solve()[1]
        lost = true.value_of(true.policy()) - true.value_of(other)
        assert (lost >= -error).all() and lost.max() > error
