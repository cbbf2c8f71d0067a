"""Peers' tests reach fastpref: planted ones pass with it, and fail where a number is wrong."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import peer_tables
import peer_tests
import plugin
import pytest
import standing_in
import torch
from torch.nn.functional import log_softmax

import fastpref

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
RESULTS = json.loads((ROOT / "benchmarks/results/peer-tests.json").read_text("utf-8"))
# Where a planted test is put, so that an adapter takes it for one of the peer's; and how many.
PLANTED = {
    "for_liger": ("test/chunked_loss/test_planted.py", 8),
    "for_trl": ("test_jsd.py", 6),
    "for_cce": ("test_cce_loss_forward.py", 2),
}


def theirs(*_, **__):
    raise AssertionError("a function of the peer was called")


@pytest.fixture
def adapter(request, monkeypatch):
    """An adapter, beside a package that has its places and nothing else."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    found = importlib.import_module(request.param)
    for place in found.PLACES:
        module, _, path = place.partition(":")
        names = module.split(".")
        for count in range(len(names)):
            part = ".".join(names[: count + 1])
            if not isinstance(sys.modules.get(part), Fake):
                monkeypatch.setitem(sys.modules, part, Fake(part))
        owner = sys.modules[module]
        *owners, name = path.split(".")
        for one in owners:
            setattr(owner, one, type(one, (), {}))
            owner = getattr(owner, one)
        setattr(owner, name, theirs)
    return found


class Fake(ModuleType):
    """A module in the place of a peer's."""

    __path__ = ()


def run(adapter, folder):
    """The outcomes of an adapter's planted tests, less that of something else, and this one."""
    key = adapter.__name__
    file = folder / PLANTED[key][0]
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / f"planted_{key.removeprefix('for_')}.py", file)
    settings, outcomes = folder / "pytest.ini", folder / "outcomes.json"
    settings.write_text("[pytest]\n", "utf-8")
    sys.modules.pop(file.stem, None)
    status = pytest.main([
        "-p", "plugin", "-p", "no:cacheprovider", "-c", str(settings), "-W", "ignore", "-q",
        "--tb=short", "--adapter", key, "--outcomes", str(outcomes), str(file),
    ])  # fmt: skip
    sys.modules.pop(file.stem, None)
    found = json.loads(outcomes.read_text("utf-8"))
    assert not found["not_collected"] and status in (0, 1)
    return [plugin.Outcome(**one) for one in found["outcomes"]]


def outcomes(found):
    return [one.outcome for one in found if "something_else" not in one.test]


@pytest.mark.parametrize("adapter", PLANTED, indirect=True)
def test_planted_tests_pass_with_fastpref(adapter, tmp_path):
    found = run(adapter, tmp_path)
    assert outcomes(found) == ["passed"] * PLANTED[adapter.__name__][1], found
    beside = [one for one in found if "something_else" in one.test]
    # Nothing of fastpref was called, so that it passes says nothing.
    assert all(one.reason == plugin.NOT_REACHED for one in beside)
    assert len(beside) == (adapter.__name__ == "for_cce")


@pytest.mark.parametrize("adapter", PLANTED, indirect=True)
def test_planted_tests_fail_where_fastpref_is_wrong(adapter, tmp_path, monkeypatch):
    def slightly_wrong(function):
        def call(*arguments, **named):
            found = function(*arguments, **named)
            logps = found if isinstance(found, torch.Tensor) else found.logps
            logps.detach().mul_(1 + 1e-3)
            return found

        return call

    for name in ("linear_logps", "linear_logps_with_stats", "linear_divergence"):
        if hasattr(adapter, name):
            monkeypatch.setattr(adapter, name, slightly_wrong(getattr(fastpref, name)))
    found = run(adapter, tmp_path)
    assert outcomes(found) == ["failed"] * PLANTED[adapter.__name__][1], found
    assert not any(one.explanation for one in found)


