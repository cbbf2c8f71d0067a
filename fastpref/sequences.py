"""Sequences of tokens, padded or packed, and the pairs they are stacked in.

Padded tensors are (2B, T, ...). Packed ones are flat, (N, ...): sequence ``s`` owns positions
``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, and the label of its last position is ``ignore_index``,
since nothing follows it. Either way the first B sequences are chosen, the others rejected.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastpref.checks import (
    check_device,
    check_floating,
    check_ignore_index,
    check_integers,
    refuse,
)

# The label of every position behind unread boundaries that are wrong: outside any vocabulary.
SPOILED = torch.iinfo(torch.int64).max
WITHOUT_FLOAT64 = ("mps", "xpu")  # of the latter some devices


def check_pairs(
    labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, *, read: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`check_sequences`, and refuse what is not stacked in pairs."""
    check_integers("labels", labels)
    if cu_seqlens is None:
        if labels.dim() != 2 or labels.shape[0] % 2 or not labels.shape[0]:
            refuse(
                "labels",
                "shape (2B, T) with chosen rows first and as many rejected rows after them "
                "(or flat labels with cu_seqlens)",
                tuple(labels.shape),
            )
    else:
        check_integers("cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 3 or cu_seqlens.shape[0] % 2 == 0:
            refuse("cu_seqlens", "shape (2B + 1,), B pairs", tuple(cu_seqlens.shape))
    return check_sequences(labels, cu_seqlens, ignore_index, read=read)


def check_sequences(
    labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, *, read: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Refuse labels that are neither padded (S, T) nor packed (N,), with boundaries (S + 1,).

    The host reads ``cu_seqlens`` to check them. Without ``read`` it never waits for the device, and
    where they are wrong every label becomes one that gives NaN, ``SPOILED``.

    Returns labels and boundaries as int64, which holds any ``ignore_index``.
    """
    check_integers("labels", labels)
    check_ignore_index(ignore_index)
    labels = labels.to(torch.int64)
    if cu_seqlens is None:
        if labels.dim() != 2:
            refuse("labels", "shape (S, T), or flat with cu_seqlens", tuple(labels.shape))
        return labels, None
    check_integers("cu_seqlens", cu_seqlens)
    check_device("cu_seqlens", cu_seqlens, "labels", labels)
    if labels.dim() != 1 or not labels.shape[0]:
        refuse("labels", "shape (N,), N above 0, with cu_seqlens", tuple(labels.shape))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        refuse("cu_seqlens", "shape (S + 1,), S sequences", tuple(cu_seqlens.shape))
    cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    if read:
        return labels, _checked_boundaries(cu_seqlens, labels, ignore_index)
    cu_seqlens, labels = _unread_boundaries(cu_seqlens, labels, ignore_index)
    return labels, cu_seqlens


def check_states(
    name: str, states: Tensor, labels: Tensor, cu_seqlens: Tensor | None, *, vectors: bool
) -> None:
    """Refuse per-state tensors that lack the state after the last token.

    ``states`` is (2B, T + 1) beside labels (2B, T), or (N,) beside packed labels (N,); with
    ``vectors`` it has a last dimension more, H.
    """
    check_floating(name, states)
    leading = labels.shape if cu_seqlens is not None else (labels.shape[0], labels.shape[1] + 1)
    if states.dim() != len(leading) + vectors or tuple(states.shape[: len(leading)]) != leading:
        meaning = (
            "one position for each of the packed labels"
            if cu_seqlens is not None
            else "one position more than labels, the state after the last token"
        )
        sizes = ", ".join([*map(str, leading), *(["H"] if vectors else [])])
        refuse(name, f"shape ({sizes}) ({meaning})", tuple(states.shape))
    check_device(name, states, "labels", labels)


def labels_of_states(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """One label per state: padded labels (2B, T) get the last state's, ``ignore_index``."""
    return labels if cu_seqlens is not None else pad(labels, (0, 1), value=ignore_index)


def sequence_sum(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum (2B, T) or packed (N,) numbers over each sequence: (2B,) of the same dtype."""
    if cu_seqlens is None:
        return values.sum(-1)
    # index_add takes one number after the other and so rounds more than sum, which adds by pairs.
    wide = values if values.device.type in WITHOUT_FLOAT64 else values.to(torch.float64)
    sums = wide.new_zeros(cu_seqlens.shape[0] - 1)
    sums = sums.index_add(0, sequence_of_position(values.shape[0], cu_seqlens), wide)
    return sums.to(values.dtype)


def running_sum(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum of all earlier numbers of the same sequence, for (2B, T) or packed (N,) numbers.

    By doubling: a cumsum, which on GPUs may differ from run to run, would carry NaN and infinity
    of packed sequences into later ones.
    """
    count = values.shape[-1]
    position = torch.arange(count, device=values.device)
    if cu_seqlens is not None:
        position = position - cu_seqlens[sequence_of_position(count, cu_seqlens)]
    found = torch.where(position > 0, values.roll(1, -1), 0)
    step = 1  # every sum has so many numbers, or all that there are before it
    while step < count:
        found = found + torch.where(position >= step, found.roll(step, -1), 0)
        step *= 2
    return found


def last_position(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where ``mask`` (2B, T) or packed (N,) is last True, (2B,), counted along the last dimension.

    -1 for a sequence without any.
    """
    position = torch.arange(mask.shape[-1], device=mask.device)
    position = torch.where(mask, position, -1)
    if cu_seqlens is None:
        return position.amax(-1)
    last = position.new_full((cu_seqlens.shape[0] - 1,), -1)
    sequence = sequence_of_position(mask.shape[0], cu_seqlens)
    return last.scatter_reduce(0, sequence, position, "amax")


def sequence_of_position(count: int, boundaries: Tensor) -> Tensor:
    """Which sequence each of ``count`` positions belongs to (N,), by boundaries (2B + 1,)."""
    positions = torch.arange(count, device=boundaries.device, dtype=boundaries.dtype)
    return torch.searchsorted(boundaries[1:-1], positions, right=True)


def offsets(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Where each sequence starts and the last one ends, (2B + 1,), in flattened labels."""
    if cu_seqlens is not None:
        return cu_seqlens
    return torch.arange(labels.shape[0] + 1, device=labels.device) * labels.shape[1]


@torch.library.custom_op("fastpref::checked_boundaries", mutates_args=())
def _checked_boundaries(cu_seqlens: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return (2B + 1,) boundaries that were read and found right.

    An operator, so that compiled code checks them too.
    """
    never_falls, one_prediction_short = _boundary_rules(cu_seqlens, labels, ignore_index)
    checks = torch.stack((never_falls, one_prediction_short)).tolist()
    if not checks[0]:
        refuse(
            "cu_seqlens",
            f"boundaries that never fall, from 0 to {labels.shape[0]}, the length of labels",
            cu_seqlens.tolist(),
        )
    if not checks[1]:
        refuse(
            "labels",
            f"{ignore_index} (ignore_index) at the last position of every packed sequence, "
            "which predicts nothing",
            "a token there",
        )
    return cu_seqlens.clone()


@_checked_boundaries.register_fake
def _(cu_seqlens: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return torch.empty_like(cu_seqlens)


def _unread_boundaries(
    cu_seqlens: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Where boundaries are wrong, cut evenly instead and spoil all labels, without a host read.

    A label outside any vocabulary gives NaN, which is how wrong input shows where nobody waits.
    An even cut leaves no sequence without one, if there are positions for all.
    """
    sequences = cu_seqlens.shape[0] - 1
    evenly = torch.arange(sequences + 1, device=labels.device) * labels.shape[0] // sequences
    right = torch.stack(_boundary_rules(cu_seqlens, labels, ignore_index)).all()
    return torch.where(right, cu_seqlens, evenly), torch.where(right, labels, SPOILED)


def _boundary_rules(cu_seqlens: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Whether boundaries rise from 0 to N, and whether every sequence's last label is ignored."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    last_label = labels[(ends - 1).clamp(0, labels.shape[0] - 1)]
    spans = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == labels.shape[0])
    rises = (ends >= starts).all()
    return spans & rises, ((ends <= starts) | (last_label == ignore_index)).all()
