"""Two heads on some rows and the whole vocabulary at a time: values, and gradients of logits.

A block of rows is projected by both heads, normalised, and overwritten by the gradient of the
student's logits: every kind of divergence takes the same matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import multiply, operand_dtype, statistics_dtype
from fastpref.ops.divergences import KINDS, SIGNED, Pair, Settings, times
from fastpref.ops.operands import Logits
from fastpref.ops.tiling import (
    blocks,
    carve,
    columns_per_cast,
    padded,
    rows_per_block,
    rows_per_piece,
)
from fastpref.ops.torch_tiles import LogitTransform, label_columns, largest, write_at_labels

# What the operators with two heads take between `Operands` and what is their own.
SCHEMA = (
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
    "Tensor? reference_hidden, Tensor? reference_weight, Tensor? reference_bias, "
    "float teacher_temperature, float teacher_logit_scale, float? teacher_softcap, "
    "float reference_logit_scale, float? reference_softcap, "
    "str kind, float teacher_share, bool detach_mixture, float? lowest, float? highest"
)


class Comparison(NamedTuple):
    """What the student is compared with, and how: the arguments of `SCHEMA`."""

    teacher_hidden: Tensor  # (N, H_t)
    teacher_weight: Tensor  # (V, H_t)
    teacher_bias: Tensor | None  # (V,)
    reference_hidden: Tensor | None  # (N, H_r), with kind "advantage" only
    reference_weight: Tensor | None  # (V, H_r)
    reference_bias: Tensor | None  # (V,)
    teacher_temperature: float
    teacher_logit_scale: float
    teacher_softcap: float | None
    reference_logit_scale: float
    reference_softcap: float | None
    kind: str
    teacher_share: float
    detach_mixture: bool
    lowest: float | None
    highest: float | None

    @classmethod
    def split(cls, arguments: tuple[Any, ...]) -> tuple[Comparison, tuple[Any, ...]]:
        """These among an operator's arguments, and what follows them."""
        count = len(cls._fields)
        return cls(*arguments[:count]), arguments[count:]

    def settings(self) -> Settings:
        """What the functions of `divergences` take beside the two distributions."""
        return Settings(self.teacher_share, self.detach_mixture, self.lowest, self.highest)

    def teacher(self, rows: Tensor | None) -> Logits:
        """The teacher's logits of ``rows``."""
        transform = LogitTransform(
            self.teacher_temperature, self.teacher_logit_scale, self.teacher_softcap
        )
        head = self.teacher_weight, self.teacher_bias
        return Logits(self.teacher_hidden, rows, *head, None, transform)

    def reference(self, rows: Tensor | None) -> Logits | None:
        """The reference's logits of ``rows``, at the teacher's temperature."""
        if self.reference_hidden is None or self.reference_weight is None:
            return None
        transform = LogitTransform(
            self.teacher_temperature, self.reference_logit_scale, self.reference_softcap
        )
        head = self.reference_weight, self.reference_bias
        return Logits(self.reference_hidden, rows, *head, None, transform)

    def without(self, ignored: Tensor | None) -> Comparison:
        """The same with nothing in the rows (N,) that are ignored."""
        if ignored is None:
            return self
        mask, reference = ignored.unsqueeze(1), self.reference_hidden
        return self._replace(
            teacher_hidden=self.teacher_hidden.masked_fill(mask, 0),
            reference_hidden=None if reference is None else reference.masked_fill(mask, 0),
        )


class RowNumbers(NamedTuple):
    """What is left of every row: every tensor (n,), in the dtype of statistics."""

    divergence: Tensor
    maximum: Tensor  # the student's largest logit
    others: Tensor  # sum of exp(z - maximum) over all its logits but one that is as large as any
    shortfall: Tensor  # sum of exp(z - maximum) * (maximum - z)
    target_logit: Tensor  # the label's; NaN for a label outside the vocabulary


