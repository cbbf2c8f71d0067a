"""Divergences from a teacher of which a few tokens are known, and means of what those are worth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.checks import (
    check_choice,
    check_device,
    check_floating,
    check_integers,
    check_shape,
    refuse,
)
from fastpref.derivatives import plain_autograd_only
from fastpref.ops.backend import statistics_dtype
from fastpref.ops.divergences import times
from fastpref.ops.head import Head, prepare_labelled
from fastpref.ops.linear_divergence import DivergenceWithStats
from fastpref.ops.operands import Operands
from fastpref.ops.softmax_rows import NO_TOKEN
from fastpref.ops.topk_op import Found, topk_ops
from fastpref.ops.topk_tails import bucket, drop, expectation, joined, normalise, renormalize

TAILS = ("bucket", "drop", "renormalize")
OF_TOKENS = {"drop": drop, "renormalize": renormalize, "expectation": expectation}
# What the numbers of a token are, and that of none.
LOGPS, VALUES = ("token_logps", -torch.inf), ("token_values", 0.0)


@plain_autograd_only
def linear_topk_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    token_ids: Tensor,
    token_logps: Tensor,
    labels: Tensor,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
) -> Tensor:
    r"""Forward KL from a teacher of which the likeliest tokens are known, without the logits.

    With the teacher's :math:`p` on the K tokens of a position, the student's :math:`q` and
    :math:`p_{rest} = 1 - \sum_K p, q_{rest} = 1 - \sum_K q`:

    ================= =============================================================================
    ``tail``          value
    ================= =============================================================================
    ``"bucket"``      :math:`\sum_K p \log (p / q) + p_{rest} \log (p_{rest} / q_{rest})`
    ``"drop"``        :math:`\sum_K p \log (p / q)`
    ``"renormalize"`` :math:`\sum_K \tilde p \log (\tilde p / \tilde q)`, both of sum 1 on the K
    ================= =============================================================================

    ``"bucket"`` counts all other tokens as one, as `DCKD <https://arxiv.org/abs/2502.17927>`_ does.
    It never exceeds the KL over the whole vocabulary, and is 0 only where K tokens have the
    teacher's probabilities. ``"drop"`` ignores all other tokens: it may be negative.

    The gradient is the student's: the teacher's log-probabilities count as constants. Exact for any
    loss made of the values. Two matrix products with the head where only ``student_hidden`` needs a
    gradient, four where the head trains, one without gradients, and for ``"renormalize"`` none:
    beside products with the K tokens of every position.

    Args:
        student_hidden: (..., H) hidden states that the student's head reads; float64, float32,
            float16 or bfloat16.
        student_head: `Head`, or its weight (V, H), in the dtype of ``student_hidden`` (autocast
            casts both).
        token_ids: (..., K) integers, different ones at a position.
        token_logps: (..., K) the teacher's log-probabilities of them in nats, of any floating-point
            dtype. Where it is -inf there is no token, whatever the id.
        labels: (...) integers, already shifted. They say which positions are left out.
        tail: A name from the table.
        temperature: Divides the student's logits. The teacher's are those of ``token_logps``.
        ignore_index: The label of positions to leave out; their divergence is 0.
        compact: Project only labelled rows, for which the host reads two counts from the device.
            ``False`` never waits for the device (CUDA graphs), projects every row, and answers NaN
            where a label or a token is outside the vocabulary.

    Returns:
        (...) divergences in nats, float32 (float64 for float64 students), 0 where ignored and where
        a position has no token.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; a number that is not finite or out of
            range; an unknown tail; a head that is sharded over the vocabulary; with ``compact``, a
            label outside ``[0, V)`` that is not ``ignore_index``, or a token outside.

    Example:
        >>> student, head = torch.randn(2, 3, 8, requires_grad=True), torch.randn(50, 8)
        >>> teacher = torch.randn(2, 3, 50).log_softmax(-1)
        >>> known, ids = teacher.topk(5)
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> found = linear_topk_divergence(student, head, ids, known, labels)
        >>> found.shape, found[0, 2].item()
        (torch.Size([2, 3]), 0.0)
        >>> found.sum().backward()
    """
    check_choice("tail", tail, TAILS)
    given = _Tokens(token_ids, token_logps, *LOGPS), tail, temperature, ignore_index, compact
    return _call(student_hidden, student_head, labels, *given, stats=False).divergence


@plain_autograd_only
def linear_topk_divergence_with_stats(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    token_ids: Tensor,
    token_logps: Tensor,
    labels: Tensor,
    *,
    tail: str = "bucket",
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
) -> DivergenceWithStats:
    r"""`linear_topk_divergence`, and what `linear_logps_with_stats` gives of the student beside.

    .. math:: D(q_t; p_t), \quad \log q_t(y_t), \quad \tau \log \sum_j \exp z_{t,j}, \quad
              -\sum_j q_{t,j} \log q_{t,j}

    All of it in the matrix products that ``"bucket"`` takes.

    Args:
        student_hidden: As in `linear_topk_divergence`, like all that follows.
        student_head: `Head`, or its weight (V, H).
        token_ids: (..., K) integers.
        token_logps: (..., K) the teacher's log-probabilities of them in nats.
        labels: (...) integers, already shifted.
        tail: ``"bucket"``, ``"drop"`` or ``"renormalize"``.
        temperature: Divides the student's logits.
        ignore_index: The label of positions to leave out.
        compact: Project labelled rows only.

    Returns:
        `DivergenceWithStats`, float32 (float64 for float64 students) and bool.

    Raises:
        ValueError: As `linear_topk_divergence`.

    Example:
        >>> labels, ids = torch.tensor([4, 9]), torch.tensor([[4, 1], [9, 2]])
        >>> logps = torch.full((2, 2), 0.02).log()  # as the student has them
        >>> student = torch.zeros(2, 8), torch.randn(50, 8)
        >>> found = linear_topk_divergence_with_stats(*student, ids, logps, labels)
        >>> round(float(found.divergence[0]), 6), round(float(found.logps[0]), 3)  # log 1/50
        (0.0, -3.912)
    """
    check_choice("tail", tail, TAILS)
    given = _Tokens(token_ids, token_logps, *LOGPS), tail, temperature, ignore_index, compact
    return _call(student_hidden, student_head, labels, *given, stats=True)


@plain_autograd_only
def linear_topk_expectation(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    token_ids: Tensor,
    token_values: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
) -> Tensor:
    r"""Mean under the student of what a few tokens of every position are worth.

    .. math:: \sum_{v \in K_t} q_t(v) A_t(v)

    All other tokens are worth 0. With the advantages of an aligned teacher on its 50 likeliest
    tokens, clamped to 1e-8 and 1, it is what the released code of `ADPA
    <https://arxiv.org/abs/2502.17927>`_ trains in the place of the mean over the vocabulary, which
    is `linear_divergence` with ``kind="advantage"``.

    The gradient is the student's, exact for any loss made of the values, in the matrix products of
    `linear_topk_divergence`.

    Args:
        student_hidden: (..., H) hidden states that the student's head reads; float64, float32,
            float16 or bfloat16.
        student_head: `Head`, or its weight (V, H), in the dtype of ``student_hidden`` (autocast
            casts both).
        token_ids: (..., K) integers, different ones at a position.
        token_values: (..., K) constants of any floating-point dtype and unit. Where it is 0 the id
            does not matter.
        labels: (...) integers, already shifted. They say which positions are left out.
        temperature: Divides the student's logits.
        ignore_index: The label of positions to leave out; their mean is 0.
        compact: As in `linear_topk_divergence`.

    Returns:
        (...) in the unit of the values, float32 (float64 for float64 students), 0 where ignored.

    Raises:
        ValueError: As `linear_topk_divergence`.

    Example:
        >>> student = torch.zeros(2, 8), torch.randn(50, 8)  # every token has 1/50
        >>> ids, values = torch.tensor([[4, 1], [9, 2]]), torch.tensor([[1.0, 0.5], [0.0, -1.0]])
        >>> linear_topk_expectation(*student, ids, values, torch.tensor([4, 9]))
        tensor([ 0.0300, -0.0200])
    """
    tokens = _Tokens(token_ids, token_values, *VALUES)
    given = tokens, "expectation", temperature, ignore_index, compact
    return _call(student_hidden, student_head, labels, *given, stats=False).divergence


class _Tokens(NamedTuple):
    """Some tokens at every position."""

    ids: Tensor  # (..., K) integers
    numbers: Tensor  # (..., K) of each token
    name: str  # of the numbers, as an argument
    of_none: float  # where there is no token


def _call(
    hidden: Tensor,  # (..., H)
    head: Head | Tensor,
    labels: Tensor,  # (...) integers
    tokens: _Tokens,
    tail: str,
    temperature: float,
    ignore_index: int,
    compact: bool,
    *,
    stats: bool,
) -> DivergenceWithStats:
    """Check and cast the arguments, run the operator; what is not wanted comes back empty."""
    ready, flat = prepare_labelled(
        hidden, head, labels, temperature, ignore_index, compact, prefix="student_"
    )
    _check_tokens(tokens, hidden)
    count, ignored = tokens.ids.shape[-1], flat == ignore_index
    numbers = tokens.numbers.detach().reshape(-1, count).to(statistics_dtype(ready.hidden.dtype))
    numbers = numbers.masked_fill(ignored.unsqueeze(1), tokens.of_none)
    ids = tokens.ids.reshape(-1, count).to(torch.int64)
    ids = ids.masked_fill(numbers == tokens.of_none, NO_TOKEN)
    if stats:  # one more token, of which the teacher says nothing
        ids = torch.cat((ids, flat.masked_fill(ignored, NO_TOKEN).unsqueeze(1)), dim=1)
    operands = Operands(*ready[:3], flat, *ready.transform, ignore_index, compact)
    wants_rest = stats or tail != "renormalize"
    by_jacobian = torch.is_grad_enabled() and ready.hidden.requires_grad and not ready.trains()
    op = topk_ops.of(operands)
    found = Found(*op(*operands, ids, wants_rest, wants_rest and by_jacobian))
    logits = found.logits.masked_fill(ids == NO_TOKEN, -torch.inf)
    if not wants_rest:
        values = [renormalize(logits, numbers)]
    else:
        given = logits, numbers, ids, tail, ready.transform.temperature
        values = _values(found, *given, stats=stats)
    if not compact:
        named = torch.cat((ids, flat.unsqueeze(1)), dim=1)
        outside = (named < 0) | (named >= ready.weight.shape[0])
        outside = (outside & (named != NO_TOKEN)).any(1)
        values = [
            one.masked_fill(outside, False if one.dtype == torch.bool else torch.nan)
            for one in values
        ]
    values = [one.masked_fill(ignored, 0).view(labels.shape) for one in values]
    empty = found.rest.new_empty(0)
    return DivergenceWithStats(*values, *[empty] * (len(DivergenceWithStats._fields) - len(values)))


def _values(
    found: Found,
    logits: Tensor,  # (N, K), with ``stats`` and the label's (N, K + 1); -inf where no token is
    numbers: Tensor,  # (N, K) of the tokens
    ids: Tensor,  # like the logits
    tail: str,
    temperature: float,
    *,
    stats: bool,
) -> list[Tensor]:
    """The divergence (N,), and with ``stats`` the other fields of `DivergenceWithStats`."""
    count = numbers.shape[1]
    if stats:  # a label among the K tokens counts once
        column = (ids == ids[:, count:]).to(torch.uint8).argmax(1, keepdim=True)
        extra = logits[:, count:].masked_fill(column < count, -torch.inf)
        logits = torch.cat((logits[:, :count], extra), dim=1)
    maximum, of_rest = found.stats.unbind(1)
    log_q, lse = normalise(
        torch.cat((logits, maximum.unsqueeze(1)), dim=1),
        torch.cat((torch.zeros_like(logits), found.rest.unsqueeze(1)), dim=1),
    )
    log_rest = joined(log_q[:, count], log_q[:, -1]) if stats else log_q[:, -1]
    if tail == "bucket":
        divergence = bucket(log_q[:, :count], numbers, log_rest)
    else:
        divergence = OF_TOKENS[tail](log_q[:, :count], numbers)
    if not stats:
        return [divergence]
    logs = log_q.detach()
    of_tokens = times(logs.exp(), logs, out=torch.empty_like(logs)).sum(1)
    entropy = logs[:, -1].exp() * of_rest - of_tokens
    target = logits.detach().gather(1, column).squeeze(1)
    is_top1 = target >= torch.maximum(logits.detach().amax(1), maximum)
    logps = log_q.gather(1, column).squeeze(1)
    return [divergence, logps, lse * temperature, entropy, is_top1]


def _check_tokens(tokens: _Tokens, hidden: Tensor) -> None:
    check_integers("token_ids", tokens.ids)
    check_floating(tokens.name, tokens.numbers)
    shape = hidden.shape[:-1]
    if tokens.ids.dim() == 0 or tokens.ids.shape[:-1] != shape or tokens.ids.shape[-1] == 0:
        expected = f"shape ({', '.join(map(str, (*shape, 'K')))}), K at least 1"
        refuse("token_ids", expected, tuple(tokens.ids.shape))
    check_shape(tokens.name, tokens.numbers, tokens.ids.shape, "like token_ids")
    check_device("token_ids", tokens.ids, "student_hidden", hidden)
    check_device(tokens.name, tokens.numbers, "student_hidden", hidden)
