"""Two heads on some rows and the whole vocabulary at a time: values, and gradients of logits.

A block of rows is projected by both heads, normalised, and overwritten by the gradient of the
student's logits: every kind of divergence takes the same matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import multiply, operand_dtype, statistics_dtype, uses_triton
from fastpref.ops.divergences import KINDS, SIGNED, Join, Pair, Settings, times
from fastpref.ops.forward import Reading, reading_of_partial
from fastpref.ops.linear_stats_op import Partial
from fastpref.ops.operands import Logits, take
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

    def of_rows(self, rows: Tensor | None) -> Comparison:
        """The same of some rows (n,); of all for None."""
        reference = self.reference_hidden
        return self._replace(
            teacher_hidden=take(self.teacher_hidden, rows),
            reference_hidden=None if reference is None else take(reference, rows),
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

    has_kernels = True
    of_no_label = math.nan  # what a label outside of these columns has for its logit

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
        self.by_kernels = self.has_kernels and uses_triton(like)
        spares = 5 if probabilities else 4
        self.step, self.piece = self._steps(count, like, spares)
        self.tiles = like.new_empty(2, self.step * width).unbind()
        if not self.by_kernels:
            self.spare = like.new_empty(spares, self.piece * width).unbind()

    def _steps(self, count: int, like: Tensor, spares: int) -> tuple[int, int]:
        """Rows of a block, and of a piece that is computed elementwise in so many buffers."""
        step = rows_per_block(count, self.vocab_size, like)
        return step, min(step, rows_per_piece(self.vocab_size, like))

    def of(self, start: int, stop: int) -> Iterator[slice]:
        """Blocks of some of the rows."""
        return blocks(start, stop, self.step)

    def finish(self) -> None:
        """Finish the numbers, once every row has been read."""
        if self.kind not in SIGNED:
            self.numbers.divergence.clamp_min_(0)

    def reading(self) -> Reading:
        """The student's running numbers and stats, of finished numbers."""
        return reading_of_numbers(self.numbers, self.student.labels)

    def read(self, rows: slice, place: KeptRows | None = None) -> KeptRows:
        """Read one block, write its numbers, and return its gradient: in ``place`` if given."""
        student, teacher = self._tiles(rows)
        if self.by_kernels:
            if place is None:
                places = (self._operand(one) for one in (student, teacher))
                place = KeptRows(next(places), next(places) if self.probabilities else None)
            self._project(rows, student, teacher)
            self._compare_by_kernel(rows, student, teacher, place)
            _spoil_(place.gradient, self.numbers.divergence[rows])
            return place
        if place is not None and place.gradient.dtype == self.dtype:
            student = place.gradient
        self._project(rows, student, teacher)
        for piece in self._pieces(rows):
            self._compare(rows.start + piece.start, student[piece], teacher[piece])
        found = KeptRows(student, teacher if self.probabilities else None)
        if place is not None:
            if place.gradient is not student:
                place.gradient.copy_(student)
            if place.probabilities is not None:
                place.probabilities.copy_(teacher)
        return found

    def read_numbers(self, rows: slice) -> None:
        """Read one block for its numbers alone."""
        if not self.by_kernels:
            self.read(rows)
            return
        student, teacher = self._tiles(rows)
        self._project(rows, student, teacher)
        self._compare_by_kernel(rows, student, teacher)

    def _tiles(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The buffers (n_b, V) of one block's projections."""
        student, teacher = (
            carve(one, rows.stop - rows.start, self.vocab_size) for one in self.tiles
        )
        return student, teacher

    def _pieces(self, rows: slice) -> Iterator[slice]:
        """What of a block is computed elementwise at once, counted from its first row."""
        return blocks(0, rows.stop - rows.start, self.piece)

    def _operand(self, tile: Tensor) -> Tensor:
        """The memory of a tile as one in the dtype of matrix products, which may be narrower."""
        return tile.view(operand_dtype(self.student.hidden))[:, : self.vocab_size]

    def _project(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        """Write both models' projections of one block.

        With a reference the teacher's become log-probabilities less the reference's, whose
        projections are where the student's will be.
        """
        project(self.teacher, rows, teacher)
        if self.reference is not None:
            project(self.reference, rows, student)
            if self.by_kernels:
                from fastpref.kernels.divergences import log_ratio_rows

                transforms = self.teacher.transform, self.reference.transform
                log_ratio_rows(teacher, student, *transforms, self.numbers.divergence[rows])
            else:
                for piece in self._pieces(rows):
                    self._log_ratio(rows.start + piece.start, teacher[piece], student[piece])
        project(self.student, rows, student)

    def _compare_by_kernel(
        self, rows: slice, student: Tensor, teacher: Tensor, place: KeptRows | None = None
    ) -> None:
        """What `_compare` does, of a whole block; the gradient only where it has a place."""
        from fastpref.kernels.divergences import compare_rows

        divergence, *statistics = (one[rows] for one in self.numbers)
        compare_rows(
            student, teacher, self.student.labels_of(rows), self.student.transform,
            self.teacher.transform if self.reference is None else None,
            self.kind, *self.settings, divergence, statistics if self.stats else (),
            *(place or ()),
        )  # fmt: skip

    def _normalise(self, *heads: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`normalise_` logits, each into the tensor beside it."""
        return [normalise_(logits, out=out) for logits, out in heads]

    def _join(self) -> Join | None:
        """For `Pair`, of the first head that was normalised last."""
        return None

    def _log_ratio(self, start: int, teacher: Tensor, reference: Tensor) -> None:
        """Overwrite the teacher's projections by its log-probabilities less the reference's."""
        assert self.reference is not None
        p, r, *_ = (carve(one, len(teacher), self.vocab_size) for one in self.spare)
        (*_, others), (*_, of_reference) = self._normalise(
            (self.teacher.transform.apply_(teacher), p),
            (self.reference.transform.apply_(reference), r),
        )
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
            numbers.target_logit.copy_(at_label.masked_fill_(~inside, self.of_no_label))
        heads = [(logits, q)]
        if self.reference is None:
            heads.append((self.teacher.transform.apply_(teacher), p))
        (maximum, top, others), *of_teacher = self._normalise(*heads)
        if self.stats:
            numbers.maximum.copy_(maximum)
            numbers.others.copy_(others)
            numbers.shortfall.copy_(times(q, logits, out=spare).sum(1).mul_(-1 - others))
        invalid = others * 0
        for *_, others_of_teacher in of_teacher:
            log_ratio_(teacher, others_of_teacher, logits, others)
            invalid += others_of_teacher * 0
        if self.probabilities:
            more[0].copy_(q)
        values, gradient = KINDS[self.kind](
            Pair(q, p, teacher, top, out=student, spare=spare, mixture=mixture, join=self._join()),
            self.settings,
        )
        # Sums leave out what is not a number: rows that have no distribution say so here.
        numbers.divergence.add_(values).add_(invalid)
        _spoil_(gradient, numbers.divergence)
        if damping is not None:
            gradient.mul_(damping)
        if self.probabilities:
            teacher.copy_(more[0] if damping is None else more[0].mul_(damping))
            if labels is not None:
                write_at_labels(teacher, labels, 0, torch.zeros_like(others))


def _spoil_(gradient: Tensor, divergence: Tensor) -> None:
    """Say in the gradient (k, V), too, where a divergence (k,) is not a number.

    One number in a row is enough: a product with the head spreads it over the hidden state.
    """
    gradient[:, 0].masked_fill_(divergence.isnan(), torch.nan)


def reading_of_numbers(numbers: RowNumbers, labels: Tensor | None) -> Reading:
    """What `linear_logps` has of the student, of numbers that are finished."""
    nothing, none = torch.zeros_like(numbers.others), torch.full_like(numbers.others, -math.inf)
    partial = Partial(numbers.maximum, none, numbers.others, numbers.shortfall, nothing)
    return reading_of_partial(partial, numbers.target_logit, labels)


class KeptRows(NamedTuple):
    """What `RowBlocks.read` gives of some rows: every tensor (k, V)."""

    # Of divergences with respect to the student's projections, but for the constant factor of the
    # slope.
    gradient: Tensor
    # The student's, damped like the gradient, 0 at the label; where log-probabilities are wanted.
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
