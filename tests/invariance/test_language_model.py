"""Corollary 2.1 for `tvkd_loss` itself, on a language model whose every answer can be listed.

Answers stop at an end token or after two tokens of a vocabulary of three, so there are seven; the
student is a table of logits and can be any policy over them. Preferences follow Bradley and Terry
with a known reward r. The loss is minimised over all pairs of answers, in both orders, each with
its probability. At the minimum m_w - m_l = r_w - r_l for every pair, and the policy is

    pi(y)  proportional to  exp((r(y) + alpha Psi(y)) / beta),

so that the teacher changes the policy exactly as much as Psi differs between answers:

- with ``terminal="zero"`` and ``gamma=1`` Psi(y) = -V(s_0) for every answer, and the policy is that
  of the preferences alone, whatever the teacher. This is the corollary's invariance, and it needs
  both: the value of the end must be zero, and the steps must telescope;
- with ``terminal="bootstrap"`` Psi(y) = V(s_T) - V(s_0): the episode counts as going on, and the
  policy is tilted by the teacher's value of the state that it ends in, by that and nothing else;
- with ``gamma`` below 1, or ``form="next_value"``, values of states on the way stay in the sum, for
  the loss adds the steps up undiscounted, and they tilt the policy;
- a reward that depends on the action tilts the policy by that reward.

Every one of these tilts can put another answer first. Nothing is shown of students that cannot be
any policy, of a sample of the pairs, or of training that stops before the minimum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import NamedTuple

import formulas
import pytest
import torch
from torch import Tensor

from fastpref import teacher_shaping, tvkd_loss
from fastpref.teacher import action_rewards

EPSILON = torch.finfo(torch.float64).eps
VOCABULARY, END, NOTHING = 3, 0, -100
ANSWERS = [
    (first, second)
    for first, second in product(range(VOCABULARY), [*range(VOCABULARY), NOTHING])
    if (first == END) == (second == NOTHING)
]
LABELS = torch.tensor(ANSWERS)  # (7, 2)
LABELLED = LABELS != NOTHING
TWO_TOKENS = LABELLED.all(1)  # (7,)
# Each answer's states before, within and after it; what comes after the end token is never read.
STATES = torch.tensor(
    [[0, 1 + first, 1 + VOCABULARY + number] for number, (first, _) in enumerate(ANSWERS)]
)  # (7, 3)
ALPHA, BETA = 0.7, 0.5


class Problem(NamedTuple):
    """Rewards of the answers (7,), and a teacher: hidden states (7, 3, H) and a head (V, H)."""

    rewards: Tensor
    hidden: Tensor
    head: Tensor

    def of_answers(self, function: Callable[..., Tensor], **options) -> Tensor:
        """A teacher's number (7,) for each answer; stacked twice, answers make pairs."""
        hidden, labels = torch.cat([self.hidden, self.hidden]), torch.cat([LABELS, LABELS])
        return function(hidden, self.head, labels, **options)[: len(ANSWERS)]

    def values(self) -> tuple[Tensor, Tensor]:
        """``V`` of the state between the two tokens, 0 without any, and of the last state (7,)."""
        values = torch.logsumexp(self.hidden @ self.head.T, -1)
        return torch.where(TWO_TOKENS, values[:, 1], 0), torch.where(
            TWO_TOKENS, values[:, 2], values[:, 1]
        )

    def added_up(self, of_actions: Tensor) -> Tensor:
        """The sum (7,) over an answer of a number (7, 3, V) of each action."""
        taken = of_actions[:, :2].gather(2, LABELS.clamp(min=0).unsqueeze(2)).squeeze(2)
        return torch.where(LABELLED, taken, 0).sum(1)


