"""Every function that Triton compiles is in the launches that sanitizers watch."""

from __future__ import annotations

import signal
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import launches  # noqa: E402  # skipped without Triton
from forked import exit_code  # noqa: E402  # skipped without Triton
from planted import _read_beyond_kernel  # noqa: E402  # skipped without Triton

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, for which inf is unusual
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]
# As in launches.py, but that the functions that kernels call are noted, too.
INTERPRETED = type(_read_beyond_kernel)


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["launches.py", *options])
    return exit_code(launches.main)


@pytest.mark.skipif(
    not hasattr(INTERPRETED, "run"), reason="Triton 3.5 has no method that every launch calls"
)
def test_every_function_is_reached_and_none_beyond_a_tensor(monkeypatch, capfd):
    reached = set()

    def noted(method):
        def call(self, *args, **kwargs):
            reached.add(self.fn)
            return method(self, *args, **kwargs)

        return call

    def main():
        for name in ("__call__", "run"):
            monkeypatch.setattr(INTERPRETED, name, noted(getattr(INTERPRETED, name)))
        launches.main()
        functions = launches.functions()
        assert len(functions) > 40
        missed = [name for name, one in functions.items() if one.fn not in reached]
        sys.exit(f"not reached: {missed}" if missed else 0)

    monkeypatch.setattr(sys, "argv", ["launches.py", "--guarded", "after"])
    assert exit_code(main) == 0, capfd.readouterr()


def test_errors_are_seen(monkeypatch):
    planted = ("--guarded", "after", "--planted")
    assert run(monkeypatch, *planted, "memcheck") == -signal.SIGSEGV
    assert run(monkeypatch, *planted, "initcheck") == launches.SEEN


def test_what_is_missing_or_wrong_is_said(monkeypatch, capfd):
    monkeypatch.setattr(launches, "LAUNCHES", {})
    assert run(monkeypatch) == 1
    assert "not launched: ['divergences._compare_rows_kernel'," in capfd.readouterr().out
    nan = {"some": lambda on: [torch.zeros(2), torch.full((2, 3), float("nan"))]}
    monkeypatch.setattr(launches, "LAUNCHES", nan)
    assert run(monkeypatch) == 1
    assert "some: NaN in result 1 of shape (2, 3)" in capfd.readouterr().out
