"""The forward KL from a teacher's means is that from the teacher."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, reference_logps, reference_logsumexp
from counting import flops_of, peak_bytes_of
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from two_heads import TwoHeads, hold, two_heads

from fastpref import (
    Head,
    TeacherMeans,
    linear_cached_kl,
    linear_cached_kl_with_stats,
    linear_divergence,
    linear_logps_with_stats,
    teacher_means,
)
from fastpref.ops import tiling
from fastpref.ops.cached_kl_op import cached_kl_backward_ops, cached_kl_ops
from fastpref.ops.teacher_means_op import teacher_means_ops

LABELS = torch.tensor([3, -100, 0, 10])


def uncapped(case: TwoHeads) -> TwoHeads:
    student = case.student
    return case._replace(student=student._replace(head=student.head._replace(softcap=None)))


def means_of(case: TwoHeads, *, compact: bool = True) -> TeacherMeans:
    _, head, labels, options = case.student
    given = {"temperature": case.teacher_temperature or options["temperature"]}
    given["ignore_index"] = options["ignore_index"]
    return teacher_means(*case.teacher, head, labels, compact=compact, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=two_heads(), compact=st.booleans())
def test_equals_the_reference(dtype, case, compact):
    case = uncapped(case)
    ours, plain = (case.to(dtype, trained=False) for _ in range(2))
    exact, nearby = ours.to(torch.float64, trained=False), ours.nearby()
    hidden, head, labels, options = ours.student
    means = means_of(ours, compact=compact)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert means.weight.shape == hidden.shape and means.weight.dtype == wide
    assert not any(one is not None and one.requires_grad for one in means)
    found = linear_cached_kl_with_stats(hidden, head, means, labels, compact=compact, **options)
    values = [found[:3]] + [
        (
            one.expected("forward_kl"),
            reference_logps(one.student),
            reference_logsumexp(one.student),
        )
        for one in (plain, nearby, exact)
    ]
    labelled = case.labelled()
    # The divergence is a difference of numbers as large as its parts.
    sizes = values[-1][2].abs() + means.entropy, 0, 0
    for size, *same in zip(sizes, *values, strict=True):
        hold(*(((one.double() + size) * labelled).detach() for one in same), dtype)
    stats = linear_logps_with_stats(hidden, head, labels, compact=compact, **options)
    assert torch.equal(found.entropy, stats.entropy) and torch.equal(found.is_top1, stats.is_top1)
    alone = linear_cached_kl(hidden, head, means, labels, compact=compact, **options)
    torch.testing.assert_close(alone, found.divergence, rtol=1e-6, atol=1e-5)
    weights = torch.randn(3, *labels.shape, dtype=torch.float64) * labelled
    for one in values:
        terms = zip(weights, one, strict=True)
        sum((w.to(value.dtype) * value).sum() for w, value in terms).backward()
    for gradients in zip(
        *(one.student.gradients() for one in (ours, plain, nearby, exact)), strict=True
    ):
        hold(*gradients, dtype)


@given(case=two_heads(), extra=st.integers(1, 9))
def test_tokens_of_one_vocabulary_alone_are_left_out(case, extra):
    case = uncapped(case).to(torch.float64, trained=False)
    hidden, head, labels, options = case.student
    expected = linear_divergence(
        hidden, head, *case.teacher, labels, kind="forward_kl",
        teacher_temperature=case.teacher_temperature, **options,
    )  # fmt: skip

    def padded(head: Head) -> Head:
        def more(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            return torch.cat((tensor, torch.randn(extra, *tensor.shape[1:]).double()))

        return head._replace(weight=more(head.weight), bias=more(head.bias))

    wider = case._replace(teacher=(case.teacher[0], padded(case.teacher[1])))
    wider_student = case._replace(student=case.student._replace(head=padded(head)))
    for means in (means_of(wider), means_of(wider_student)):
        found = linear_cached_kl(hidden, head, means, labels, **options)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@given(case=two_heads(), compact=st.booleans())
def test_is_the_same_for_any_tiling(case, compact):
    case = uncapped(case).to(torch.float64, trained=False)

    def everything() -> list[torch.Tensor]:
        one = case.to(torch.float64, trained=False)
        hidden, head, labels, options = one.student
        means = means_of(one, compact=compact)
        found = linear_cached_kl(hidden, head, means, labels, compact=compact, **options)
        found.square().sum().backward()
        return [found.detach(), means.weight, means.entropy, *one.student.gradients()]

    whole = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "ROWS_PER_TILE", 4)
        patch.setattr(tiling, "CPU_TILE_BYTES", 1)
        patch.setattr(tiling, "CPU_PIECE_BYTES", 1)
        tiled = everything()
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.double)])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_teacher_may_have_another_dtype(flipped, dtypes):
    own, other = dtypes[::-1] if flipped else dtypes
    hidden, weight, bias = torch.randn(5, 8).to(own), torch.randn(30, 8), torch.randn(30)
    head = Head(weight.to(own), bias.to(own))
    teacher, labels = (torch.randn(5, 6).to(other), torch.randn(30, 6).to(other)), torch.arange(5)
    means = teacher_means(*teacher, head, labels)
    assert means.weight.dtype == (torch.float64 if torch.double in dtypes else torch.float32)
    found = linear_cached_kl(hidden, head, means, labels)
    wide = [one.double() for one in (hidden, *head[:2], *teacher)]
    expected = linear_divergence(wide[0], Head(*wide[1:3]), *wide[3:], labels, kind="forward_kl")
    assert found.dtype == (torch.float64 if own == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("compact", [True, False])
def test_what_is_ignored_spoils_nothing(compact):
    hidden, teacher = torch.randn(4, 5), torch.randn(4, 7)
    hidden[1] = teacher[1] = torch.nan
    weight, teacher_weight = torch.randn(11, 5), torch.randn(11, 7)
    means = teacher_means(teacher, teacher_weight, weight, LABELS, compact=compact)
    assert (means.weight[1] == 0).all() and means.entropy[1] == 0
    means = means._replace(weight=means.weight.clone())
    means.weight[1] = torch.nan  # as padding may be
    hidden.requires_grad_()
    found = linear_cached_kl_with_stats(hidden, weight, means, LABELS, compact=compact)
    assert found.divergence[1] == 0
    sum(one.sum() for one in found[:3]).backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("compact", [True, False])
def test_no_rows_at_all_and_all_ignored(compact):
    for count, labels in ((0, torch.zeros(0, dtype=torch.int64)), (4, torch.full((4,), -100))):
        hidden, weight = torch.randn(count, 8, requires_grad=True), torch.randn(5, 8)
        means = teacher_means(torch.randn(count, 3), torch.randn(5, 3), weight, labels)
        found = linear_cached_kl_with_stats(hidden, weight, means, labels, compact=compact)
        assert all(values.tolist() == [0] * count for values in found)
        (found.divergence.sum() + found.logps.sum()).backward()
        assert (hidden.grad == 0).all()


def test_without_compact_a_label_outside_is_nan():
    head = torch.randn(11, 5)
    means = teacher_means(torch.randn(4, 5), head, head, LABELS)
    labels = torch.tensor([3, -100, 11, 10])
    found = linear_cached_kl(torch.randn(4, 5), head, means, labels, compact=False)
    assert found.isnan().tolist() == [False, False, True, False]


# What is counted.

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = 64, 8, 24, 1000
S = 2 * ROWS * WIDTH * VOCAB
T = 2 * ROWS * TEACHER_WIDTH * VOCAB


def inputs(rows: int = ROWS, ignored: int = 0) -> tuple[torch.Tensor, ...]:
    labels = torch.randint(0, VOCAB, (rows,))
    labels[:ignored] = -100
    return torch.randn(rows, TEACHER_WIDTH), torch.randn(VOCAB, TEACHER_WIDTH), labels


@pytest.mark.parametrize("ignored", [0, ROWS // 2])
def test_products(ignored):
    *teacher, labels = inputs(ignored=ignored)
    hidden, head = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    share = 1 - ignored / ROWS
    assert flops_of(lambda: teacher_means(*teacher, head, labels)) == share * (T + S)
    means = teacher_means(*teacher, head, labels)
    for function in (linear_cached_kl, linear_cached_kl_with_stats):

        def run() -> torch.Tensor:
            found = function(hidden, head, means, labels)  # noqa: B023  # called before the loop goes on
            return found if isinstance(found, torch.Tensor) else sum(found[:3])

        assert flops_of(lambda: run().sum().backward()) == share * 2 * S  # noqa: B023  # called before the loop goes on
        with torch.no_grad():
            assert flops_of(run) == share * S


def test_memory_is_a_block_and_flat(monkeypatch):
    block, piece, tile = 2 * 16 * 4 * VOCAB, 4 * 4 * VOCAB, 2**17
    monkeypatch.setattr(tiling, "CPU_BLOCK_BYTES", block)  # two tiles of 16 rows
    monkeypatch.setattr(tiling, "CPU_PIECE_BYTES", piece)
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", tile)
    head = torch.randn(VOCAB, WIDTH)

    def peaks(rows: int) -> tuple[int, int]:
        *teacher, labels = inputs(rows)
        hidden = torch.randn(rows, WIDTH, requires_grad=True)
        means = teacher_means(*teacher, head, labels)
        return (
            peak_bytes_of(lambda: teacher_means(*teacher, head, labels)),
            peak_bytes_of(lambda: linear_cached_kl(hidden, head, means, labels).sum().backward()),
        )

    small, large = peaks(ROWS), peaks(2 * ROWS)
    assert large[0] < block / 2 + 4 * piece + (large[0] - small[0])
    assert large[1] < 2 * tile + (large[1] - small[1])
    # The means, or the Jacobian, its product and the gradient; a few numbers a row.
    assert large[0] - small[0] < ROWS * 4 * (3 * WIDTH + TEACHER_WIDTH + 32)
    assert large[1] - small[1] < ROWS * 4 * (6 * WIDTH + 32)


# What PyTorch expects of operators.


def leaves(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    return hidden, torch.randn(11, 5, dtype=dtype), torch.randn(11, dtype=dtype)


def some_means(head: Head, dtype: torch.dtype = torch.float32) -> TeacherMeans:
    teacher = torch.randn(4, 7, dtype=dtype), torch.randn(11, 7, dtype=dtype)
    return teacher_means(*teacher, head, LABELS, temperature=0.5)


@pytest.mark.parametrize("compact", [False, True])
def test_gradcheck(compact):
    hidden, *head = leaves(torch.float64)
    head = Head(*head, logit_scale=-1.5)
    means = some_means(head, torch.float64)

    def values(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = {"temperature": 0.7, "compact": compact}
        return linear_cached_kl_with_stats(hidden, head, means, LABELS, **options)[:3]

    assert torch.autograd.gradcheck(values, hidden)


@pytest.mark.parametrize("compact", [False, True])
def test_opcheck(compact):
    hidden, weight, bias = leaves()
    operands = LABELS, 1.5, 0.5, None, -100, compact
    teacher = torch.randn(4, 7), torch.randn(11, 7), None
    opcheck(teacher_means_ops[compact], (*teacher, *operands, weight, bias))
    means = some_means(Head(weight, bias))
    given = hidden, weight, bias, *operands, *means
    opcheck(cached_kl_ops[compact], (*given, True, True))
    _, _, _, jacobian, _, running, rows, n_rows, _ = cached_kl_ops[compact](*given, True, False)
    left = *torch.randn(3, 4), running, rows, n_rows, jacobian
    opcheck(cached_kl_backward_ops[compact], (hidden.detach(), *given[1:9], means.weight, *left))


def test_what_the_host_reads_stays_out_of_cuda_graphs():
    for pair in (teacher_means_ops, cached_kl_ops, cached_kl_backward_ops):
        tagged = [torch.Tag.cudagraph_unsafe in op._opoverload.tags for op in pair]
        assert tagged == [False, True]


def test_compiles_without_graph_breaks():
    hidden, weight, bias = leaves()
    teacher = torch.randn(4, 7), torch.randn(11, 7)

    def total(hidden: torch.Tensor) -> torch.Tensor:
        head = Head(weight, bias)
        means = teacher_means(*teacher, head, LABELS)
        found = linear_cached_kl_with_stats(hidden, head, means, LABELS)
        return found.divergence.square().sum() + found.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(hidden), hidden)
    torch.testing.assert_close(found, torch.autograd.grad(total(hidden), hidden))


def test_second_derivatives_are_refused():
    hidden, weight, _ = leaves()
    values = linear_cached_kl(hidden, weight, some_means(Head(weight)), LABELS)
    (gradient,) = torch.autograd.grad(values.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="fastpref"):
        gradient.sum().backward()


WEIGHT, BIAS = torch.zeros(11, 5), torch.zeros(11)
MEANS = TeacherMeans(torch.zeros(4, 5), None, torch.zeros(4))
REFUSALS = [
    ({"student_head": WEIGHT.clone().requires_grad_()}, "student_head: expected a head that wants"),
    ({"student_head": Head(WEIGHT, softcap=3.0)}, "student_softcap: expected None"),
    ({"student_head": WEIGHT[:, :4]}, r"student_weight: expected shape \(V, 5\)"),
    ({"student_head": Head(WEIGHT, BIAS)}, "means.bias: expected a tensor, got NoneType"),
    ({"means": MEANS._replace(bias=torch.zeros(4))}, "means.bias: expected None, like the bias"),
    ({"means": tuple(MEANS)}, "means: expected TeacherMeans, got tuple"),
    ({"means": MEANS._replace(weight=torch.zeros(4, 6))}, r"means.weight: expected shape \(4, 5\)"),
    ({"means": MEANS._replace(entropy=torch.zeros(3))}, r"means.entropy: expected shape \(4,\)"),
    ({"means": MEANS._replace(entropy=LABELS)}, "means.entropy: expected float64, float32"),
    ({"means": MEANS._replace(weight=WEIGHT[:4].to("meta"))}, "means.weight: expected device cpu"),
    ({"labels": LABELS[:3]}, r"labels: expected shape \(4,\) \(student_hidden without"),
    ({"labels": LABELS + 1}, r"labels: expected -100 \(ignore_index\) or values in \[0, 11\)"),
    ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
]


@pytest.mark.parametrize("function", [linear_cached_kl, linear_cached_kl_with_stats])
@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_bad_input_is_refused(changes, message, function):
    given = {"student_hidden": torch.zeros(4, 5), "student_head": WEIGHT}
    given |= {"means": MEANS, "labels": LABELS}
    with pytest.raises(ValueError, match=f"^{message}"):
        function(**{**given, **changes})


def test_a_head_that_trains_has_values_without_gradients():
    weight = WEIGHT.clone().requires_grad_()
    with torch.no_grad():
        assert linear_cached_kl(torch.zeros(4, 5), weight, MEANS, LABELS).shape == (4,)


REFUSALS_OF_MEANS = [
    ({"teacher_hidden": torch.zeros(4, 6)}, r"teacher_weight: expected shape \(V, 6\)"),
    ({"student_head": Head(WEIGHT, softcap=3.0)}, "student_softcap: expected None"),
    ({"student_head": WEIGHT.to("meta")}, "student_weight: expected device cpu, like teacher_hid"),
    ({"student_head": WEIGHT[0]}, r"student_weight: expected shape \(V, H\)"),
    ({"student_head": WEIGHT.long()}, "student_weight: expected float64, float32"),
    ({"student_head": None}, r"student_head: expected a Head or a tensor \(V, H\)"),
    ({"student_head": WEIGHT[:7]}, r"labels: expected -100 \(ignore_index\) or values in \[0, 7\)"),
    ({"labels": LABELS[:3]}, r"labels: expected shape \(4,\) \(teacher_hidden without"),
    ({"temperature": -1}, "temperature: expected a finite number above 0, got -1"),
    ({"compact": None}, "compact: expected True or False, got None"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS_OF_MEANS)
def test_bad_input_of_means_is_refused(changes, message):
    given = {"teacher_hidden": torch.zeros(4, 7), "teacher_head": torch.zeros(11, 7)}
    given |= {"student_head": WEIGHT, "labels": LABELS}
    with pytest.raises(ValueError, match=f"^{message}"):
        teacher_means(**{**given, **changes})
