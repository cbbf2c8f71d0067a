"""What happens to one tile of projections between two matrix products, in plain PyTorch.

A tile holds ``hidden @ weight[start:end].T + bias[start:end]`` for some rows and a stretch of the
vocabulary. `fastpref.kernels.tiles` has the same functions as Triton kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
            return projection if self.factor == 1.0 else projection.mul_(self.factor)
        return self._tanh_(projection).mul_(self.softcap / self.temperature)

    def apply_and_damp_(self, projection: Tensor) -> tuple[Tensor, Tensor | None]:
        """`apply_`, and the damping of a soft cap, None without one."""
        if self.softcap is None:
            return self.apply_(projection), None
        tanh = self._tanh_(projection)
        damping = _one_less_square(tanh)
        return tanh.mul_(self.softcap / self.temperature), damping

    def _tanh_(self, projection: Tensor) -> Tensor:
        assert self.softcap is not None
        scaled = projection if self.logit_scale == 1.0 else projection.mul_(self.logit_scale)
        return scaled.div_(self.softcap).tanh_()

    @property
    def factor(self) -> float:
        """The constant part of the derivative of the logits with respect to the projection.

        The other part is the damping of a soft cap: ``1 - tanh ** 2``.
        """
        return self.logit_scale / self.temperature

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative of the logits with respect to the projection, from the logits."""
        if self.softcap is None:
            return torch.full_like(logits, self.factor)
        return _one_less_square(logits / (self.softcap / self.temperature)) * self.factor


def _one_less_square(tanh: Tensor) -> Tensor:
    return torch.addcmul(torch.ones_like(tanh), tanh, tanh, value=-1)


def fold_tile(
    tile: Tensor,  # (n, w), overwritten
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: LogitTransform,
    reference: Tensor,  # (n,), updated in place; starts at the dtype's lowest finite number
    sum_exp: Tensor,  # (n,), updated in place; starts at 0
    target_logit: Tensor,  # (n,), updated in place; starts at NaN
    rest: Tensor | None = None,  # (n,), updated in place; starts at 0
    shortfall: Tensor | None = None,  # (n,), updated in place; starts at 0
    exponentials: Tensor | None = None,  # (n, w) in the dtype of matrix products
    earlier: Sequence[Tensor] = (),  # (n, k) each, updated in place
) -> None:
    """Fold one tile into the running numbers of every column but the label's.

    With ``rest`` and ``shortfall`` also into what an entropy is made of: ``rest`` is ``sum_exp``
    without the largest logit, so that it keeps its digits where the sum is nearly one, and
    ``shortfall`` the sum of ``exp(logit - reference) * (reference - logit)``.

    With ``exponentials``, also write ``exp(logit - reference)`` there, damped, and 0 at the label.
    They may be the tile itself, but not together with ``rest``. What earlier tiles' exponentials
    were summed up to follows the reference where it rises.

    Here the reference is always the largest logit.
    """
    logits, damping = (
        (transform.apply_(tile), None) if exponentials is None else transform.apply_and_damp_(tile)
    )
    if labels is not None:
        # Leaving the label out keeps 1 - p(label) exact where p(label) is close to one.
        column, inside = label_columns(labels, vocab_start, tile.shape[1])
        at_label = logits.gather(1, column).squeeze(1)
        target_logit.copy_(torch.where(inside, at_label, target_logit))
        hidden_from_sum = torch.where(inside, -math.inf, at_label)
        logits.scatter_(1, column, hidden_from_sum.unsqueeze(1))
    if rest is None or shortfall is None:
        new_reference = torch.maximum(reference, logits.amax(1))
        exp = logits.sub_(new_reference.unsqueeze(1)).exp_()
        factor = torch.exp(reference - new_reference)
        sum_exp.mul_(factor).add_(exp.sum(1))
    else:
        tile_maximum, top = largest(logits)
        new_reference = torch.maximum(reference, tile_maximum)
        difference = logits.sub_(new_reference.unsqueeze(1))
        same = exponentials is not None and exponentials.dtype == tile.dtype
        exp = torch.exp(difference, out=exponentials if same else None)
        raised = (tile_maximum > reference).to(exp.dtype)
        rise = new_reference - reference
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
    if exponentials is not None:
        exponentials.copy_(exp if damping is None else exp.mul_(damping))
    for accumulated in earlier:
        accumulated.mul_(factor.unsqueeze(1))
    reference.copy_(new_reference)


def gradient_tile(
    tile: Tensor,  # (n, w), overwritten
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    transform: LogitTransform,
    reference: Tensor,  # (n,)
    coefficients: Tensor,  # (n,)
    label_gradients: Tensor,  # (n,)
    out: Tensor,  # (n, w) in the dtype of matrix products, may be the tile
) -> None:
    """Write the gradient of the projections, damped: ``coefficient * exp(logit - reference)``.

    At the label's column it is the label's own, as it is.
    """
    logits, damping = transform.apply_and_damp_(tile)
    exponentials = logits.sub_(reference.unsqueeze(1)).exp_()
    gradient = exponentials.mul_(coefficients.unsqueeze(1))
    if damping is not None:
        gradient.mul_(damping)
    if labels is not None:
        write_at_labels(gradient, labels, vocab_start, label_gradients)
    out.copy_(gradient)


def gradient_of_kept_tile(
    exponentials: Tensor,  # (n, w) as `fold_tile` wrote them, damped
    labels: Tensor | None,  # (n,) int64
    vocab_start: int,
    kept_reference: Tensor,  # (n,), to which they are relative
    reference: Tensor,  # (n,), of all tiles
    coefficients: Tensor,  # (n,)
    label_gradients: Tensor,  # (n,)
    out: Tensor,  # (n, w) in the dtype of matrix products
) -> None:
    """As `gradient_tile`, of a tile that the forward pass kept."""
    scale = coefficients * torch.exp(kept_reference - reference)
    torch.mul(exponentials, scale.unsqueeze(1), out=out)
    if labels is not None:
        write_at_labels(out, labels, vocab_start, label_gradients)


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
