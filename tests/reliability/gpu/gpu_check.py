"""Every check of the kernels that needs a GPU, in one command: ``make gpu-check``.

Prints a line for each step, writes a JSON file, and exits with 0 only if every step has passed.
Without a GPU kernels are interpreted on the CPU, and what needs a GPU is said not to have run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SANITIZER = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SEEN = 77  # the exit code after an error that was planted; also in launches.py
SECONDS = 3600  # for one step: sanitizers are slow
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"

LOOK = """
import json, torch, triton
count = torch.cuda.device_count()
print(json.dumps({
    "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(index) for index in range(count)],
}))
"""


class Step(NamedTuple):
    name: str
    command: tuple[str, ...]
    # One that every machine with a GPU could pass.
    required: bool = True
    interpreted: bool = False
    planted: bool = False  # an error, which must be seen
    missing: str = ""  # what it needs and there is not


class Outcome(NamedTuple):
    status: str
    why: str
    skipped: tuple[str, ...] = ()


def look() -> dict[str, Any]:
    """Versions and CUDA devices, as a process finds them that is not watched by a sanitizer."""
    found = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"PyTorch or Triton cannot be imported:\n{found.stderr}")
    return json.loads(found.stdout)


def pytest(*paths: str) -> tuple[str, ...]:
    return sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths


def launches(*options: str) -> tuple[str, ...]:
    return sys.executable, str(HERE / "launches.py"), *options


def sanitized(tool: str, *options: str) -> tuple[str, ...]:
    """The launches under one of the sanitizer's tools.

    Triton's compiler runs in processes of its own, which are not of interest. PyTorch asks CUDA
    for things that some drivers have not, which are no errors of kernels.
    """
    found = [SANITIZER, "--tool", tool, "--error-exitcode", str(SEEN)]
    found += ["--target-processes", "application-only"]
    if tool == "memcheck":  # space between allocations: none begins where another ends
        found += ["--padding", "512", "--report-api-errors", "no"]
    return (*found, *launches(*options))


def steps(devices: int) -> Iterator[Step]:
    """All steps, the quick ones first."""
    on_cpu = devices == 0
    no_device = "no CUDA device" if on_cpu else ""
    no_tool = "" if shutil.which(SANITIZER) else f"{SANITIZER} not found"
    yield Step("launches", launches(), interpreted=on_cpu)
    if on_cpu:
        for tool in ("memcheck", "initcheck"):
            command = launches("--guarded", "after", "--planted", tool)
            yield Step(f"fences see a planted error: {tool}", command, True, True, True)
        for side in ("after", "before"):
            command = launches("--guarded", side)
            yield Step(f"fences {side} tensors", command, interpreted=True)
    for tool in TOOLS:
        missing = no_device or no_tool
        planted = sanitized(tool, "--planted", tool)
        yield Step(f"{tool} sees a planted error", planted, planted=True, missing=missing)
        yield Step(tool, sanitized(tool), missing=missing)
    graphs = pytest("tests/ops/test_cuda_graphs.py")
    yield Step("CUDA graphs", graphs, missing=no_device)
    one = "" if devices > 1 else "one CUDA device" if devices else no_device
    second = pytest(str(HERE.relative_to(ROOT) / "test_second_device.py"))
    yield Step("second device", second, required=False, missing=one)
    yield Step("kernel tests", pytest("tests/kernels"), interpreted=on_cpu)


def environment(step: Step) -> dict[str, str]:
    """What a step's process is told: no caching of memory, as a sanitizer sees what is allocated.

    A cache hands out parts of large allocations, beyond which other tensors lie.
    """
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), found.get("PYTHONPATH", ""))))
    if "pytest" not in step.command:
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if step.interpreted:
        found["TRITON_INTERPRET"] = "1"
    return found


def run(step: Step, log: Path) -> Outcome:
    """Run a step, all that it prints into a file."""
    if step.missing:
        return Outcome(NOT_RUN, step.missing)
    report = log.with_suffix(".xml")
    command = list(step.command)
    if "pytest" in command:
        command.append(f"--junitxml={report}")
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment(step), timeout=SECONDS,
                stdout=output, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return Outcome(FAILED, f"not done after {SECONDS} s")
    if "pytest" in command:
        return judge_tests(code, report)
    return judge(step, code, log.read_text("utf-8", errors="replace"))


def judge(step: Step, code: int, said: str) -> Outcome:
    """Of a step that launches kernels.

    A sanitizer that watched nothing exits with 0, too, so that what it says counts as well.
    """
    watched = step.command[0] == SANITIZER
    summary = re.search(r"SUMMARY: (\d+) (?:errors?|hazards?).*", said)
    last = said.strip().splitlines()[-1] if said.strip() else "it said nothing"
    why = summary[0] if summary else last if code >= 0 else signal.Signals(-code).name
    errors = int(summary[1]) if summary else None
    if step.planted:
        # A process that touches a fence ends by a signal.
        seen = (code == SEEN and errors != 0) if watched else code in (SEEN, -signal.SIGSEGV)
        seen = seen and (errors is not None or not watched)
        return Outcome(PASSED, f"seen: {why}") if seen else Outcome(FAILED, f"not seen: {why}")
    if code == 0 and watched and (errors is None or "launched" not in said):
        return Outcome(FAILED, f"it watched nothing: {why}")
    return Outcome(PASSED if code == 0 and not errors else FAILED, why)


def judge_tests(code: int, report: Path) -> Outcome:
    """Of a step of tests: tests that are all skipped have not run."""
    if not report.exists():
        return Outcome(FAILED, f"pytest exited with {code} and no report")
    (suite,) = ElementTree.parse(report).getroot()
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    skipped = tuple(sorted({reason(one) for one in suite.iter("skipped")}))
    why = f"{passed} passed, {counts['skipped']} skipped"
    if code not in (0, 5) or counts["failures"] or counts["errors"]:
        return Outcome(FAILED, f"{counts['failures'] + counts['errors']} failed, {why}", skipped)
    if passed == 0:
        return Outcome(NOT_RUN, "; ".join((why, *skipped)), skipped)
    return Outcome(PASSED, why, skipped)


def reason(skipped: ElementTree.Element) -> str:
    """Why a test is skipped; of a whole module pytest says it elsewhere."""
    message = skipped.get("message", "")
    return (skipped.text or "").strip() if message == "collection skipped" else message


def commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"))
    parser.add_argument(
        "--allow-missing", action="store_true", help="exit with 0 whatever has not run"
    )
    parser.add_argument("--only", metavar="TEXT", help="steps whose name contains it")
    options = parser.parse_args(arguments)
    machine = {**look(), "python": platform.python_version(), "commit": commit()}
    print(json.dumps(machine), flush=True)
    found: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, step in enumerate(steps(len(machine["devices"]))):
            if options.only and options.only not in step.name:
                continue
            start, log = time.monotonic(), Path(folder) / f"{index}.log"
            outcome = run(step, log)
            seconds = round(time.monotonic() - start, 1)
            interpreted = " (interpreted)" if step.interpreted else ""
            print(f"{step.name}{interpreted}: {outcome.status}: {outcome.why} ({seconds} s)")
            print(f"    {shlex.join(step.command)}", flush=True)
            if outcome.status == FAILED and log.exists():
                print(log.read_text("utf-8", errors="replace"), flush=True)
            found.append({**step._asdict(), **outcome._asdict(), "seconds": seconds})
    counts = {
        status: sum(one["status"] == status for one in found)
        for status in (PASSED, FAILED, NOT_RUN)
    }
    options.output.write_text(
        json.dumps({"machine": machine, "counts": counts, "steps": found}, indent=2) + "\n", "utf-8"
    )
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    lacking = [one for one in found if one["status"] == NOT_RUN and one["required"]]
    if not found:
        sys.exit(f"--only: expected a part of a step's name, got {options.only!r}")
    return int(counts[FAILED] > 0 or (bool(lacking) and not options.allow_missing))


if __name__ == "__main__":
    sys.exit(main())
