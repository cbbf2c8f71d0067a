"""Two heads' projections of some rows and the whole vocabulary: divergences and their gradients.

A program has a row. It is read three times: for both normalisers, for the divergence and the mean
that its gradient needs, and to be overwritten by the gradient. `fastpref.ops.divergences` has the
formulas of every kind in PyTorch, and why they are written this way.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import compile_options, on
from .numerics import (
    FAR,
    LOWEST,
    Transform,
    exp,
    log1p,
    tanh,
    transform_arguments,
    transform_logits,
)

BLOCK = 2048
FEWEST_COLUMNS = 128  # of a block: at least one for each thread
COLUMNS_PER_THREAD = 8


@triton.jit
def forward_kl(q, p, log_ratio, share, lowest, highest):
    """`sum p log(p/q)`: the gradient is `q - p`."""
    excess = _excess(q, p, _half_tanh(log_ratio))
    return times(p, log_ratio) - excess, 0.0, -excess


@triton.jit
def reverse_kl(q, p, log_ratio, share, lowest, highest):
    """`sum q log(q/p)`, `g = log(q/p)`."""
    value = _excess(q, p, _half_tanh(log_ratio)) - times(q, log_ratio)
    return value, -log_ratio, 0.0


@triton.jit
def jeffreys(q, p, log_ratio, share, lowest, highest):
    """`sum (p - q) log(p/q)`, `g = -p/q + log(q/p)`."""
    excess = _excess(q, p, _half_tanh(log_ratio))
    return times(excess, log_ratio), -log_ratio, -excess


@triton.jit
def total_variation(q, p, log_ratio, share, lowest, highest):
    """`1/2 sum abs(p - q)`, `g = 1/2 sign(q - p)`."""
    value = 0.5 * tl.abs(_excess(q, p, _half_tanh(log_ratio)))
    half_sign = tl.where(log_ratio > 0.0, 0.5, tl.where(log_ratio < 0.0, -0.5, 0.0))
    return value, -half_sign, 0.0


@triton.jit
def jsd(q, p, log_ratio, share, lowest, highest):
    """`b sum p log(p/m) + (1-b) sum q log(q/m)`, `g = (1-b) log(q/m)`."""
    larger = _larger_over_mixture(_half_tanh(log_ratio), share)
    log_p = tl.minimum(log_ratio, 0.0) + larger
    log_q = larger - tl.maximum(log_ratio, 0.0)
    value = share * times(p, log_p) + (1.0 - share) * times(q, log_q)
    return value, (1.0 - share) * log_q, 0.0


@triton.jit
def skew_kl(q, p, log_ratio, share, lowest, highest):
    """`sum p log(p/m)`, `m = a p + (1-a) q`, `g = -(1-a) p/m`."""
    half_tanh = _half_tanh(log_ratio)
    log_p = tl.minimum(log_ratio, 0.0) + _larger_over_mixture(half_tanh, share)
    value = times(p, log_p) - (1.0 - share) * _excess(q, p, half_tanh)
    return value, (share - 1.0) * exp(log_p), 0.0


@triton.jit
def skew_reverse_kl(q, p, log_ratio, share, lowest, highest):
    """`sum q log(q/m)`, `m = (1-a) p + a q`, `g = log(q/m) - a q/m`."""
    value, log_q, direct = skew_reverse_kl_detached(q, p, log_ratio, share, lowest, highest)
    half_tanh = _half_tanh(log_ratio)
    # (p - q) / m = (1 - q/m) / (1-a)
    over_mixture = 2.0 * half_tanh / (1.0 + (2.0 * share - 1.0) * half_tanh)
    return value, log_q + share * (1.0 - share) * over_mixture, direct


@triton.jit
def skew_reverse_kl_detached(q, p, log_ratio, share, lowest, highest):
    """The same with `g = log(q/m)`."""
    half_tanh = _half_tanh(log_ratio)
    log_q = _larger_over_mixture(half_tanh, share) - tl.maximum(log_ratio, 0.0)
    value = times(q, log_q) + share * _excess(q, p, half_tanh)
    return value, log_q, 0.0


@triton.jit
def advantage(q, p, log_ratio, share, lowest, highest):
    """`g = A`, clipped; the value is its mean."""
    return 0.0, tl.minimum(tl.maximum(log_ratio, lowest), highest), 0.0


class Kind(NamedTuple):
    """A function of `q`, `p`, `log(p/q)` and three numbers, and what to make of what it returns.

    It returns `value`, `g` and `direct`, of each token, from which follow the divergence
    `sum value` and its gradient `q * (g - sum(q * g)) + direct`.
    """

    function: Any  # triton.JITFunction
    centred: bool = True  # whether there is a `g`
    is_mean: bool = False  # whether the divergence is `sum(q * g)`


KINDS = {
    "forward_kl": Kind(forward_kl, centred=False),
    "reverse_kl": Kind(reverse_kl),
    "jsd": Kind(jsd),
    "skew_kl": Kind(skew_kl),
    "skew_reverse_kl": Kind(skew_reverse_kl),
    "total_variation": Kind(total_variation),
    "jeffreys": Kind(jeffreys),
    "advantage": Kind(advantage, is_mean=True),
}
DETACHED = Kind(skew_reverse_kl_detached)


def compare_rows(
    student: Tensor,  # (n, V) float32
    teacher: Tensor,  # (n, V) float32
    labels: Tensor | None,  # (n,) int64
    transform: Transform,
    teacher_transform: Transform | None,
    kind: str,
    teacher_share: float,
    detach_mixture: bool,
    lowest: float | None,
    highest: float | None,
    divergence: Tensor,  # (n,) float32, written
    statistics: Sequence[Tensor] = (),  # none or four, (n,) float32 each, written
    gradient: Tensor | None = None,  # (n, V), written
    probabilities: Tensor | None = None,  # (n, V), written
) -> None:
    """Compute divergences of rows of projections, and their gradients if they have a place.

    `gradient` is with respect to the student's projections, but for the constant factor of their
    slope; `probabilities` are the student's, damped likewise and 0 at the label. They may be
    `student` and `teacher`, or views of these in 16 bits with the same rows.

    Without `teacher_transform`, `teacher` is what `log_ratio_rows` left, as `divergence` is.

    `statistics` are, with `z` the student's logits: the largest logit; the sum of
    `e = exp(z - largest)` over all tokens but the largest; that of `e * (largest - z)`; the label's
    logit, NaN for a label outside `[0, V)`. Matrices have contiguous rows, vectors are contiguous.
    """
    n_rows, width = student.shape
    if n_rows == 0:
        return
    function, centred, is_mean = DETACHED if detach_mixture else KINDS[kind]
    maximum, others, shortfall, target_logit = statistics or [None] * 4
    block = _block(width)
    with on(student.device):
        _compare_rows_kernel[(n_rows,)](
            student,
            teacher,
            None if labels is None else labels.contiguous(),
            divergence,
            maximum,
            others,
            shortfall,
            target_logit,
            gradient,
            probabilities,
            width,
            student.stride(0),
            teacher.stride(0),
            0 if gradient is None else gradient.stride(0),
            0 if probabilities is None else probabilities.stride(0),
            float(teacher_share),
            -float("inf") if lowest is None else float(lowest),
            float("inf") if highest is None else float(highest),
            **transform_arguments(transform),
            **_of_other(teacher_transform or transform),
            KIND=function,
            CENTRED=centred,
            IS_MEAN=is_mean,
            IS_LOG_RATIO=teacher_transform is None,
            EVEN=width % block == 0,
            BLOCK=block,
            num_warps=_warps(block),
            **compile_options(),
        )


def log_ratio_rows(
    teacher: Tensor,  # (n, V) float32, overwritten
    reference: Tensor,  # (n, V) float32
    transform: Transform,
    reference_transform: Transform,
    divergence: Tensor,  # (n,) float32, written
) -> None:
    """Overwrite projections of a teacher by its log-probabilities less those of a reference.

    They are 0 where both are -inf. `divergence` is 0, and NaN of rows without a distribution.
    """
    n_rows, width = teacher.shape
    if n_rows == 0:
        return
    block = _block(width)
    with on(teacher.device):
        _log_ratio_rows_kernel[(n_rows,)](
            teacher,
            reference,
            divergence,
            width,
            teacher.stride(0),
            reference.stride(0),
            **transform_arguments(transform),
            **_of_other(reference_transform),
            EVEN=width % block == 0,
            BLOCK=block,
            num_warps=_warps(block),
            **compile_options(),
        )


def _block(width: int) -> int:
    block: int = triton.next_power_of_2(width)
    return min(max(block, FEWEST_COLUMNS), BLOCK)


def _warps(block: int) -> int:
    return max(1, block // (32 * COLUMNS_PER_THREAD))


def _of_other(transform: Transform) -> dict[str, float | bool]:
    """The arguments of a second head."""
    arguments = transform_arguments(transform).items()
    return {f"other_{name}" if name.islower() else f"OTHER_{name}": one for name, one in arguments}


@triton.jit
def _compare_rows_kernel(
    student_ptr,  # (n, V)
    teacher_ptr,  # (n, V)
    labels_ptr,  # (n,) or None
    divergence_ptr,  # (n,)
    maximum_ptr,  # (n,) or None
    others_ptr,  # (n,), or None with maximum_ptr
    shortfall_ptr,  # (n,), or None with maximum_ptr
    target_logit_ptr,  # (n,), or None with maximum_ptr
    gradient_ptr,  # (n, V) or None
    probabilities_ptr,  # (n, V) or None
    width, student_stride, teacher_stride, gradient_stride, probabilities_stride,
    share, lowest, highest, inner, outer, other_inner, other_outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    OTHER_HAS_SOFTCAP: tl.constexpr, OTHER_HAS_FACTOR: tl.constexpr,
    KIND: tl.constexpr, CENTRED: tl.constexpr, IS_MEAN: tl.constexpr,
    IS_LOG_RATIO: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    gradient_ptr = _row(gradient_ptr, row, gradient_stride)
    probabilities_ptr = _row(probabilities_ptr, row, probabilities_stride)
    # A launch under torch.compile may hand Python floats over as float64.
    share = tl.cast(share, tl.float32)
    lowest = tl.cast(lowest, tl.float32)
    highest = tl.cast(highest, tl.float32)
    label = -1
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
        label = tl.where((label >= 0) & (label < width), label, -1).to(tl.int32)
        if target_logit_ptr is not None:
            target_logit = tl.full((), float("nan"), tl.float32)
            if label >= 0:
                x = tl.load(student_ptr + label)
                target_logit, _ = transform_logits(x, inner, outer, HAS_SOFTCAP, HAS_FACTOR)
            tl.store(target_logit_ptr + row, target_logit)

    # Of each place in a block: no sum over threads until all columns have been seen.
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    teacher_largest = tl.full((BLOCK,), LOWEST, tl.float32)
    teacher_others = tl.zeros((BLOCK,), tl.float32)
    teacher_at_top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        s, _ = _logits(student_ptr, start, width, inner, outer, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK)
        t = _teacher(
            teacher_ptr, start, width, other_inner, other_outer,
            OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, IS_LOG_RATIO, EVEN, BLOCK,
        )  # fmt: skip
        teacher_at_top = tl.where(s > largest, t, teacher_at_top)
        largest, others = _fold(s, largest, others)
        if not IS_LOG_RATIO:
            teacher_largest, teacher_others = _fold(t, teacher_largest, teacher_others)
    maximum = tl.max(largest, axis=0)
    teacher_at_top = tl.max(tl.where(largest == maximum, teacher_at_top, -float("inf")), axis=0)
    maximum, others = _join(largest, others)
    unit = 1.0 / (1.0 + others)
    teacher_maximum = 0.0
    teacher_unit = 0.0
    normaliser = 0.0
    if IS_LOG_RATIO:
        invalid = tl.load(divergence_ptr + row) + others * 0.0
    else:
        teacher_maximum, teacher_others = _join(teacher_largest, teacher_others)
        teacher_unit = 1.0 / (1.0 + teacher_others)
        normaliser = log1p(others) - log1p(teacher_others)
        invalid = (others + teacher_others) * 0.0
    # Relative to the top's, which is nearly all of the mean where the student is certain.
    q, p, log_ratio = _pair(
        maximum, teacher_at_top, maximum, teacher_maximum, unit, teacher_unit, normaliser,
        IS_LOG_RATIO,
    )  # fmt: skip
    _, of_top, _ = KIND(q, p, log_ratio, share, lowest, highest)
    if CENTRED:
        of_top = tl.where(tl.abs(of_top) == float("inf"), 0.0, of_top)

    values = tl.zeros((BLOCK,), tl.float32)
    terms = tl.zeros((BLOCK,), tl.float32)
    shortfall = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        s, damping = _logits(
            student_ptr, start, width, inner, outer, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK
        )
        t = _teacher(
            teacher_ptr, start, width, other_inner, other_outer,
            OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, IS_LOG_RATIO, EVEN, BLOCK,
        )  # fmt: skip
        q, p, log_ratio = _pair(
            s, t, maximum, teacher_maximum, unit, teacher_unit, normaliser, IS_LOG_RATIO
        )
        value, g, direct = KIND(q, p, log_ratio, share, lowest, highest)
        values += value
        if shortfall_ptr is not None:
            shortfall += q * tl.minimum(maximum - s, FAR)
        if CENTRED:
            terms += times(q, g - of_top)
        elif gradient_ptr is not None:
            _store(
                gradient_ptr, probabilities_ptr, start, width, label, direct, q, damping,
                EVEN, BLOCK,
            )  # fmt: skip
    mean = tl.sum(terms, axis=0)
    if IS_MEAN:
        divergence = mean + of_top
    else:
        divergence = tl.maximum(tl.sum(values, axis=0), 0.0)
    # Terms that are not a number are left out: rows that have no distribution say so here.
    tl.store(divergence_ptr + row, divergence + invalid)
    if maximum_ptr is not None:
        tl.store(maximum_ptr + row, maximum)
        tl.store(others_ptr + row, others)
        tl.store(shortfall_ptr + row, tl.sum(shortfall, axis=0) * (1.0 + others))

    if CENTRED and gradient_ptr is not None:
        for start in range(0, width, BLOCK):
            s, damping = _logits(
                student_ptr, start, width, inner, outer, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK
            )
            t = _teacher(
                teacher_ptr, start, width, other_inner, other_outer,
                OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, IS_LOG_RATIO, EVEN, BLOCK,
            )  # fmt: skip
            q, p, log_ratio = _pair(
                s, t, maximum, teacher_maximum, unit, teacher_unit, normaliser, IS_LOG_RATIO
            )
            _, g, direct = KIND(q, p, log_ratio, share, lowest, highest)
            gradient = times(q, g - of_top) - q * mean + direct
            _store(
                gradient_ptr, probabilities_ptr, start, width, label, gradient, q, damping,
                EVEN, BLOCK,
            )  # fmt: skip


@triton.jit
def _log_ratio_rows_kernel(
    teacher_ptr,  # (n, V)
    reference_ptr,  # (n, V)
    divergence_ptr,  # (n,)
    width, teacher_stride, reference_stride, inner, outer, other_inner, other_outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    OTHER_HAS_SOFTCAP: tl.constexpr, OTHER_HAS_FACTOR: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    teacher_ptr += row * teacher_stride
    reference_ptr += row * reference_stride
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    reference_largest = tl.full((BLOCK,), LOWEST, tl.float32)
    reference_others = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        t, _ = _logits(teacher_ptr, start, width, inner, outer, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK)
        r, _ = _logits(
            reference_ptr, start, width, other_inner, other_outer,
            OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, EVEN, BLOCK,
        )  # fmt: skip
        largest, others = _fold(t, largest, others)
        reference_largest, reference_others = _fold(r, reference_largest, reference_others)
    maximum, others = _join(largest, others)
    reference_maximum, reference_others = _join(reference_largest, reference_others)
    normaliser = log1p(reference_others) - log1p(others)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        t, _ = _logits(teacher_ptr, start, width, inner, outer, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK)
        r, _ = _logits(
            reference_ptr, start, width, other_inner, other_outer,
            OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, EVEN, BLOCK,
        )  # fmt: skip
        log_ratio = (t - maximum) - (r - reference_maximum) + normaliser
        tl.store(teacher_ptr + column, _no_nan(log_ratio), mask=column < width)
    tl.store(divergence_ptr + row, (others + reference_others) * 0.0)


@triton.jit
def times(weights, logs):
    """`weights * logs`, 0 where the weight is 0 and the logarithm infinite."""
    return _no_nan(weights * logs)


@triton.jit
def _no_nan(x):
    """`x` with 0 for NaN."""
    return tl.where(x == x, x, 0.0)


@triton.jit
def _half_tanh(log_ratio):
    """`tanh(log(p/q) / 2) = (p - q) / (p + q)`, with all its digits where p is close to q."""
    half, _ = tanh(0.5 * log_ratio)
    return half


@triton.jit
def _excess(q, p, half_tanh):
    """`p - q`."""
    return (p + q) * half_tanh


@triton.jit
def _larger_over_mixture(half_tanh, share):
    """`log(max(p, q) / m)`, `m = share * p + (1 - share) * q`."""
    tilted = (2.0 * share - 1.0) * half_tanh
    # Where all of the mixture is of the smaller, less a rounding.
    above = tl.maximum(tl.abs(half_tanh) - tilted, 0.0)
    return log1p(above / (1.0 + tilted))


@triton.jit
def _fold(z, largest, others):
    """Take one logit more at every place of a block.

    There `others` is the sum of `exp(z - largest)` over all logits but one that is the largest.
    """
    rises = z > largest
    weight = exp(-tl.abs(z - largest))
    others = tl.where(rises, (others + 1.0) * weight, others + weight)
    return tl.where(rises, z, largest), others


@triton.jit
def _join(largest, others):
    """The same of a whole row from those of every place.

    `others` is NaN where a row has an infinite logit, or none above -inf.
    """
    maximum = tl.max(largest, axis=0)
    is_top = largest == maximum
    weight = exp(largest - maximum)
    tops = tl.sum(is_top.to(tl.float32), axis=0)
    others = tl.sum(others * weight + tl.where(is_top, 0.0, weight), axis=0) + (tops - 1.0)
    maximum = tl.where(maximum == LOWEST, -float("inf"), maximum)
    return maximum, others + maximum * 0.0


@triton.jit
def _pair(
    s, t, maximum, teacher_maximum, unit, teacher_unit, normaliser, IS_LOG_RATIO: tl.constexpr
):  # fmt: skip
    """Probabilities of student and teacher, and `log(p/q)`: 0 where both are -inf."""
    below = s - maximum
    q = exp(below) * unit
    if IS_LOG_RATIO:
        p = q
        log_ratio = t
    else:
        teacher_below = t - teacher_maximum
        p = exp(teacher_below) * teacher_unit
        log_ratio = _no_nan(teacher_below - below + normaliser)
    return q, p, log_ratio


@triton.jit
def _row(ptr, row, stride):
    """Where a row starts."""
    if ptr is not None:
        ptr += row * stride
    return ptr


@triton.jit
def _logits(
    row_ptr, start, width, inner, outer, HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK,) of a row from `start` on, -inf past its end, and their damping."""
    x = _load(row_ptr, start, width, EVEN, BLOCK)
    z, damping = transform_logits(x, inner, outer, HAS_SOFTCAP, HAS_FACTOR)
    if not EVEN:
        z = tl.where(start + tl.arange(0, BLOCK) < width, z, -float("inf"))
    return z, damping


