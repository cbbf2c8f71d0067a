"""Divergences of rows, and their gradients, against float64 formulas and the same in PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import formulas
import pytest
import torch
from against_torch import (
    DEVICE,
    FLOATS,
    INF,
    QUIET,
    Transform,
    offsets,
    randint,
    randn,
    rounded,
    spread,
    transforms,
)
from closeness import assert_no_worse
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref.kernels import divergences
from fastpref.kernels.divergences import compare_rows, log_ratio_rows
from fastpref.ops.divergence_rows import log_ratio_, normalise_
from fastpref.ops.divergences import KINDS, Pair, Settings

pytestmark = QUIET

# Each name's kind, the formula's options, and the same as `Settings`.
OPTIONS: dict[str, tuple[str, dict, Settings]] = {
    **{
        kind: (kind, {}, Settings(0.5, False, None, None))
        for kind in ("forward_kl", "reverse_kl", "jeffreys", "total_variation", "jsd")
    },
    "jsd, uneven": ("jsd", {"beta": 0.1}, Settings(0.1, False, None, None)),
    "skew_kl": ("skew_kl", {"alpha": 0.1}, Settings(0.1, False, None, None)),
    "skew_reverse_kl": ("skew_reverse_kl", {"alpha": 0.1}, Settings(0.9, False, None, None)),
    "skew_reverse_kl, detached": (
        "skew_reverse_kl", {"alpha": 0.3, "detach_mixture": True}, Settings(0.7, True, None, None),
    ),
}  # fmt: skip
SHIPPED = (divergences.BLOCK, divergences.COLUMNS_PER_THREAD)
BLOCKS = st.sampled_from([SHIPPED, (128, 4), (256, 8)])
# A row is one block or several, which it fills or does not.
WIDTHS = [1, 6, 40, 128, 300, 1030]
PLAIN = Transform()


class Rows(NamedTuple):
    """What is found of some rows."""

    divergence: Tensor  # (n,)
    gradient: Tensor  # (n, V)
    probabilities: Tensor  # (n, V)
    maximum: Tensor  # (n,)
    others: Tensor  # (n,)
    shortfall: Tensor  # (n,)
    target_logit: Tensor  # (n,)


def found(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    name: str,
    transform: Transform = PLAIN,
    teacher_transform: Transform | None = PLAIN,
    dtype: torch.dtype = torch.float32,
    in_place: bool = False,
    settings: Settings | None = None,
    divergence: Tensor | None = None,
) -> Rows:
    kind, _, usual = OPTIONS.get(name, (name, {}, Settings(0.5, False, None, None)))
    student, teacher = student.clone(), teacher.clone()
    width = student.shape[1]
    if in_place:
        gradient, probabilities = (one.view(dtype)[:, :width] for one in (student, teacher))
    else:
        gradient, probabilities = (torch.empty_like(student, dtype=dtype) for _ in range(2))
    if divergence is None:
        divergence = torch.full_like(student[:, 0], INF).contiguous()
    numbers = [torch.empty_like(divergence) for _ in range(4)]
    compare_rows(
        student, teacher, labels, transform, teacher_transform, kind, *(settings or usual),
        divergence, numbers, gradient, probabilities,
    )  # fmt: skip
    return Rows(divergence, gradient, probabilities, *numbers)


def by_formula(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    name: str,
    transform: Transform = PLAIN,
    teacher_transform: Transform = PLAIN,
) -> Rows:
    """In the dtype of the projections."""
    kind, options, _ = OPTIONS[name]
    log_p = teacher_transform(teacher).log_softmax(-1)
    return by_autograd(
        student, labels, transform,
        lambda log_q: formulas.divergence(log_q, log_p, kind=kind, **options),
    )  # fmt: skip


def by_autograd(
    student: Tensor, labels: Tensor, transform: Transform, function: Callable[[Tensor], Tensor]
) -> Rows:
    x = student.detach().requires_grad_()
    z = transform(x)
    log_q = z.log_softmax(-1)
    value = function(log_q)
    factor = transform.logit_scale / transform.temperature
    gradient, slope = (
        torch.autograd.grad(one.sum(), x, retain_graph=True)[0] for one in (value, z)
    )
    z = z.detach()
    probabilities = log_q.detach().exp() * slope / factor
    probabilities.scatter_(1, labels[:, None], 0)
    maximum, top = z.max(1)
    e = (z - maximum[:, None]).exp()
    shortfall = torch.where(e > 0, e * (maximum[:, None] - z), 0).sum(1)
    others = e.scatter(1, top[:, None], 0).sum(1)
    at_label = z.gather(1, labels[:, None])[:, 0]
    more = probabilities, maximum, others, shortfall, at_label
    return Rows(value.detach(), gradient / factor, *more)


def by_torch(
    student: Tensor, teacher: Tensor, name: str, settings: Settings | None = None
) -> tuple[Tensor, Tensor]:
    """Divergences and gradients (n, V) of logits, as the PyTorch code has them."""
    kind, _, usual = OPTIONS[name]
    logits, log_ratio = student.clone(), teacher.clone()
    q, p, spare, mixture = (torch.empty_like(student) for _ in range(4))
    _, top, others = normalise_(logits, out=q)
    of_teacher = normalise_(log_ratio, out=p)[-1]
    log_ratio_(log_ratio, of_teacher, logits, others)
    pair = Pair(q, p, log_ratio=log_ratio, top=top, out=logits, spare=spare, mixture=mixture)
    values, gradient = KINDS[kind](pair, settings or usual)
    return values.clamp_min(0) + (others + of_teacher) * 0, gradient


def nearby(x: Tensor, seed: int, transform: Transform) -> Tensor:
    """Projections in float64 that differ from others as float32 arithmetic may.

    Without a transform differences are taken first, and an offset costs nothing.
    """
    x = x.double()
    relative = x - x.amax(1, keepdim=True) if transform == PLAIN else x
    return x + 2**-23 * relative * randn(seed, *x.shape).double()


def assert_close(ours: Rows, *rough: Rows, exact: Rows) -> None:
    """No error larger than twice the larger one of any that is ``rough``."""
    for name, one, *others, right in zip(Rows._fields, ours, *rough, exact, strict=True):
        right = right.double()
        worst = max(others, key=lambda other: float((other.double() - right).norm()))
        # Beside a perfect entry, for what float64 itself rounds away.
        perfect = right.new_tensor([1e-9])
        values = (torch.cat((t.reshape(-1).double(), perfect)) for t in (one, worst, right))
        try:
            assert_no_worse(*values, torch.float32)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def small_blocks(patch: pytest.MonkeyPatch, block: tuple[int, int]) -> None:
    patch.setattr(divergences, "BLOCK", block[0])
    patch.setattr(divergences, "COLUMNS_PER_THREAD", block[1])


@pytest.mark.parametrize("name", OPTIONS)
@given(
    n=st.integers(1, 4),
    width=st.sampled_from(WIDTHS),
    block=BLOCKS,
    step=st.sampled_from([1e-3, 0.1, 3.0]),
    scale=st.sampled_from([0.1, 3.0, 12.0]),
    masked=st.booleans(),
    offset=offsets,
    transform=transforms,
    teacher_transform=transforms,
)
def test_equals_the_formula(
    name: str,
    n: int,
    width: int,
    block: tuple[int, int],
    step: float,
    scale: float,
    masked: bool,
    offset: float,
    transform: Transform,
    teacher_transform: Transform,
) -> None:
    """A teacher near the student and far from it; tokens that both mask."""
    student = scale * randn(0, n, width)
    teacher = student + step * randn(1, n, width)
    # A soft cap would flatten an offset, and all differences with it.
    student += 0.0 if transform.softcap else offset
    teacher -= 0.0 if teacher_transform.softcap else offset
    labels = randint(2, width, n)
    both = transform, teacher_transform
    if masked and not (transform.softcap or teacher_transform.softcap):
        hidden = torch.arange(width, device=DEVICE) % 3 == 1
        student, teacher = (one.masked_fill(hidden, -INF) for one in (student, teacher))
        labels -= labels % 3
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block)
        ours = found(student, teacher, labels, name, *both)
    # Of infinite logits the formula has no derivative.
    student, teacher = (one.nan_to_num(neginf=-1e5) for one in (student, teacher))
    near = [
        (nearby(student, seed, transform), nearby(teacher, seed + 1, teacher_transform))
        for seed in (3, 5, 7)
    ]
    exact, *rough = (
        by_formula(*one, labels, name, *both)
        for one in ((student.double(), teacher.double()), (student, teacher), *near)
    )
    if name == "total_variation" and step < 1:  # no rounding may decide which of two is larger
        ours, *rough = (one._replace(gradient=exact.gradient) for one in (ours, *rough))
    assert_close(ours, *rough, exact=exact)


@given(
    n=st.integers(1, 3),
    width=st.sampled_from(WIDTHS),
    block=BLOCKS,
    bounds=st.sampled_from([(None, None), (-1.0, 0.5), (None, 0.1), (0.0, None)]),
    step=st.sampled_from([0.1, 3.0]),
    offset=offsets,
    transform=transforms,
    of_both=st.tuples(transforms, transforms),
)
def test_advantages_of_a_teacher_over_a_reference(
    n: int,
    width: int,
    block: tuple[int, int],
    bounds: tuple[float | None, float | None],
    step: float,
    offset: float,
    transform: Transform,
    of_both: tuple[Transform, Transform],
) -> None:
    student, labels = 3 * randn(0, n, width), randint(1, width, n)
    teacher = student + randn(2, n, width) + (0.0 if of_both[0].softcap else offset)
    reference = teacher + step * randn(3, n, width)

    def expected(*inputs: Tensor) -> Rows:
        gains = [one(x).log_softmax(-1) for one, x in zip(of_both, inputs[1:], strict=True)]
        gain = gains[0] - gains[1]
        gain = gain if bounds == (None, None) else gain.clamp(*bounds)
        return by_autograd(inputs[0], labels, transform, lambda log_q: (log_q.exp() * gain).sum(1))

    inputs, each = (student, teacher, reference), (transform, *of_both)
    exact = expected(*(one.double() for one in inputs))
    rough = [expected(*inputs)] + [
        expected(*(nearby(x, seed + k, each[k]) for k, x in enumerate(inputs)))
        for seed in (4, 7, 10)
    ]
    divergence, log_ratio = torch.full((n,), INF, device=DEVICE), teacher.clone()
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block)
        log_ratio_rows(log_ratio, reference, *of_both, divergence)
        assert (divergence == 0).all()
        settings = Settings(0.5, False, *bounds)
        ours = found(
            student, log_ratio, labels, "advantage", transform, None,
            settings=settings, divergence=divergence,
        )  # fmt: skip
    assert_close(ours, *rough, exact=exact)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("step", [1e-4, 1e-2])
def test_a_teacher_that_is_all_but_the_student(step: float, name: str) -> None:
    """Relative errors grow like 1 / step; of sums that cancel they would like 1 / step ** 2."""
    student = 3 * randn(0, 3, 300)
    teacher = student + step * randn(1, 3, 300)
    ours = found(student, teacher, randint(2, 300, 3), name)
    exact = by_torch(student.double(), teacher.double(), name)
    for one, right in zip(ours, exact, strict=False):
        assert (one - right).norm() <= 1e-6 / step * right.norm()


@pytest.mark.parametrize("name", OPTIONS)
def test_certain_students_keep_their_digits(name: str) -> None:
    """Both models put all but 1e-9 or so on one token: the same, or two."""
    student, teacher = randn(0, 2, 300), randn(1, 2, 300)
    student[:, 7] += 25
    teacher[0, 7] += 24
    teacher[1, 9] += 20
    ours = found(student, teacher, randint(2, 300, 2), name)
    exact = by_torch(student.double(), teacher.double(), name)
    for one, right in zip(ours, exact, strict=False):
        for row in range(2):
            assert (one[row] - right[row]).norm() <= 2e-5 * right[row].norm()


@pytest.mark.parametrize("block", [SHIPPED, (128, 4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_masked_and_invalid_rows_are_those_of_the_pytorch_code(
    monkeypatch: pytest.MonkeyPatch, name: str, block: tuple[int, int]
) -> None:
    """Tokens that one model masks: infinite divergences, and gradients that are not numbers."""
    small_blocks(monkeypatch, block)
    student, teacher = randn(0, 7, 300), randn(1, 7, 300)
    student[0, 3] = teacher[1, 150] = student[2, 5] = teacher[2, 5] = -INF
    student[3, ::2], teacher[3, 1::2] = -INF, -INF  # no token in common
    student[4] = teacher[5] = -INF
    student[6, 140] = INF
    expected = by_torch(student, teacher, name)
    for one, right in zip(found(student, teacher, randint(2, 2, 7), name), expected, strict=False):
        torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_written_over_what_is_read(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str
) -> None:
    small_blocks(monkeypatch, (128, 4))
    student, teacher, labels = randn(0, 2, 300), randn(1, 2, 300), randint(2, 300, 2)
    transform = Transform(softcap=2.0)
    apart, in_place = (
        found(student, teacher, labels, name, transform, dtype=dtype, in_place=one)
        for one in (False, True)
    )
    wide = found(student, teacher, labels, name, transform)
    for one, other, exact in zip(apart, in_place, wide, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.float(), rounded(exact, one.dtype).float())


def test_what_has_no_place_is_not_written() -> None:
    student, teacher, labels = randn(0, 3, 300), randn(1, 3, 300), randint(2, 300, 3)
    for name in OPTIONS:
        kind, _, settings = OPTIONS[name]
        everything = found(student, teacher, labels, name)
        given = student.clone(), teacher.clone(), None, PLAIN, PLAIN, kind, *settings
        alone, gradient = torch.empty(3, device=DEVICE), torch.empty_like(student)
        compare_rows(*given, alone)
        assert torch.equal(alone, everything.divergence)
        assert torch.equal(given[0], student) and torch.equal(given[1], teacher)
        compare_rows(*given, alone, gradient=gradient)
        assert torch.equal(gradient, everything.gradient)


def test_labels_outside_the_vocabulary() -> None:
    labels = torch.tensor([-100, -1, 5, 2**32 + 1, 4], device=DEVICE)
    student, teacher = randn(0, 5, 5), randn(1, 5, 5)
    ours = found(student, teacher, labels, "jsd")
    assert ours.target_logit.isnan().tolist() == [True] * 4 + [False]
    assert (ours.probabilities == 0).sum(1).tolist() == [0, 0, 0, 0, 1]
    assert ours.divergence.isfinite().all() and ours.gradient.isfinite().all()


def test_no_rows() -> None:
    assert found(randn(0, 0, 5), randn(1, 0, 5), randint(2, 5, 0), "jsd").gradient.shape == (0, 5)
    nothing = torch.empty(0, device=DEVICE)
    log_ratio_rows(randn(0, 0, 5), randn(1, 0, 5), PLAIN, PLAIN, nothing)


def test_offsets_past_32_bits() -> None:
    student, teacher, labels = randn(0, 3, 40), randn(1, 3, 40), randint(2, 40, 3)
    near = found(student, teacher, labels, "jsd", dtype=torch.float16)
    far = [spread(torch.empty_like(near.gradient)) for _ in range(2)]
    compare_rows(
        student, teacher, labels, PLAIN, PLAIN, "jsd", *OPTIONS["jsd"][2],
        torch.empty(3, device=DEVICE), (), *far,
    )  # fmt: skip
    assert torch.equal(far[0], near.gradient) and torch.equal(far[1], near.probabilities)
