"""What parts of the vocabulary leave of a row gives the numbers of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpref.ops import forward
from fastpref.ops.operands import Operands
from fastpref.ops.running import Running, joined, joined_stats
from fastpref.ops.torch_tiles import LogitTransform

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


@pytest.mark.parametrize("stats", [True, False])
def test_a_label_is_in_one_part_or_in_none(stats):
    logits, labels = torch.randn(3, 6), torch.tensor([0, 4, -1])
    locals_ = [torch.where(labels < 3, labels, -1), torch.where(labels >= 3, labels - 3, -1)]
    readings = [read(part, local) for part, local in zip(logits.split(3, 1), locals_, strict=True)]
    for numbers, of_part in readings:  # as kernels leave it where they find no label
        numbers[2] = numbers[2].masked_fill(numbers[2] == -torch.inf, torch.nan)
        of_part[:, 2] = numbers[2]
    readings = [(one, other if stats else other[:, :0]) for one, other in readings]
    whole, numbers = forward._joined(readings, locals_)
    at_label = torch.stack((logits[0, 0], logits[1, 4], torch.tensor(torch.nan)))
    torch.testing.assert_close(whole[2], at_label, equal_nan=True)
    assert numbers.shape == (3, 3 if stats else 0)
    if stats:
        torch.testing.assert_close(numbers[:2, 2], at_label[:2])
        assert numbers[2, 2].isnan() and numbers[:, :2].isfinite().all()


def test_labels_of_a_part_of_the_vocabulary():
    hidden, weight, labels = torch.randn(4, 2), torch.randn(6, 2), torch.tensor([0, 2, 4, 5])
    operands = Operands(hidden, weight, None, labels, *LogitTransform(), -100, True)
    part = operands.of_columns(slice(2, 5))
    assert part.labels.tolist() == [-1, 0, 2, -1] and torch.equal(part.weight, weight[2:5])
