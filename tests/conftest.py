"""Settings that every test shares."""

import os
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

settings.register_profile(
    "fastpref",
    deadline=None,
    derandomize=True,
    max_examples=5 if INTERPRETED else 25,  # the interpreter takes a second for some examples
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fastpref")

if INTERPRETED:
    # As on GPUs, and as Triton 3.9 interprets them, maxima and minima drop NaN unless told not to.
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, numpy.fmax)
    InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, numpy.fmin)

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores, and what they start
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


CASES = 5  # of a test, in the interpreter; all of them run with PyTorch's code, and on a GPU


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    # Drawn by the test's name: every worker has to draw the same.
    kept = {
        case
        for name, cases in tests.items()
        for case in random.Random(name).sample(cases, min(len(cases), CASES))
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str]]:
    """Runs the command `fastpref`: its exit code or error, and what it printed."""
    from fastpref.cli import main

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr("sys.argv", ["fastpref", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    return run
