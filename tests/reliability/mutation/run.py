"""Mutation testing: changes the package's code in small ways and sees whether tests notice.

python tests/reliability/mutation/run.py fastpref/responses.py --each 50
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mutants import difference, mutants
from patching import patchable, replacements
from running import OPTIONS, Collected, Ready, outcome, preload, run_imported, run_patched

ROOT = Path(__file__).resolve().parents[3]
Touched = dict[str, Any]  # what `touched.py` writes
KEPT = ROOT / "build" / "mutation"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
POOLS = [
    "tests/ops tests/losses tests/test_responses.py tests/test_rewards.py",
    "tests/teacher tests/invariance tests/models tests/reliability/composition",
]
if INTERPRETED:  # runs Triton kernels on the CPU
    POOLS = [
        "tests/kernels tests/losses/test_pair_ops.py tests/losses/test_tvkd.py "
        "tests/losses/test_drdo.py tests/ops/test_linear_logps.py"
    ]
# These see what importing makes of the lines that no test touches.
OF_IMPORTS = ["tests/test_defaults.py", "tests/reliability/composition/test_transforms.py"]
TRIED = KEPT / f"tried-{os.getpid()}.txt"  # in this run
SLOWEST = 4.0  # seconds; slower tests are left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="+", help="files or folders of the package")
    parser.add_argument("--each", type=int, default=10**9, help="mutants of each module, at random")
    parser.add_argument("--seconds", type=float, default=6.0, help="of tests for each mutant")
    parser.add_argument("--survivors", action="store_true", help="try those that survived again")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    KEPT.mkdir(parents=True, exist_ok=True)
    TRIED.write_text("")
    touched = touches()
    preload()
    modules = [
        str(file)
        for name in arguments.modules
        for file in (sorted(Path(name).rglob("*.py")) if Path(name).is_dir() else [Path(name)])
    ]

    def work(ready: Ready | None) -> None:
        for module in modules:
            Module(module, arguments, touched).try_all(ready)

    if child := os.fork():  # in which the package is imported, and tests are collected, once
        os.waitpid(child, 0)
        work(None)
    else:
        pools = " ".join(POOLS).split()
        names = [module.removesuffix(".py").replace("/", ".") for module in modules]
        collected = Collected(names, work)
        pytest.main([*OPTIONS, "-k", "not compile", *pools], plugins=[collected])
        os._exit(0)


def touches() -> Touched:
    kind = "touched-interpreted" if INTERPRETED else "touched"
    for number, pool in enumerate(POOLS):
        file = KEPT / f"{kind}{number}.json"
        if not file.exists():
            here = {"TOUCHED": str(file), "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
            options = "-q -n 0 -p touched -p no:cacheprovider -k".split()
            command = [sys.executable, "-m", "pytest", *options, "not compile", *pool.split()]
            subprocess.run(command, env={**os.environ, **here})
    found = {}
    for file in sorted(KEPT.glob(f"{kind}[0-9].json")):
        found |= json.loads(file.read_text())
    return found


def valid(code: str) -> bool:
    try:
        compile(code, "", "exec")
    except SyntaxError:  # of `/` among parameters, for example
        return False
    return True


class Module:
    """The mutants of a module, and what became of them."""

    def __init__(self, module: str, arguments: argparse.Namespace, touched: Touched) -> None:
        self.module, self.arguments, self.touched = module, arguments, touched
        self.path = str(ROOT / module)
        self.code = Path(self.path).read_text()
        self.every = mutants(ROOT, module)
        self.file = KEPT / (module.replace("/", ".") + ".json")
        self.digest = hashlib.sha256(self.code.encode()).hexdigest()
        self.kept: dict[str, tuple[str, str]] = {}
        if self.file.exists():
            before = json.loads(self.file.read_text())
            if before["code"] == self.digest:
                self.kept = before["mutants"]

    def try_all(self, ready: Ready | None) -> None:
        """Try mutants on collected tests, or without them those that must be imported anew."""
        chosen = list(self.every)
        random.Random(self.module).shuffle(chosen)
        settled = ["killed", "timed out"] + ["survived"] * (not self.arguments.survivors)
        for mutant in sorted(chosen[: self.arguments.each], key=lambda one: one.line):
            changed = mutant.code(self.code)
            key = f"{mutant.line}: {'  ->  '.join(difference(self.code, changed))}"
            if self.kept.get(key, [""])[0] not in settled and valid(changed):
                self.try_one(key, mutant.line, changed, ready)
        if ready is None:
            self.check()

    def try_one(self, key: str, line: int, changed: str, ready: Ready | None) -> None:
        swapped = replacements(self.code, changed, self.path)
        if swapped == {}:
            return
        name = f"{self.module}:{key}\n"
        if ready is None:
            if name in TRIED.read_text():
                return
        elif swapped is None or not patchable(swapped, ready.functions):
            return
        seconds = self.arguments.seconds
        tests = self.fitting(line, ready) or self.fitting(None, ready)
        tests += OF_IMPORTS * (ready is None)
        if not tests:
            found = "no test", ""
        elif swapped is None or ready is None:
            run = run_imported(self.path, changed, tests)
            found = outcome(run, 20 + int(5 * seconds))
        else:
            found = outcome(run_patched(swapped, ready, tests), 10 + int(5 * seconds))
        self.kept[key] = found
        with TRIED.open("a") as tried:
            tried.write(name)
        if found[0] != "killed":
            print(found[0], name, end="", flush=True)
        about = {"of": len(self.every), "code": self.digest, "mutants": self.kept}
        self.file.write_text(json.dumps(about, indent=1))

    def fitting(self, line: int | None, ready: Ready | None) -> list[str]:
        """Tests that touch the line: each function's fastest case, then the second of each."""
        functions: dict[str, list[tuple[float, str]]] = {}
        for test, about in self.touched.items():
            lines = about["lines"].get(self.module, ())
            fits = line in lines if line is not None else bool(lines)
            if fits and about["seconds"] <= SLOWEST and (ready is None or test in ready.tests):
                functions.setdefault(test.split("[")[0], []).append((about["seconds"], test))
        ranked = [
            (place, seconds, test)
            for tests in functions.values()
            for place, (seconds, test) in enumerate(sorted(tests))
        ]
        chosen, total = [], 0.0
        for _, seconds, test in sorted(ranked):
            if total + seconds <= self.arguments.seconds or not chosen:
                chosen.append(test)
                total += seconds
        return chosen

    def check(self) -> None:
        """See that the tests that killed mutants pass without."""
        killers = sorted({by for _, by in self.kept.values() if by})
        if not killers:
            return
        found, by = outcome(run_imported(self.path, self.code, killers), 600)
        if found != "survived":
            raise SystemExit(f"{self.module}: {by} fails without a mutant: its kills do not count")


if __name__ == "__main__":
    main()
