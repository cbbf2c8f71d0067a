"""What PyTorch expects of an operator: gradients, fakes, compilation, autocast, layouts."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import fastpref
from fastpref import Head
from fastpref.ops.linear_logps_op import (
    Found,
    gradient_by_jacobian_ops,
    linear_logps_backward_ops,
    linear_logps_ops,
)
from fastpref.ops.linear_stats_op import linear_stats_ops

LABELS = torch.tensor([3, -100, 0, 10])
OPTIONS = (1.5, 0.5, 3.0, -100)  # temperature, logit_scale, softcap, ignore_index
COMPACT = [False, True]  # the indices of `OperatorPair`, too


def leaves(dtype: torch.dtype, *, trained: bool) -> list[torch.Tensor]:
    hidden = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=trained)
    bias = torch.randn(11, dtype=dtype, requires_grad=trained)
    return [hidden, weight, bias]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(trained, softcap):
    def logps_and_lse(hidden, weight, bias):
        head = Head(weight, bias, softcap=softcap)
        return fastpref.linear_logps_with_stats(hidden, head, LABELS, temperature=0.7)[:2]

    def logsumexp(hidden, weight, bias):
        return fastpref.linear_logsumexp(hidden, Head(weight, bias, softcap=softcap))

    for function in (logps_and_lse, logsumexp):
        assert torch.autograd.gradcheck(function, leaves(torch.float64, trained=trained))


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("jacobian", [False, True])
@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "no labels"])
def test_opcheck_forward(labels, compact, jacobian, stats):
    hidden, weight, bias = leaves(torch.float32, trained=not jacobian)
    stats, op = stats and labels is not None, linear_logps_ops[compact and labels is not None]
    opcheck(op, (hidden, weight, bias, labels, *OPTIONS, compact, jacobian, stats, 0))


@pytest.mark.parametrize("stats", [False, True])
def test_opcheck_forward_with_a_cache(stats):
    hidden, weight, bias = leaves(torch.float32, trained=True)
    # What no tile fills stays unwritten, so outputs cannot be compared between runs.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (hidden, weight, bias, LABELS, *OPTIONS, True, False, stats, 10**6)
    opcheck(linear_logps_ops.of_labelled_rows, arguments, test_utils=checks)


def read(compact: bool, *wanted: object) -> tuple[tuple[object, ...], tuple[torch.Tensor, ...]]:
    """Operands without gradients, and what a backward pass is given of them."""
    hidden, weight, bias = (leaf.detach() for leaf in leaves(torch.float32, trained=True))
    operands = (hidden, weight, bias, LABELS, *OPTIONS, compact)
    found = Found(*linear_logps_ops[compact](*operands, *wanted))
    left = (*torch.randn(2, 4), found.running, found.rows, found.n_rows)
    return operands, (*left, found.cache, found.jacobian)


@pytest.mark.parametrize("compact", COMPACT)
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_backward(wanted, compact):
    operands, left = read(compact, False, False, 100)
    opcheck(linear_logps_backward_ops[compact], (*operands, *left[:-1], *wanted))


@pytest.mark.parametrize("compact", COMPACT)
def test_opcheck_gradient_by_jacobian(compact):
    operands, (*left, _, jacobian) = read(compact, True, False, 0)
    opcheck(gradient_by_jacobian_ops[compact], (*operands, *left, jacobian))


def test_what_the_host_reads_stays_out_of_cuda_graphs():
    for pair in (
        linear_logps_ops, linear_logps_backward_ops, gradient_by_jacobian_ops, linear_stats_ops
    ):  # fmt: skip
        tagged = [torch.Tag.cudagraph_unsafe in op._opoverload.tags for op in pair]
        assert tagged == [False, True]


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_without_graph_breaks(trained):
    hidden, weight, bias = leaves(torch.float32, trained=trained)

    def total(hidden, weight, bias):
        return fastpref.linear_logps(hidden, Head(weight, bias), LABELS).square().sum()

    wanted = [leaf for leaf in (hidden, weight, bias) if leaf.requires_grad]
    expected = torch.autograd.grad(total(hidden, weight, bias), wanted)
    compiled = torch.compile(total, fullgraph=True, mode="reduce-overhead")
    found = torch.autograd.grad(compiled(hidden, weight, bias), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_casts_like_a_linear_layer(trained):
    hidden, weight, bias = leaves(torch.float32, trained=trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastpref.linear_logps(hidden, Head(weight, bias), LABELS)
    found.sum().backward()
    halves = [
        leaf.detach().bfloat16().requires_grad_(leaf.requires_grad) for leaf in (hidden, weight)
    ]
    head = Head(halves[1], bias.detach().bfloat16())
    expected = fastpref.linear_logps(halves[0], head, LABELS)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_leaves_float64_alone(trained):
    hidden, weight, bias = leaves(torch.float64, trained=trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fastpref.linear_logps(hidden, Head(weight, bias), LABELS)
    assert found.dtype == torch.float64
    assert torch.equal(found, fastpref.linear_logps(hidden, Head(weight, bias), LABELS))


@pytest.mark.parametrize("trained", [False, True])
def test_non_contiguous_inputs(trained):
    hidden = torch.randn(6, 3, 10)[:, :, ::2].transpose(0, 1).requires_grad_()
    weight = torch.randn(5, 11).T.requires_grad_(trained)
    labels = torch.randint(0, 11, (6, 3)).T
    found = fastpref.linear_logps(hidden, weight, labels)
    copies = [
        one.detach().contiguous().requires_grad_(one.requires_grad) for one in (hidden, weight)
    ]
    expected = fastpref.linear_logps(*copies, labels.contiguous())
    torch.testing.assert_close(found, expected)
    incoming = torch.randn(3, 6)
    found.backward(incoming)
    expected.backward(incoming)
    for one, other in zip((hidden, weight), copies, strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("trained", [False, True])
def test_a_retained_graph_gives_the_same_gradients_again(trained):
    hidden, weight, bias = leaves(torch.float32, trained=trained)
    logps = fastpref.linear_logps(hidden, Head(weight, bias), LABELS, scratch_bytes=10**6)
    first = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    second = torch.autograd.grad(logps.sum(), hidden)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("trained", [False, True])
def test_second_derivatives_are_refused(trained):
    hidden, weight, bias = leaves(torch.float32, trained=trained)
    logps = fastpref.linear_logps(hidden, Head(weight, bias), LABELS)
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="fastpref"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by jvp itself
def test_forward_mode_is_refused():
    hidden, weight, _ = (leaf.detach() for leaf in leaves(torch.float32, trained=False))

    def logps(hidden: torch.Tensor) -> torch.Tensor:
        return fastpref.linear_logps(hidden, weight, LABELS)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(logps, (hidden,), (hidden,))


def test_only_the_head_trains():
    _, weight, bias = leaves(torch.float32, trained=True)
    hidden = torch.randn(4, 5)
    fastpref.linear_logps(hidden, Head(weight, bias), LABELS).sum().backward()
    expected = [one.grad.clone() for one in (weight, bias)]
    weight.grad = bias.grad = None
    fastpref.linear_logps(hidden.requires_grad_(), Head(weight, bias), LABELS).sum().backward()
    for one, other in zip((weight, bias), expected, strict=True):
        torch.testing.assert_close(one.grad, other)


def test_integer_labels_of_any_width():
    hidden, weight, _ = leaves(torch.float32, trained=False)
    found = fastpref.linear_logps(hidden, weight, LABELS.to(torch.int32))
    torch.testing.assert_close(found, fastpref.linear_logps(hidden, weight, LABELS))
