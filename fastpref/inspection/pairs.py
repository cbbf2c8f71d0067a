"""The pairs that are looked at: which rows, their tokens, and the text of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastpref.checks import refuse
from fastpref.data.rows import BadRow, BadRowsError
from fastpref.data.tokens import TokenizedPair, tokenize_rows
from fastpref.teacher.precompute import context_length, rows_of

CONTEXT_TOKENS = 8  # of a prompt, which say how the first token of a response is written


class Reader(NamedTuple):
    """Models that read the same tokens, and their tokenizer."""

    tokenizer: Any
    models: list[Any]


class SelectedPairs(NamedTuple):
    """The same rows in the tokens of each reader, and the rows that were left out."""

    of_readers: list[list[TokenizedPair]]
    skipped: list[int]


class ShownPair(NamedTuple):
    """A pair in text: what is shown of it."""

    row: int  # in the dataset
    prompt: str
    chosen: list[str]  # by token, of the tokens that the model predicts
    rejected: list[str]


def select_pairs(
    dataset: Any,
    readers: Sequence[Reader],
    *,
    count: int,
    max_length: int | None,
    skip_bad_rows: bool,
) -> SelectedPairs:
    """Tokenize ``count`` rows that are spread evenly over a dataset, for every reader.

    A sorted dataset would be seen from one end if its first rows were taken.
    """
    rows = rows_of(dataset)
    places = spread(len(rows), count)
    rows = [rows[place] for place in places]
    of_readers, bad = [], dict[int, str]()
    for tokenizer, models in readers:
        pairs, defects = tokenize_rows(
            rows, tokenizer, max_length=max_length, context_length=context_length(models)
        )
        of_readers.append(pairs)
        bad |= {places[row]: reason for row, reason in defects if places[row] not in bad}
    if bad and not skip_bad_rows:
        raise BadRowsError([BadRow(row, reason) for row, reason in sorted(bad.items())])
    kept = [
        [pair._replace(row=places[pair.row]) for pair in pairs if places[pair.row] not in bad]
        for pairs in of_readers
    ]
    if len(kept[0]) < 2:
        refuse("dataset", "at least two preference pairs", str(len(kept[0])))
    return SelectedPairs(kept, sorted(bad))


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` of ``length`` places, at even distances."""
    count = min(length, count)
    return [place * length // count for place in range(count)]


def shown_pair(pair: TokenizedPair, tokenizer: Any, counts: tuple[int, int]) -> ShownPair:
    """A pair in text, of its responses the last ``counts`` tokens, those that are predicted."""
    prompt, sides = pair.prompt.tolist(), (pair.chosen.tolist(), pair.rejected.tolist())
    chosen, rejected = (
        token_texts(tokenizer, prompt + side[:-count], side[-count:])
        for side, count in zip(sides, counts, strict=True)
    )
    return ShownPair(pair.row, _decode(tokenizer, prompt), chosen, rejected)


def token_texts(tokenizer: Any, before: list[int], tokens: list[int]) -> list[str]:
    """The text that each token adds to those before it.

    A token alone may decode to another text (without the space before a word), or to none: where
    several tokens make one character it is the last one's, and the others' text is empty.
    """
    context = before[-CONTEXT_TOKENS:]
    texts: list[str] = []
    written = len(context)  # tokens whose text is complete
    ids = context + tokens
    start = 0  # of the window that is decoded
    for end in range(len(context) + 1, len(ids) + 1):
        old, new = _decode(tokenizer, ids[start:written]), _decode(tokenizer, ids[start:end])
        # The replacement character: bytes that are no character yet. Not for longer than one takes.
        if new.endswith("\N{REPLACEMENT CHARACTER}") and end - written < 4 and end < len(ids):
            texts.append("")
            continue
        texts.append(new[len(old) :])
        start, written = max(written - 1, 0), end
    return texts


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
