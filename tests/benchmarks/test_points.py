"""Contenders are checked before they are timed, and one that breaks costs one row."""

import os
import sys
import time
from types import ModuleType

import points
import pytest
import torch
from check import Outcome, errors, expected, outcome
from contenders import CONTENDERS, MODES, Contender, cce, cce_exact
from head_shapes import HeadShape, make_inputs
from peers import full_logits_logps
from points import Job, Point, run

SHAPE = HeadShape("tiny", "tiny head", 16, 60)
QUICK_TO_RUN = [key for key in CONTENDERS if key != "compile"]  # compiling takes its seconds


def job(key, *modes):
    forever = time.time() + 600
    return Job(key, [Point(SHAPE, 32, mode) for mode in modes], "cpu", 0.0, forever)


class Sent(list):
    """Stands for the pipe to the parent process."""

    send = list.append


@pytest.fixture(autouse=True)
def forget():
    yield
    for cached in (points._check, points._expected, points._inputs):
        cached.cache_clear()


@pytest.mark.parametrize("key", QUICK_TO_RUN)
@pytest.mark.filterwarnings("ignore")  # other libraries' notices
def test_every_contender_is_right(key):
    contender = CONTENDERS[key]
    if contender.needs_cuda:
        pytest.skip("measured on CUDA GPUs only")
    sent = Sent()
    points._measure_job(job(key, *contender.modes), sent)
    if sent[0].status == "missing":
        pytest.skip(sent[0].reason)
    for row in sent:
        assert row.status == "ok", row.reason
        assert row.value_error < 1e-5
        assert (row.hidden_grad_error is None) == (row.mode == "no-grad")
        assert (row.weight_grad_error is None) == (row.mode != "trained")
        assert max(row.hidden_grad_error or 0, row.weight_grad_error or 0) < 1e-5
        assert row.seconds >= row.forward_seconds > 0
        assert row.peak_extra_bytes >= 0


@pytest.mark.parametrize("gives", ["tokens", "sum", "pairs"])
def test_what_is_expected_is_the_formula(gives):
    """Gradient of the projections: incoming gradient times (one-hot - probabilities)."""
    inputs = make_inputs(SHAPE, 32, 0, "cpu")
    found = expected(inputs, gives)
    hidden, weight = inputs.hidden.double(), inputs.weight.double()
    probabilities = torch.softmax(hidden @ weight.T, -1)
    logps = torch.log_softmax(hidden @ weight.T, -1).gather(-1, inputs.labels[:, None])[:, 0]
    incoming = inputs.coefficients.double()
    if gives == "sum":
        incoming = -torch.ones(32, dtype=torch.float64)
    elif gives == "pairs":
        sums = 0.01 * logps.view(4, 8).sum(1)
        slope = 0.01 * torch.sigmoid(sums[2:] - sums[:2]) / 2  # two pairs, mean
        incoming = torch.cat((-slope, slope)).repeat_interleave(8)
    one_hot = torch.nn.functional.one_hot(inputs.labels, 60)
    gradient = incoming[:, None] * (one_hot - probabilities)
    torch.testing.assert_close(found.hidden_grad, gradient @ weight)
    torch.testing.assert_close(found.weight_grad, gradient.T @ hidden)


def rounded_away(hidden, weight, labels):
    """Wrong by 1 %: more than rounding."""
    return full_logits_logps(hidden * 1.01, weight, labels)


def ignores_the_head(hidden, weight, labels):
    return full_logits_logps(hidden, weight.detach(), labels)


def exits(hidden, weight, labels):
    os._exit(3)


def test_wrong_is_reported_and_not_timed(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "broken", Contender("broken", "broken", rounded_away))
    sent = Sent()
    points._measure_job(job("broken", *MODES), sent)
    for row in sent:
        assert row.status == "wrong"
        assert "in the value" in row.reason
        assert row.seconds is None
    assert "gradient of weight" in sent[2].reason


def test_a_missing_gradient_fails(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "broken", Contender("broken", "broken", ignores_the_head))
    sent = Sent()
    points._measure_job(job("broken", "frozen", "trained"), sent)
    assert [row.status for row in sent] == ["ok", "failed"]


def test_nan_is_wrong():
    inputs = make_inputs(SHAPE, 32, 0, "cpu")
    wanted = expected(inputs, "tokens")
    got = outcome(CONTENDERS["full"], inputs, "frozen")
    assert errors(got, wanted).verdict(torch.float32) == ""
    got = Outcome(got.value, got.hidden_grad * float("nan"), None)
    assert "gradient of hidden" in errors(got, wanted).verdict(torch.float32)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ImportError("no name 'x' in 'y' (/some/where/y.py)"), "missing", "no name 'x' in 'y'"),
        (torch.OutOfMemoryError("tried to allocate"), "out of memory", ""),
        (RuntimeError("too large\ntrace"), "failed", "RuntimeError: too large"),
    ],
)
def test_what_cannot_run_is_a_row(monkeypatch, error, status, reason):
    def call(*tensors):
        raise error

    monkeypatch.setitem(CONTENDERS, "broken", Contender("broken", "broken", call))
    sent = Sent()
    points._measure_job(job("broken", "frozen"), sent)
    assert (sent[0].status, sent[0].reason) == (status, reason)


def test_after_the_deadline_nothing_begins():
    sent = Sent()
    late = Job("full", [Point(SHAPE, 32, "frozen")], "cpu", 0.0, deadline=time.time() - 1)
    points._measure_job(late, sent)
    assert sent[0].status == "skipped"


def test_a_process_that_dies_costs_one_point(monkeypatch):
    """The parent knows the contender, the fresh process does not and ends with an error."""
    monkeypatch.setitem(CONTENDERS, "unknown", Contender("unknown", "unknown", exits))
    first, second = run(job("unknown", "frozen", "trained"))
    assert (first.mode, second.mode) == ("frozen", "trained")
    assert first.status == second.status == "failed"


def test_cuda_only_contenders_are_named_without_starting_anything():
    rows = list(run(job("quack", "frozen", "trained")))
    assert [row.status for row in rows] == ["missing", "missing"]
    assert "CUDA" in rows[0].reason


@pytest.mark.parametrize("version", ["with float32 sums", "without"])
def test_cce_is_asked_for_exact_gradients_in_every_version(monkeypatch, version):
    asked = []

    def new(e, c, targets, *, reduction, filter_eps="auto", accum_e_fp32=False, accum_c_fp32=False):
        asked.append((filter_eps, accum_e_fp32, accum_c_fp32))
        return -full_logits_logps(e, c, targets)

    def old(e, c, targets, *, reduction, filter_eps="high"):
        asked.append((filter_eps,))
        return -full_logits_logps(e, c, targets)

    module = ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = new if version == "with float32 sums" else old
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    inputs = make_inputs(SHAPE, 32, 0, "cpu")
    want = full_logits_logps(*inputs[:3])
    torch.testing.assert_close(cce(*inputs[:3]), want)
    torch.testing.assert_close(cce_exact(*inputs[:3]), want)
    assert asked == (
        [("auto", False, False), (None, True, True)]
        if version == "with float32 sums"
        else [("high",), (None,)]
    )
