"""Per-position statistics of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import check_labels, check_shape, refuse
from fastpref.derivatives import plain_autograd_only
from fastpref.ops.head import Head, prepare_head
from fastpref.ops.linear_stats_op import Partial, Sums, linear_stats_ops
from fastpref.ops.operands import Operands

Statistic = Literal[
    "logsumexp",
    "max_prob",
    "margin",
    "expected_logit",
    "entropy",
    "target_logit",
    "target_logp",
    "log_sum_squared_probs",
    "is_top1",
]


class _Row(NamedTuple):
    """What the formulas read: every tensor (N,), logits divided by the temperature."""

    all: Partial
    others: Tensor  # those of the partial, NaN where every logit is -inf or one is +inf
    target_logit: Tensor
    temperature: float


# With m the largest logit, p(top) = 1 / (1 + others), and no formula subtracts from 1.
FORMULAS: dict[str, Callable[[_Row], Tensor]] = {
    "logsumexp": lambda row: row.temperature * row.all.lse(),
    "max_prob": lambda row: 1 / (1 + row.others),
    "margin": lambda row: -torch.expm1(row.all.second - row.all.maximum) / (1 + row.others),
    "expected_logit": lambda row: (
        row.temperature * (row.all.maximum - row.all.shortfall / (1 + row.others))
    ),
    "entropy": lambda row: row.all.entropy(),
    "target_logit": lambda row: row.temperature * row.target_logit,
    "target_logp": lambda row: row.target_logit - row.all.maximum - row.others.log1p(),
    "log_sum_squared_probs": lambda row: row.all.squares.log1p() - 2 * row.others.log1p(),
    "is_top1": lambda row: row.target_logit >= row.all.maximum,
}
OF_LABELS = {"target_logit", "target_logp", "is_top1"}


@plain_autograd_only
def linear_stats(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor | None = None,
    *,
    stats: Sequence[Statistic],
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
) -> dict[Statistic, Tensor]:
    r"""Any statistics of a language-model head's vocabulary in one matrix product, without logits.

    .. math:: Q = \mathrm{softcap}(\mathrm{logit\_scale}\,(h W^\top + b)), \qquad
              p = \mathrm{softmax}(Q / \tau)

    ===========================  ==============================================  ==============
    ``"logsumexp"``              :math:`\tau \log \sum_a \exp(Q_a / \tau)`       logits
    ``"max_prob"``               :math:`p^{(1)}`, the largest probability        0 to 1
    ``"margin"``                 :math:`p^{(1)} - p^{(2)}`                       0 to 1
    ``"expected_logit"``         :math:`\sum_a p_a Q_a`                          logits
    ``"entropy"``                :math:`-\sum_a p_a \log p_a`                    nats
    ``"target_logit"``           :math:`Q_y`, the label's                        logits
    ``"target_logp"``            :math:`\log p_y`, as `linear_logps` has it      nats
    ``"log_sum_squared_probs"``  :math:`\log \sum_a p_a^2`                       nats
    ``"is_top1"``                no logit is larger than the label's             true or false
    ===========================  ==============================================  ==============

    The potentials and action-dependent rewards of TVKD's Table 5 (Teacher Value-based Knowledge
    Distillation, NeurIPS 2025) are among them. Each keeps its digits where the model is certain,
    too. There are no gradients: call it under ``torch.no_grad()``.

    Args:
        hidden: (..., H) hidden states that the head reads; float64, float32, float16 or bfloat16.
        head: `Head`, or its weight (V, H), in the dtype of ``hidden`` (autocast casts both).
        labels: (...) integers, already shifted: the token that each hidden state predicts. None
            where no statistic is the label's: then no position is left out.
        stats: Names from the table.
        temperature: :math:`\tau`, in the unit of the logits.
        ignore_index: The label of positions to leave out; their statistics are 0 (False).
        compact: Project only labelled rows, for which the host reads one count from the device.
            ``False`` never waits for the device (CUDA graphs), projects every row, and answers NaN
            (False) where a label is outside the vocabulary.

    Returns:
        By name, in the order of ``stats``: (...) float32 (float64 for float64 inputs) in the unit
        of the table, ``"is_top1"`` bool.

    Raises:
        ValueError: Statistics without a name, unknown or named twice; one of the label's without
            ``labels``; shapes, devices or dtypes that do not fit; a number that is not finite or
            out of range; with ``compact``, a label outside ``[0, V)`` that is not ``ignore_index``.
        NotImplementedError: A gradient would be wanted.

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> found = linear_stats(hidden, weight, stats=["max_prob", "entropy"])
        >>> found["max_prob"].shape, round(float(found["entropy"][0, 0]), 3)  # log 50
        (torch.Size([2, 3]), 3.912)
    """
    _check_stats(stats, has_labels=labels is not None)
    if labels is not None:
        check_labels(labels, hidden)
        check_shape("labels", labels, hidden.shape[:-1], "hidden without its last dimension")
        labels = labels.to(torch.int64)
    rows, weight, bias, transform, shard = prepare_head(
        hidden, head, temperature, ignore_index, compact
    )
    _refuse_gradients(rows, weight, bias)

    flat = None if labels is None else labels.reshape(-1)
    operands = Operands(rows, weight, bias, flat, *transform, ignore_index, compact)
    sums = Sums(
        second="margin" in stats,
        shortfall="expected_logit" in stats or "entropy" in stats,
        squares="log_sum_squared_probs" in stats,
    )
    if shard is None:
        vocab_size = weight.shape[0]
        numbers, target_logit = linear_stats_ops.of(operands)(*operands, *sums)
    else:
        from fastpref.parallel.vocab_shard import sharded_stats

        vocab_size = shard.total
        numbers, target_logit = sharded_stats(operands, shard, sums)
    partial = Partial(*numbers.unbind(1))
    others = partial.others.masked_fill(partial.maximum.isinf(), torch.nan)
    row = _Row(partial, others, target_logit, transform.temperature)
    found = {name: FORMULAS[name](row).view(hidden.shape[:-1]) for name in stats}
    if labels is None:
        return found
    ignored = labels == ignore_index
    outside = ~ignored & ((labels < 0) | (labels >= vocab_size))
    return {
        name: _mask(values, ignored, None if compact else outside) for name, values in found.items()
    }


def _check_stats(stats: Sequence[str], *, has_labels: bool) -> None:
    expected = "a sequence of names out of " + ", ".join(repr(name) for name in FORMULAS)
    if isinstance(stats, str) or not isinstance(stats, Sequence):
        refuse("stats", expected, repr(stats))
    if not stats or any(name not in FORMULAS for name in stats):
        refuse("stats", expected, repr(stats))
    if len(set(stats)) < len(stats):
        refuse("stats", "every name once", repr(stats))
    of_labels = [name for name in stats if name in OF_LABELS]
    if of_labels and not has_labels:
        refuse("labels", f"a tensor of integers, for {', '.join(of_labels)}", None)


def _refuse_gradients(*tensors: Tensor | None) -> None:
    """Refuse to be differentiated rather than to answer with numbers that have no gradient."""
    wanted = any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if wanted and torch.is_grad_enabled():
        raise NotImplementedError(
            "linear_stats has no gradients: call it under torch.no_grad(), or detach its arguments"
        )


def _mask(values: Tensor, ignored: Tensor, outside: Tensor | None) -> Tensor:
    """``values`` with 0 where ignored, and NaN (False) at a label outside the vocabulary."""
    if outside is not None:
        values = values.masked_fill(outside, False if values.dtype == torch.bool else torch.nan)
    return values.masked_fill(ignored, 0)
