"""How a language-model head turns its projection into logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
