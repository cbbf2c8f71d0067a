"""Per-token log-probabilities and soft values of a language-model head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.checks import check_labels, check_scratch_bytes, check_shape
from fastpref.derivatives import plain_autograd_only
from fastpref.ops.head import Head, PreparedHead, prepare_head
from fastpref.ops.linear_logps_op import Found, linear_logps_ops
from fastpref.ops.operands import Operands

# Of a trained head, as ``scratch_bytes=None`` has it: SmolLM2's exponentials of 4096 tokens fit.
AUTOMATIC_SCRATCH_BYTES = 2**30


class LogpsWithStats(NamedTuple):
    """What `linear_logps_with_stats` returns: (...) each, 0 (False) where ignored."""

    logps: Tensor  #: log-probabilities of the labels in nats, differentiable
    lse: Tensor  #: temperature * logsumexp of the logits, differentiable
    entropy: Tensor  #: of the distribution over the vocabulary in nats, detached
    is_top1: Tensor  #: bool: no logit is larger than the label's


@plain_autograd_only
def linear_logps(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int | None = None,
) -> Tensor:
    r"""Log-probabilities of ``labels`` under a language-model head, without the logits.

    .. math:: \log \pi(y_t) = z_{t, y_t} - \log \sum_j \exp z_{t,j}, \qquad
              z = \mathrm{softcap}(\mathrm{logit\_scale}\,(h W^\top + b)) / \mathrm{temperature}

    Exact forward and backward, in two matrix products where only ``hidden`` needs a gradient (the
    Jacobian is taken in the forward pass, and kept in the size of ``hidden``, of float32 for
    float16) and in four where the head trains. Call it under ``torch.no_grad()`` where no gradient
    is wanted: one matrix product.

    A head whose rows are spread over processes stays where it is, and a head whose rows are sharded
    for data parallelism is gathered: see ``docs/distributed.md``.

    Args:
        hidden: (..., H) hidden states that the head reads; float64, float32, float16 or bfloat16.
        head: `Head`, or its weight (V, H), in the dtype of ``hidden`` (autocast casts both).
        labels: (...) integers, already shifted: the token that each hidden state predicts.
        temperature: Divides the logits.
        ignore_index: The label of positions to leave out; their log-probability is 0.
        compact: Project only labelled rows, for which the host reads one count from the device,
            and where the head trains once more in the backward pass. ``False`` never waits for the
            device (CUDA graphs), projects every row, and answers NaN where a label is outside the
            vocabulary.
        scratch_bytes: Where the head trains, keep exponentials for the backward pass in at most so
            many bytes instead of computing them again: three matrix products where all fit. None
            takes what the batch needs, up to 1 GiB; 0 keeps nothing. What is held is sized by all
            rows, labelled or not.

    Returns:
        (...) log-probabilities in nats, float32 (float64 for float64 inputs), 0 where ignored.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; a number that is not finite or out of
            range; with ``compact``, a label outside ``[0, V)`` that is not ``ignore_index``.

    Example:
        >>> hidden = torch.randn(2, 3, 8, requires_grad=True)
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> logps = linear_logps(hidden, torch.randn(50, 8), labels)
        >>> logps.shape, logps[0, 2].item()
        (torch.Size([2, 3]), 0.0)
        >>> logps.sum().backward()
    """
    return call_head(
        hidden, head, labels, temperature=temperature,
        ignore_index=ignore_index, compact=compact, scratch_bytes=scratch_bytes,
    ).logps  # fmt: skip


@plain_autograd_only
def linear_logps_with_stats(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int | None = None,
) -> LogpsWithStats:
    r"""`linear_logps`, and what trainers log beside: logsumexp, entropy and top-1 accuracy.

    .. math:: H_t = -\sum_j p_{t,j} \log p_{t,j}, \qquad p_t = \mathrm{softmax}(z_t)

    Args:
        hidden: As in `linear_logps`, like all that follows.
        head: `Head`, or its weight (V, H).
        labels: (...) integers, already shifted.
        temperature: Divides the logits.
        ignore_index: The label of positions to leave out.
        compact: Project labelled rows only.
        scratch_bytes: Where the head trains, the most bytes to keep for backward; None chooses.

    Returns:
        `LogpsWithStats`, float32 (float64 for float64 inputs) and bool.

    Raises:
        ValueError: As `linear_logps`.

    Example:
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> found = linear_logps_with_stats(torch.zeros(2, 3, 8), torch.randn(50, 8), labels)
        >>> round(float(found.entropy[0, 0]), 3), float(found.entropy[0, 2])  # log 50, ignored
        (3.912, 0.0)
    """
    return call_head(
        hidden, head, labels, temperature=temperature,
        ignore_index=ignore_index, compact=compact, scratch_bytes=scratch_bytes, stats=True,
    )  # fmt: skip


@plain_autograd_only
def linear_logsumexp(hidden: Tensor, head: Head | Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""The soft value of every position under a language-model head, without the logits.

    .. math:: V(s) = \tau \log \sum_a \exp(Q(s, a) / \tau), \qquad
              Q = \mathrm{softcap}(\mathrm{logit\_scale}\,(h W^\top + b))

    Lemma 1 of TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025) with
    :math:`\tau` = ``temperature``. Exact, differentiable, one matrix product without gradients.

    Args:
        hidden: (..., H) hidden states that the head reads; float64, float32, float16 or bfloat16.
        head: `Head`, or its weight (V, H), in the dtype of ``hidden`` (autocast casts both).
        temperature: :math:`\tau`, in the unit of the logits.

    Returns:
        (...) values in the unit of the logits, float32 (float64 for float64 inputs).

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; a number that is not finite or out of
            range.

    Example:
        >>> import torch
        >>> values = linear_logsumexp(torch.zeros(2, 3, 8), torch.randn(50, 8))
        >>> values.shape, round(float(values[0, 0]), 3)  # log 50
        (torch.Size([2, 3]), 3.912)
    """
    return call_head(hidden, head, None, temperature=temperature).lse


