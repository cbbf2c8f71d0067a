"""Means of a student's head over a teacher's distributions: an offline teacher in a few numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.checks import check_device, check_floating, refuse
from fastpref.derivatives import plain_autograd_only
from fastpref.ops.head import Head, PreparedHead, as_head, prepare_labelled
from fastpref.ops.operands import Operands
from fastpref.ops.teacher_means_op import Found, teacher_means_ops


class TeacherMeans(NamedTuple):
    """What `teacher_means` returns and `linear_cached_kl` reads: 0 where ignored.

    With the teacher's distribution p it is all that a student's frozen head can see of it.
    """

    weight: Tensor  #: (..., H_s) E_p[W_s]
    bias: Tensor | None  #: (...) E_p[b_s], where the student's head has a bias
    entropy: Tensor  #: (...) of p, in nats


@plain_autograd_only
def teacher_means(
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    student_head: Head | Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
) -> TeacherMeans:
    r"""What a student's frozen head can see of a teacher: means of its weight, and an entropy.

    .. math:: u_t = \sum_v p_t(v) W_v, \qquad \sum_v p_t(v) b_v, \qquad
              H(p_t) = -\sum_v p_t(v) \log p_t(v)

    With :math:`p` the teacher's distribution and :math:`W, b` the student's head. They are all of
    the teacher that the forward KL of `Hinton et al. <https://arxiv.org/abs/1503.02531>`_ needs:
    write them once, and train with `linear_cached_kl` without the teacher. Exact over the whole
    vocabulary, in one matrix product with each head. There are no gradients.

    Heads of different vocabularies: the tokens beyond the smaller one are left out on both sides.
    Where that is the teacher's, give `linear_cached_kl` the student's head without them, too.

    Args:
        teacher_hidden: (..., H_t) hidden states that the teacher's head reads; float64, float32,
            float16 or bfloat16.
        teacher_head: `Head`, or its weight (V, H_t), in the dtype of ``teacher_hidden`` (autocast
            casts all).
        student_head: `Head`, or its weight (V, H_s), of any floating-point dtype, without a soft
            cap. Its ``logit_scale`` is not in the means.
        labels: (...) integers, already shifted: the token that each hidden state predicts. They say
            which positions are left out.
        temperature: Divides the teacher's logits.
        ignore_index: The label of positions to leave out; their numbers are 0.
        compact: Project only labelled rows, for which the host reads one count from the device.
            ``False`` never waits for the device (CUDA graphs) and projects every row.

    Returns:
        `TeacherMeans`, the entropy in nats; float32 (float64 where one of the models is).

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; a number that is not finite or out of
            range; a student's head with a soft cap; a head that is sharded over the vocabulary;
            with ``compact``, a label outside ``[0, V)`` that is not ``ignore_index``.

    Example:
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> means = teacher_means(
        ...     torch.zeros(2, 3, 16), torch.randn(50, 16), torch.randn(50, 8), labels
        ... )
        >>> means.weight.shape, round(float(means.entropy[0, 0]), 3)  # log 50
        (torch.Size([2, 3, 8]), 3.912)
    """
    with torch.no_grad():
        ready, flat = prepare_labelled(
            teacher_hidden, teacher_head, labels, temperature, ignore_index, compact,
            prefix="teacher_",
        )  # fmt: skip
        student = _prepare_student(student_head, ready.hidden)
        vocab_size = min(ready.weight.shape[0], student.weight.shape[0])
        ready, student = ready.cut(vocab_size), student.cut(vocab_size)
        operands = Operands(*ready[:3], flat, *ready.transform, ignore_index, compact)
        found = Found(*teacher_means_ops.of(operands)(*operands, *student[1:3]))
    shape = labels.shape
    return TeacherMeans(
        found.weight.view(*shape, found.weight.shape[1]),
        None if student.bias is None else found.bias.view(shape),
        found.entropy.view(shape),
    )


def refuse_softcap(softcap: float | None) -> None:
    """Refuse a student whose logits its mean projection does not give."""
    if softcap is not None:
        refuse("student_softcap", "None: capped logits are no linear function", softcap)


def _prepare_student(head: Head | Tensor, teacher_hidden: Tensor) -> PreparedHead:
    """The student's head, checked and cast, without hidden states."""
    weight, _, _, softcap, _ = as_head(head, prefix="student_")
    refuse_softcap(softcap)
    check_floating("student_weight", weight)
    check_device("student_weight", weight, "teacher_hidden", teacher_hidden)
    hidden = torch.empty(0, *weight.shape[-1:], dtype=weight.dtype, device=weight.device)
    labels = torch.empty(0, dtype=torch.int64, device=weight.device)
    return prepare_labelled(hidden, head, labels, 1.0, -100, True, prefix="student_")[0]
