"""Rewards of responses, as a student or an oracle with a reward head gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.data.rows import RESPONSES, BadRowsError
from fastpref.data.tokens import check_max_length, tokenize_rows
from fastpref.extras import require_extra
from fastpref.models.lm_head import lm_head_of
from fastpref.models.reward_head import reward_head_of, rewards_at_head
from fastpref.teacher.precompute import (
    check_batch_size,
    context_length,
    plan,
    read_states,
)

RENAMED = RESPONSES[0], "completion"


@torch.no_grad()
def score(
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
) -> Tensor:
    r"""The rewards of responses, by a model with a reward head.

    .. math:: \hat r(y) = w \cdot h_T

    DRDO (Direct Reward Distillation and policy-Optimization). Its students and its oracles have
    such a head.

    Args:
        model: A causal language model of transformers with a reward head
            (`fastpref.models.load_reward_head`), on its device; left in evaluation mode.
        tokenizer: Its tokenizer, whose chat template is applied as TRL's trainers do.
        rows: B rows, or one, in a format of TRL: ``prompt`` and ``completion``, or preference pairs
            with ``chosen`` and ``rejected``; text or chat messages.
        max_length: Cut sequences after so many tokens, as in training.
        batch_size: Rows per batch.

    Returns:
        Float32 on the CPU: (B,) rewards of completions, or (B, 2) of chosen and rejected responses;
        without the first dimension for one row. Only differences mean something.

    Raises:
        ValueError: A model without a reward head, rows that cannot be used, a setting out of range.
        ImportError: Without the extra "teacher".

    Example:
        >>> from fastpref.models import load_reward_head
        >>> from fastpref.teacher import load_teacher, score
        >>> def better(folder, prompt, one, other):
        ...     model, tokenizer = load_teacher(folder)
        ...     load_reward_head(model, folder)
        ...     pair = {"prompt": prompt, "chosen": one, "rejected": other}
        ...     first, second = score(model, tokenizer, pair)
        ...     return one if first > second else other
    """
    require_extra("teacher", "fastpref.teacher.score", "transformers", "trl")
    check_max_length(max_length)
    check_batch_size(batch_size)
    reward_head_of(model)
    examples = [rows] if isinstance(rows, Mapping) else list(rows)
    # A completion is a pair of which one side is read.
    sides = 1 if any(isinstance(row, Mapping) and "completion" in row for row in examples) else 2
    if sides == 1:
        examples = [_as_pair(row) for row in examples]
    head = lm_head_of(model.eval())
    pairs, bad = tokenize_rows(
        examples, tokenizer, max_length=max_length, context_length=context_length([model])
    )
    if bad:
        if sides == 1:
            bad = [one._replace(reason=one.reason.replace(*RENAMED)) for one in bad]
        raise BadRowsError(bad, "rows", advice="", rows=examples)
    found = torch.empty(len(pairs), sides)
    for batch in plan(pairs, batch_size):
        states, labels = read_states(model, head, batch, check=False, sides=sides)
        if sides == 1:  # rewards are of pairs
            states, labels = torch.cat((states, states)), torch.cat((labels, labels))
        rewards = rewards_at_head(model, states, labels).float().cpu().view(2, len(batch))
        found[[pair.row for pair in batch]] = rewards[:sides].T
    found = found.squeeze(1) if sides == 1 else found
    return found[0] if isinstance(rows, Mapping) else found


def _as_pair(row: Any) -> Any:
    """A completion on both sides; of rows without one what is wrong is said later."""
    if not isinstance(row, Mapping):
        return row
    others = {name: value for name, value in row.items() if name not in ("completion", *RESPONSES)}
    return {**others, **dict.fromkeys(RESPONSES, row.get("completion"))}
