"""Look at a teacher before training with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import check_number, refuse
from fastpref.data.rows import SHOWN
from fastpref.data.tokens import TokenizedPair, check_max_length, check_same_vocabulary
from fastpref.extras import require_extra
from fastpref.inspection.files import read_files
from fastpref.inspection.measures import SignalMeasures, measure
from fastpref.inspection.pairs import Reader, SelectedPairs, ShownPair, select_pairs, shown_pair
from fastpref.inspection.readings import read_signals, read_student
from fastpref.inspection.signals import IMPLICIT_REWARD, Signal
from fastpref.inspection.verdicts import verdict
from fastpref.teacher.shaping_columns import ShapingOptions, check_other_model

if TYPE_CHECKING:
    import datasets

MODULES = ("accelerate", "datasets", "jinja2", "tqdm", "transformers", "trl")


class Inspection(NamedTuple):
    """What `inspect_teacher` and `inspect_values` return."""

    measures: list[SignalMeasures]  #: the numbers, by signal
    verdicts: list[str]  #: what they mean, by signal
    facts: dict[str, str]  #: what was looked at, for the page
    signals: list[Signal]  #: the numbers of every state, by signal
    pairs: list[ShownPair]  #: in text
    student_gaps: Tensor | None  #: (pairs,) float64, beta times the student's log-prob gap


def inspect_teacher(
    dataset: datasets.Dataset | Iterable[Mapping[str, Any]] | str | Path,
    model: Any,
    tokenizer: Any,
    *,
    reference: Any = None,
    reference_tokenizer: Any = None,
    student: Any = None,
    student_tokenizer: Any = None,
    beta: float = 0.1,
    pairs: int = 200,
    max_length: int | None = None,
    batch_size: int = 8,
    skip_bad_rows: bool = False,
) -> Inspection:
    r"""Ask of each of a teacher's signals whether it tells chosen from rejected, before training.

    .. math:: \Delta\Psi = \Psi(y_w) - \Psi(y_l), \qquad
              \Psi(y) = \sum_t \phi(s_{t+1}) - \phi(s_t) \quad\text{or}\quad \sum_t R(s_t, a_t)

    The signals are the potentials and the rewards of actions of table 5 of TVKD (`Preference
    Distillation via Value based Reinforcement Learning <https://arxiv.org/abs/2509.16965>`_), and
    with a reference the implicit reward. Each batch goes through the teacher once for all of them.

    Args:
        dataset: Preference pairs, as `fastpref.teacher.add_shaping` takes them.
        model: The teacher, a causal language model of transformers, on its device.
        tokenizer: The teacher's own tokenizer.
        reference: The model that the teacher's preference training started from, for the implicit
            reward; it reads the teacher's tokens.
        reference_tokenizer: Its tokenizer, whose vocabulary has to be the teacher's; None where it
            is ``tokenizer``.
        student: The model that would be trained, to compare its log-probabilities with the signals.
        student_tokenizer: The student's own tokenizer; None where it is ``tokenizer``.
        beta: Scales the student's log-probabilities, as in `fastpref.tvkd_loss`, and the implicit
            reward.
        pairs: How many rows are read, spread evenly over the dataset.
        max_length: Cut sequences after so many tokens, as TRL's ``max_length``.
        batch_size: Pairs per batch.
        skip_bad_rows: Leave rows out that cannot be used, instead of refusing them all.

    Returns:
        `Inspection`: ``measures`` are the numbers of each signal, ``verdicts`` a sentence on each.
        `write_page` makes a page of it.

    Raises:
        ValueError: Rows that cannot be used, by their index; fewer than two pairs; a model whose
            head fastpref does not know; tokenizers of teacher and reference that differ; numbers
            out of range, or not finite.
        ImportError: Without the extra "teacher".

    Example:
        >>> from fastpref.teacher import load_teacher
        >>> def look(name, pairs):
        ...     for sentence in inspect_teacher(pairs, *load_teacher(name)).verdicts:
        ...         print(sentence)
    """
    check_inspection(beta, pairs, max_length, batch_size)
    require_extra("teacher", "fastpref.inspection.inspect_teacher", *MODULES)
    if reference_tokenizer is not None:
        check_same_vocabulary(
            "reference_tokenizer", reference_tokenizer, tokenizer, whose="teacher"
        )
    if reference is not None:
        check_other_model(ShapingOptions(IMPLICIT_REWARD), model, reference)
    readers = [Reader(tokenizer, [model] if reference is None else [model, reference])]
    if student is not None:
        readers.append(Reader(student_tokenizer or tokenizer, [student]))
    chosen = select_pairs(
        dataset, readers, count=pairs, max_length=max_length, skip_bad_rows=skip_bad_rows
    )
    signals = read_signals(
        chosen.of_readers[0], model, reference=reference, beta=beta, batch_size=batch_size
    )
    facts = {"teacher": name_of(model), "dtype": str(model.dtype).removeprefix("torch.")}
    if reference is not None:
        facts["reference"] = name_of(reference)
    return _inspection(signals, chosen, tokenizer, student, facts, beta=beta, batch_size=batch_size)


def inspect_values(
    files: str | Path | Sequence[str | Path],
    tokenizer: Any,
    *,
    student: Any = None,
    student_tokenizer: Any = None,
    beta: float = 0.1,
    pairs: int = 200,
    batch_size: int = 8,
    skip_bad_rows: bool = False,
) -> Inspection:
    r"""Ask the same of values that ``fastpref values --per-token`` wrote, without the teacher.

    .. math:: \Psi(y) = \sum_t \gamma \phi(s_{t+1}) - \phi(s_t)

    TVKD (`Preference Distillation via Value based Reinforcement Learning
    <https://arxiv.org/abs/2509.16965>`_). The shaping is the one that the file has, with its
    discount, its end and its form.

    Args:
        files: The Parquet file, or several of the same rows, each with another potential or other
            settings.
        tokenizer: The teacher's own tokenizer, for the text of the tokens.
        student: The model that would be trained, to compare its log-probabilities with the values.
        student_tokenizer: None where it is ``tokenizer``.
        beta: Scales the student's log-probabilities.
        pairs: How many rows are read, spread evenly over the files.
        batch_size: Pairs per batch of the student.
        skip_bad_rows: Leave rows out that the student cannot read, instead of refusing them all.

    Returns:
        `Inspection`, as `inspect_teacher`, of the files' potentials.

    Raises:
        ValueError: A file that fastpref did not write, that lacks the values of every token, or was
            made with another tokenizer or template; files of different rows.
        ImportError: Without the extra "teacher".

    Example:
        >>> def look(file, tokenizer):
        ...     return inspect_values(file, tokenizer).measures[0].ranked_first.share
    """
    check_inspection(beta, pairs, None, batch_size)
    require_extra("teacher", "fastpref.inspection.inspect_values", *MODULES)
    files = [files] if isinstance(files, str | Path) else list(files)
    found = read_files([Path(file) for file in files], tokenizer)
    readers = [Reader(tokenizer, [])]
    if student is not None:
        readers.append(Reader(student_tokenizer or tokenizer, [student]))
    chosen = select_pairs(
        found.dataset,
        readers,
        count=pairs,
        max_length=found.max_length,
        skip_bad_rows=skip_bad_rows,
    )
    signals = found.signals([pair.row for pair in chosen.of_readers[0]])
    return _inspection(
        signals, chosen, tokenizer, student, found.facts, beta=beta, batch_size=batch_size
    )


def check_inspection(beta: float, pairs: int, max_length: int | None, batch_size: int) -> None:
    """Refuse what would fail only after the models have been loaded."""
    check_number("beta", beta, above=0)
    check_max_length(max_length)
    for name, value, least in (("pairs", pairs, 2), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            refuse(name, f"a number of pairs, at least {least}", repr(value))


def name_of(model: Any) -> str:
    """What a model was loaded as."""
    return str(model.config.name_or_path) or type(model).__name__


def _inspection(
    signals: list[Signal],
    chosen: SelectedPairs,
    tokenizer: Any,
    student: Any,
    facts: dict[str, str],
    *,
    beta: float,
    batch_size: int,
) -> Inspection:
    """Measure the signals, beside a student where there is one."""
    pairs = chosen.of_readers[0]
    student_gaps = None
    if student is not None:
        gaps = read_student(chosen.of_readers[1], student, batch_size=batch_size)
        student_gaps = beta * gaps
        facts = {**facts, "student": name_of(student)}
    if student is not None or "reference" in facts:
        facts = {**facts, "beta": f"{beta:g}"}
    measures = [measure(signal, _length_gaps(pairs), student_gaps) for signal in signals]
    counts = [tuple(len(curve) - 1 for curve in curves) for curves in signals[0].curves]
    shown = [
        shown_pair(pair, tokenizer, (chosen, rejected))
        for pair, (chosen, rejected) in zip(pairs, counts, strict=True)
    ]
    facts = {**facts, "pairs": str(len(pairs)), "tokens": f"{sum(map(sum, counts)):,}"}
    if chosen.skipped:
        first = ", ".join(map(str, chosen.skipped[:SHOWN]))
        more = " …" if len(chosen.skipped) > SHOWN else ""
        facts["left out"] = f"{len(chosen.skipped)} rows: {first}{more}"
    return Inspection(measures, list(map(verdict, measures)), facts, signals, shown, student_gaps)


def _length_gaps(pairs: list[TokenizedPair]) -> Tensor:
    gaps = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    return torch.tensor(gaps, dtype=torch.float64)