@pytest.mark.parametrize("adapter", ["for_cce"], indirect=True)
def test_places_that_are_missing_are_named(adapter):
    gone = "cut_cross_entropy:gone"
    assert standing_in.install({gone: None, **adapter.PLACES}) == [gone]


def test_the_tables_of_the_docs_are_those_of_the_results():
    page = (ROOT / "docs/peer_tests.md").read_text("utf-8")
    tables = (peer_tables.counts, peer_tables.failures, peer_tables.reasons)
    assert all(table(RESULTS) in page for table in tables)
    assert set(RESULTS["peers"]) == set(peer_tests.PEERS.values())


def test_a_checkout_that_is_not_given_is_skipped_and_one_without_tests_refused(
    tmp_path, capsys, monkeypatch
):
    given = ["peer_tests.py", "--output", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        peer_tests.main()
    assert not ended.value.code and capsys.readouterr().out.count("skipped") == 3
    assert json.loads((tmp_path / "out.json").read_text("utf-8"))["peers"] == {}
    monkeypatch.setattr(sys, "argv", [*given, "--trl", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has none of tests/test_utils\.py"):
        peer_tests.main()


def test_outcomes_are_counted_by_file_and_class():
    tests = ("a/test_x.py::test_y", "a/test_x.py::test_z", "b/test_x.py::TestY::test_z")
    kinds = ("passed", "failed", "passed")
    found = [{"test": one, "outcome": kind} for one, kind in zip(tests, kinds, strict=True)]
    assert peer_tests.groups(found) == {
        "test_x.py": {"passed": 1, "failed": 1},
        "test_x.py::TestY": {"passed": 1},
    }


def test_unexplained_failures_stand_in_the_table():
    failed = {"test": "a/test_x.py::test_y", "reason": "assert 1 == 2", "explanation": ""}
    peer = {"failures": [failed], "not_collected": ["test_z.py: no such module"]}
    table = peer_tables.failures({"peers": {"TRL": peer}})
    assert "| `test_x.py::test_y` | 1 | not explained: assert 1 == 2 |" in table
    assert "test_z.py: no such module" in table


def test_what_failed_is_as_it_is_explained():
    """Against float64: gradients in bfloat16, rounded log-probabilities, JSD from either side."""
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(128, 32).bfloat16()
    labels = torch.randint(128, (64,))

    def gradient(logps, dtype):
        given = hidden.to(dtype).requires_grad_()
        return torch.autograd.grad(logps(given, weight.to(dtype), labels).sum(), given)[0].double()

    def full_logits(given, weight, labels):
        wide = torch.promote_types(given.dtype, torch.float32)
        logps = log_softmax((given @ weight.T).to(wide), -1)
        return logps.gather(1, labels[:, None])

    exact = gradient(full_logits, torch.float64)
    ours, theirs = (
        gradient(one, torch.bfloat16) - exact for one in (fastpref.linear_logps, full_logits)
    )
    assert 2 * ours.norm() < theirs.norm() and theirs.abs().max() > 1e-2

    logits = torch.randn(128, 256, dtype=torch.bfloat16)
    labels = torch.randint(256, (128, 1))
    found = fastpref.linear_logps(logits, torch.eye(256).bfloat16(), labels[:, 0]).bfloat16()
    assert torch.equal(found, logits.double().log_softmax(-1).gather(1, labels)[:, 0].bfloat16())
    assert not torch.equal(found, logits.log_softmax(-1).gather(1, labels)[:, 0])

    student, teacher = torch.randn(2, 50, 5)
    one_way, other_way = (
        fastpref.linear_divergence(
            a, torch.eye(5), b, torch.eye(5), torch.zeros(50, dtype=torch.int64), kind="jsd"
        )
        for a, b in ((student, teacher), (teacher, student))
    )
    torch.testing.assert_close(one_way, other_way, rtol=1e-5, atol=0)
    assert not torch.equal(one_way, other_way)
