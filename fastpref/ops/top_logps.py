"""The likeliest tokens of a head, and their log-probabilities, without the logits of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.checks import refuse
from fastpref.ops.backend import statistics_dtype
from fastpref.ops.divergence_rows import project
from fastpref.ops.head import Head, prepare_head
from fastpref.ops.operands import Logits
from fastpref.ops.tiling import blocks, carve, padded, rows_per_block


@torch.no_grad()
def top_logps(
    hidden: Tensor,  # (N, H)
    head: Head | Tensor,
    count: int,
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Tokens (N, K) int64 and log-probabilities (N, K) in nats, the likeliest first.

    K is ``count``, or the whole vocabulary where that is smaller. Log-probabilities are float32,
    or float64 for float64 inputs.
    """
    ready = prepare_head(hidden, head, temperature, ignore_index=-100, compact=True)
    if ready.shard is not None:
        refuse("head", "one that is not sharded over the vocabulary", "one that is")
    logits = Logits(ready.hidden, None, ready.weight, ready.bias, None, ready.transform)
    rows, vocab_size = logits.shape()
    like = ready.hidden.new_empty(0, dtype=statistics_dtype(ready.hidden.dtype))
    count = min(count, vocab_size)
    logps, tokens = like.new_empty(rows, count), like.new_empty(rows, count, dtype=torch.int64)
    step = rows_per_block(rows, vocab_size, like)
    buffer = like.new_empty(step * padded(vocab_size))
    for block in blocks(0, rows, step):
        tile = carve(buffer, block.stop - block.start, vocab_size)
        project(logits, block, tile)
        ready.transform.apply_(tile)
        normaliser = tile.logsumexp(1, keepdim=True)
        largest, tokens[block] = tile.topk(count)
        torch.sub(largest, normaliser, out=logps[block])
    return tokens, logps
