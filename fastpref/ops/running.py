"""What one reading of the vocabulary leaves of every row, and what follows from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Shares(NamedTuple):
    """Probabilities of a row: every tensor (n,)."""

    unit: Tensor  # of a token whose logit is the reference
    others: Tensor  # of all tokens but the label
    label: Tensor  # of the label


class Running(NamedTuple):
    """A row's logits ``z``, summed up: every tensor (n,).

    The label has no part in the sum, so ``1 - p(label)`` keeps its digits where the model is
    certain. The logarithm of the sum is never added to the reference before a difference is taken:
    logits may share an offset of hundreds, of which a float32 sum would keep fewer digits than the
    differences have.
    """

    reference: Tensor  # close to the largest logit but the label's, never far below it; finite
    sum_exp: Tensor  # sum of exp(z - reference) over all tokens but the label
    target_logit: Tensor  # the label's; -inf without labels, NaN for one outside the vocabulary

    @classmethod
    def of(cls, numbers: Tensor) -> Running:
        """From a tensor (3 or more, n), whose further rows are left out."""
        reference, sum_exp, target_logit = numbers[:3].unbind()
        # log(p) of an infinite logit is inf - inf.
        target_logit = target_logit.masked_fill(target_logit == torch.inf, torch.nan)
        return cls(reference, sum_exp, target_logit)

    def logps(self) -> Tensor:
        """Log-probability of the label."""
        above, log_odds = self.target_logit - self.reference, self._log_odds()
        # From its odds where a sum would round 1 - p away; else one rounding less.
        unlikely = above - torch.log(self.sum_exp + above.exp())
        return torch.where(log_odds > 0, logsigmoid(log_odds), unlikely)

    def lse(self) -> Tensor:
        """Logsumexp of all logits."""
        return torch.logaddexp(self.target_logit, self.reference + self.sum_exp.log())

    def shares(self) -> Shares:
        """The probabilities that gradients are made of."""
        log_odds = self._log_odds()
        above = self.target_logit - self.reference
        unit = torch.exp(-torch.logaddexp(above, self.sum_exp.log()))
        # Of a row whose every logit is -inf nothing has a share.
        unit = unit.masked_fill(unit == torch.inf, 0)
        return Shares(unit, torch.sigmoid(-log_odds), torch.sigmoid(log_odds))

    def _log_odds(self) -> Tensor:
        """Of the label, ``log(p / (1 - p))``."""
        return (self.target_logit - self.reference) - self.sum_exp.log()


def joined(parts: Tensor) -> Tensor:
    """Running numbers (3, n) of parts (k, 3, n) of the vocabulary.

    The label's logit is -inf in parts that do not hold the label.
    """
    reference, sum_exp, target_logit = parts.unbind(1)
    whole = reference.amax(0)
    sums = (sum_exp * torch.exp(reference - whole)).sum(0)
    return torch.stack((whole, sums, target_logit.amax(0)))


def joined_stats(parts: Tensor, stats: Tensor) -> Tensor:
    """Entropy, largest logit and label's logit (n, 3) of parts of the vocabulary.

    From the running numbers (k, 3, n) and stats (k, n, 3) of each. A distribution that is a mixture
    of others without overlap has the mean of their entropies, and the entropy of which it is.
    """
    reference, sum_exp, target_logit = parts.unbind(1)
    entropy, maximum, _ = stats.unbind(2)
    top = torch.maximum(reference, target_logit).amax(0)
    masses = sum_exp * torch.exp(reference - top) + torch.exp(target_logit - top)
    # No difference of large numbers where one part has nearly all of the mass.
    others = torch.stack([masses[:k].sum(0) + masses[k + 1 :].sum(0) for k in range(len(masses))])
    log_share = -torch.log1p(others / masses)
    # A part that is masked as a whole, as padding of the vocabulary is, has no share.
    mixed = (log_share.exp() * (entropy - log_share)).masked_fill(log_share == -torch.inf, 0).sum(0)
    return torch.stack((mixed, maximum.amax(0), target_logit.amax(0)), dim=1)
