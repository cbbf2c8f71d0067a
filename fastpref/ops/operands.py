"""What operators with a head begin with: its operands, and which rows a loss will read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op

from fastpref.ops.backend import autocasts, multiply, operand_dtype
from fastpref.ops.tiling import Tiling, blocks, grid_by_columns
from fastpref.ops.torch_tiles import LogitTransform

# The fields of `Operands`, as a schema has them: all operators with a head begin with these.
SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, float temperature, "
    "float logit_scale, float? softcap, int ignore_index, bool compact"
)


class OperatorPair(NamedTuple):
    """One operator under two names, because what it does about the host depends on its arguments.

    A CUDA graph can hold the first. The second waits for a number of rows, and carries the tag by
    which ``torch.compile(mode="reduce-overhead")`` leaves it out of graphs.
    """

    of_all_rows: CustomOpDef
    of_labelled_rows: CustomOpDef

    def of(self, operands: Operands) -> CustomOpDef:
        """The one for these operands."""
        return self.of_labelled_rows if operands.compacts() else self.of_all_rows


def register(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], schema: str
) -> OperatorPair:
    """Register ``function`` as an operator that begins with `Operands`."""
    function = _without_autocast(function)
    pair = OperatorPair(
        custom_op(f"fastpref::{name}", function, mutates_args=(), schema=schema),
        custom_op(
            f"fastpref::{name}_of_labelled_rows", function, mutates_args=(), schema=schema,
            tags=(torch.Tag.cudagraph_unsafe,),
        ),
    )  # fmt: skip
    for op in pair:
        op.register_fake(fake)
    return pair


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same where the operands alone say in which dtypes it computes.

    They have been cast, and what is wider, a sum or a gathered row, is so for its digits.
    """

    @functools.wraps(function)
    def call(hidden: Tensor, *more: Any) -> Any:
        if not autocasts(hidden.device):
            return function(hidden, *more)
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden, *more)

    return call


NO_LABEL = -1  # of a row that is projected without one
LABELS_AT_ONCE = 2048  # rows of the weight that are copied, beside a tile's memory


class Logits(NamedTuple):
    """Logits (n, V) that are computed tile by tile, and never held."""

    hidden: Tensor  # (N, H)
    rows: Tensor | None  # (n,) int64, which of them; None for all
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor | None  # (n,) int64
    transform: LogitTransform

    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        hidden = self.hidden if self.rows is None else self.rows
        return hidden.shape[0], self.weight.shape[0]

    def hidden_of(self, rows: slice) -> Tensor:
        """Hidden states of some of the rows, as `multiply` takes them."""
        hidden = self.hidden[rows] if self.rows is None else take(self.hidden, self.rows[rows])
        return hidden.to(operand_dtype(hidden))

    def project(
        self,
        hidden: Tensor,  # (k, H) as `hidden_of` gives it
        columns: slice,
        out: Tensor,  # (k, w), written
    ) -> Tensor:
        """One tile of ``hidden @ weight.T + bias``, not transformed: ``out``."""
        multiply(hidden, self.weight[columns].T, out)
        return out if self.bias is None else out.add_(self.bias[columns])

    def labels_of(self, rows: slice) -> Tensor | None:
        """Labels of one tile's rows."""
        return None if self.labels is None else self.labels[rows]

    def weight_of_labels(self, rows: slice = slice(None)) -> Tensor:
        """Rows (n, H) of the weight; of any token for a label outside the vocabulary."""
        assert self.labels is not None
        return take(self.weight, self.labels[rows].clamp(0, self.weight.shape[0] - 1))

    def add_weight_of_labels_(self, total: Tensor, coefficients: Tensor) -> None:
        """Add those rows, times (n,), to ``total`` (n, H); nothing for a label below 0."""
        assert self.labels is not None
        coefficients = coefficients.masked_fill(self.labels < 0, 0).unsqueeze(1)
        for rows in blocks(0, len(total), LABELS_AT_ONCE):
            total[rows].addcmul_(self.weight_of_labels(rows), coefficients[rows])

    def grid_by_columns(self, like: Tensor) -> Tiling:
        """The tiles of these logits for the head's gradient, and for what is kept for it."""
        (count, vocab_size), hidden_size = self.shape(), self.hidden.shape[1]
        return grid_by_columns(count, hidden_size, vocab_size, like)


