"""The forward KL from a teacher of which the means of the student's head are all that is left."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.checks import check_device, check_floating, check_shape, refuse
from fastpref.derivatives import plain_autograd_only
from fastpref.ops.cached_kl_op import cached_kl_ops
from fastpref.ops.head import Head, PreparedHead, prepare_labelled
from fastpref.ops.linear_divergence import DivergenceWithStats
from fastpref.ops.linear_logps import in_shape
from fastpref.ops.linear_logps_op import Found
from fastpref.ops.operands import Operands
from fastpref.ops.teacher_means import TeacherMeans, refuse_softcap


@plain_autograd_only
def linear_cached_kl(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    means: TeacherMeans,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
) -> Tensor:
    r"""Forward KL from a teacher at every token, from means that were computed once.

    .. math:: \mathrm{KL}(p_t \| q_t) = \log \sum_v \exp z_{t,v} - \frac{s}{\tau}
              \Bigl(h_t \cdot \sum_v p_t(v) W_v + \sum_v p_t(v) b_v\Bigr) - H(p_t)

    With the student's distribution :math:`q = \mathrm{softmax}(z)`, :math:`z = s (h W^\top + b) /
    \tau`, and the `TeacherMeans` of the teacher's :math:`p`. It is `linear_divergence` of kind
    ``"forward_kl"``, the loss of `Hinton et al. <https://arxiv.org/abs/1503.02531>`_ over the whole
    vocabulary, without the teacher: exact for any loss made of the values, in the two matrix
    products of `linear_logps`, and in one without gradients.

    The value is a difference of numbers as large as the logits: where both models agree it may be a
    rounding error below 0. The gradient is not made of it.

    Args:
        student_hidden: (..., H) hidden states that the student's head reads; float64, float32,
            float16 or bfloat16.
        student_head: `Head`, or its weight (V, H), in the dtype of ``student_hidden`` (autocast
            casts both). It is the one that the means are of, does not train and has no soft cap.
        means: `TeacherMeans` of `teacher_means` at the same positions; of any floating-point dtype.
        labels: (...) integers, already shifted. They say which positions are left out.
        temperature: Divides the student's logits. That of the teacher's is in the means.
        ignore_index: The label of positions to leave out; their divergence is 0.
        compact: Project only labelled rows, for which the host reads one count from the device.
            ``False`` never waits for the device (CUDA graphs), projects every row, and answers NaN
            where a label is outside the vocabulary.

    Returns:
        (...) divergences in nats, float32 (float64 for float64 students), 0 where ignored.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; a number that is not finite or out of
            range; a head that wants a gradient, has a soft cap or is sharded over the vocabulary;
            means without a bias for a head with one, or the other way round; with ``compact``, a
            label outside ``[0, V)`` that is not ``ignore_index``.

    Example:
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> student, head = torch.randn(2, 3, 8, requires_grad=True), torch.randn(50, 8)
        >>> teacher = torch.randn(2, 3, 16), torch.randn(50, 16)
        >>> means = teacher_means(*teacher, head, labels)
        >>> found = linear_cached_kl(student, head, means, labels)
        >>> same = linear_divergence(student, head, *teacher, labels, kind="forward_kl")
        >>> torch.allclose(found, same, atol=1e-4)
        True
    """
    return _call(
        student_hidden, student_head, means, labels, temperature, ignore_index, compact, stats=False
    ).divergence


@plain_autograd_only
def linear_cached_kl_with_stats(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    means: TeacherMeans,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    compact: bool = True,
) -> DivergenceWithStats:
    r"""`linear_cached_kl`, and what `linear_logps_with_stats` gives of the student beside.

    .. math:: \mathrm{KL}(p_t \| q_t), \quad \log q_t(y_t), \quad \tau \log \sum_j \exp z_{t,j},
              \quad -\sum_j q_{t,j} \log q_{t,j}

    The same two matrix products give all of it, and every gradient.

    Args:
        student_hidden: As in `linear_cached_kl`, like all that follows.
        student_head: `Head`, or its weight (V, H).
        means: `TeacherMeans` at the same positions.
        labels: (...) integers, already shifted.
        temperature: Divides the student's logits.
        ignore_index: The label of positions to leave out.
        compact: Project labelled rows only.

    Returns:
        `DivergenceWithStats`, float32 (float64 for float64 students) and bool.

    Raises:
        ValueError: As `linear_cached_kl`.

    Example:
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> same = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> means = teacher_means(*same, same[1], labels)
        >>> found = linear_cached_kl_with_stats(*same, means, labels)
        >>> round(float(found.entropy[0, 0]), 3), round(float(found.logps[0, 0]), 3)  # log 50
        (3.912, -3.912)
    """
    return _call(
        student_hidden, student_head, means, labels, temperature, ignore_index, compact, stats=True
    )


def _call(
    hidden: Tensor,  # (..., H)
    head: Head | Tensor,
    means: TeacherMeans,
    labels: Tensor,  # (...) integers
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
    _check_student(ready)
    weight, bias, entropy = _check_means(means, hidden, ready)
    operands = Operands(*ready[:3], flat, *ready.transform, ignore_index, compact)
    jacobian = torch.is_grad_enabled() and ready.hidden.requires_grad
    op = cached_kl_ops.of(operands)
    divergence, *more = op(*operands, weight, bias, entropy, jacobian, stats)
    found = Found(*more)
    shape = labels.shape
    student = in_shape(found.logps, found.lse, found.stats, operands, shape)
    return DivergenceWithStats(divergence.view(shape), *student)


def _check_student(ready: PreparedHead) -> None:
    """Refuse a head of which the means say too little."""
    refuse_softcap(ready.transform.softcap)
    if torch.is_grad_enabled() and ready.trains():
        refuse(
            "student_head",
            "a head that wants no gradient: the means are those of one that stays as it is",
            "one that wants a gradient",
        )


def _check_means(
    means: TeacherMeans, hidden: Tensor, ready: PreparedHead
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The means as the operator takes them: (N, H), (N,) and (N,)."""
    if not isinstance(means, TeacherMeans):
        refuse("means", "TeacherMeans", type(means).__name__)
    weight, bias, entropy = means
    if ready.bias is None and bias is not None:
        refuse("means.bias", "None, like the bias of student_head", "a tensor")
    given = {"weight": weight, "entropy": entropy}
    if ready.bias is not None:
        given["bias"] = bias  # type: ignore[assignment]  # checked below
    for name, one in given.items():
        check_floating(f"means.{name}", one)
        check_device(f"means.{name}", one, "student_hidden", hidden)
    check_shape("means.weight", given.pop("weight"), hidden.shape, "like student_hidden")
    for name, one in given.items():
        meaning = "student_hidden without its last dimension"
        check_shape(f"means.{name}", one, hidden.shape[:-1], meaning)
    flat = None if bias is None else bias.detach().reshape(-1)
    return weight.detach().reshape(-1, weight.shape[-1]), flat, entropy.detach().reshape(-1)
