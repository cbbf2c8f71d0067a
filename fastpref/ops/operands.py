"""What operators with a head begin with: its operands, and which rows a loss will read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.ops.backend import multiply, operand_dtype
from fastpref.ops.tiling import carve
from fastpref.ops.torch_tiles import LogitTransform

# The fields of `Operands`, as a schema has them: all operators with a head begin with these.
SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, float temperature, "
    "float logit_scale, float? softcap, int ignore_index, bool compact"
)


class Logits(NamedTuple):
    """Logits (n, V) that are computed tile by tile, and never held."""

    hidden: Tensor  # (n, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    labels: Tensor | None  # (n,) int64
    transform: LogitTransform

    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.hidden.shape[0], self.weight.shape[0]

    def in_dtype_of_products(self) -> Logits:
        """The same with hidden states as `multiply` takes them."""
        return self._replace(hidden=self.hidden.to(operand_dtype(self.hidden)))

    def project(
        self,
        rows: slice,
        columns: slice,
        scratch: Tensor,  # flat, overwritten
    ) -> Tensor:  # a view of scratch
        """One tile of ``hidden @ weight.T + bias``, not transformed."""
        tile = carve(scratch, rows.stop - rows.start, columns.stop - columns.start)
        multiply(self.hidden[rows], self.weight[columns].T, tile)
        return tile if self.bias is None else tile.add_(self.bias[columns])

    def labels_of(self, rows: slice) -> Tensor | None:
        """Labels of one tile's rows."""
        return None if self.labels is None else self.labels[rows]


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

    def rows(self) -> Tensor | None:
        """Indices (n,) of the rows to project; None for all of them."""
        if self.labels is None or not self.compact:
            return None
        return labelled_rows(self.labels, self.weight.shape[0], self.ignore_index)

    def count(self, rows: Tensor | None) -> int:
        """How many ``rows`` are."""
        return self.hidden.shape[0] if rows is None else rows.numel()

    def logits(self, rows: Tensor | None) -> Logits:
        """The logits of ``rows``."""
        labels = None if self.labels is None else take(self.labels, rows)
        return Logits(take(self.hidden, rows), self.weight, self.bias, labels, self.transform())


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