class Operands(NamedTuple):
    """The arguments that every operator with a head begins with."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor | None  # (N,) int64
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    compact: bool

    @classmethod
    def split(cls, arguments: tuple[Any, ...]) -> tuple[Operands, tuple[Any, ...]]:
        """The operands and what follows them among an operator's arguments."""
        count = len(cls._fields)
        return cls(*arguments[:count]), arguments[count:]

    def transform(self) -> LogitTransform:
        """What happens to the projections."""
        return LogitTransform(self.temperature, self.logit_scale, self.softcap)

    def compacts(self) -> bool:
        """Whether labelled rows alone are projected, for which the host reads their number."""
        return self.compact and self.labels is not None

    def rows(self) -> Tensor | None:
        """Indices (n,) of the rows to project; None for all of them."""
        if self.labels is None or not self.compact:
            return None
        return labelled_rows(self.labels, self.weight.shape[0], self.ignore_index)

    def without_ignored(self) -> tuple[Operands, Tensor | None]:
        """The same with nothing in rows that are projected for nothing, and which these are (N,).

        What an ignored row holds, NaN perhaps, then reaches no sum over rows.
        """
        if self.labels is None or self.compact:
            return self, None
        ignored = self.labels == self.ignore_index
        hidden = self.hidden.masked_fill(ignored.unsqueeze(1), 0)
        labels = self.labels.masked_fill(ignored, NO_LABEL)
        return self._replace(hidden=hidden, labels=labels), ignored

    def count(self, rows: Tensor | None) -> int:
        """How many ``rows`` are."""
        return self.hidden.shape[0] if rows is None else rows.numel()

    def note_rows(self, rows: Tensor | None, out: Tensor, n_rows: Tensor) -> None:
        """Write which rows are projected, for the backward pass; nothing where all are."""
        if not self.compacts():
            return
        n_rows.fill_(self.count(rows))
        out.zero_()
        if rows is not None:
            out[: len(rows)] = rows

    def chosen_labels(self, rows: Tensor | None) -> Tensor | None:
        """The labels of ``rows``."""
        return None if self.labels is None else take(self.labels, rows)

    def of_columns(self, columns: slice) -> Operands:
        """The same of a part of the vocabulary; a label elsewhere becomes `NO_LABEL`."""
        labels, bias = self.labels, self.bias
        if labels is not None:
            inside = (labels >= columns.start) & (labels < columns.stop)
            labels = torch.where(inside, labels - columns.start, NO_LABEL)
        return self._replace(
            weight=self.weight[columns], bias=None if bias is None else bias[columns], labels=labels
        )

    def logits(self, rows: Tensor | None) -> Logits:
        """The logits of ``rows``."""
        labels = self.chosen_labels(rows)
        return Logits(self.hidden, rows, self.weight, self.bias, labels, self.transform())

    def for_kernel(
        self, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, LogitTransform]:
        """What a kernel takes that gathers ``rows`` by itself."""
        labels = self.chosen_labels(rows)
        return self.hidden, self.weight, self.bias, labels, rows, self.transform()


def labelled_rows(
    labels: Tensor,  # (N,) int64
    vocab_size: int,
    ignore_index: int,
) -> Tensor | None:
    """Indices (n,) of rows whose label is not ``ignore_index``; None where that is all of them.

    Labels outside the vocabulary raise a ``ValueError``. Both counts come to the host in one read.
    """
    labelled = labels != ignore_index
    outside = labelled & ((labels < 0) | (labels >= vocab_size))
    count, bad = torch.stack((labelled.sum(), outside.sum())).tolist()
    if bad:
        raise ValueError(
            f"labels: expected {ignore_index} (ignore_index) or values in [0, {vocab_size}), "
            f"got {bad} outside, the first of them {int(labels[outside][0])}"
        )
    if count == labels.numel():
        return None
    return torch.nonzero_static(labelled, size=count).squeeze(1)


def take(values: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of ``values``; all of them for None."""
    return values if rows is None else values.index_select(0, rows)


def spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Put ``values`` of some rows back in their places among ``count`` rows, zeros elsewhere."""
    if rows is None:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy_(0, rows, values)
