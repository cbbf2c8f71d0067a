"""A pytest plugin: which tests touch which lines of the package, and how long each takes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coverage
import pytest

ROOT = Path(__file__).resolve().parents[3]


class Touched:
    def __init__(self, output: Path) -> None:
        self.output = output
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.lines = coverage.Coverage(data_file=None, source=[str(ROOT / "fastpref")])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.lines.switch_context(item.nodeid)
        yield
        self.lines.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before = self.seconds.get(report.nodeid, 0.0)
        self.seconds[report.nodeid] = before + report.duration
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.lines.stop()
        data = self.lines.get_data()
        tests: dict[str, dict[str, list[int]]] = {}
        for file in data.measured_files():
            module = str(Path(file).relative_to(ROOT))
            for line, contexts in data.contexts_by_lineno(file).items():
                for test in set(contexts) - self.failed - {""}:
                    tests.setdefault(test, {}).setdefault(module, []).append(line)
        found = {
            test: {"seconds": round(self.seconds[test], 3), "lines": lines}
            for test, lines in sorted(tests.items())
        }
        self.output.write_text(json.dumps(found))


def pytest_configure(config: Any) -> None:
    plugin = Touched(Path(os.environ["TOUCHED"]))
    config.pluginmanager.register(plugin)
    plugin.lines.start()
