"""Divergences of two heads, and their gradients, from projections on the whole vocabulary.

A program has a row. It is read three times: for both normalisers, for the divergence and the mean
that its gradient needs, and to be overwritten by the gradient.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .divergence_kinds import DETACHED, KINDS, no_nan, times
from .launch import compile_options, on
from .numerics import (
    FAR,
    LOWEST,
    Transform,
    exp,
    log1p,
    log1p_bounded,
    transform_arguments,
    transform_logits,
)
from .tiles import load_logits

BLOCK = 2048
FEWEST_COLUMNS = 128  # of a block: at least one for each thread
COLUMNS_PER_THREAD = 8


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
    slope; `probabilities`, which have a place only beside it, are the student's, damped likewise
    and 0 at the label. They may be `student` and `teacher`, or the same memory as 16-bit numbers.

    Without `teacher_transform`, `teacher` and `divergence` are what `log_ratio_rows` left.

    `statistics` are, with `z` the student's logits: the largest logit; the sum of
    `e = exp(z - largest)` over all tokens but the largest; that of `e * (largest - z)`; the label's
    logit, NaN for a label outside `[0, V)`. Matrices have contiguous rows, vectors are contiguous.
    """
    n_rows, width = student.shape
    if n_rows == 0:
        return
    bounds = (
        -float("inf") if lowest is None else float(lowest),
        float("inf") if highest is None else float(highest),
    )
    function, centred, is_mean = DETACHED if detach_mixture else KINDS[kind]
    numbers: Sequence[Tensor | None] = statistics or [None] * 4
    with on(student.device):
        _compare_rows_kernel[(n_rows,)](
            student, teacher, None if labels is None else labels.contiguous(), divergence,
            *numbers, gradient, probabilities,
            width, student.stride(0), teacher.stride(0),
            0 if gradient is None else gradient.stride(0),
            0 if probabilities is None else probabilities.stride(0),
            float(teacher_share), *bounds,
            **transform_arguments(transform),
            **_of_other(teacher_transform),
            KIND=function,
            CENTRED=centred,
            IS_MEAN=is_mean,
            IS_LOG_RATIO=teacher_transform is None,
            **_blocks(width),
            **compile_options(many_registers=transform.softcap is not None),
        )  # fmt: skip


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
    with on(teacher.device):
        _log_ratio_rows_kernel[(n_rows,)](
            teacher, reference, divergence, width, teacher.stride(0), reference.stride(0),
            **transform_arguments(transform),
            **_of_other(reference_transform),
            **_blocks(width),
            **compile_options(),
        )  # fmt: skip


