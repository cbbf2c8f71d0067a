"""What PyTorch expects of the operators under `linear_divergence`, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from two_heads import EVERY, OPTIONS

from fastpref import Head
from fastpref.ops import linear_divergence, linear_divergence_with_stats
from fastpref.ops.divergence_backward import backward_ops, by_jacobian_ops
from fastpref.ops.linear_divergence_op import Found, linear_divergence_ops

LABELS = torch.tensor([3, -100, 0, 10])
COMPACT = [False, True]  # the indices of `OperatorPair`, too


def leaves(dtype: torch.dtype, *, trained: bool) -> list[torch.Tensor]:
    hidden = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=trained)
    return [hidden, weight, torch.randn(11, dtype=dtype, requires_grad=trained)]


GENERATOR = torch.Generator().manual_seed(1)
TEACHER, TEACHER_HEAD, TEACHER_BIAS, REFERENCE, REFERENCE_HEAD = (
    torch.randn(*shape, generator=GENERATOR) for shape in ((4, 7), (11, 7), (11,), (4, 3), (11, 3))
)


def call(name: str, hidden: Any, weight: Any, bias: Any, **more: Any) -> Any:
    """With teachers that are the same in every call."""
    stats, softcap = more.pop("stats", False), more.pop("softcap", None)
    given = {"kind": name.partition(",")[0], **OPTIONS[name], "labels": LABELS, **more}
    dtype = hidden.dtype
    teacher_head = Head(TEACHER_HEAD.to(dtype), TEACHER_BIAS.to(dtype))
    if given["kind"] == "advantage":
        reference = REFERENCE.to(dtype), REFERENCE_HEAD.to(dtype)
        given |= dict(zip(("reference_hidden", "reference_head"), reference, strict=True))
    function = linear_divergence_with_stats if stats else linear_divergence
    head = Head(weight, bias, softcap=softcap)
    return function(hidden, head, TEACHER.to(dtype), teacher_head, **given)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("trained", "scratch", "softcap"), [(False, 0, 2.0), (True, 0, None), (True, 10**6, 2.0)]
)
def test_gradcheck(trained, scratch, softcap, name):
    if name == "skew_reverse_kl, detached":
        name = "skew_reverse_kl"  # a detached mixture's is no derivative of the value

    def values(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options = {"temperature": 0.7, "stats": True, "scratch_bytes": scratch}
        return call(name, *tensors, softcap=softcap, **options)[:3]

    # Along one random direction, since the property tests compare every number.
    inputs = leaves(torch.float64, trained=trained)
    assert torch.autograd.gradcheck(values, inputs, fast_mode=True)


def arguments(kind: str, *, compact: bool, trained: bool) -> tuple[Any, ...]:
    """The operator's, up to its flags."""
    teacher = (torch.randn(4, 7), torch.randn(11, 7), torch.randn(11))
    reference = (torch.randn(4, 3), torch.randn(11, 3), None)
    return (
        *leaves(torch.float32, trained=trained), LABELS, 1.5, 0.5, 3.0, -100, compact,
        *teacher, *(reference if kind == "advantage" else (None, None, None)),
        0.9, 1.0, 4.0, 1.0, None, kind, 0.3, False, None, 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["forward_kl", "advantage"])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("jacobian", [False, True])
@pytest.mark.parametrize("compact", COMPACT)
def test_opcheck_forward(compact, jacobian, stats, kind):
    given = arguments(kind, compact=compact, trained=not jacobian)
    opcheck(linear_divergence_ops[compact], (*given, jacobian, stats, 0))


@pytest.mark.parametrize("stats", [False, True])
def test_opcheck_forward_with_a_cache(stats):
    # What no row fills stays unwritten, so outputs cannot be compared between runs.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = arguments("jsd", compact=True, trained=True)
    op = linear_divergence_ops.of_labelled_rows
    opcheck(op, (*given, False, stats, 10**6), test_utils=checks)


def left(compact: bool, *wanted: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], Found]:
    given = arguments("jsd", compact=compact, trained=False)
    given = (given[0].detach(), *given[1:])
    found = Found(*linear_divergence_ops[compact](*given, *wanted))
    return given, (*torch.randn(3, 4), found.running, found.rows, found.n_rows), found


@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_backward(wanted, compact):
    given, more, found = left(compact, False, True, 200)
    opcheck(backward_ops[compact], (*given, *more, found.cache, *wanted))


@pytest.mark.parametrize("compact", COMPACT)
def test_opcheck_gradient_by_jacobian(compact):
    given, more, found = left(compact, True, True, 0)
    jacobians = found.jacobian, found.logps_jacobian
    opcheck(by_jacobian_ops[compact], (*given[:9], *more, *jacobians))