def call_head(
    hidden: Tensor,  # (..., H)
    head: Head | Tensor,
    labels: Tensor | None,  # (...) integers
    *,
    temperature: float,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int | None = None,
    stats: bool = False,
) -> LogpsWithStats:
    """Check and cast the arguments, run the operator; what is not wanted comes back empty."""
    if labels is not None:
        check_labels(labels, hidden)
        check_shape("labels", labels, hidden.shape[:-1], "hidden without its last dimension")
        labels = labels.to(torch.int64).reshape(-1)
    check_scratch_bytes(scratch_bytes)
    ready = prepare_head(hidden, head, temperature, ignore_index, compact)
    return read_head(
        ready, labels, hidden.shape[:-1], ignore_index=ignore_index, compact=compact,
        scratch_bytes=scratch_bytes, stats=stats,
    )  # fmt: skip


def read_head(
    ready: PreparedHead,
    labels: Tensor | None,  # (N,) int64
    shape: tuple[int, ...],  # of what is returned: N numbers
    *,
    ignore_index: int,
    compact: bool,
    scratch_bytes: int | None = None,
    stats: bool = False,
) -> LogpsWithStats:
    """`call_head` of what is checked and cast."""
    rows, weight, bias, transform, shard = ready
    operands = Operands(rows, weight, bias, labels, *transform, ignore_index, compact)
    wants_gradient = torch.is_grad_enabled()
    if scratch_bytes is None:
        scratch_bytes = AUTOMATIC_SCRATCH_BYTES
    scratch_bytes = scratch_bytes if wants_gradient and ready.trains() else 0
    if shard is None:
        jacobian = wants_gradient and rows.requires_grad and not ready.trains()
        op = linear_logps_ops.of(operands)
        found = Found(*op(*operands, jacobian, stats, scratch_bytes))
        logps, lse, numbers = found.logps, found.lse, found.stats
    else:
        from fastpref.parallel.vocab_shard import sharded_logps

        logps, lse, numbers = sharded_logps(operands, shard, stats, scratch_bytes)
    return in_shape(logps, lse, numbers, operands, shape)


def in_shape(
    logps: Tensor,  # (N,), like all three as the operator returns them
    lse: Tensor,  # (N,)
    numbers: Tensor,  # (N, 3), or (N, 0) without stats
    operands: Operands,
    shape: tuple[int, ...],
) -> LogpsWithStats:
    """What an operator found, in the shape of the labels and the unit of the logits."""
    labels, temperature = operands.labels, operands.temperature
    values = lse.view(shape) if temperature == 1 else lse.view(shape) * temperature
    if labels is None:
        return LogpsWithStats(logps, values, numbers, numbers)
    logps = logps.view(shape)
    if numbers.shape[1] == 0:
        return LogpsWithStats(logps, values, numbers, numbers)
    entropy, maximum, target_logit = numbers.view(*shape, 3).unbind(-1)
    entropy = entropy.masked_fill(target_logit.isnan(), torch.nan)
    ignored = labels.view(shape) == operands.ignore_index
    is_top1 = (target_logit >= maximum) & ~ignored
    return LogpsWithStats(logps, values, entropy.masked_fill(ignored, 0), is_top1)
