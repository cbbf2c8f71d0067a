"""TRL's metrics, as sums and counts that all processes add up in one go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.ops import Head

SIDES = ("chosen", "rejected")


def of_output(output: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """What a loss returned, by TRL's names: ``chosen_rewards`` is ``rewards/chosen``.

    Parts of the loss are ``losses/<part>``: the likelihood only where it is a part. Of unpaired
    responses, the desirable ones are those that count as chosen.
    """
    metrics = {}
    found = output._asdict()
    desirable = found.pop("desirable", None)
    for name, values in found.items():
        first, _, second = name.partition("_")
        is_part = name != "nll_loss" or options.get("sft_weight")
        if name == "loss" or values is None or not is_part:
            continue
        if desirable is not None and values.shape == desirable.shape:
            metrics[f"{name}/chosen"] = summed(values, desirable)
            metrics[f"{name}/rejected"] = summed(values, ~desirable)
            continue
        if first in SIDES:
            name = f"{second}/{first}"
        elif second == "loss":
            name = f"losses/{first}"
        metrics[name] = summed(values)
    if "chosen_rewards" in found:
        chosen, rejected = output.chosen_rewards, output.rejected_rewards
        metrics["rewards/accuracies"] = summed((chosen > rejected).float())
        metrics["rewards/margins"] = summed(chosen - rejected)
    return metrics


def of_signals(signals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's shaping and the oracle's margin, where the loss reads them."""
    metrics: dict[str, Tensor] = {}
    if "shaping" in signals:
        chosen, rejected = signals["shaping"].chunk(2)
        metrics |= {"shaping/chosen": summed(chosen), "shaping/rejected": summed(rejected)}
    if "oracle_rewards" in signals:
        chosen, rejected = signals["oracle_rewards"].chunk(2)
        metrics["rewards/oracle_margin"] = summed(chosen - rejected)
    return metrics


@torch.no_grad()
def of_logits(states: Tensor, head: Head, mask: Tensor, pairs: int) -> dict[str, Tensor]:
    """Mean logits of chosen and rejected responses, from (2B, T, H) states; or of chosen ones.

    The mean logit of a position is linear in its state, so no logits are needed; a head with a soft
    cap has no such metrics.
    """
    if head.softcap is not None:
        return {}
    mean_row = head.weight.mean(0, dtype=torch.float32)
    mean_bias = 0.0 if head.bias is None else head.bias.float().mean()
    metrics = {}
    for side, start in zip(SIDES, range(0, len(states), pairs), strict=False):
        rows, part = states[start : start + pairs], mask[start : start + pairs]
        total = torch.where(part.unsqueeze(-1), rows, 0).sum((0, 1), dtype=torch.float32)
        count = part.sum()
        logits = head.logit_scale * ((total * mean_row).sum() + count * mean_bias)
        metrics[f"logits/{side}"] = torch.stack([logits, count.to(logits.dtype)])
    return metrics


def summed(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(2,) float32 sum of the values, of those under the mask where there is one, and how many."""
    if mask is None:
        return torch.stack([values.sum().float(), values.new_tensor(values.numel()).float()])
    return torch.stack([torch.where(mask, values, 0).sum().float(), mask.sum().float()])