def test_what_the_host_reads_stays_out_of_cuda_graphs():
    for pair in (linear_divergence_ops, backward_ops, by_jacobian_ops):
        tagged = [torch.Tag.cudagraph_unsafe in op._opoverload.tags for op in pair]
        assert tagged == [False, True]


@pytest.mark.parametrize("name", ["jsd", "advantage, clipped"])
@pytest.mark.parametrize("trained", [False, True])
def test_compiles_without_graph_breaks(trained, name):
    tensors = leaves(torch.float32, trained=trained)
    wanted = [leaf for leaf in tensors if leaf.requires_grad]

    def total(*tensors: torch.Tensor) -> torch.Tensor:
        found = call(name, *tensors, stats=True)
        return found.divergence.square().sum() + found.logps.sum() + found.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*tensors), wanted)
    for one, other in zip(found, torch.autograd.grad(total(*tensors), wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options", [{}, {"scratch_bytes": 5000}, {"compact": False, "scratch_bytes": 0}], ids=str
)
@pytest.mark.parametrize("trained", [False, True])
def test_compiles_twice_whatever_the_lengths(trained, options):
    """Once for the first length, once for any other."""
    weight, teacher_head = torch.randn(50, 8, requires_grad=trained), torch.randn(50, 6)

    def loss(hidden, weight, teacher, labels):
        models = hidden, weight, teacher, teacher_head
        found = linear_divergence_with_stats(*models, labels, kind="jsd", **options)
        return found.divergence.square().sum() + found.lse.sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for length in (6, 11, 300, 23):
        labels = torch.randint(0, 50, (length,))
        labels[: length // 3] = -100
        hidden = torch.randn(length, 8, requires_grad=True)
        given = hidden, weight, torch.randn(length, 6), labels
        wanted = (hidden, weight)[: 2 if trained else 1]
        found = torch.autograd.grad(compiled(*given), wanted)
        for one, other in zip(found, torch.autograd.grad(loss(*given), wanted), strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_casts_like_a_linear_layer(trained):
    tensors = leaves(torch.float32, trained=trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call("jsd", *tensors)
    found.sum().backward()
    halves = [one.detach().bfloat16().requires_grad_(one.requires_grad) for one in tensors]
    torch.testing.assert_close(found, call("jsd", *halves))
    assert found.dtype == tensors[0].grad.dtype == torch.float32


@pytest.mark.parametrize("trained", [False, True])
def test_non_contiguous_inputs_and_narrow_labels(trained):
    hidden = torch.randn(6, 3, 10)[:, :, ::2].transpose(0, 1)
    teacher = torch.randn(6, 3, 7).transpose(0, 1)
    weight, teacher_weight = torch.randn(5, 11).T, torch.randn(7, 11).T
    labels = torch.randint(0, 11, (6, 3), dtype=torch.int32).T

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        hidden, weight, teacher, teacher_weight, labels = tensors
        hidden = hidden.detach().requires_grad_()
        weight = weight.detach().requires_grad_(trained)
        found = linear_divergence(hidden, weight, teacher, teacher_weight, labels, kind="jeffreys")
        found.square().sum().backward()
        return [found.detach(), hidden.grad, *([weight.grad] if trained else [])]

    given = hidden, weight, teacher, teacher_weight, labels
    for one, other in zip(run(*given), run(*(one.contiguous() for one in given)), strict=True):
        torch.testing.assert_close(one, other)
    assert run(*given)[0].shape == (3, 6)


@pytest.mark.parametrize("trained", [False, True])
def test_a_retained_graph_gives_the_same_gradients_again(trained):
    tensors = leaves(torch.float32, trained=trained)
    values = call("jsd", *tensors, scratch_bytes=10**6)
    first = torch.autograd.grad(values.sum(), tensors[0], retain_graph=True)
    second = torch.autograd.grad(values.sum(), tensors[0])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_second_derivatives_are_refused(trained):
    tensors = leaves(torch.float32, trained=trained)
    values = call("jsd", *tensors)
    (gradient,) = torch.autograd.grad(values.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="fastpref"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by jvp itself
def test_forward_mode_is_refused():
    hidden, weight, bias = (leaf.detach() for leaf in leaves(torch.float32, trained=False))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda one: call("jsd", one, weight, bias), (hidden,), (hidden,))


def test_only_the_head_trains():
    hidden, weight, bias = leaves(torch.float32, trained=True)
    call("jsd", hidden.detach(), weight, bias).sum().backward()
    expected = [one.grad.clone() for one in (weight, bias)]
    weight.grad = bias.grad = None
    call("jsd", hidden, weight, bias).sum().backward()
    for one, other in zip((weight, bias), expected, strict=True):
        torch.testing.assert_close(one.grad, other)


HIDDEN, WEIGHT = torch.zeros(4, 5), torch.zeros(11, 5)
REFUSALS = [
    ({"kind": "kl"}, "kind: expected 'forward_kl' or 'reverse_kl' or .*, got 'kl'"),
    ({"labels": LABELS[:3]}, r"labels: expected shape \(4,\) \(student_hidden without"),
    ({"labels": LABELS.float()}, "labels: expected an integer dtype"),
    ({"labels": LABELS + 1}, r"labels: expected -100 \(ignore_index\) or values in \[0, 11\), got"),
    ({"labels": LABELS.to("meta")}, "labels: expected device cpu, like student_hidden, got meta"),
    ({"student_hidden": None}, "student_hidden: expected a tensor, got NoneType"),
    ({"student_head": WEIGHT[:, :4]}, r"student_weight: expected shape \(V, 5\), the last"),
    ({"student_head": [WEIGHT]}, r"student_head: expected a Head or a tensor \(V, H\)"),
    ({"student_head": Head(WEIGHT, softcap=0.0)}, "student_softcap: expected a finite number"),
    ({"teacher_hidden": HIDDEN[:3]}, r"teacher_hidden: expected shape \(4, H\), like student_hid"),
    ({"teacher_hidden": HIDDEN.to("meta")}, "teacher_hidden: expected device cpu, like student_hi"),
    ({"teacher_head": WEIGHT[:, :4]}, r"teacher_weight: expected shape \(V, 5\), the last"),
    ({"teacher_head": WEIGHT.double()}, "teacher_weight: expected dtype torch.float32, like teach"),
    ({"teacher_head": Head(WEIGHT, WEIGHT)}, r"teacher_bias: expected shape \(11,\)"),
    ({"teacher_head": WEIGHT[:7]}, r"labels: expected -100 \(ignore_index\) or values in \[0, 7\)"),
    ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
    ({"teacher_temperature": -1}, "teacher_temperature: expected a finite number above 0, got -1"),
    ({"beta": 1.0}, "beta: expected a number above 0 and below 1, got 1.0"),
    ({"beta": 0.0}, "beta: expected a finite number above 0, got 0.0"),
    ({"alpha": 1.5}, "alpha: expected a number above 0 and below 1, got 1.5"),
    ({"detach_mixture": True}, "detach_mixture: expected False with kind 'jsd', got True"),
    ({"detach_mixture": 1}, "detach_mixture: expected True or False, got 1"),
    ({"clip": (0, 1)}, r"clip: expected None with kind 'jsd', got \(0, 1\)"),
    ({"reference_hidden": HIDDEN}, "reference_hidden: expected None with kind 'jsd', got Tensor"),
    ({"reference_head": WEIGHT}, "reference_head: expected None with kind 'jsd', got Tensor"),
    ({"compact": None}, "compact: expected True or False, got None"),
    ({"ignore_index": None}, "ignore_index: expected an integer, got None"),
    ({"scratch_bytes": -1}, "scratch_bytes: expected a whole number of bytes"),
]
WITH_REFERENCE = {"kind": "advantage", "reference_hidden": HIDDEN, "reference_head": WEIGHT}
REFUSALS += [
    ({**WITH_REFERENCE, **changes}, message)
    for changes, message in (
        ({"reference_hidden": None}, "reference_hidden: expected that of the reference, with kind"),
        ({"reference_head": None}, "reference_head: expected that of the reference, with kind"),
        ({"reference_hidden": HIDDEN[1:]}, r"reference_hidden: expected shape \(4, H\), like stud"),
        ({"reference_head": WEIGHT[:, 1:]}, r"reference_weight: expected shape \(V, 5\)"),
        ({"clip": 1.0}, r"clip: expected two numbers, .*, got 1\.0"),
        ({"clip": (0, 1, 2)}, r"clip: expected two numbers, .*, got \(0, 1, 2\)"),
        ({"clip": (1, 0)}, r"clip: expected the least before the largest, got \(1, 0\)"),
        ({"clip": (0, torch.nan)}, "clip: expected a finite number, got nan"),
    )
]


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_bad_input_is_refused(changes, message, stats):
    given: dict[str, Any] = {
        "student_hidden": HIDDEN, "student_head": WEIGHT, "teacher_hidden": HIDDEN,
        "teacher_head": WEIGHT, "labels": LABELS, "kind": "jsd",
    }  # fmt: skip
    function = linear_divergence_with_stats if stats else linear_divergence
    with pytest.raises(ValueError, match=f"^{message}"):
        function(**{**given, **changes})
