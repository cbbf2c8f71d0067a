"""What happens to one tile of projections between two matrix products, in plain PyTorch.

A tile holds ``hidden @ weight[start:end].T + bias[start:end]`` for some rows and a stretch of the
vocabulary. `fastpref.kernels.tiles` has the same two functions as Triton kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.ops.transform import LogitTransform


def fold_tile(
    tile: Tensor,  # (n, w), overwritten
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: LogitTransform,
    maximum: Tensor,  # (n,), updated in place; starts at the dtype's lowest finite number
    sum_exp: Tensor,  # (n,), updated in place; starts at 0
    target_logit: Tensor,  # (n,), updated in place; starts at NaN
    exponentials: Tensor | None = None,  # (n, w) in the dtype of matrix products, may be the tile
    rescale: Tensor | None = None,  # (n,), written
) -> None:
    """Fold one tile into the running logsumexp of every column but the label's.

    With ``exponentials``, also write ``exp(logit - maximum) * slope`` there (0 at the label), and
    into ``rescale`` the factor that brings earlier tiles' sums to the new maximum.
    """
    logits = transform.apply_(tile)
    slope = transform.slope(logits) if exponentials is not None else 1.0
    if labels is not None:
        # Leaving the label out keeps 1 - p(label) exact where p(label) is close to one.
        column, inside = label_columns(labels, vocab_start, tile.shape[1])
        at_label = logits.gather(1, column).squeeze(1)
        target_logit.copy_(torch.where(inside, at_label, target_logit))
        hidden_from_sum = torch.where(inside, -math.inf, at_label)
        logits.scatter_(1, column, hidden_from_sum.unsqueeze(1))
    new_maximum = torch.maximum(maximum, logits.amax(1))
    exp = logits.sub_(new_maximum.unsqueeze(1)).exp_()
    factor = maximum.sub_(new_maximum).exp_()
    sum_exp.mul_(factor).add_(exp.sum(1))
    if exponentials is not None and rescale is not None:
        exponentials.copy_(_scale_(exp, slope))
        rescale.copy_(factor)
    maximum.copy_(new_maximum)


def gradient_tile(
    tile: Tensor,  # (n, w), overwritten
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: LogitTransform,
    lse: Tensor,  # (n,), not -inf
    probability_coefficients: Tensor,  # (n,)
    label_coefficients: Tensor,  # (n,)
    out: Tensor,  # (n, w) in the dtype of matrix products, may be the tile
) -> None:
    """Write the gradient of the projections: ``slope * coefficient * p``, and the label's own."""
    logits = transform.apply_(tile)
    slope = transform.slope(logits)
    probabilities = logits.sub_(lse.unsqueeze(1)).exp_()
    gradient = probabilities.mul_(probability_coefficients.unsqueeze(1))
    if labels is not None:
        write_at_labels(gradient, labels, vocab_start, label_coefficients)
    out.copy_(_scale_(gradient, slope))


def write_at_labels(
    tile: Tensor,  # (n, w)
    labels: Tensor,  # (n,) int64
    vocab_start: int,
    values: Tensor,  # (n,)
) -> None:
    """Overwrite each row's number at its label, where that lies in the tile."""
    column, inside = label_columns(labels, vocab_start, tile.shape[1])
    at_label = torch.where(inside, values.to(tile.dtype), tile.gather(1, column).squeeze(1))
    tile.scatter_(1, column, at_label.unsqueeze(1))


def _scale_(values: Tensor, slope: Tensor | float) -> Tensor:
    return values.mul_(slope) if isinstance(slope, Tensor) or slope != 1.0 else values


def label_columns(labels: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """Each row's label as a column (n, 1) of the tile, and whether it lies inside (n,)."""
    local = labels - vocab_start
    inside = (local >= 0) & (local < width)
    return local.clamp(0, width - 1).unsqueeze(1), inside
