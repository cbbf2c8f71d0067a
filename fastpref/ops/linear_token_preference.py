"""A preference at every token: the teacher's likeliest token over the student's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.checks import check_beside, check_number
from fastpref.derivatives import plain_autograd_only
from fastpref.ops import token_preference_op
from fastpref.ops.head import Head, cut_alike, prepare_labelled
from fastpref.ops.operands import Operands
from fastpref.ops.token_preference_op import token_preference_ops
from fastpref.ops.topk_op import Found, topk_ops


@plain_autograd_only
def linear_token_preference(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    labels: Tensor,
    *,
    beta: float = 0.1,
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
) -> Tensor:
    r"""DPO at every token, of the teacher's likeliest token over the student's own.

    With the student's distribution :math:`q` and the teacher's :math:`p`:

    .. math:: -\log \sigma\left(\beta \log \frac{q(a)}{q(b)} - \beta \log \frac{p(a)}{p(b)}\right),
              \qquad a = \arg\max_v p(v), \quad b = \arg\max_v q(v)

    The loss in the released code of `DPKD <https://arxiv.org/abs/2406.19774>`_. No normaliser is
    left in it: both logarithms are differences of logits. It is never below :math:`\log 2`,
    which it is where both models agree on the likeliest token; there the gradient is 0. The choice
    of the tokens has no gradient.

    The gradient is the student's: the teacher counts as a constant. Exact for any loss made of the
    values. One matrix product with each head, without those of a gradient: that takes rows of two
    tokens at a position, whether the student's head trains or not.

    Heads of different vocabularies: the tokens beyond the smaller one are left out on both sides.

    Args:
        student_hidden: (..., H_s) hidden states that the student's head reads; float64, float32,
            float16 or bfloat16.
        student_head: `Head`, or its weight (V, H_s), in the dtype of ``student_hidden`` (autocast
            casts both).
        teacher_hidden: (..., H_t) hidden states at the same positions.
        teacher_head: `Head`, or its weight (V, H_t), in the dtype of ``teacher_hidden``.
        labels: (...) integers, already shifted. They say which positions are left out.
        beta: Scale of the log-ratios, above 0.
        temperature: Divides the logits of both.
        ignore_index: The label of positions to leave out; their loss is 0.
        compact: Project only labelled rows, for which the host reads three counts from the device.
            ``False`` never waits for the device (CUDA graphs), projects every row, and answers NaN
            where a label is outside the vocabulary.

    Returns:
        (...) losses in nats, float32 (float64 for float64 students), 0 where ignored. Infinite
        where one of the models masks the likeliest token of the other, NaN where one
        has a logit of +inf.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; a number that is not finite or out of
            range; a head that is sharded over the vocabulary; with ``compact``, a label outside
            ``[0, V)`` that is not ``ignore_index``.

    Example:
        >>> student, teacher = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 16)
        >>> heads = torch.randn(50, 8), torch.randn(50, 16)
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> found = linear_token_preference(student, heads[0], teacher, heads[1], labels)
        >>> found.shape, found[0, 2].item()
        (torch.Size([2, 3]), 0.0)
        >>> found.sum().backward()
    """
    beta = check_number("beta", beta, above=0)
    shared = temperature, ignore_index, compact
    ready, flat = prepare_labelled(student_hidden, student_head, labels, *shared, prefix="student_")
    check_beside("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    teacher, _ = prepare_labelled(teacher_hidden, teacher_head, labels, *shared, prefix="teacher_")
    ready, teacher = cut_alike([ready, teacher], ("student_", "teacher_"))
    operands = Operands(*ready[:3], flat, *ready.transform, ignore_index, compact)
    with torch.no_grad():
        op = token_preference_ops.of(operands)
        likeliest = token_preference_op.Found(*op(*operands, *teacher[:3], *teacher.transform))
    found = Found(*topk_ops.of(operands)(*operands, likeliest.tokens, False, False))
    margin = found.logits[:, 0] - found.logits[:, 1]
    # Both logits are then one token's, whose two gradients would cancel only up to rounding.
    agree = likeliest.tokens[:, 0] == likeliest.tokens[:, 1]
    margin = torch.where(agree, margin.detach(), margin) - likeliest.margin
    ignored = flat == ignore_index
    values = -logsigmoid(beta * margin.masked_fill(ignored, 0))
    if not compact:
        values = values.masked_fill((flat < 0) | (flat >= ready.weight.shape[0]), torch.nan)
    return values.masked_fill(ignored, 0).view(labels.shape)