@triton.jit
def _teacher(
    row_ptr, start, width, inner, outer, HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    IS_LOG_RATIO: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The teacher's logits (BLOCK,), or the logarithms of ratios, which are 0 past the end."""
    if IS_LOG_RATIO:
        t = _load(row_ptr, start, width, EVEN, BLOCK)
    else:
        t, _ = _logits(row_ptr, start, width, inner, outer, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK)
    return t


@triton.jit
def _load(row_ptr, start, width, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    column = start + tl.arange(0, BLOCK)
    if EVEN:
        x = tl.load(row_ptr + column)
    else:
        x = tl.load(row_ptr + column, mask=column < width, other=0.0)
    return x


@triton.jit
def _store(
    gradient_ptr, probabilities_ptr, start, width, label, gradient, q, damping,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one block of the gradient, and of the probabilities if they have a place.

    Every thread has read its part of the block, which the same memory may hold in more bytes.
    """
    column = start + tl.arange(0, BLOCK)
    mask = None if EVEN else column < width
    tl.debug_barrier()
    tl.store(gradient_ptr + column, gradient * damping, mask=mask)
    if probabilities_ptr is not None:
        probabilities = tl.where(column == label, 0.0, q * damping)
        tl.store(probabilities_ptr + column, probabilities, mask=mask)
