"""Divergences of two distributions of which some tokens are known: what to make of all others.

Log-probabilities are (n, K), -inf where there is no token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.derivatives import first_derivative_only
from fastpref.ops.divergences import times


def bucket(log_q: Tensor, log_p: Tensor, log_rest: Tensor) -> Tensor:
    """KL(p || q) (n,) of the tokens and one that stands for all others; of q it is ``log_rest``.

    Where q has no others, p has none either: what is left of 1 there is a rounding error.
    """
    none = log_rest == -torch.inf
    of_p = _log_rest(log_p).masked_fill(none, -torch.inf)
    return _forward_kl(*(
        torch.cat((one, rest.unsqueeze(1)), dim=1)
        for one, rest in ((log_q, log_rest), (log_p, of_p))
    ))  # fmt: skip


def drop(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The tokens' part (n,) of KL(p || q)."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(1)


def expectation(log_q: Tensor, values: Tensor) -> Tensor:
    """Mean (n,) of values (n, K) under q, which are 0 for all other tokens."""
    return (log_q.exp() * values).sum(1)


def renormalize(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) (n,) given that it is one of the tokens; ``log_q`` may lack its normaliser."""
    nothing = log_p == -torch.inf
    # A finite number, of which a row without any token makes no NaN.
    lowest = torch.finfo(log_p.dtype).min
    log_q, log_p = (
        one.masked_fill(nothing, lowest).log_softmax(1).masked_fill(nothing, -torch.inf)
        for one in (log_q, log_p)
    )
    return _forward_kl(log_q, log_p)


def normalise(logits: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, K) and logsumexp (n,) of logits plus offsets, which a sum would round.

    Unlike those of ``log_softmax`` they know what a token that is all but certain leaves of 1.
    """
    top = (logits + offsets).detach().argmax(1, keepdim=True)
    at_top, offset = logits.gather(1, top), offsets.gather(1, top)
    above = (logits - at_top) + (offsets - offset)
    others = above.exp().scatter(1, top, 0).sum(1, keepdim=True).log1p()
    return above - others, (at_top + (offset + others)).squeeze(1)


def joined(one: Tensor, other: Tensor) -> Tensor:
    """``logaddexp``, with a gradient of 0 where both are -inf."""
    none = (one == -torch.inf) & (other == -torch.inf)
    return torch.logaddexp(one.masked_fill(none, 0), other).masked_fill(none, -torch.inf)


def _log_rest(logs: Tensor) -> Tensor:
    """Logarithm (n,) of what log-probabilities leave of 1: finite even if below 0.

    Where one of them is nearly all, its logarithm still knows what it leaves.
    """
    top = logs.argmax(1, keepdim=True)
    left = -torch.expm1(logs.gather(1, top).squeeze(1))
    rest = left - logs.exp().scatter(1, top, 0).sum(1)
    return rest.clamp_min(torch.finfo(logs.dtype).tiny).log()


def _forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """``sum p log(p / q) + q - p`` (n,), as `divergences.forward_kl` has it.

    The second part sums to 0: with it no digit is lost where p is close to q.
    """
    divergence: Tensor = forward_kl_op(log_q, log_p)[0]
    return divergence


@torch.library.custom_op("fastpref::forward_kl_of_logps", mutates_args=())
def forward_kl_op(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence (n,), and its gradient (n, K) with respect to ``log_q``: ``q - p``."""
    log_ratio = (log_p - log_q).nan_to_num(0, torch.inf, -torch.inf)
    p, q = log_p.exp(), log_q.exp()
    gradient = (p + q) * torch.tanh(log_ratio * -0.5)
    return (times(p, log_ratio, out=p) + gradient).sum(1).clamp_min(0), gradient


@forward_kl_op.register_fake
def _(log_q: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return log_q.new_empty(log_q.shape[0]), torch.empty_like(log_q)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])  # the latter for `first_derivative_only`


@first_derivative_only("fastpref.linear_topk_divergence")
def _backward(ctx: Any, incoming: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    gradient, _ = ctx.saved_tensors
    return gradient * incoming.unsqueeze(1), None


forward_kl_op.register_autograd(_backward, setup_context=_setup_context)
