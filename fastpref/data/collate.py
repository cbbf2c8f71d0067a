"""Batches for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.checks import is_finite_float32, refuse
from fastpref.data.rows import RESPONSES, BadRow, describe
from fastpref.data.tokens import check_max_length, pad_pairs, tokenize_rows
from fastpref.extras import require_extra

# By the name of a loss's input: the ending of the dataset columns that hold it.
SIGNALS = {"shaping": "shaping", "oracle_rewards": "reward"}


def collate_pairs(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, max_length: int | None = None
) -> dict[str, Tensor]:
    """Make a batch of preference pairs, chosen rows first: the ``collate_fn`` of a ``DataLoader``.

    The tokens are those of TRL's ``DPOTrainer``: template, end token and truncation included. The
    labels are shifted, as every function of fastpref takes them: ``labels[:, t]`` is the token that
    position ``t`` predicts.

    Args:
        rows: B pairs in TRL's standard or conversational format (text or chat messages), with a
            ``prompt`` or with one that ``chosen`` and ``rejected`` repeat.
        tokenizer: The student's tokenizer, of transformers. It needs no padding token: padding is
            0, and the attention mask is 0 there.
        max_length: Cut sequences after so many tokens, as TRL's ``max_length``.

    Returns:
        A dictionary with ``input_ids`` and ``attention_mask`` (2B, T + 1) int64; ``labels``
        (2B, T) int64, -100 outside the responses; ``shaping`` (2B,) float32 where the rows have
        ``chosen_shaping`` and ``rejected_shaping``, as `fastpref.teacher.add_shaping` adds them;
        ``oracle_rewards`` (2B,) float32 where they have ``chosen_reward`` and ``rejected_reward``.

    Raises:
        ValueError: A row that cannot be used, or whose prompt alone fills ``max_length``; a number
            that is missing, NaN or infinite; no rows.
        ImportError: Without the extra "teacher".

    Example:
        >>> from functools import partial
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"two": 1, "plus": 2, "four": 3, "five": 4, ".": 5}))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=".")
        >>> pairs = [{"prompt": "two plus two ", "chosen": "four", "rejected": "five",
        ...           "chosen_shaping": 0.5, "rejected_shaping": -0.5}]
        >>> collate = partial(collate_pairs, tokenizer=tokenizer)
        >>> loader = torch.utils.data.DataLoader(pairs, batch_size=8, collate_fn=collate)
        >>> batch = next(iter(loader))
        >>> batch["input_ids"]
        tensor([[1, 2, 1, 3, 5],
                [1, 2, 1, 4, 5]])
        >>> batch["labels"]
        tensor([[-100, -100,    3,    5],
                [-100, -100,    4,    5]])
        >>> batch["shaping"]
        tensor([ 0.5000, -0.5000])
    """
    require_extra("teacher", "fastpref.collate_pairs", "trl")
    check_max_length(max_length)
    if isinstance(rows, Mapping):
        refuse("rows", "a list of rows", "a dictionary of columns")
    if not rows:
        refuse("rows", "at least one preference pair", "none")
    pairs, bad = tokenize_rows(rows, tokenizer, max_length=max_length, context_length=None)
    signals = {} if bad else _signals(rows)
    bad += [
        BadRow(index, f"{column} must be a finite number, got {row.get(column)!r}")
        for columns in signals.values()
        for column in columns
        for index, row in enumerate(rows)
        if not is_finite_float32(row.get(column))
    ]
    if bad:
        first = str(rows[bad[0].row])
        raise ValueError(f"rows: {describe(bad, rows)}. The first of them: {first[:200]}")
    input_ids, attention_mask, labels = pad_pairs(pairs)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    for name, columns in signals.items():
        numbers = [row[column] for column in columns for row in rows]
        batch[name] = torch.tensor(numbers, dtype=torch.float32)
    return batch


def _signals(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The columns, chosen first, of each signal that at least one row has a column of."""
    found = {name: [f"{side}_{end}" for side in RESPONSES] for name, end in SIGNALS.items()}
    present = {column for row in rows for column in row}
    return {name: columns for name, columns in found.items() if not present.isdisjoint(columns)}
