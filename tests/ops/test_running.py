"""What parts of the vocabulary leave of a row gives the numbers of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpref.ops.running import Running, joined, joined_stats

SIZES = [4, 1, 3, 5]


def read(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Running numbers (3, n) and stats (n, 3) of logits (n, w); a label below 0 is elsewhere."""
    here = labels >= 0
    column = labels.clamp_min(0).unsqueeze(1)
    at_label = logits.gather(1, column).squeeze(1).masked_fill(~here, -torch.inf)
    is_label = torch.zeros_like(logits, dtype=torch.bool).scatter(1, column, here.unsqueeze(1))
    others = logits.masked_fill(is_label, -torch.inf)
    reference = others.amax(1).clamp_min(torch.finfo(logits.dtype).min)
    sums = torch.exp(others - reference.unsqueeze(1)).sum(1)
    logs = torch.log_softmax(logits, 1)
    entropy = -(logs.exp() * logs).nansum(1)
    return (
        torch.stack((reference, sums, at_label)),
        torch.stack((entropy, logits.amax(1), at_label), dim=1),
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_parts_give_the_whole(scale):
    logits = scale * torch.randn(26, sum(SIZES), dtype=torch.float64) + 100
    labels = torch.arange(26) % sum(SIZES)
    logits[3, 5:8] = -torch.inf  # a part that is masked as a whole
    logits[4, [0, 1, 2, 3, 6]] = -torch.inf  # and one that is masked in part
    parts, start = [], 0
    for size in SIZES:
        local = torch.where((labels >= start) & (labels < start + size), labels - start, -1)
        parts.append(read(logits[:, start : start + size], local))
        start += size
    running, stats = (torch.stack(one) for one in zip(*parts, strict=True))
    logps = torch.log_softmax(logits, 1)
    found = Running.of(joined(running))
    at_label = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.logps(), logps.gather(1, labels.unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(found.lse(), logits.logsumexp(1))
    expected = torch.stack((-(logps.exp() * logps).nansum(1), logits.amax(1), at_label), dim=1)
    torch.testing.assert_close(joined_stats(running, stats), expected)
    shares = found.shares()
    torch.testing.assert_close(shares.label, found.logps().exp())
    torch.testing.assert_close(shares.others, 1 - found.logps().exp(), atol=1e-12, rtol=1e-7)
    torch.testing.assert_close(shares.unit, torch.exp(found.reference - found.lse()))
