"""From preference rows to tokens, exactly as TRL's ``DPOTrainer`` makes them."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastpref.checks import refuse
from fastpref.data.rows import BadRow, row_defect

# int32: four bytes per token, since a whole dataset is in memory.
TokenIds: TypeAlias = "array[int]"
IGNORE_INDEX = -100


class TokenizedPair(NamedTuple):
    """A row of the dataset in tokens."""

    row: int  # in the dataset
    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds

    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def tokenize_rows(
    rows: Iterable[Any], tokenizer: Any, *, max_length: int | None, context_length: int | None
) -> tuple[list[TokenizedPair], list[BadRow]]:
    """Tokenize what can be tokenized, and list the rest.

    Like TRL's collator with ``truncation_mode="keep_start"``, ``max_length`` cuts the end of a
    sequence; a row whose prompt alone fills it is bad, as is, without ``max_length``, one that
    is longer than the model's context.
    """
    if not callable(tokenizer):
        refuse("tokenizer", "a tokenizer of transformers", type(tokenizer).__name__)
    pairs, bad = [], []
    for index, row in enumerate(rows):
        defect = row_defect(row)
        if defect is None:
            try:
                prompt, chosen, rejected = _tokenize_row(row, tokenizer)
            except (ImportError, MemoryError):  # no fault of the row
                raise
            except Exception as error:  # templates raise what they like, jinja2's errors too
                defect = f"cannot be tokenized: {str(error).splitlines()[0]}"
        if defect is None:
            room = None if max_length is None else max(max_length - len(prompt), 0)
            pair = TokenizedPair(index, prompt, chosen[:room], rejected[:room])
            defect = _length_defect(pair, max_length, context_length)
        if defect is None:
            pairs.append(pair)
        else:
            bad.append(BadRow(index, defect))
    return pairs, bad


def check_max_length(max_length: int | None) -> None:
    """Refuse a length that leaves no room for a token and the one before it."""
    if max_length is None:
        return
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        refuse("max_length", "a number of tokens, at least 2, or None", repr(max_length))


def tokenizer_settings(tokenizer: Any) -> dict[str, str | None]:
    """What tells one tokenizer from another: its name, template, end token and a digest."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "tokenizer": str(tokenizer.name_or_path),
        "chat_template": tokenizer.chat_template,
        "eos_token": tokenizer.eos_token,
        "tokenizer_digest": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
    }


def check_same_vocabulary(
    argument: str, tokenizer: Any, other: Any, *, whose: str = "student", when: str = ""
) -> None:
    """Refuse the tokenizer of a model that cannot read another one's tokens."""
    key = "tokenizer_digest"
    if tokenizer_settings(tokenizer)[key] != tokenizer_settings(other)[key]:
        refuse(
            argument,
            f"the {whose}'s vocabulary, since it reads the {whose}'s tokens{when}",
            f"another one (tokenizers {tokenizer.name_or_path!r} and {other.name_or_path!r})",
        )


def pad_pairs(pairs: list[TokenizedPair]) -> tuple[Tensor, Tensor, Tensor]:
    """Stack B pairs: tokens (2B, T + 1), attention mask (2B, T + 1) and shifted labels (2B, T)."""
    width = max(max(pair.length() for pair in pairs), 2)
    tokens = torch.zeros(2 * len(pairs), width, dtype=torch.int64)
    attention = torch.zeros_like(tokens)
    labels = torch.full((2 * len(pairs), width - 1), IGNORE_INDEX)
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    for row, (prompt, response) in enumerate(rows):
        sequence = torch.tensor(prompt + response)
        tokens[row, : len(sequence)] = sequence
        attention[row, : len(sequence)] = 1
        # A first token that nothing precedes is predicted by no state.
        first = max(len(prompt), 1)
        labels[row, first - 1 : len(sequence) - 1] = sequence[first:]
    return tokens, attention, labels


def _tokenize_row(row: Mapping[str, Any], tokenizer: Any) -> tuple[TokenIds, TokenIds, TokenIds]:
    from trl.data_utils import extract_prompt, is_conversational

    if "prompt" not in row:
        row = {**row, **extract_prompt({side: row[side] for side in ("chosen", "rejected")})}
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if is_conversational({"chosen": chosen}):
        tools = row.get("tools")
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
            "tokenize": True,
            "return_dict": True,
        }
        apply = tokenizer.apply_chat_template
        prompt_ids = apply(prompt, add_generation_prompt=True, **options)["input_ids"]
        sequences = [apply(prompt + side, **options)["input_ids"] for side in (chosen, rejected)]
    else:
        end = tokenizer.eos_token
        if end is None:
            raise ValueError("the tokenizer has no eos_token to end a response with")
        sides = (side if side.endswith(end) else side + end for side in (chosen, rejected))
        prompt_ids = tokenizer(text=prompt)["input_ids"]
        sequences = [tokenizer(text=prompt + side)["input_ids"] for side in sides]
    # A response starts where the prompt and the whole part ways: templates and tokenizers may
    # write the end of a prompt differently when something follows it.
    start = min(_common_prefix(prompt_ids, sequence) for sequence in sequences)
    chosen_ids, rejected_ids = (array("i", sequence[start:]) for sequence in sequences)
    return array("i", prompt_ids[:start]), chosen_ids, rejected_ids


def _common_prefix(one: list[int], other: list[int]) -> int:
    same = takewhile(lambda ids: ids[0] == ids[1], zip(one, other, strict=False))
    return sum(1 for _ in same)


def _length_defect(
    pair: TokenizedPair, max_length: int | None, context_length: int | None
) -> str | None:
    if max_length is not None and len(pair.prompt) >= max_length:
        return f"the prompt alone has {len(pair.prompt)} tokens, max_length is {max_length}"
    if context_length is not None and pair.length() > context_length:
        return f"{pair.length()} tokens, the model reads {context_length}"
    if min(len(pair.chosen), len(pair.rejected)) == 0:
        return "a response has no token of its own"
    if len(pair.prompt) + min(len(pair.chosen), len(pair.rejected)) < 2:
        return "a response of one token that nothing precedes"
    return None
