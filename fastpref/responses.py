"""Per-token log-probabilities, summed over responses. What comes after knows of no padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.checks import check_device, check_flag, check_floating, check_shape
from fastpref.sequences import SPOILED, check_sequences, sequence_sum


class Responses(NamedTuple):
    """What a loss reads of S responses; of B pairs the first B are chosen, the others rejected."""

    logps: Tensor  #: (S,) sums of log-probabilities, weighted where tokens have weights, nats
    lengths: Tensor  #: (S,) int64, number of response tokens
    unweighted_logps: Tensor | None = None  #: (S,) the sums without, where tokens have weights

    def sequences(self) -> int:
        """The number of responses S."""
        return self.logps.shape[0]

    def per_token(self, values: Tensor) -> Tensor:
        """``values`` (S,) divided by the lengths; a response without tokens counts as one."""
        return values / self.lengths.clamp_min(1)

    def likelihoods(self) -> Tensor:
        """Log-probabilities (S,) of the responses themselves, whatever their tokens' weights."""
        return self.logps if self.unweighted_logps is None else self.unweighted_logps

    def chosen_nll(self) -> Tensor:
        """Mean negative log-probability of all tokens of the chosen half, ()."""
        (chosen, _), (lengths, _) = self.likelihoods().chunk(2), self.lengths.chunk(2)
        return -token_mean(chosen, lengths)


def token_mean(sums: Tensor, lengths: Tensor) -> Tensor:
    """The mean () over all tokens of responses, from sums (S,) over each and their lengths (S,)."""
    return sums.sum() / lengths.sum().clamp_min(1)


class Tokens(NamedTuple):
    """Log-probabilities that are yet to be summed, of arguments that were checked."""

    logps: Tensor  # (S, T) or packed (N,)
    mask: Tensor  # (S, T) or (N,) bool: which of them belong to a response
    cu_seqlens: Tensor | None  # (S + 1,) boundaries of packed sequences
    token_weights: Tensor | None  # (S, T) or (N,)

    def sequences(self) -> int:
        """The number of sequences S."""
        rows = self.mask if self.cu_seqlens is None else self.cu_seqlens[1:]
        return rows.shape[0]

    def sums(self) -> Responses:
        """What `sum_responses` returns."""
        lengths = sequence_sum(self.mask.to(torch.int64), self.cu_seqlens)
        logps = torch.where(self.mask, self.logps, 0)
        sums = sequence_sum(logps, self.cu_seqlens)
        if self.token_weights is None:
            return Responses(sums, lengths)
        # Masks the weights, not the products: an ignored token's NaN would be in the gradients.
        weights = torch.where(self.mask, self.token_weights.to(logps.dtype), 0)
        return Responses(sequence_sum(weights * logps, self.cu_seqlens), lengths, sums)


def sum_responses(
    logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    compact: bool = True,
) -> Responses:
    r"""Sum per-token log-probabilities over responses, padded or packed: what losses read.

    .. math:: \log \pi(y) = \sum_t w_t \log \pi(y_t)

    Differentiable in ``logps`` and ``token_weights``.

    Args:
        logps: (S, T) or packed (N,), from `linear_logps`; floating point. Positions without a label
            may hold anything.
        labels: (S, T) integers, already shifted, ``ignore_index`` outside the response; or (N,).
        cu_seqlens: (S + 1,) integers, the boundaries of packed sequences.
        token_weights: (S, T) or (N,), multiplied with the log-probabilities; None for ones.
        ignore_index: The label of positions outside the response.
        compact: Let the host read ``cu_seqlens`` to check them. ``False`` never waits for the
            device, and answers NaN where they are wrong.

    Returns:
        `Responses` in the dtype of ``logps``. A response without labels has log-probability 0.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit, wrong ``cu_seqlens``.

    Example:
        >>> labels = torch.tensor([[4, 9, 2], [1, 3, -100]])
        >>> sum_responses(torch.full((2, 3), -0.5), labels).logps
        tensor([-1.5000, -1.0000])
    """
    check_flag("compact", compact)
    labels, cu_seqlens = check_sequences(labels, cu_seqlens, ignore_index, read=compact)
    check_floating("logps", logps)
    check_shape("logps", logps, labels.shape, "like labels")
    check_device("logps", logps, "labels", labels)
    check_token_weights(token_weights, labels)
    if not compact and cu_seqlens is not None:
        logps = logps.masked_fill((labels == SPOILED).any(), torch.nan)
    return Tokens(logps, labels != ignore_index, cu_seqlens, token_weights).sums()


def check_token_weights(token_weights: Tensor | None, labels: Tensor) -> None:
    """Refuse weights that are not one floating-point number per label."""
    if token_weights is None:
        return
    check_floating("token_weights", token_weights)
    check_shape("token_weights", token_weights, labels.shape, "like labels")
    check_device("token_weights", token_weights, "labels", labels)
