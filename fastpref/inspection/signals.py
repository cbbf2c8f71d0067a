"""What a teacher says of every state of every response, in one form for all its signals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.data.tokens import IGNORE_INDEX
from fastpref.ops import Head, linear_stats
from fastpref.ops.linear_stats import Statistic
from fastpref.sequences import labels_of_states, running_sum
from fastpref.teacher.actions import ACTION_REWARDS
from fastpref.teacher.implicit import rewards_so_far
from fastpref.teacher.shaping import POTENTIALS, Potential

IMPLICIT_REWARD: Potential = "implicit_reward"
MEANINGS = {
    "value": "potential: the teacher's soft value, logsumexp of its logits",
    "max": "potential: its largest probability",
    "margin": "potential: its largest probability less the second",
    "expectation": "potential: the mean of its logits under its own probabilities",
    IMPLICIT_REWARD: "potential: beta times its log-probability less its reference's, so far",
    "logit": "reward of the action: the logit of the token",
    "logp": "reward of the action: the log-probability of the token",
}

Curves = tuple[Tensor, Tensor]  # of the chosen and the rejected response


class Signal(NamedTuple):
    """One number for every state of the responses of all pairs, and what a token is paid for it."""

    name: str
    # (T + 1,) float64 each, by pair: a potential, or the running sum of a reward of actions, which
    # is 0 at the start. Either way a token's shaping is the difference of its two states.
    curves: list[Curves]
    gamma: float = 1.0
    leaving: float = 1.0  # how often the state that a token leaves is subtracted

    @property
    def meaning(self) -> str:
        """The signal in words."""
        return MEANINGS[self.name.split(",")[0]]

    def steps(self, curve: Tensor) -> Tensor:
        """The shaping (T,) of every token of a response."""
        return self.gamma * curve[1:] - self.leaving * curve[:-1]

    def sums(self) -> Tensor:
        """The shaping (pairs, 2) of chosen and rejected responses."""
        rows = [[self.steps(curve).sum() for curve in curves] for curves in self.curves]
        return torch.tensor(rows, dtype=torch.float64)


@torch.no_grad()
def curves_of_batch(
    states: Tensor,  # (2B, T + 1, H)
    head: Head,
    labels: Tensor,  # (2B, T)
    *,
    reference_logps: Tensor | None,  # (2B, T + 1)
    beta: float,
) -> dict[str, list[Tensor]]:
    """The curves (T + 1,) of 2B responses by the name of the signal, from one pass of the head."""
    tokens = labels_of_states(labels, None, IGNORE_INDEX)
    predicts = tokens != IGNORE_INDEX
    in_response = predicts | predicts.roll(1, dims=1)
    # The last state predicts nothing: any token marks it as one whose potential is wanted.
    wanted = torch.where(in_response & ~predicts, 0, tokens)
    names: list[tuple[str, Statistic]] = [*POTENTIALS.items(), *ACTION_REWARDS.items()]
    found = linear_stats(states, head, wanted, stats=[statistic for _, statistic in names])
    numbers = {name: found[statistic].cpu().double() for name, statistic in names}
    predicts, in_response = predicts.cpu(), in_response.cpu()
    if reference_logps is not None:
        log_ratios = (numbers["logp"] - reference_logps.cpu()).masked_fill(~predicts, 0)
        numbers[IMPLICIT_REWARD] = rewards_so_far(log_ratios, beta)
    for name in ACTION_REWARDS:
        numbers[name] = running_sum(numbers[name].masked_fill(~predicts, 0), None)
    return {
        name: [row[kept] for row, kept in zip(values, in_response, strict=True)]
        for name, values in numbers.items()
    }
