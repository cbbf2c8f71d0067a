"""One head on some rows and the whole vocabulary at a time: the softmax of its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.ops.divergence_rows import normalise_, project
from fastpref.ops.divergences import times
from fastpref.ops.operands import Logits
from fastpref.ops.tiling import blocks, carve, padded, rows_per_block, rows_per_piece

NO_TOKEN = torch.iinfo(torch.int64).min  # among the ids of tokens to leave out: none


class Softmax(NamedTuple):
    """Of some rows; not a number where no logit is above -inf, or one is infinite.

    Where tokens are left out and no other is above -inf, the probabilities are 0.
    """

    rows: slice
    probabilities: Tensor  # (k, V), overwritten by what the next block has
    top: Tensor  # (k, 1) int64, a token as probable as any
    maximum: Tensor  # (k,) the largest logit
    others: Tensor  # (k,) sum of exp(logit - maximum) over all but the top
    entropy: Tensor  # (k,)


def softmax_blocks(
    logits: Logits,
    dtype: torch.dtype,  # of what is computed
    *,
    without: Tensor | None = None,  # (n, K) int64, tokens to leave out of every row
    damped: bool = False,  # by the slope of a soft cap
) -> Iterator[Softmax]:
    """Every row, in blocks that share a buffer."""
    (count, vocab_size), like = logits.shape(), logits.hidden.new_empty(0, dtype=dtype)
    step = rows_per_block(count, vocab_size, like)
    piece = min(step, rows_per_piece(vocab_size, like))
    buffer, spare = (like.new_empty(size * padded(vocab_size)) for size in (step, piece))
    for rows in blocks(0, count, step):
        tile = carve(buffer, rows.stop - rows.start, vocab_size)
        project(logits, rows, tile)
        parts = []
        for some in blocks(0, len(tile), piece):
            scaled, damping = tile[some], None
            if damped:
                scaled, damping = logits.transform.apply_and_damp_(scaled)
            else:
                logits.transform.apply_(scaled)
            if without is not None:
                _mask_(scaled, without[rows][some])
            out = carve(spare, len(scaled), vocab_size)
            maximum, top, others = normalise_(scaled, out=out)
            entropy = others.log1p() - times(out, scaled, out=scaled).sum(1)
            if damping is not None:
                out.mul_(damping)
            if without is not None:
                out.masked_fill_((maximum == -torch.inf).unsqueeze(1), 0)
            tile[some] = out
            parts.append((top, maximum, others, entropy))
        yield Softmax(rows, tile, *(torch.cat(one) for one in zip(*parts, strict=True)))


def _mask_(logits: Tensor, tokens: Tensor) -> None:
    """Overwrite the logits of some tokens (k, K) by -inf."""
    change = torch.where(tokens == NO_TOKEN, 0.0, -torch.inf).to(logits.dtype)
    # Added, because a place may be named twice: by a token and by none.
    logits.scatter_add_(1, tokens.clamp(0, logits.shape[1] - 1), change)
