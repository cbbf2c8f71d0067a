"""Divergences of two distributions of which K tokens are known: what to make of all others.

Log-probabilities are (n, K) and -inf where there is no token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fastpref.ops.divergences import times


def bucket(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) (n,) of the K tokens and one that stands for all others."""
    log_q, log_p = (torch.cat((one, _log_rest(one).unsqueeze(1)), dim=1) for one in (log_q, log_p))
    return _forward_kl(log_q, log_p)


def drop(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The K tokens' part (n,) of KL(p || q)."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(1)


def renormalize(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) (n,) given that it is one of the K tokens; ``log_q`` may lack its normaliser."""
    nothing = log_p == -torch.inf
    # A finite number, of which a row without any token makes no NaN.
    lowest = torch.finfo(log_p.dtype).min
    log_q, log_p = (
        one.masked_fill(nothing, lowest).log_softmax(1).masked_fill(nothing, -torch.inf)
        for one in (log_q, log_p)
    )
    return _forward_kl(log_q, log_p)


TAILS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bucket": bucket,
    "drop": drop,
    "renormalize": renormalize,
}


def _log_rest(logs: Tensor) -> Tensor:
    """Logarithm (n,) of what probabilities leave of 1.

    Where one of them is nearly all, its logarithm still knows what it leaves. What all others then
    leave of that has an error of rounding, above which the result is held.
    """
    top = logs.argmax(1, keepdim=True)
    left = -torch.expm1(logs.gather(1, top).squeeze(1))
    rest = left - logs.exp().scatter(1, top, 0).sum(1)
    numbers = torch.finfo(logs.dtype)
    return torch.maximum(rest, 4 * numbers.eps * left).clamp_min(numbers.tiny).log()


def _forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``sum p log(p / q) + q - p`` (n,), where the second part sums to 0."""
    divergence: Tensor = _ForwardKL.apply(log_q, log_p)  # type: ignore[no-untyped-call]  # autograd's own
    return divergence


class _ForwardKL(Function):
    """As `divergences.forward_kl`: no digit is lost where p is close to q, nor in the gradient."""

    @staticmethod
    def forward(ctx: Any, log_q: Tensor, log_p: Tensor) -> Tensor:
        log_ratio = (log_p - log_q).nan_to_num(0, torch.inf, -torch.inf)
        p, q = log_p.exp(), log_q.exp()
        gradient = (p + q) * torch.tanh(log_ratio * -0.5)  # q - p
        ctx.save_for_backward(gradient)
        return (times(p, log_ratio, out=p) + gradient).sum(1).clamp_min(0)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * incoming.unsqueeze(1), None
