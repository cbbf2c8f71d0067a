"""Columns of a dataset in place of a teacher: what ``fastpref kd-cache`` wrote of every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from fastpref.checks import refuse
from fastpref.data.rows import RESPONSES
from fastpref.integrations.trl.config import PreferenceConfig
from fastpref.integrations.trl.passes import CachedReading, Sides, comparisons_of
from fastpref.integrations.trl.signals import missing_columns, sides_of_models
from fastpref.models import lm_head_of
from fastpref.teacher.kd_cache import BIASES, ENTROPIES, TOKEN_IDS, TOKEN_LOGPS, WEIGHTS
from fastpref.teacher.model import head_digest
from fastpref.teacher.store import note_of

MEANS: tuple[str, ...] = (WEIGHTS, ENTROPIES)
TOP_K: tuple[str, ...] = (TOKEN_IDS, TOKEN_LOGPS)
# What fills up columns: nothing is likely outside a response.
FILL = {TOKEN_LOGPS: -torch.inf}
ROW = "fastpref_row"  # the number of a row, while TRL makes its tokens
ROWS_AT_ONCE = 1000


@dataclass
class TeacherColumns:
    """What a teacher says of every token, in columns of a dataset."""

    endings: tuple[str, ...]  # of their names, after the side
    sides: Sides  # whose responses are read
    temperatures: set[float]  # of the divergences
    max_length: int | None
    topk_tail: str
    note: dict[str, Any] | None = None  # what they were made with, the same for all datasets

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        sides = RESPONSES[slice(*self.sides)]
        return tuple(f"{side}_{ending}" for side in sides for ending in self.endings)

    def beside_tokens(self, dataset: Any, name: str, tokenize: Callable[[Any], Any]) -> Any:
        """A dataset with tokens, as ``tokenize`` adds them, without a copy of these columns."""
        if missing := missing_columns(dataset, self.columns):
            expected = f"columns {' and '.join(self.columns)}; add them with `fastpref kd-cache`"
            refuse(f"{name}_dataset", expected, f"no {' and no '.join(missing)}")
        self._agree(dataset, name)
        if not isinstance(dataset, Dataset):
            return tokenize(dataset)
        ours = dataset.with_format(None).select_columns([*self.columns])
        rest = dataset.remove_columns([*self.columns]).add_column(ROW, list(range(len(dataset))))
        tokens = tokenize(rest).with_format(None)
        kept = tokens[ROW][:]  # TRL drops rows whose prompt fills max_length
        if len(kept) < len(ours):
            ours = ours.select(kept)
        # Else concatenating them would flatten both, which copies.
        tokens = tokens.remove_columns(ROW).flatten_indices()
        found = concatenate_datasets([tokens, ours], axis=1)
        self._check_positions(found, name)
        # Lists of lists are read much sooner as arrays.
        return found.with_format("numpy", columns=[*self.columns], output_all_columns=True)

    def _agree(self, dataset: Any, name: str) -> None:
        """Refuse columns that were made for another divergence, or otherwise than others."""
        last = self.columns[-1] if self.endings == TOP_K else f"chosen_{ENTROPIES}"
        note = note_of(dataset, last)
        if note is None:
            return
        if self.note not in (None, note):
            refuse(f"{name}_dataset", f"columns that were made with {self.note}", note)
        self.note = note
        for temperature in self.temperatures - {note["temperature"]}:
            expected = f"columns that were made with temperature {temperature:g}"
            refuse(f"{name}_dataset", expected, f"{note['temperature']:g}")

    def _check_positions(self, dataset: Dataset, name: str) -> None:
        """Refuse rows with more or fewer positions than the student's response has tokens."""
        start, sides = 0, RESPONSES[slice(*self.sides)]
        columns = {side: f"{side}_{self.endings[-1]}" for side in sides}
        lists = ["prompt_ids", *(f"{side}_ids" for side in sides), *columns.values()]
        few = dataset.select_columns(lists).with_format("arrow")
        for batch in few.iter(batch_size=ROWS_AT_ONCE):
            prompts = _lengths(batch, "prompt_ids")
            for side, column in columns.items():
                tokens, found = _lengths(batch, f"{side}_ids"), _lengths(batch, column)
                for row, (prompt, response, count) in enumerate(
                    zip(prompts, tokens, found, strict=True), start
                ):
                    length = prompt + response
                    if self.max_length is not None:
                        length = min(length, self.max_length)
                    # A first token that nothing precedes is predicted by no state.
                    _check_count(column, max(length - max(prompt, 1), 0), count, f"row {row}")
            start += batch.num_rows

    def check_head(self, model: Any) -> None:
        """Refuse a student whose head is not the one that the columns are means of."""
        if self.endings == TOP_K:
            return
        column, head = f"chosen_{WEIGHTS}", lm_head_of(model)
        if any(one is not None and one.requires_grad for one in (head.weight, head.bias)):
            expected = f"a head that does not train, since {column} are means of its rows"
            advice = " (LoRA, requires_grad_(False), or `fastpref kd-cache --top-k`)"
            refuse("model", expected + advice, "one that trains")
        # ZeRO-3 has taken the head to pieces already.
        if self.note is not None and head.weight.numel():
            expected = f"the head that {column} were made with (`fastpref kd-cache --student`)"
            if head_digest(head) != self.note["student_head_digest"]:
                refuse("model", expected, "another one")

    def collate(self, examples: list[dict[str, Any]], mask: Tensor) -> dict[str, Tensor]:
        """(S, T + 1, ...) tensors, by endings, where ``mask`` (2B, T + 1) has the responses."""
        sides = RESPONSES[slice(*self.sides)]
        predicts = mask[self.sides.rows(len(examples))].roll(-1, dims=1) == 1
        predicts[:, -1] = False
        counts = predicts.sum(1).tolist()
        found = {}
        for ending in self.endings:
            columns = [f"{side}_{ending}" for side in sides for _ in examples]
            rows = [example[f"{side}_{ending}"] for side in sides for example in examples]
            dtype = np.int64 if ending == TOKEN_IDS else np.float32
            arrays = [torch.tensor(np.asarray(one, dtype)) for one in rows]
            for row, (column, count, one) in enumerate(zip(columns, counts, arrays, strict=True)):
                _check_count(column, count, len(one), f"row {row % len(examples)} of a batch")
            shape = max(one.shape[1:] for one in arrays)
            whole = torch.full(
                (*predicts.shape, *shape), FILL.get(ending, 0), dtype=arrays[0].dtype
            )
            for place, where, one in zip(whole, predicts, arrays, strict=True):
                if shape:  # some rows may have fewer likeliest tokens
                    place[where, : one.shape[1]] = one
                else:
                    place[where] = one
            found[ending] = whole
        return found

    def reading(self, batch: dict[str, Tensor]) -> CachedReading:
        """What the columns say of a batch."""
        columns = {ending: batch[ending] for ending in self.endings}
        vocab_size = None if self.note is None else self.note.get("vocab_size")
        return CachedReading(columns, self.sides, vocab_size, self.topk_tail)


