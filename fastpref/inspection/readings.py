"""One pass of the models over the pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastpref.data.tokens import IGNORE_INDEX, TokenizedPair
from fastpref.inspection.signals import MEANINGS, Curves, Signal, curves_of_batch
from fastpref.models.lm_head import lm_head_of
from fastpref.ops import linear_logps
from fastpref.sequences import labels_of_states
from fastpref.teacher.actions import action_rewards
from fastpref.teacher.precompute import check_finite, plan, read_states


@torch.no_grad()
def read_signals(
    pairs: list[TokenizedPair], model: Any, *, reference: Any, beta: float, batch_size: int
) -> list[Signal]:
    """All signals of a teacher, in the order of the pairs; each batch goes through it once."""
    model.eval()
    head = lm_head_of(model)
    reference_head = None if reference is None else lm_head_of(reference.eval())
    found: dict[str, dict[int, Curves]] = {}
    for number, batch in _with_progress("teacher", pairs, batch_size):
        check = number == 0
        states, labels = read_states(model, head, batch, check=check)
        theirs = None
        if reference_head is not None:
            others, tokens = read_states(reference, reference_head, batch, check=check)
            tokens = labels_of_states(tokens, None, IGNORE_INDEX)
            theirs = linear_logps(others, reference_head, tokens)
        for name, curves in curves_of_batch(
            states, head, labels, reference_logps=theirs, beta=beta
        ).items():
            counts = torch.tensor([len(curve) for curve in curves])
            check_finite(torch.cat(curves), counts, batch)
            sides = zip(curves[: len(batch)], curves[len(batch) :], strict=True)
            rows = (pair.row for pair in batch)
            found.setdefault(name, {}).update(zip(rows, sides, strict=True))
    return [
        Signal(name, [found[name][pair.row] for pair in pairs])
        for name in MEANINGS
        if name in found
    ]


def read_student(pairs: list[TokenizedPair], model: Any, *, batch_size: int) -> Tensor:
    """How much more likely, in nats, a student finds each pair's chosen response: (pairs,)."""
    model.eval()
    head = lm_head_of(model)
    found: dict[int, Tensor] = {}
    for number, batch in _with_progress("student", pairs, batch_size):
        states, labels = read_states(model, head, batch, check=number == 0)
        logps = action_rewards(states, head, labels, reward="logp").cpu().double()
        check_finite(logps, None, batch)
        chosen, rejected = logps.chunk(2)
        rows = (pair.row for pair in batch)
        found.update(zip(rows, chosen - rejected, strict=True))
    return torch.stack([found[pair.row] for pair in pairs])


def _with_progress(
    name: str, pairs: list[TokenizedPair], batch_size: int
) -> Iterator[tuple[int, list[TokenizedPair]]]:
    from tqdm import tqdm

    with tqdm(total=len(pairs), desc=name, unit="pair") as bar:
        for number, batch in enumerate(plan(pairs, batch_size)):
            yield number, batch
            bar.update(len(batch))