def _blocks(width: int) -> dict[str, int | bool]:
    """How a row is cut into blocks, and the warps for one."""
    block = min(max(triton.next_power_of_2(width), FEWEST_COLUMNS), BLOCK)
    warps = max(1, block // (32 * COLUMNS_PER_THREAD))
    return {"EVEN": width % block == 0, "BLOCK": block, "num_warps": warps}


def _of_other(transform: Transform | None) -> dict[str, float | bool]:
    """`transform_arguments` of a second head; None leaves its numbers as they are."""
    given = {"inner": 1.0, "outer": 1.0, "HAS_SOFTCAP": False, "HAS_FACTOR": False}
    if transform is not None:
        given = transform_arguments(transform)
    return {f"other_{name}" if name.islower() else f"OTHER_{name}": given[name] for name in given}


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
    if gradient_ptr is not None:
        gradient_ptr += row * gradient_stride
    if probabilities_ptr is not None:
        probabilities_ptr += row * probabilities_stride
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

    maximum, others, teacher_maximum, teacher_others, teacher_at_top = _normalise(
        student_ptr, teacher_ptr, width, inner, outer, other_inner, other_outer,
        HAS_SOFTCAP, HAS_FACTOR, OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, IS_LOG_RATIO, EVEN, BLOCK,
    )  # fmt: skip
    unit = 1.0 / (1.0 + others)
    teacher_unit = 1.0 / (1.0 + teacher_others)
    normaliser = _log_of_ratio(others, teacher_others)
    invalid = (others + teacher_others) * 0.0
    if IS_LOG_RATIO:
        invalid += tl.load(divergence_ptr + row)
    of_top = 0.0
    if CENTRED:
        # The top's `g` is nearly all of the mean where the student is certain.
        top_q, top_p, top_log_ratio = _pair(
            maximum, teacher_at_top, maximum, teacher_maximum, unit, teacher_unit, normaliser,
            IS_LOG_RATIO,
        )  # fmt: skip
        _, of_top, _ = KIND(top_q, top_p, top_log_ratio, share, lowest, highest)
        of_top = tl.where(tl.abs(of_top) == float("inf"), 0.0, of_top)

    values = tl.zeros((BLOCK,), tl.float32)
    terms = tl.zeros((BLOCK,), tl.float32)
    shortfall = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        s, damping, t = _logits_of_both(
            student_ptr, teacher_ptr, start, width, inner, outer, other_inner, other_outer,
            HAS_SOFTCAP, HAS_FACTOR, OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, EVEN, BLOCK,
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
    divergence = mean + of_top
    if not IS_MEAN:
        divergence = tl.maximum(tl.sum(values, axis=0), 0.0)
    # Terms that are not a number are left out: rows that have no distribution say so here.
    tl.store(divergence_ptr + row, divergence + invalid)
    if maximum_ptr is not None:
        tl.store(maximum_ptr + row, maximum)
        tl.store(others_ptr + row, others)
        tl.store(shortfall_ptr + row, tl.sum(shortfall, axis=0) * (1.0 + others))

    if CENTRED and gradient_ptr is not None:
        for start in range(0, width, BLOCK):
            s, damping, t = _logits_of_both(
                student_ptr, teacher_ptr, start, width, inner, outer, other_inner, other_outer,
                HAS_SOFTCAP, HAS_FACTOR, OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, EVEN, BLOCK,
            )  # fmt: skip
            q, p, log_ratio = _pair(
                s, t, maximum, teacher_maximum, unit, teacher_unit, normaliser, IS_LOG_RATIO
            )
            value, g, direct = KIND(q, p, log_ratio, share, lowest, highest)
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
    maximum, others, reference_maximum, reference_others, at_top = _normalise(
        teacher_ptr, reference_ptr, width, inner, outer, other_inner, other_outer,
        HAS_SOFTCAP, HAS_FACTOR, OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, False, EVEN, BLOCK,
    )  # fmt: skip
    normaliser = _log_of_ratio(reference_others, others)
    for start in range(0, width, BLOCK):
        t, damping, r = _logits_of_both(
            teacher_ptr, reference_ptr, start, width, inner, outer, other_inner, other_outer,
            HAS_SOFTCAP, HAS_FACTOR, OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, EVEN, BLOCK,
        )  # fmt: skip
        column = start + tl.arange(0, BLOCK)
        log_ratio = no_nan((t - maximum) - (r - reference_maximum) + normaliser)
        tl.store(teacher_ptr + column, log_ratio, mask=column < width)
    tl.store(divergence_ptr + row, (others + reference_others) * 0.0)


@triton.jit
def _normalise(
    row_ptr, other_ptr, width, inner, outer, other_inner, other_outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    OTHER_HAS_SOFTCAP: tl.constexpr, OTHER_HAS_FACTOR: tl.constexpr,
    IS_LOG_RATIO: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of two rows of logits each largest, and the sum of the others' exponentials less it.

    Also the second row's number at the top of the first. With IS_LOG_RATIO that is all there is of
    the second. A sum is NaN where a row has an infinite logit, or none above -inf.
    """
    # Of each place in a block: no sum over threads until all columns have been seen.
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    other_largest = tl.full((BLOCK,), LOWEST, tl.float32)
    other_others = tl.zeros((BLOCK,), tl.float32)
    other_at_top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        z, _, other = _logits_of_both(
            row_ptr, other_ptr, start, width, inner, outer, other_inner, other_outer,
            HAS_SOFTCAP, HAS_FACTOR, OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, EVEN, BLOCK,
        )  # fmt: skip
        other_at_top = tl.where(z > largest, other, other_at_top)
        largest, others = _fold(z, largest, others)
        if not IS_LOG_RATIO:
            other_largest, other_others = _fold(other, other_largest, other_others)
    is_top = largest == tl.max(largest, axis=0)
    at_top = tl.max(tl.where(is_top, other_at_top, -float("inf")), axis=0)
    maximum, others = _join(largest, others)
    other_maximum = tl.full((), 0.0, tl.float32)
    other_sum = tl.full((), 0.0, tl.float32)
    if not IS_LOG_RATIO:
        other_maximum, other_sum = _join(other_largest, other_others)
    return maximum, others, other_maximum, other_sum, at_top


@triton.jit
def _fold(z, largest, others):
    """Take in one logit at every place of a block.

    There `others` is the sum of `exp(z - largest)` over all logits but one that is the largest.
    """
    rises = z > largest
    weight = exp(-tl.abs(z - largest))
    others = tl.where(rises, (others + 1.0) * weight, others + weight)
    return tl.where(rises, z, largest), others


@triton.jit
def _join(largest, others):
    """The same of a whole row."""
    maximum = tl.max(largest, axis=0)
    is_top = largest == maximum
    weight = exp(largest - maximum)
    more_tops = tl.sum(is_top.to(tl.float32), axis=0) - 1.0
    others = tl.sum(others * weight + tl.where(is_top, 0.0, weight), axis=0) + more_tops
    maximum = tl.where(maximum == LOWEST, -float("inf"), maximum)
    return maximum, others + maximum * 0.0


@triton.jit
def _log_of_ratio(others, other_others):
    """`log((1 + others) / (1 + other_others))`, with all its digits where the two are close."""
    change = (others - other_others) / (1.0 + other_others)
    near = log1p_bounded(tl.minimum(tl.maximum(change, -0.5), 1.0))
    return tl.where((change > 1.0) | (change < -0.5), log1p(others) - log1p(other_others), near)


@triton.jit
def _pair(
    s, t, maximum, teacher_maximum, unit, teacher_unit, normaliser, IS_LOG_RATIO: tl.constexpr
):  # fmt: skip
    """Probabilities of student and teacher, and `log(p/q)`: 0 where both are -inf."""
    below = s - maximum
    q = exp(below) * unit
    if IS_LOG_RATIO:
        p = q  # which nobody reads
        log_ratio = t
    else:
        teacher_below = t - teacher_maximum
        p = exp(teacher_below) * teacher_unit
        log_ratio = no_nan(teacher_below - below + normaliser)
    return q, p, log_ratio


@triton.jit
def _logits_of_both(
    row_ptr, other_ptr, start, width, inner, outer, other_inner, other_outer,
    HAS_SOFTCAP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    OTHER_HAS_SOFTCAP: tl.constexpr, OTHER_HAS_FACTOR: tl.constexpr,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK,) of two rows from `start` on, -inf past their end; the first's damping."""
    z, damping = load_logits(
        row_ptr, start, width, -1, inner, outer, False, HAS_SOFTCAP, HAS_FACTOR, EVEN, BLOCK
    )
    other, _ = load_logits(
        other_ptr, start, width, -1, other_inner, other_outer,
        False, OTHER_HAS_SOFTCAP, OTHER_HAS_FACTOR, EVEN, BLOCK,
    )  # fmt: skip
    return z, damping, other


@triton.jit
def _store(
    gradient_ptr, probabilities_ptr, start, width, label, gradient, q, damping,
    EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one block of the gradient, and of the probabilities if they have a place."""
    column = start + tl.arange(0, BLOCK)
    # What is written may lie where another thread reads the block's projections, if in fewer bytes.
    tl.debug_barrier()
    tl.store(gradient_ptr + column, gradient * damping, mask=column < width)
    if probabilities_ptr is not None:
        probabilities = tl.where(column == label, 0.0, q * damping)
        tl.store(probabilities_ptr + column, probabilities, mask=column < width)