def columns_of_teacher(args: PreferenceConfig, teacher: Any, dataset: Any) -> TeacherColumns | None:
    """The columns that do in place of a teacher; None where there are none, or one is needed."""
    sides = sides_of_models(args).get("teacher_model")
    first: dict[str, Any] = next(iter(dataset or ()), {})
    found = [endings for endings in (MEANS, TOP_K) if f"chosen_{endings[0]}" in first]
    if sides is None or not found:
        args.refuse_set(["topk_tail"], "no loss reads columns of a teacher's likeliest tokens")
        return None
    if len(found) > 1:
        names = [f"chosen_{endings[0]}" for endings in found]
        refuse("train_dataset", f"{' or '.join(names)}", "both")
    (endings,) = found
    if endings == MEANS:
        args.refuse_set(["topk_tail"], "the dataset's columns leave no token out")
        if f"chosen_{BIASES}" in first:
            endings = (*endings, BIASES)
    compared = [one for one in comparisons_of(args) if "teacher_model" in one.models]
    others = [one.kind for one in compared if one.kind != "forward_kl"]
    if teacher is not None:
        if others or args.lmbda:
            return None
        reason = f"the train dataset has chosen_{endings[0]}"
        refuse("teacher_model", f"None, since {reason}", type(teacher).__name__)
    if others:
        expected = "a model, since the dataset's columns have the forward KL alone, and not"
        refuse("teacher_model", f"{expected} {others[0]!r}", None)
    if args.lmbda:
        expected = "0, since the dataset's columns have nothing of the student's own responses"
        refuse("lmbda", expected, args.lmbda)
    args.refuse_set(["truncation_mode"], "columns of a teacher are of responses cut at their end")
    return TeacherColumns(
        endings, sides, {one.temperature for one in compared}, args.max_length,
        args.topk_tail_of_columns(),
    )  # fmt: skip


@dataclass
class CollatorWithTeacher:
    """A collator, and beside its tensors those of a teacher's columns."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    cache: TeacherColumns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, refusing rows that have not one position for each token."""
        batch = self.collator(examples)
        return {**batch, **self.cache.collate(examples, batch["completion_mask"])}


def _lengths(batch: Any, column: str) -> list[int]:
    lengths: list[int] = pyarrow.compute.list_value_length(batch[column]).to_pylist()
    return lengths


def _check_count(column: str, expected: int, found: int, where: str) -> None:
    """Refuse a row of a column that is not as long as its response."""
    if found != expected:
        meaning = f"{expected} positions, one for each token of the student's response"
        advice = "; `fastpref kd-cache` wants the student's template and max_length"
        refuse(column, meaning + advice, f"{found} ({where})")
