"""Per-token log-probabilities of a language-model head."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastpref.checks import check_labels, check_shape
from fastpref.ops.head import call_head


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    compact: bool = ...,
    scratch_bytes: int = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    compact: bool = ...,
    scratch_bytes: int = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probabilities of ``labels`` under a language-model head, without the logits.

    .. math:: \log \pi(y_t) = z_{t, y_t} - \log \sum_j \exp z_{t,j}, \qquad
              z = \mathrm{softcap}(\mathrm{logit\_scale}\,(h W^\top + b)) / \mathrm{temperature}

    Exact forward and backward, in two matrix products where only ``hidden`` needs a gradient (the
    Jacobian is taken in the forward pass, and kept in the size of ``hidden``, of float32 for
    float16) and in four where the head trains. Call it under ``torch.no_grad()`` where no gradient
    is wanted: one matrix product.

    Args:
        hidden: (..., H) hidden states that the head reads; float64, float32, float16 or bfloat16.
        weight: (V, H) the head, in the dtype of ``hidden`` (autocast casts both). A ``DTensor`` is
            gathered where it is sharded by data parallelism, and used shard by shard where it is
            sharded over the vocabulary on a mesh dimension named "tp".
        labels: (...) integers, already shifted: the token that each hidden state predicts.
        bias: (V,) or None.
        temperature: Divides the logits.
        logit_scale: Multiplies the projection, as in Cohere and Granite.
        softcap: ``softcap * tanh(x / softcap)``, as in Gemma.
        ignore_index: The label of positions to leave out; their log-probability is 0.
        compact: Project only labelled rows, for which the host reads one count from the device,
            and where the head trains once more in the backward pass. ``False`` never waits for the
            device (CUDA graphs), projects every row, and answers NaN where a label is outside the
            vocabulary.
        scratch_bytes: Where the head trains, keep exponentials for the backward pass in at most so
            many bytes instead of computing them again: down to three matrix products. What is
            held is sized by all rows, labelled or not.
        return_lse: Also return the logsumexp values. A frozen head keeps the Jacobian of the
            log-probabilities alone: a loss that uses the logsumexp computes the logits again in
            its backward pass, four matrix products in all.

    Returns:
        (...) log-probabilities in nats, float32 (float64 for float64 inputs), 0 where ignored. With
        ``return_lse`` also (...) ``temperature * logsumexp(z)``, as `linear_logsumexp` has it, 0
        where ignored. Both are differentiable.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; a number that is not finite or out of
            range; with ``compact``, a label outside ``[0, V)`` that is not ``ignore_index``.

    Example:
        >>> hidden = torch.randn(2, 3, 8, requires_grad=True)
        >>> weight = torch.randn(50, 8)
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> logps = linear_logps(hidden, weight, labels)
        >>> logps.shape, logps[0, 2].item()
        (torch.Size([2, 3]), 0.0)
        >>> logps.sum().backward()
    """
    check_labels(labels, hidden)
    check_shape("labels", labels, hidden.shape[:-1], "hidden without its last dimension")
    logps, values = call_head(
        hidden,
        weight,
        labels.to(torch.int64),
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        compact=compact,
        scratch_bytes=scratch_bytes,
    )
    return (logps, values) if return_lse else logps
