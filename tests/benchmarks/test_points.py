"""Contenders are checked before they are timed, and one that breaks costs one row."""

import os
import sys
import time
from types import ModuleType

import points
import pytest
import torch
from check import Outcome, errors, expected, outcome
from contenders import CONTENDERS, MODES, Contender, cce, cce_exact, cce_main
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


def asked_of(monkeypatch, module):
    """What each contender asks of one version of CCE, or the reason why it is missing."""
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    inputs = make_inputs(SHAPE, 32, 0, "cpu")
    want = full_logits_logps(*inputs[:3])
    found = []
    for call in (cce, cce_exact, cce_main):
        module.asked = None
        try:
            torch.testing.assert_close(call(*inputs[:3]), want)
        except ImportError as error:
            module.asked = str(error)
        found.append(module.asked)
    return found


def test_cce_of_the_wheel_sums_in_bfloat16(monkeypatch):
    module = ModuleType("cut_cross_entropy")

    def call(e, c, targets, *, reduction, filter_eps="high"):
        module.asked = filter_eps
        return -full_logits_logps(e, c, targets)

    module.linear_cross_entropy = call
    found = asked_of(monkeypatch, module)
    assert found[:2] == ["high", None]
    assert "no float32 sums" in found[2]


def test_cce_of_the_main_branch_sums_in_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("CCE_MAIN", str(tmp_path))
    module = ModuleType("cut_cross_entropy")

    def call(
        e, c, targets, *, reduction, filter_eps="auto", accum_e_fp32=False, accum_c_fp32=False
    ):
        module.asked = (filter_eps, accum_e_fp32, accum_c_fp32)
        return -full_logits_logps(e, c, targets)

    module.linear_cross_entropy = call
    found = asked_of(monkeypatch, module)
    assert found[0] == ("auto", False, False)
    assert "is not the wheel" in found[1]
    assert found[2] == (None, True, True)
    assert sys.path[0] == str(tmp_path)


def test_losses_of_tokens_become_log_probabilities(monkeypatch):
    """Quack runs on GPUs only; here its functions are stood for by full logits."""
    package, module = ModuleType("quack"), ModuleType("quack.linear_cross_entropy")

    def whole(x, weight, bias, target, *, reduction):
        assert bias is None and reduction == "none"
        return -full_logits_logps(x, weight, target)

    def chunked(x, weight, target, *, reduction):
        assert reduction == "sum"
        return -full_logits_logps(x, weight, target).sum()

    module.linear_cross_entropy_func, module.chunked_linear_cross_entropy = whole, chunked
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", module)
    inputs = make_inputs(SHAPE, 32, 0, "cpu")
    for key in ("quack", "quack-full"):
        wanted = expected(inputs, CONTENDERS[key].gives)
        found = errors(outcome(CONTENDERS[key], inputs, "trained"), wanted)
        assert found.verdict(torch.float32) == ""


def test_who_is_missing_is_named_with_the_command_that_brings_it(monkeypatch):
    def call(*tensors):
        import no_such_library  # noqa: F401  # its absence is the test

    contender = Contender("absent", "absent", call, install="pip install no-such-library")
    monkeypatch.setitem(CONTENDERS, "absent", contender)
    sent = Sent()
    points._measure_job(job("absent", "frozen"), sent)
    assert sent[0].status == "missing"
    assert sent[0].reason == (
        "No module named 'no_such_library'; pip install no-such-library brings it"
    )


@pytest.mark.parametrize(("slow", "repeats"), [(0.0, 1), (60.0, 5)])
def test_one_call_of_who_is_slow(monkeypatch, slow, repeats):
    calls = []

    def counted(hidden, weight, labels):
        calls.append(len(hidden))
        return full_logits_logps(hidden, weight, labels)

    monkeypatch.setitem(CONTENDERS, "counted", Contender("counted", "counted", counted))
    sent = Sent()
    point = Point(SHAPE, 32, "trained", slow=slow)
    points._measure_job(Job("counted", [point], "cpu", 60.0, time.time() + 600), sent)
    assert sent[0].repeats == repeats
    assert calls.count(32) == (1 if repeats == 1 else 1 + repeats)
    assert 0 < sent[0].forward_seconds < sent[0].seconds
