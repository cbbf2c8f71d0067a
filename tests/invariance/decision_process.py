"""Small decision processes, solved exactly: entropy-regularised and greedy value iteration."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import linear_stats

EPSILON = torch.finfo(torch.float64).eps


class DecisionProcess(NamedTuple):
    """A finite Markov decision process; what a row of transitions lacks of 1 ends the episode."""

    reward: Tensor  # (S, A)
    transition: Tensor  # (S, A, S)
    gamma: float
    temperature: float  # of the soft values; 0 is greedy

    def shaped(self, potential: Tensor) -> DecisionProcess:
        """Add ``gamma E[phi(s')] - phi(s)``, with 0 for the end."""
        following = self.gamma * self.transition @ potential
        return self._replace(reward=self.reward + following - potential.unsqueeze(1))

    def with_added(self, reward: Tensor) -> DecisionProcess:
        """Add a reward (S, A) that may depend on the action."""
        return self._replace(reward=self.reward + reward)

    def greedy(self) -> DecisionProcess:
        """The same process without the entropy."""
        return self._replace(temperature=0.0)

    def backup(self, values: Tensor) -> Tensor:
        """``Q(s, a)`` of the values of the next states."""
        return self.reward + self.gamma * self.transition @ values

    def state_values(self, q: Tensor) -> Tensor:
        """``V(s)``: the soft maximum of ``Q(s, .)``, or the maximum."""
        if self.temperature == 0:
            return q.amax(1)
        return self.temperature * torch.logsumexp(q / self.temperature, 1)

    def solve(self) -> tuple[Tensor, float]:
        """Optimal ``Q`` (S, A), and how far rounding and the last step may keep it from exact."""
        states = self.reward.shape[0]
        q = torch.zeros_like(self.reward)
        if self.gamma < 1:
            # The distance shrinks by gamma a sweep: go on until it is below rounding.
            sweeps = math.ceil(math.log(EPSILON) / math.log(self.gamma))
            amplification = 1 / (1 - self.gamma)
        else:
            # Without discount every episode here ends within as many steps as there are states.
            sweeps, amplification = states, float(states)
        for _ in range(sweeps):
            q = self.backup(self.state_values(q))
        size = float(self.reward.abs().max() + q.abs().max() + self.temperature)
        operations = 4 * (states + self.reward.shape[1])
        return q, operations * EPSILON * size * amplification

    def policy(self) -> Tensor:
        """The probabilities (S, A) of the optimal policy."""
        q, _ = self.solve()
        if self.temperature == 0:
            return torch.nn.functional.one_hot(q.argmax(1), q.shape[1]).double()
        return (q / self.temperature).softmax(1)

    def value_of(self, policy: Tensor) -> Tensor:
        """Returns (S,) of any policy (S, A), entropy included, by solving its linear equations."""
        entropy = -torch.xlogy(policy, policy)
        reward = (policy * self.reward + self.temperature * entropy).sum(1)
        transition = torch.einsum("sa,sat->st", policy, self.transition)
        identity = torch.eye(len(policy), dtype=torch.float64)
        return torch.linalg.solve(identity - self.gamma * transition, reward)


def random_process(
    generator: torch.Generator, states: int, actions: int, gamma: float, temperature: float
) -> DecisionProcess:
    """Random rewards and transitions; with ``gamma`` 1 only to later states, or to the end."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = torch.softmax(2 * normal(states, actions, states + 1), -1)
    transition = weights[..., :states]
    if gamma == 1:
        later = torch.triu(torch.ones(states, states, dtype=torch.float64), diagonal=1)
        transition = transition * later.unsqueeze(1)
    return DecisionProcess(normal(states, actions), transition, gamma, temperature)


def teacher_signals(generator: torch.Generator, states: int, actions: int) -> dict[str, Tensor]:
    """Table 5 of a random teacher, by fastpref: four potentials (S,), two action rewards (S, A)."""
    logits = 3 * torch.randn(states, actions, generator=generator, dtype=torch.float64)
    head = torch.eye(actions, dtype=torch.float64)
    stats = ("logsumexp", "max_prob", "margin", "expected_logit")
    found: dict[str, Tensor] = dict(linear_stats(logits, head, stats=stats))
    every = torch.arange(actions).expand(states, actions)
    of_actions = linear_stats(
        logits.unsqueeze(1).expand(-1, actions, -1),
        head,
        every,
        stats=("target_logit", "target_logp"),
    )
    return found | dict(of_actions)
