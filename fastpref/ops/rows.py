"""Which rows have a label that a loss will read."""

from __future__ import annotations

import torch
from torch import Tensor


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
