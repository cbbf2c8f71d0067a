"""The implicit reward of a teacher that was aligned: a potential made of two models."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.ops import Head
from fastpref.ops.head import prepare_head
from fastpref.ops.linear_logps import read_head
from fastpref.sequences import running_sum


@torch.no_grad()
def implicit_rewards(
    hidden: Tensor,  # (2B, T + 1, H), or packed (N, H)
    head: Head | Tensor,
    reference_hidden: Tensor,  # (2B, T + 1, H_r), or packed (N, H_r)
    reference_head: Head | Tensor,
    labels: Tensor,  # (2B, T + 1), or packed (N,)
    *,
    beta: float,
    temperature: float = 1.0,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    compact: bool = True,
) -> Tensor:
    """`rewards_so_far` of every state, in the shape of ``labels``.

    With ``compact=False`` NaN from the state on whose label is outside a vocabulary.
    """
    models = (("", hidden, head), ("reference_", reference_hidden, reference_head))
    logps, reference_logps = (
        read_head(
            prepare_head(states, of, temperature, ignore_index, compact, prefix=prefix),
            labels.reshape(-1),
            labels.shape,
            ignore_index=ignore_index,
            compact=compact,
        ).logps
        for prefix, states, of in models
    )
    log_ratios = logps - reference_logps
    found = rewards_so_far(log_ratios, beta, cu_seqlens)
    # Behind boundaries that are wrong such a label may have no state after it.
    return torch.where(log_ratios.isnan(), log_ratios, found)


def rewards_so_far(log_ratios: Tensor, beta: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """``beta`` times the sum of the log-ratios (2B, T + 1) or packed (N,) before each state.

    They are 0 where there is no label, so that states after a gap go on from where it began.
    """
    return beta * running_sum(log_ratios, cu_seqlens)
