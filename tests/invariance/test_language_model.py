"""Corollary 2.1 for `tvkd_loss` itself, on a language model whose every answer can be listed.

Answers are two tokens of a vocabulary of two, so there are four; the student is a table of logits
and can be any policy over them. Preferences follow Bradley and Terry with a known reward r. The
loss is minimised over all pairs of answers, each with its probability, until its gradient vanishes.
Its minimum is

    pi(y)  proportional to  exp((r(y) + alpha Psi(y)) / beta),

so that the teacher changes the policy exactly as much as Psi differs between answers:

- with ``terminal="zero"`` and ``gamma=1`` Psi(y) = -V(s_0) for every answer, and the policy is that
  of the preferences alone, whatever the teacher: the invariance of the corollary;
- with ``terminal="bootstrap"`` Psi(y) = V(s_T) - V(s_0): the episode counts as going on, and the
  policy is tilted by the teacher's value of the state it ends in, by that and by nothing else;
- with the teacher's log-probability as a reward the policy is pulled to the teacher's, and can put
  another answer first.
"""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from fastpref import teacher_shaping, tvkd_loss
from fastpref.teacher import action_rewards

VOCABULARY = 2
ANSWERS = list(product(range(VOCABULARY), repeat=2))
ALPHA, BETA = 0.7, 0.5


def states_of(answer: tuple[int, int]) -> list[int]:
    """Numbers of the states before, within and after an answer: 1 + 2 + 4 of them."""
    first, second = answer
    return [0, 1 + first, 1 + VOCABULARY + VOCABULARY * first + second]


STATES = torch.tensor([states_of(answer) for answer in ANSWERS])  # (4, 3)
LABELS = torch.tensor(ANSWERS)  # (4, 2)
NUMBER_OF_STATES = 1 + VOCABULARY + VOCABULARY**2


def minimise(rewards: Tensor, shaping: Tensor) -> Tensor:
    """The student's log-policy over all answers (4,) at the minimum of the loss."""
    one_hot = torch.eye(1 + VOCABULARY, dtype=torch.float64)
    table = torch.zeros(VOCABULARY, 1 + VOCABULARY, dtype=torch.float64, requires_grad=True)
    pairs = []
    for one, other in combinations(range(len(ANSWERS)), 2):
        chosen, rejected = sorted((one, other), key=lambda y: -float(rewards[y]))
        wrong = torch.sigmoid(rewards[rejected] - rewards[chosen]).item()
        pairs.append(([chosen, rejected], wrong))

    def loss() -> Tensor:
        # How often a pair is labelled the wrong way round is the label smoothing of that pair.
        return torch.stack(
            [
                tvkd_loss(
                    one_hot[STATES[pair, :2]],
                    table,
                    LABELS[pair],
                    shaping[pair],
                    alpha=ALPHA,
                    beta=BETA,
                    label_smoothing=wrong,
                ).loss
                for pair, wrong in pairs
            ]
        ).sum()

    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    assert table.grad is not None and table.grad.abs().max() < 1e-7, "not converged"
    log_policy = table.detach().log_softmax(0)
    return log_policy[LABELS, STATES[:, :2]].sum(1)


def optimum(rewards: Tensor, shaping: Tensor) -> Tensor:
    return ((rewards + ALPHA * shaping) / BETA).log_softmax(0)


@pytest.fixture(params=[0, 1])
def problem(request):
    """A reward of each answer (4,), and a teacher: its states (4, 3, H) and its head (V, H)."""
    generator = torch.Generator().manual_seed(request.param)
    rewards = torch.randn(len(ANSWERS), generator=generator, dtype=torch.float64)
    features = torch.randn(NUMBER_OF_STATES, 4, generator=generator, dtype=torch.float64)
    head = 2 * torch.randn(VOCABULARY, 4, generator=generator, dtype=torch.float64)
    return rewards, features[STATES], head


def assert_same_policy(one: Tensor, other: Tensor) -> None:
    # A vanishing gradient leaves the minimum known to about the root of the rounding of the loss.
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def for_answers(function, hidden: Tensor, head: Tensor, **options) -> Tensor:
    """A teacher's number for each answer; answers are stacked twice to make pairs."""
    both = function(torch.cat([hidden, hidden]), head, torch.cat([LABELS, LABELS]), **options)
    return both[: len(ANSWERS)]


def test_zero_terminal_value_keeps_the_policy(problem):
    rewards, hidden, head = problem
    shaping = for_answers(teacher_shaping, hidden, head, terminal="zero")
    assert shaping.abs().min() > 0.1  # there is a signal, the same for all
    unshaped = minimise(rewards, torch.zeros_like(rewards))
    assert_same_policy(unshaped, optimum(rewards, torch.zeros_like(rewards)))
    assert_same_policy(minimise(rewards, shaping), unshaped)


def test_bootstrapped_value_tilts_by_the_value_of_the_end(problem):
    rewards, hidden, head = problem
    shaping = for_answers(teacher_shaping, hidden, head)
    final = torch.logsumexp(hidden[:, 2] @ head.T, -1)
    found = minimise(rewards, shaping)
    assert_same_policy(found, optimum(rewards, final))
    assert (found - optimum(rewards, torch.zeros_like(rewards))).abs().max() > 0.1


def test_log_probabilities_as_a_reward_change_the_policy(problem):
    rewards, hidden, head = problem
    added = for_answers(action_rewards, hidden, head, reward="logp")
    found = minimise(rewards, added)
    assert_same_policy(found, optimum(rewards, added))
    assert (found - optimum(rewards, torch.zeros_like(rewards))).abs().max() > 0.1


def test_log_probabilities_as_a_reward_can_put_another_answer_first():
    """The counter-example that shaping with a zero terminal value cannot have."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rewards = torch.randn(len(ANSWERS), generator=generator, dtype=torch.float64)
        features = torch.randn(NUMBER_OF_STATES, 4, generator=generator, dtype=torch.float64)
        hidden = features[STATES]
        head = 2 * torch.randn(VOCABULARY, 4, generator=generator, dtype=torch.float64)
        added = for_answers(action_rewards, hidden, head, reward="logp")
        if optimum(rewards, added).argmax() != rewards.argmax():
            break
    else:
        pytest.fail("no counter-example among 20 teachers")
    assert minimise(rewards, added).argmax() != rewards.argmax()
    shaping = for_answers(teacher_shaping, hidden, head, terminal="zero")
    assert minimise(rewards, shaping).argmax() == rewards.argmax()
