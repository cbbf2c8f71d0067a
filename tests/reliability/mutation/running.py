"""Runs tests on a mutant, in a fork of a process that has imported all that takes long."""

from __future__ import annotations

import gc
import importlib
import os
import resource
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch
from patching import Changed, Functions, functions_of, patch

ROOT = Path(__file__).resolve().parents[3]
MEMORY = 6 * 2**30  # a mutant may ask for any amount
WAITING = 10  # seconds for each second of computation: other processes may have the cores
OPTIONS = "-x -q -n 0 -p no:cacheprovider --assert=plain".split()
PRELOADED = """
torch._dynamo datasets peft safetensors.torch transformers.models.llama.modeling_llama
liger_kernel.chunked_loss trl.kernels.chunked_divergence trl.experimental.cpo.cpo_trainer
trl.experimental.gkd.gkd_trainer trl.experimental.orpo.orpo_trainer
"""


class Ready(NamedTuple):
    """What is there after collecting tests."""

    tests: dict[str, pytest.Item]
    functions: Functions


class NoShrinking:
    """Whether a test fails is all that counts, not the smallest example that it fails for."""

    def pytest_sessionstart(self) -> None:
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        usual = hypothesis.settings.get_profile("fastpref")
        hypothesis.settings.register_profile("mutation", usual, phases=phases, max_examples=12)
        hypothesis.settings.load_profile("mutation")


class FirstFailure(NoShrinking):
    """Says which test fails first."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failed:
            self.failed = True
            os.write(self.to, report.nodeid.encode())


class Collected(NoShrinking):
    """Calls a function with all tests, collected once, where pytest would run them."""

    def __init__(self, modules: list[str], work: Callable[[Ready], None]) -> None:
        self.functions = functions_of(modules)
        self.work = work

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        settle()
        self.work(Ready({item.nodeid: item for item in session.items}, self.functions))
        return True


def preload() -> None:
    """Imports what tests import, but not the package that is mutated."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    torch.set_num_threads(1)
    settle()


def settle() -> None:
    """Let forks share what is there."""
    gc.collect()
    gc.freeze()


def outcome(run: Callable[[FirstFailure], int], seconds: int) -> tuple[str, str]:
    """ "survived", "killed" or "timed out", as tests say in a fork; and by which test.

    Killed by no test is what Python or PyTorch refused when it was imported.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            _limit(seconds)
            status = run(FirstFailure(writing))
        except BaseException:  # what ends the tests kills the mutant
            traceback.print_exc()
            status = 70
        os._exit(status)
    os.close(writing)
    found = "timed out"
    end = time.monotonic() + WAITING * seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGXCPU:
                found = "survived" if status == 0 else "killed"
            break
        time.sleep(0.01)
    else:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.set_blocking(reading, False)
    try:
        by = os.read(reading, 4096).decode()
    except BlockingIOError:  # a process that the tests started holds the other end
        by = ""
    os.close(reading)
    return found, by


def _limit(seconds: int) -> None:
    if "MUTATION_OUTPUT" not in os.environ:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run_patched(changed: Changed, ready: Ready, names: list[str]) -> Callable[[FirstFailure], int]:
    """Runs collected tests after giving the package's functions other code."""
    tests = [ready.tests[name] for name in names]

    def run(failure: FirstFailure) -> int:
        patch(changed, ready.functions)
        tests[0].config.pluginmanager.register(failure)
        for test, after in zip(tests, [*tests[1:], None], strict=True):
            test.ihook.pytest_runtest_protocol(item=test, nextitem=after)
            if failure.failed:
                break
        return int(failure.failed)

    return run


def run_imported(path: str, code: str, tests: list[str]) -> Callable[[FirstFailure], int]:
    """Runs tests in a process that has yet to import the package, and finds this code there."""

    def run(failure: FirstFailure) -> int:
        usual = SourceFileLoader.get_code

        def get_code(loader: SourceFileLoader, name: str) -> types.CodeType | None:
            if os.path.realpath(loader.path) == path:
                return compile(code, loader.path, "exec")
            return usual(loader, name)

        SourceFileLoader.get_code = get_code  # type: ignore[method-assign] # in this fork alone
        return int(pytest.main([*OPTIONS, *tests], plugins=[failure]))

    return run
