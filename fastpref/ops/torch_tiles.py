"""What happens to one tile of projections between two matrix products, in plain PyTorch.

A tile holds ``hidden @ weight[start:end].T + bias[start:end]`` for some rows and a stretch of the
vocabulary. `fastpref.kernels.tiles` has the same two functions as Triton kernels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # columns that `largest` looks at together


class LogitTransform(NamedTuple):
    """``logits = softcap * tanh(logit_scale * projection / softcap) / temperature``.

    Without ``softcap`` the tanh is left out. ``projection`` is ``hidden @ weight.T + bias``.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def apply_(self, projection: Tensor) -> Tensor:
        """Turn ``projection`` (any shape, floating point) into logits in place."""
        if self.softcap is None:
            scale = self.logit_scale / self.temperature
            return projection if scale == 1.0 else projection.mul_(scale)
        projection.mul_(self.logit_scale / self.softcap).tanh_()
        return projection.mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Derivative of the logits with respect to the projection, from the logits themselves.

        A number where it is the same everywhere, else a new tensor of the shape of ``logits``.
        """
        scale = self.logit_scale / self.temperature
        if self.softcap is None:
            return scale
        tanh = logits * (self.temperature / self.softcap)
        return torch.addcmul(torch.full_like(tanh, scale), tanh, tanh, value=-scale)


def fold_tile(
    tile: Tensor,  # (n, w), overwritten
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: LogitTransform,
    maximum: Tensor,  # (n,), updated in place; starts at the dtype's lowest finite number
    sum_exp: Tensor,  # (n,), updated in place; starts at 0
    target_logit: Tensor,  # (n,), updated in place; starts at NaN
    rest: Tensor | None = None,  # (n,), updated in place; starts at 0
    shortfall: Tensor | None = None,  # (n,), updated in place; starts at 0
    exponentials: Tensor | None = None,  # (n, w) in the dtype of matrix products
    rescale: Tensor | None = None,  # (n,), written
) -> None:
    """Fold one tile into the running logsumexp of every column but the label's.

    With ``rest`` and ``shortfall`` also into what an entropy is made of: ``rest`` is ``sum_exp``
    without the largest logit, so that it keeps its digits where the sum is nearly one, and
    ``shortfall`` the sum of ``exp(logit - maximum) * (maximum - logit)``.

    With ``exponentials``, also write ``exp(logit - maximum) * slope`` there (0 at the label), and
    into ``rescale`` the factor that brings earlier tiles' sums to the new maximum. They may be the
    tile itself, but not together with ``rest``.
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
    if rest is None or shortfall is None:
        new_maximum = torch.maximum(maximum, logits.amax(1))
        exp = logits.sub_(new_maximum.unsqueeze(1)).exp_()
        factor = maximum.sub_(new_maximum).exp_()
        sum_exp.mul_(factor).add_(exp.sum(1))
    else:
        tile_maximum, top = largest(logits)
        new_maximum = torch.maximum(maximum, tile_maximum)
        difference = logits.sub_(new_maximum.unsqueeze(1))
        same = exponentials is not None and exponentials.dtype == tile.dtype
        exp = torch.exp(difference, out=exponentials if same else None)
        raised = (tile_maximum > maximum).to(exp.dtype)
        rise = new_maximum - maximum
        factor = torch.exp(-rise)
        # 0 times a logit of -inf is NaN, and no part of the sum.
        shortfall.add_(rise * sum_exp).mul_(factor).sub_(difference.mul_(exp).nansum(1))
        at_top = exp.gather(1, top.unsqueeze(1))
        others = exp.scatter_(1, top.unsqueeze(1), 0).sum(1)
        exp.scatter_(1, top.unsqueeze(1), at_top)
        at_top = at_top.squeeze(1)
        # The largest so far becomes one of the rest where this tile has a larger one.
        rest.add_(raised).mul_(factor).add_(others).add_(at_top * (1 - raised))
        sum_exp.mul_(factor).add_(others).add_(at_top)
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


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As ``logits.max(1)`` of (n, w), which on a CPU takes several times as long."""
    width = logits.shape[1]
    if width % BLOCK:
        maximum, top = logits.max(1)
        return maximum, top
    blocks = logits.view(-1, width // BLOCK, BLOCK)
    maximum, block = blocks.amax(2).max(1)
    # Blocks of all rows side by side, as what picks whole rows is the fastest way to pick.
    index = torch.arange(len(block), device=block.device) * (width // BLOCK) + block
    column = logits.view(-1, BLOCK).index_select(0, index).max(1).indices
    return maximum, block * BLOCK + column