def random_problem(seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    features = normal(int(STATES.max()) + 1, 4)
    return Problem(normal(len(ANSWERS)), features[STATES], normal(VOCABULARY, 4))


# A teacher's signal by fastpref, and by hand what of it differs between answers.
TILTS: dict[str, tuple[Callable[[Problem], Tensor], Callable[[Problem], Tensor]]] = {
    "bootstrap": (
        lambda problem: problem.of_answers(teacher_shaping, terminal="bootstrap"),
        lambda problem: problem.values()[1],
    ),
    "discount": (
        lambda problem: problem.of_answers(teacher_shaping, terminal="zero", gamma=0.5),
        lambda problem: -0.5 * problem.values()[0],
    ),
    "next_value": (
        lambda problem: problem.of_answers(teacher_shaping, form="next_value", gamma=0.5),
        lambda problem: 0.5 * problem.values()[0],
    ),
    "logit": (
        lambda problem: problem.of_answers(action_rewards, reward="logit"),
        lambda problem: problem.added_up(problem.hidden @ problem.head.T),
    ),
    "logp": (
        lambda problem: problem.of_answers(action_rewards, reward="logp"),
        lambda problem: problem.added_up((problem.hidden @ problem.head.T).log_softmax(-1)),
    ),
}


def population_loss(
    of_pair: Callable[..., Tensor], table: Tensor, rewards: Tensor, shaping: Tensor
) -> Tensor:
    """The loss of all pairs of answers, by the student's table of logits (V, 1 + V)."""
    one_hot = torch.eye(1 + VOCABULARY, dtype=torch.float64)
    total = table.new_zeros(())
    for pair in combinations(rewards.argsort(descending=True).tolist(), 2):
        rows = list(pair)
        # How often the worse answer is preferred is the label smoothing of the pair.
        preferred, other = rewards[rows]
        total = total + of_pair(
            one_hot[STATES[rows, :2]],
            table,
            LABELS[rows],
            shaping[rows],
            alpha=ALPHA,
            beta=BETA,
            label_smoothing=torch.sigmoid(other - preferred).item(),
        )
    return total


def minimise(rewards: Tensor, shaping: Tensor) -> tuple[Tensor, float]:
    """The log-policy (7,) at the minimum of the loss, and how far from it the search may be."""
    table = torch.zeros(VOCABULARY, 1 + VOCABULARY, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=100,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = population_loss(lambda *a, **k: tvkd_loss(*a, **k).loss, table, rewards, shaping)
        value.backward()
        return value

    def gradient() -> Tensor:
        closure()
        assert table.grad is not None
        return table.grad.flatten()

    optimizer.step(closure)
    hessian = torch.autograd.functional.hessian(
        lambda logits: population_loss(formulas.tvkd_loss, logits, rewards, shaping),
        table.detach(),
    )
    curvatures, directions = torch.linalg.eigh(hessian.reshape(table.numel(), -1))
    # Seven answers leave six directions that change the policy; the others are flat.
    curvatures, directions = (part[..., -(len(ANSWERS) - 1) :] for part in (curvatures, directions))
    # LBFGS stops where the loss rounds; Newton's steps go on to where the gradient does.
    for _ in range(2):
        step = directions @ (directions.T @ gradient() / curvatures)
        with torch.no_grad():
            table -= step.reshape(table.shape)
    left = float(gradient().norm())
    assert left < 1e-10, "not converged"
    rounding = 8 * len(ANSWERS) ** 2 * EPSILON
    distance = 2 * (left + rounding) / float(curvatures[0])

    log_policy = table.detach().log_softmax(0)[LABELS.clamp(min=0), STATES[:, :2]]
    # A log-probability moves by at most twice as much as the logits, and an answer has two.
    return torch.where(LABELLED, log_policy, 0).sum(1), 4 * distance


def optimum(rewards: Tensor, tilt: Tensor | float = 0.0) -> Tensor:
    """The log-policy (7,) that the theory gives."""
    return ((rewards + ALPHA * tilt) / BETA).log_softmax(0)


def assert_same_policy(one: Tensor, other: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Seven rows gain nothing from more threads, which on a busy machine wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unshaped() -> tuple[Problem, Tensor, float]:
    """A problem, and the policy that its preferences alone give."""
    problem = random_problem(0)
    return problem, *minimise(problem.rewards, torch.zeros_like(problem.rewards))


def test_preferences_alone_give_the_policy_of_their_reward(unshaped):
    problem, policy, error = unshaped
    assert_same_policy(policy, optimum(problem.rewards), error)


@pytest.mark.parametrize("potential", ["value", "max", "margin", "expectation"])
def test_a_zero_terminal_value_keeps_the_policy(unshaped, potential):
    problem, policy, error = unshaped
    shaping = problem.of_answers(teacher_shaping, terminal="zero", potential=potential)
    assert (shaping != 0).all()  # there is a signal, the same for all
    shaped, shaped_error = minimise(problem.rewards, shaping)
    assert_same_policy(shaped, policy, error + shaped_error)


@pytest.mark.parametrize("name", TILTS)
def test_other_signals_tilt_the_policy_and_can_put_another_answer_first(name):
    """By exactly what theory says, shown on the first teacher whose tilt is large enough."""
    signal, tilt = TILTS[name]
    for problem in map(random_problem, range(50)):
        expected = optimum(problem.rewards, tilt(problem))
        if expected.argmax() != problem.rewards.argmax():
            break
    else:
        pytest.fail("no counter-example among 50 teachers")
    found, error = minimise(problem.rewards, signal(problem))
    assert_same_policy(found, expected, error)
    best, preferred = found.argmax(), problem.rewards.argmax()
    assert found[best] - found[preferred] > 2 * error