class RowBlocks:
    """The rows of two heads, block by block, in buffers that every block uses again."""

    def __init__(
        self, student: Logits, comparison: Comparison, *, stats: bool, probabilities: bool
    ) -> None:
        """With ``stats`` all `RowNumbers` are written, without them the divergence alone."""
        self.student, self.teacher = student, comparison.teacher(student.rows)
        self.reference = comparison.reference(student.rows)
        self.kind, self.settings = comparison.kind, comparison.settings()
        self.stats, self.probabilities = stats, probabilities
        self.dtype = statistics_dtype(student.hidden.dtype)
        count, self.vocab_size = student.shape()
        like, width = student.hidden.new_empty(0, dtype=self.dtype), padded(self.vocab_size)
        self.numbers = RowNumbers(*(like.new_zeros(count) for _ in RowNumbers._fields))
        self.step = rows_per_block(count, self.vocab_size, like)
        self.piece = min(self.step, rows_per_piece(self.vocab_size, like))
        self.tiles = like.new_empty(2, self.step * width).unbind()
        self.spare = like.new_empty(5 if probabilities else 4, self.piece * width).unbind()

    def of(self, start: int, stop: int) -> Iterator[slice]:
        """Blocks of some of the rows."""
        return blocks(start, stop, self.step)

    def read(self, rows: slice, gradient: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read one block, and write its numbers.

        Returns the gradient (n_b, V) of its divergences with respect to the student's projections,
        but for the constant factor of the slope, in the place of ``gradient`` if that is given. And
        with ``probabilities`` the student's (n_b, V), damped like the gradient, 0 at the label.
        """
        count = rows.stop - rows.start
        student, teacher = (carve(one, count, self.vocab_size) for one in self.tiles)
        if gradient is not None:
            student = gradient
        pieces = list(blocks(0, count, self.piece))
        project(self.teacher, rows, teacher)
        if self.reference is not None:
            project(self.reference, rows, student)
            for piece in pieces:
                self._log_ratio(rows.start + piece.start, teacher[piece], student[piece])
        project(self.student, rows, student)
        for piece in pieces:
            self._compare(rows.start + piece.start, student[piece], teacher[piece])
        return student, teacher

    def _log_ratio(self, start: int, teacher: Tensor, reference: Tensor) -> None:
        """Overwrite the teacher's projections by its log-probabilities less the reference's."""
        assert self.reference is not None
        spare = carve(self.spare[0], len(teacher), self.vocab_size)
        *_, others = normalise_(self.teacher.transform.apply_(teacher), out=spare)
        *_, of_reference = normalise_(self.reference.transform.apply_(reference), out=spare)
        log_ratio_(teacher, others, reference, of_reference)
        # NaN of rows that have no distribution, which is all that the ratio does not say.
        self.numbers.divergence[start : start + len(teacher)] = (others + of_reference) * 0

    def _compare(self, start: int, student: Tensor, teacher: Tensor) -> None:
        """Overwrite the student's projections by their gradient, the teacher's by probabilities."""
        rows = slice(start, start + len(student))
        numbers = RowNumbers(*(one[rows] for one in self.numbers))
        labels = self.student.labels_of(rows)
        q, p, spare, mixture, *more = (
            carve(one, len(student), self.vocab_size) for one in self.spare
        )
        logits, damping = self.student.transform.apply_and_damp_(student)
        if self.stats and labels is not None:
            column, inside = label_columns(labels, 0, self.vocab_size)
            at_label = logits.gather(1, column).squeeze(1)
            numbers.target_logit.copy_(at_label.masked_fill_(~inside, torch.nan))
        maximum, top, others = normalise_(logits, out=q)
        if self.stats:
            numbers.maximum.copy_(maximum)
            numbers.others.copy_(others)
            numbers.shortfall.copy_(times(q, logits, out=spare).sum(1).mul_(-1 - others))
        invalid = others * 0
        if self.reference is None:
            *_, of_teacher = normalise_(self.teacher.transform.apply_(teacher), out=p)
            log_ratio_(teacher, of_teacher, logits, others)
            invalid += of_teacher * 0
        if self.probabilities:
            more[0].copy_(q)
        values, gradient = KINDS[self.kind](
            Pair(q, p, log_ratio=teacher, top=top, out=student, spare=spare, mixture=mixture),
            self.settings,
        )
        if self.kind not in SIGNED:
            values.clamp_min_(0)
        # Sums leave out what is not a number: rows that have no distribution say so here.
        numbers.divergence.add_(values).add_(invalid)
        if damping is not None:
            gradient.mul_(damping)
        if self.probabilities:
            teacher.copy_(more[0] if damping is None else more[0].mul_(damping))
            if labels is not None:
                write_at_labels(teacher, labels, 0, torch.zeros_like(others))


class KeptRows(NamedTuple):
    """What `RowBlocks.read` gives of the first rows: every tensor (k, V)."""

    gradient: Tensor
    probabilities: Tensor | None

    @classmethod
    def of(cls, cache: Tensor, student: Logits, *, probabilities: bool) -> KeptRows:
        """Their places in a flat buffer of bytes: as many rows as it has room for."""
        (count, vocab_size), dtype = student.shape(), operand_dtype(student.hidden)
        count = min(count, cache.numel() // bytes_of_rows(1, vocab_size, dtype, probabilities))
        places = cache[: bytes_of_rows(count, vocab_size, dtype, probabilities)].view(dtype)
        size = count * padded(vocab_size)
        tiles = [
            carve(places[start:], count, vocab_size) for start in (0, size)[: 1 + probabilities]
        ]
        return cls(tiles[0], tiles[1] if probabilities else None)

    def of_rows(self, rows: slice) -> KeptRows:
        """Those of some of them."""
        more = self.probabilities
        return KeptRows(self.gradient[rows], None if more is None else more[rows])


def bytes_of_rows(count: int, vocab_size: int, dtype: torch.dtype, probabilities: bool) -> int:
    """What it takes to keep so many rows; both sizes may be symbolic."""
    return count * padded(vocab_size) * dtype.itemsize * (2 if probabilities else 1)


def normalise_(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract each row's largest logit, and write the probabilities (k, V) to ``out``.

    Returns that logit (k,), its column (k, 1), and the sum (k,) of the others' exponentials: the
    logarithm of one more is right to the last digit where one token is all but certain. It is NaN
    where a row has an infinite logit, or none above -inf.
    """
    maximum, top = largest(logits)
    column = top.unsqueeze(1)
    torch.exp(logits.sub_(maximum.unsqueeze(1)), out=out)
    others = out.scatter_(1, column, 0).sum(1).add_(maximum * 0)
    out.scatter_(1, column, 1).mul_((1 / (1 + others)).unsqueeze(1))
    return maximum, column, others


def log_ratio_(above: Tensor, others_above: Tensor, below: Tensor, others_below: Tensor) -> Tensor:
    """Overwrite ``above`` by log-probabilities less those of ``below``, as `normalise_` left both.

    0 where both are -inf, of tokens that both heads mask.
    """
    normaliser = (others_below.log1p() - others_above.log1p()).unsqueeze(1)
    return above.sub_(below).add_(normaliser).nan_to_num_(0, torch.inf, -torch.inf)


def project(logits: Logits, rows: slice, out: Tensor) -> None:
    """Projections (n_b, V) of some rows on the whole vocabulary: ``out``."""
    hidden = logits.hidden_of(rows)
    if torch.float64 in (hidden.dtype, out.dtype):  # of one of the two models alone
        hidden = hidden.to(out.dtype)
    for columns in columns_of(logits, out):
        logits.project(hidden, columns, out[:, columns])


def product(gradient: Tensor, logits: Logits, out: Tensor) -> None:
    """``gradient @ weight``: (n_b, V) and (V, H), to ``out`` (n_b, H) in the wide dtype."""
    dtype = logits.hidden_of(slice(0, 0)).dtype
    for columns in columns_of(logits, gradient):
        operand = gradient[:, columns].to(dtype)
        multiply(operand, logits.weight[columns], out, add=columns.start > 0)


def columns_of(logits: Logits, like: Tensor) -> Iterator[slice]:
    """Columns of one product after another: all at once where no operand has to be cast."""
    vocab_size, hidden_size = logits.weight.shape
    if logits.weight.dtype == like.dtype:
        return blocks(0, vocab_size, vocab_size)
    return blocks(0, vocab_size, columns_per_cast(hidden_size, like))
