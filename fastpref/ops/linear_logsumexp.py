"""Per-position logsumexp values of a language-model head."""

from __future__ import annotations

from torch import Tensor

from fastpref.ops.head import call_head


def linear_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    r"""The soft value of every position under a language-model head, without the logits.

    .. math:: V(s) = \tau \log \sum_a \exp(Q(s, a) / \tau), \qquad
              Q = \mathrm{softcap}(\mathrm{logit\_scale}\,(h W^\top + b))

    Lemma 1 of TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025) with
    :math:`\tau` = ``temperature``. Exact, differentiable, one matrix product without gradients.

    Args:
        hidden: (..., H) hidden states that the head reads; float64, float32, float16 or bfloat16.
        weight: (V, H) the head, in the dtype of ``hidden`` (autocast casts both).
        bias: (V,) or None.
        temperature: :math:`\tau`, in the unit of the logits.
        logit_scale: Multiplies the projection, as in Cohere and Granite.
        softcap: ``softcap * tanh(x / softcap)``, as in Gemma.

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
    _, values = call_head(
        hidden,
        weight,
        None,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    return values
