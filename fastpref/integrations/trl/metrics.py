"""TRL's metrics, as sums and counts that all processes add up in one go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.data.tokens import IGNORE_INDEX
from fastpref.ops import Head, linear_stats
from fastpref.sequences import labels_of_states


@torch.no_grad()
def vocabulary_metrics(states: Tensor, head: Head, labels: Tensor) -> dict[str, Tensor]:
    """What DPOTrainer says of the vocabulary, each as (2,): its sum over tokens, and their number.

    Costs a matrix product of its own, as nothing in a preference loss knows these numbers. The
    mean logit of a position is linear in its state, so a head with a softcap has none here.

    ``states`` (2B, T + 1, H), ``labels`` (2B, T) shifted, -100 outside the responses.
    """
    labels = labels_of_states(labels, None, IGNORE_INDEX)
    stats = linear_stats(states, head, labels, stats=("entropy", "is_top1"))
    mask = labels != IGNORE_INDEX
    chosen, rejected = mask.chunk(2)
    metrics = {
        "entropy": summed(stats["entropy"], mask),
        "mean_token_accuracy": summed(stats["is_top1"].chunk(2)[0].float(), chosen),
    }
    if head.softcap is None:
        mean_row = head.weight.mean(0, dtype=torch.float32)
        mean_bias = 0.0 if head.bias is None else head.bias.float().mean()
        for side, rows, part in (
            ("chosen", states.chunk(2)[0], chosen),
            ("rejected", states.chunk(2)[1], rejected),
        ):
            total = torch.where(part.unsqueeze(-1), rows, 0).sum((0, 1), dtype=torch.float32)
            count = part.sum()
            logits = head.logit_scale * (total @ mean_row + count * mean_bias)
            metrics[f"logits/{side}"] = torch.stack([logits, count.to(logits.dtype)])
    return metrics


def summed(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(2,) float32 sum of the values, of those under the mask where there is one, and how many."""
    if mask is None:
        return torch.stack([values.sum().float(), values.new_tensor(values.numel()).float()])
    return torch.stack([torch.where(mask, values, 0).sum().float(), mask.sum().float()])


def pair_metrics(output: Any) -> dict[str, Tensor]:
    """DPOTrainer's metrics of log-probabilities and rewards, from a loss's output."""
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    return {
        "rewards/chosen": summed(chosen),
        "rewards/rejected": summed(rejected),
        "rewards/accuracies": summed((chosen > rejected).float()),
        "rewards/margins": summed(chosen - rejected),
        "logps/chosen": summed(output.chosen_logps),
        "logps/rejected": summed(output.rejected_logps),
    }
