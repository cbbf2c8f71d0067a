"""A pytest plugin that runs a peer's tests against fastpref and writes down what became of each.

``pytest -p plugin --adapter for_liger --outcomes FILE TESTS``. The adapter is a module with
`PLACES`, what stands in where, and with regular expressions of tests: `REACHES`, those that are
kept; `WITHOUT`, those that cannot say anything about fastpref, and why; `EXPLAINED`, those whose
failure is known, and why; and `ON_CPU`, those that name a GPU and need none.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import standing_in
import torch
from on_cpu import on_cpu

NOT_REACHED = "calls no function that fastpref stands in for"
OFFLINE = "needs models or data of the Hugging Face Hub"
# What transformers, datasets and huggingface_hub raise without a connection to the Hub.
NO_CONNECTION = re.compile(
    r"couldn't connect to|LocalEntryNotFoundError|OfflineModeIsEnabled|ConnectError|"
    r"ConnectionError|Can't load (?:the configuration|tokenizer|image processor)|"
    r"MaxRetryError|on the Hub|Cannot send a request",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    test: str  # its node id, without parameters: "test/test_dpo_loss.py::test_correctness"
    parameters: str
    outcome: str  # "passed", "failed" or "not applicable"
    reason: str = ""
    explanation: str = ""  # of a failure: why it is not ours


def pytest_addoption(parser: pytest.Parser) -> None:
    """The adapter's module and the file of outcomes."""
    parser.addoption("--adapter", required=True)
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Put fastpref in place before the peer's tests are imported."""
    adapter = importlib.import_module(config.getoption("--adapter"))
    # Whether the peer's own side is compiled is nothing to us, and takes minutes on a CPU.
    compiled = mock.patch.object(torch, "compile", _uncompiled)
    compiled.start()
    config.add_cleanup(compiled.stop)
    missing = standing_in.install(adapter.PLACES)
    if len(missing) == len(adapter.PLACES):
        raise pytest.UsageError(f"none of these is there: {', '.join(missing)}")
    config.pluginmanager.register(Recorder(adapter, config.getoption("--outcomes"), missing))


class Recorder:
    """Keeps what an adapter reaches, runs it and writes down the outcomes."""

    def __init__(self, adapter: ModuleType, file: Path, missing: list[str]) -> None:
        self.reaches = re.compile(adapter.REACHES)
        self.on_cpu = re.compile(getattr(adapter, "ON_CPU", "(?!)"))
        self.without = getattr(adapter, "WITHOUT", {})
        self.explained = getattr(adapter, "EXPLAINED", {})
        self.file, self.missing = file, missing
        self.outcomes: list[Outcome] = []
        self.not_collected: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Leave out tests of other things; take off marks of tests that a CPU can run after all."""
        kept = [one for one in items if self.reaches.search(one.nodeid)]
        config.hook.pytest_deselected(items=[one for one in items if one not in set(kept)])
        items[:] = kept
        for one in items:
            for pattern, reason in self.without.items():
                if re.search(pattern, one.nodeid):
                    one.add_marker(pytest.mark.skip(reason=reason))
            if self.on_cpu.search(one.nodeid) and not torch.cuda.is_available():
                one.iter_markers = functools.partial(_without_conditions, one.iter_markers)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        """Count calls of stand-ins, and name the CPU where a test names a GPU."""
        standing_in.calls.clear()
        gpu = torch.cuda.is_available() or not self.on_cpu.search(item.nodeid)
        with contextlib.nullcontext() if gpu else on_cpu(item.module.__name__):
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        """Note the outcome, once per test."""
        report = yield
        if call.when == "call" or (call.when == "setup" and not report.passed):
            self.outcomes.append(self._outcome(item, report))
        return report

    def _outcome(self, item: Any, report: Any) -> Outcome:
        test, _, parameters = item.nodeid.partition("[")
        found = (test, parameters.removesuffix("]"))
        if report.passed:
            reached = bool(standing_in.calls)
            said = ("passed",) if reached else ("not applicable", NOT_REACHED)
            return Outcome(*found, *said)
        if report.skipped:
            if hasattr(report, "wasxfail"):
                return Outcome(*found, "not applicable", "its own library expects it to fail")
            return Outcome(*found, "not applicable", _reason(report.longrepr[2]))
        if NO_CONNECTION.search(report.longreprtext):
            return Outcome(*found, "not applicable", OFFLINE)
        why = (text for pattern, text in self.explained.items() if re.search(pattern, item.nodeid))
        return Outcome(*found, "failed", _first_error(report.longreprtext), next(why, ""))

    def pytest_collectreport(self, report: Any) -> None:
        """Note the files that could not be imported."""
        if report.failed:
            self.not_collected.append(f"{report.nodeid}: {_first_error(report.longreprtext)}")

    def pytest_sessionfinish(self) -> None:
        """Write all of it."""
        content = {
            "missing": self.missing,
            "not_collected": self.not_collected,
            "outcomes": [asdict(one) for one in self.outcomes],
        }
        self.file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return function or (lambda one: one)


def _without_conditions(markers: Callable[..., Iterator[Any]], name: str | None = None) -> Any:
    return (one for one in markers(name) if one.name != "skipif")


def _reason(said: str) -> str:
    reason = said.removeprefix("Skipped: ").strip()
    if NO_CONNECTION.search(reason):
        return OFFLINE
    gpu = re.search(r"cuda|gpu|accelerator", reason, re.IGNORECASE)
    return f"needs a GPU ({reason})" if gpu else reason


def _first_error(text: str) -> str:
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (errors or text.splitlines() or [""])[0][:300]
