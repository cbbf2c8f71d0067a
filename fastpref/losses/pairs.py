"""What every preference loss does with per-token log-probabilities before its own formula."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.sequences import sequence_sum


class SequenceSums(NamedTuple):
    """Log-probabilities and lengths of 2B responses, chosen ones first."""

    logps: Tensor  # (2B,) sums of log-probabilities
    lengths: Tensor  # (2B,) number of response tokens

    def per_token(self, values: Tensor) -> Tensor:
        """``values`` (2B,) divided by the lengths; a response without tokens counts as one."""
        return values / self.lengths.clamp_min(1)

    def chosen_nll(self) -> Tensor:
        """Mean negative log-probability of the chosen tokens of the batch."""
        (chosen, _), (lengths, _) = self.logps.chunk(2), self.lengths.chunk(2)
        return -chosen.sum() / lengths.sum().clamp_min(1)


def sequence_sums(logps: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> SequenceSums:
    """Sum (2B, T) or packed (N,) log-probabilities where ``mask`` is True."""
    return SequenceSums(
        sequence_sum(torch.where(mask, logps, 0), cu_seqlens),
        sequence_sum(mask.to(torch.int64), cu_seqlens),
    )


def preference_losses(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry losses of ``margins`` (B,), as cDPO smooths them: (B,)."""
    losses = -logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logsigmoid(-margins)
    return losses
