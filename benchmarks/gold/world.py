"""A world of tokens in which the right answer is known.

A hidden automaton reads every token, of prompts and of responses. In a response each token earns a
reward that depends on the automaton's state. The behaviour that text comes from, the values of its
states and the best that any policy can earn follow by dynamic programming, in float64.

Tensors: (S, A) a number per state and token, (T, S, A) the same at every step of a response,
(T + 1, S) a number per state before every step and after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The automaton, its rewards, and how people in it write and judge."""

    rewards: Tensor  # (S, A) float64, what a token earns in a state
    next_states: Tensor  # (S, A) int64
    length: int  # T, tokens of every response
    prompt_length: int  # P, tokens of every prompt, drawn uniformly; the automaton starts in 0
    temperature: float  # of the behaviour and of the labels, in rewards

    def action_values(self, values: Tensor) -> Tensor:
        """Reward plus the value (T + 1, S) of the state after it: (T, S, A)."""
        return self.rewards + values[1:, self.next_states]

    def soft_values(self, temperature: float, prior: Tensor | None = None) -> Tensor:
        r"""Values of the soft-optimal policy: (T + 1, S).

        .. math:: V(s_t) = \tau \log \sum_a \mu(a | s_t) \exp((r(s_t, a) + V(s_{t+1})) / \tau)

        It earns the most reward less ``temperature`` times the KL from ``prior``
        :math:`\mu` (T, S, A), or with None plus ``temperature`` times its entropy.
        """
        values = [torch.zeros_like(self.rewards[:, 0])]
        for step in reversed(range(self.length)):
            logits = (self.rewards + values[0][self.next_states]) / temperature
            if prior is not None:
                logits = logits + prior[step].log()
            values.insert(0, temperature * logits.logsumexp(-1))
        return torch.stack(values)

    def soft_policy(self, temperature: float, prior: Tensor | None = None) -> Tensor:
        """The probabilities (T, S, A) of the policy whose values `soft_values` gives."""
        logits = self.action_values(self.soft_values(temperature, prior)) / temperature
        return (logits if prior is None else logits + prior.log()).softmax(-1)

    def behaviour(self) -> Tensor:
        """The policy (T, S, A) that writes all text of the world."""
        return self.soft_policy(self.temperature)

    def policy_sums(self, policy: Tensor, amounts: Tensor) -> Tensor:
        """What a policy is expected to collect of ``amounts`` (T, S, A) or (S, A): (T + 1, S)."""
        amounts = amounts.expand_as(policy)
        sums = [torch.zeros_like(self.rewards[:, 0])]
        for step in reversed(range(self.length)):
            sums.insert(0, (policy[step] * (amounts[step] + sums[0][self.next_states])).sum(-1))
        return torch.stack(sums)

    def policy_values(self, policy: Tensor) -> Tensor:
        """The expected return (T + 1, S) of a policy (T, S, A)."""
        return self.policy_sums(policy, self.rewards)

    def policy_kl(self, policy: Tensor, other: Tensor) -> Tensor:
        """KL(policy || other) of the rest of the response, nats: (T + 1, S)."""
        return self.policy_sums(policy, policy.log() - other.log())

    def mean_at_start(self, values: Tensor) -> float:
        """The mean of (T + 1, S) numbers over the states that prompts lead to."""
        states = len(self.rewards)
        moves = torch.nn.functional.one_hot(self.next_states, states).to(values).mean(1)
        chances = torch.zeros(states, dtype=values.dtype)
        chances[0] = 1
        for _ in range(self.prompt_length):
            chances = chances @ moves
        return float(chances @ values[0])

    def best_for_kl(self, temperature: float) -> tuple[float, float]:
        """KL from the behaviour and return of the policy that earns the most for that KL."""
        behaviour = self.behaviour()
        policy = self.soft_policy(temperature, behaviour)
        kl = self.mean_at_start(self.policy_kl(policy, behaviour))
        return kl, self.mean_at_start(self.policy_values(policy))

    def states(self, sequences: Tensor) -> Tensor:
        """The state before every token of (n, L) sequences, and after the last: (n, L + 1)."""
        found = [torch.zeros_like(sequences[:, 0])]
        for tokens in sequences.unbind(1):
            found.append(self.next_states[found[-1], tokens])
        return torch.stack(found, 1)

    def returns(self, sequences: Tensor) -> Tensor:
        """The true rewards (n,) of whole sequences (n, P + T): what their responses earn."""
        states, start = self.states(sequences), self.prompt_length
        return self.rewards[states[:, start:-1], sequences[:, start:]].sum(1)

    def sample_prompts(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, P) tokens."""
        tokens = self.rewards.shape[1]
        return torch.randint(tokens, (count, self.prompt_length), generator=generator)

    def sample(self, policy: Tensor, prompts: Tensor, generator: torch.Generator) -> Tensor:
        """Prompts (n, P) and responses to them by a policy (T, S, A): (n, P + T)."""
        sequences, state = prompts, self.states(prompts)[:, -1]
        for step in range(self.length):
            tokens = torch.multinomial(policy[step, state], 1, generator=generator)
            sequences = torch.cat([sequences, tokens], 1)
            state = self.next_states[state, tokens[:, 0]]
        return sequences

    def prefers_first(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Bradley-Terry labels (n,) bool of sequences (n, P + T): noise and all."""
        margins = (self.returns(first) - self.returns(second)) / self.temperature
        return torch.bernoulli(margins.sigmoid(), generator=generator).bool()


class Pairs(NamedTuple):
    """Two sequences (n, P + T) for each prompt."""

    chosen: Tensor
    rejected: Tensor


def make_world(
    seed: int,
    *,
    states: int = 12,
    tokens: int = 24,
    length: int = 10,
    prompt_length: int = 1,
    temperature: float = 3.0,
) -> World:
    """A random automaton with standard normal rewards."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(states, tokens, generator=generator, dtype=torch.float64)
    next_states = torch.randint(states, (states, tokens), generator=generator)
    return World(rewards, next_states, length, prompt_length, temperature)


def sample_pairs(world: World, count: int, generator: torch.Generator) -> Pairs:
    """Pairs of responses of the behaviour, labelled by their true rewards with noise."""
    behaviour, prompts = world.behaviour(), world.sample_prompts(count, generator)
    first, second = (world.sample(behaviour, prompts, generator) for _ in range(2))
    wins = world.prefers_first(first, second, generator).unsqueeze(1)
    return Pairs(torch.where(wins, first, second), torch.where(wins, second, first))
