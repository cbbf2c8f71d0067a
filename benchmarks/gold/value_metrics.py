"""How well numbers of states agree with true values: pure functions of tensors.

Rows are responses of the behaviour, so states count as often as it visits them. All numbers are
compared at the same position: later states are worth less in any world.
"""

from __future__ import annotations

import torch
from torch import Tensor


def centred(numbers: Tensor) -> Tensor:
    """Numbers (n, T, ...) less the mean of their position."""
    return numbers - numbers.mean(0)


def correlation(guesses: Tensor, truths: Tensor) -> float:
    """Pearson's, of (n, T) and (n, T), both centred at every position."""
    both = torch.stack([centred(guesses).flatten(), centred(truths).flatten()])
    return torch.corrcoef(both)[0, 1].item()


def share_explained(numbers: Tensor, groups: Tensor) -> float:
    r"""The share of the variance of (n, T) numbers that their groups (n, T) of integers explain.

    .. math:: \eta^2 = \sum_t SS_{between}(t) / \sum_t SS_{total}(t)
    """
    numbers, columns = centred(numbers), torch.arange(numbers.shape[1])
    sums = numbers.new_zeros(int(groups.max()) + 1, len(columns))
    at = groups, columns.expand_as(groups)
    counts = sums.index_put(at, torch.ones_like(numbers), accumulate=True)
    sums = sums.index_put(at, numbers, accumulate=True)
    return float((sums.square() / counts.clamp_min(1)).sum() / numbers.square().sum())


def share_ranked(signal: Tensor, returns: Tensor) -> float:
    """The share of pairs (2B,) whose better response a signal ranks first; a tie is half a pair."""
    one, other = signal.chunk(2)
    first, second = returns.chunk(2)
    return ((one - other).sign() * (first - second).sign() / 2 + 0.5).mean().item()


def readable(states: Tensor, truths: Tensor) -> float:
    """How much of the true values (n, T) a linear function of hidden states (n, T, H) could tell.

    The correlation of a ridge regression that every second row trains, on the others.
    """
    inputs, targets = centred(states), centred(truths)
    seen, asked = inputs[::2].flatten(0, 1), inputs[1::2]
    ridge = 1e-3 * len(seen) * torch.eye(seen.shape[1], dtype=seen.dtype)
    weights = torch.linalg.solve(seen.T @ seen + ridge, seen.T @ targets[::2].flatten())
    return correlation(asked @ weights, targets[1::2])
