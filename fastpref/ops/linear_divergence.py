"""Per-token divergences between the distributions of two language-model heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.checks import (
    check_beside,
    check_choice,
    check_device,
    check_flag,
    check_floating,
    check_integers,
    check_number,
    check_reference,
    check_scratch_bytes,
    check_shape,
    refuse,
)
from fastpref.derivatives import plain_autograd_only
from fastpref.ops.divergence_rows import Comparison
from fastpref.ops.divergences import KINDS, Settings
from fastpref.ops.head import Head, PreparedHead, cut_alike, prepare_head
from fastpref.ops.linear_divergence_op import linear_divergence_ops
from fastpref.ops.linear_logps import AUTOMATIC_SCRATCH_BYTES
from fastpref.ops.operands import Operands
from fastpref.ops.torch_tiles import LogitTransform

PREFIXES = ("student_", "teacher_", "reference_")  # of arguments about each model


class DivergenceWithStats(NamedTuple):
    """What `linear_divergence_with_stats` returns: (...) each, 0 (False) where ignored."""

    divergence: Tensor  #: of the two distributions in nats, differentiable
    logps: Tensor  #: the student's log-probabilities of the labels in nats, differentiable
    lse: Tensor  #: temperature * logsumexp of the student's logits, differentiable
    entropy: Tensor  #: of the student's distribution in nats, detached
    is_top1: Tensor  #: bool: no logit of the student is larger than the label's


@plain_autograd_only
def linear_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    labels: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    alpha: float = 0.1,
    detach_mixture: bool = False,
    reference_hidden: Tensor | None = None,
    reference_head: Head | Tensor | None = None,
    clip: tuple[float | None, float | None] | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int | None = None,
) -> Tensor:
    r"""Divergence of a student from a teacher at every token, without the logits of either.

    With :math:`q` the student's distribution over the vocabulary and :math:`p` the teacher's,
    :math:`\mathrm{KL}(p \| q) = \sum_v p(v) \log (p(v) / q(v))`:

    ====================== ========================================================================
    ``kind``               value
    ====================== ========================================================================
    ``"forward_kl"``       :math:`\mathrm{KL}(p \| q)`
    ``"reverse_kl"``       :math:`\mathrm{KL}(q \| p)`
    ``"jsd"``              :math:`\beta\,\mathrm{KL}(p \| m) + (1 - \beta)\,\mathrm{KL}(q \| m)`,
                           :math:`m = \beta p + (1 - \beta) q`
    ``"skew_kl"``          :math:`\mathrm{KL}(p \| \alpha p + (1 - \alpha) q)`
    ``"skew_reverse_kl"``  :math:`\mathrm{KL}(q \| (1 - \alpha) p + \alpha q)`
    ``"total_variation"``  :math:`\frac12 \sum_v |p(v) - q(v)|`
    ``"jeffreys"``         :math:`\mathrm{KL}(p \| q) + \mathrm{KL}(q \| p)`
    ``"advantage"``        :math:`E_q[\mathrm{clip}(\log p - \log r)]`, :math:`r` the reference's
    ====================== ========================================================================

    The generalised JSD is that of `GKD <https://arxiv.org/abs/2306.13649>`_, the skewed ones those
    of `DistiLLM <https://arxiv.org/abs/2402.03898>`_, the expected advantage that of `ADPA
    <https://arxiv.org/abs/2502.17927>`_. JSD goes to 0 with :math:`\beta` and with
    :math:`1 - \beta`; its limits, divided by them, are the two KLs.

    The gradient is the student's: the teacher and the reference count as constants, even where
    their tensors want one. Exact for any loss made of the values. Where only ``student_hidden``
    needs a gradient, in one matrix product with the teacher's head and two with the student's,
    whatever the kind; where the student's head trains in one and three, of the rows that
    ``scratch_bytes`` has room for, and in two and four of all others.

    A student's head whose rows are spread over processes stays where it is; the other heads are
    spread alike, or whole: see ``docs/distributed.md``.

    Heads of different vocabularies: the tokens beyond the smaller one are left out on both sides,
    as if no head had them.

    Args:
        student_hidden: (..., H_s) hidden states that the student's head reads; float64, float32,
            float16 or bfloat16.
        student_head: `Head`, or its weight (V, H_s), in the dtype of ``student_hidden`` (autocast
            casts both).
        teacher_hidden: (..., H_t) hidden states at the same positions.
        teacher_head: `Head`, or its weight (V, H_t), in the dtype of ``teacher_hidden``.
        labels: (...) integers, already shifted: the token that each hidden state predicts. They say
            which positions are left out.
        kind: A name from the table.
        beta: Of ``"jsd"``: the teacher's weight in the mixture, above 0 and below 1.
        alpha: Of the skewed kinds: the weight of what is skewed towards, above 0 and below 1.
        detach_mixture: Of ``"skew_reverse_kl"``: no gradient through the mixture, as in DistiLLM-2.
        reference_hidden: (..., H_r), of ``"advantage"``: hidden states of the reference.
        reference_head: `Head`, or its weight (V, H_r), in the dtype of ``reference_hidden``.
        clip: Of ``"advantage"``: the least and the largest in nats, None for no bound.
        temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits and the reference's; None for
            ``temperature``. No factor is put before the divergence.
        ignore_index: The label of positions to leave out; their divergence is 0.
        compact: Project only labelled rows, for which the host reads one count from the device,
            and where the head trains once more in the backward pass. ``False`` never waits for the
            device (CUDA graphs), projects every row, and answers NaN where a label is outside the
            vocabulary.
        scratch_bytes: Where the student's head trains, keep gradients of logits for the backward
            pass in at most so many bytes instead of computing them again. None takes what the batch
            needs, up to 1 GiB; 0 keeps nothing.

    Returns:
        (...) divergences in nats (``"total_variation"``: of 1), float32 (float64 for float64
        students), 0 where ignored. Infinite where the formula is, of tokens that one head masks.

    Raises:
        ValueError: Shapes, devices or dtypes that do not fit; a number that is not finite or out of
            range; an unknown kind, or what another kind takes; a head that is spread over processes
            in another way than the student's; with ``compact``, a label outside
            ``[0, V)`` that is not ``ignore_index``.

    Example:
        >>> student, teacher = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 16)
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> found = linear_divergence(
        ...     student, torch.randn(50, 8), teacher, torch.randn(50, 16), labels, kind="forward_kl"
        ... )
        >>> found.shape, found[0, 2].item()
        (torch.Size([2, 3]), 0.0)
        >>> found.sum().backward()
    """
    options = _Options(
        kind, beta, alpha, detach_mixture, clip, temperature, teacher_temperature, ignore_index,
        compact, scratch_bytes,
    )  # fmt: skip
    student, teacher = (student_hidden, student_head), (teacher_hidden, teacher_head)
    reference = reference_hidden, reference_head
    return _call(student, teacher, reference, labels, options, stats=False).divergence


@plain_autograd_only
def linear_divergence_with_stats(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    labels: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    alpha: float = 0.1,
    detach_mixture: bool = False,
    reference_hidden: Tensor | None = None,
    reference_head: Head | Tensor | None = None,
    clip: tuple[float | None, float | None] | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    ignore_index: int = -100,
    compact: bool = True,
    scratch_bytes: int | None = None,
) -> DivergenceWithStats:
    r"""`linear_divergence`, and what `linear_logps_with_stats` gives of the student beside.

    .. math:: D(q_t; p_t), \quad \log q_t(y_t), \quad \tau \log \sum_j \exp z_{t,j}, \quad
              -\sum_j q_{t,j} \log q_{t,j}

    The student's head is read once for all of it. The gradient of the log-probabilities takes one
    matrix product more where only ``student_hidden`` needs one, and where the head trains the
    bytes that are kept for each row are twice as many.

    Args:
        student_hidden: As in `linear_divergence`, like all that follows.
        student_head: `Head`, or its weight (V, H_s).
        teacher_hidden: (..., H_t) hidden states at the same positions.
        teacher_head: `Head`, or its weight (V, H_t).
        labels: (...) integers, already shifted.
        kind: A name from the table of `linear_divergence`.
        beta: Of ``"jsd"``: the teacher's weight.
        alpha: Of the skewed kinds: the weight of what is skewed towards.
        detach_mixture: Of ``"skew_reverse_kl"``: no gradient through the mixture.
        reference_hidden: (..., H_r), of ``"advantage"``.
        reference_head: `Head`, or its weight (V, H_r), of ``"advantage"``.
        clip: Of ``"advantage"``: the least and the largest in nats.
        temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's and the reference's; None for ``temperature``.
        ignore_index: The label of positions to leave out.
        compact: Project labelled rows only.
        scratch_bytes: Where the head trains, the most bytes to keep for backward; None chooses.

    Returns:
        `DivergenceWithStats`, float32 (float64 for float64 students) and bool.

    Raises:
        ValueError: As `linear_divergence`.

    Example:
        >>> labels = torch.tensor([[4, 9, -100], [1, 2, 3]])
        >>> same = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> found = linear_divergence_with_stats(*same, *same, labels, kind="jsd")
        >>> found.divergence.sum().item(), round(float(found.logps[0, 0]), 3)  # log 1/50
        (0.0, -3.912)
    """
    options = _Options(
        kind, beta, alpha, detach_mixture, clip, temperature, teacher_temperature, ignore_index,
        compact, scratch_bytes,
    )  # fmt: skip
    student, teacher = (student_hidden, student_head), (teacher_hidden, teacher_head)
    reference = reference_hidden, reference_head
    return _call(student, teacher, reference, labels, options, stats=True)


class _Options(NamedTuple):
    """What both functions take beside tensors and heads."""

    kind: str
    beta: float
    alpha: float
    detach_mixture: bool
    clip: tuple[float | None, float | None] | None
    temperature: float
    teacher_temperature: float | None
    ignore_index: int
    compact: bool
    scratch_bytes: int | None


def _call(
    student: tuple[Tensor, Head | Tensor],  # (..., H_s), and the head that reads them
    teacher: tuple[Tensor, Head | Tensor],
    reference: tuple[Tensor | None, Head | Tensor | None],
    labels: Tensor,  # (...) integers
    options: _Options,
    *,
    stats: bool,
) -> DivergenceWithStats:
    """Check and cast the arguments, run the operator; what is not wanted comes back empty."""
    settings = _settings(options)
    check_scratch_bytes(options.scratch_bytes)
    temperature = check_number("temperature", options.temperature, above=0)
    of_teacher = temperature
    if options.teacher_temperature is not None:
        of_teacher = check_number("teacher_temperature", options.teacher_temperature, above=0)
    hidden = student[0]
    check_floating("student_hidden", hidden)
    check_integers("labels", labels)
    check_device("labels", labels, "student_hidden", hidden)
    shape = hidden.shape[:-1]
    check_shape("labels", labels, shape, "student_hidden without its last dimension")

    own = _prepare(PREFIXES[0], *student, temperature, options)
    others = [_prepare(PREFIXES[1], *teacher, of_teacher, options, beside=hidden)]
    takes_reference = options.kind == "advantage"
    check_reference(takes_reference, f"kind {options.kind!r}", *reference)
    if takes_reference:
        others.append(_prepare(PREFIXES[2], *reference, of_teacher, options, beside=hidden))  # type: ignore[arg-type]  # both are given
    own, *others = cut_alike([own, *others], PREFIXES)

    labels = labels.to(torch.int64).reshape(-1)
    operands = Operands(*own[:3], labels, *own.transform, options.ignore_index, options.compact)
    wants_gradient = torch.is_grad_enabled()
    jacobian = wants_gradient and own.hidden.requires_grad and not own.trains()
    scratch_bytes = 0
    if wants_gradient and own.trains():
        given = options.scratch_bytes
        scratch_bytes = AUTOMATIC_SCRATCH_BYTES if given is None else given
    comparison = _comparison(options.kind, settings, *others)
    if own.shard is None:
        op = linear_divergence_ops.of(operands)
        found = op(*operands, *comparison, jacobian, stats, scratch_bytes)
    else:
        from fastpref.parallel.vocab_divergence import sharded_divergence

        found = sharded_divergence(
            operands, comparison, own.shard,
            jacobian=jacobian, stats=stats, scratch_bytes=scratch_bytes,
        )  # fmt: skip
    divergence, logps, lse, numbers = found[:4]
    divergence = divergence.view(shape)
    if not stats:
        return DivergenceWithStats(divergence, logps, lse, numbers, numbers)
    logps, lse = logps.view(shape), lse.view(shape)
    entropy, maximum, target_logit = numbers.view(*shape, 3).unbind(-1)
    entropy = entropy.masked_fill(target_logit.isnan(), torch.nan)
    ignored = labels.view(shape) == options.ignore_index
    return DivergenceWithStats(
        divergence,
        logps,
        lse if temperature == 1 else lse * temperature,
        entropy.masked_fill(ignored, 0),
        (target_logit >= maximum) & ~ignored,
    )


def _settings(options: _Options) -> Settings:
    """Check what kinds take, and refuse what others take."""
    kind, clip = options.kind, options.clip
    check_choice("kind", kind, tuple(KINDS))
    beta = check_number("beta", options.beta, above=0)
    alpha = check_number("alpha", options.alpha, above=0)
    for name, value in (("beta", beta), ("alpha", alpha)):
        if value >= 1:
            refuse(name, "a number above 0 and below 1", value)
    check_flag("detach_mixture", options.detach_mixture)
    if options.detach_mixture and kind != "skew_reverse_kl":
        refuse("detach_mixture", f"False with kind {kind!r}", True)
    if clip is None:
        bounds: tuple[float | None, float | None] = (None, None)
    else:
        bounds = _check_clip(clip, kind)
    share = {"jsd": beta, "skew_kl": alpha, "skew_reverse_kl": 1 - alpha}.get(kind, beta)
    return Settings(share, options.detach_mixture, *bounds)


def _check_clip(
    clip: tuple[float | None, float | None], kind: str
) -> tuple[float | None, float | None]:
    """The two bounds as floats."""
    if kind != "advantage":
        refuse("clip", f"None with kind {kind!r}", repr(clip))
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        refuse("clip", "two numbers, the least and the largest, or None for either", repr(clip))
    lowest, highest = (None if one is None else check_number("clip", one) for one in clip)
    if lowest is not None and highest is not None and lowest > highest:
        refuse("clip", "the least before the largest", repr(clip))
    return lowest, highest


def _prepare(
    prefix: str,
    hidden: Tensor,
    head: Head | Tensor,
    temperature: float,
    options: _Options,
    beside: Tensor | None = None,  # the student's hidden states, for a teacher
) -> PreparedHead:
    """`prepare_head`; a teacher's has no gradient."""
    if beside is not None:
        check_beside(f"{prefix}hidden", hidden, "student_hidden", beside)
    ready = prepare_head(
        hidden, head, temperature, options.ignore_index, options.compact, prefix=prefix
    )
    if beside is None:
        return ready
    bias = None if ready.bias is None else ready.bias.detach()
    return ready._replace(hidden=ready.hidden.detach(), weight=ready.weight.detach(), bias=bias)


def _comparison(
    kind: str, settings: Settings, teacher: PreparedHead, reference: PreparedHead | None = None
) -> Comparison:
    """The operator's arguments about the teacher and the reference."""
    hidden, weight, bias, transform = None, None, None, LogitTransform()
    if reference is not None:
        hidden, weight, bias, transform, _ = reference
    return Comparison(
        teacher.hidden, teacher.weight, teacher.bias, hidden, weight, bias, *teacher.transform,
        transform.logit_scale, transform.softcap, kind,
        settings.teacher_share, settings.detach_mixture, settings.lowest, settings.highest,
    )  # fmt: skip
