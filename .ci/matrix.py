"""Run the suite with other versions of PyTorch, Triton and TRL, and print a table of the results.

.ci/matrix.py [NAME ...] [--tests PATHS] [--interpreted ARGUMENTS]; `make test-matrix` calls it

The Python that runs it has all that the suite needs. A combination's environment, .venv-NAME, sees
those packages and has its own versions of a few, from where pip is set up to look.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "matrix"
# Before Triton 3.7 its interpreter converts arrays of one element in a way that NumPy 2.4 refuses.
COMBINATIONS = {
    "2.10-3.5": ("torch==2.10.0", "triton==3.5.1", "numpy==2.3.5"),
    "2.11-3.6": ("torch==2.11.0", "triton==3.6.0", "numpy==2.3.5"),
    "2.13-3.7": ("torch==2.13.0", "triton==3.7.1"),
    "newest": ("torch>=2.10", "triton>=3.5", "transformers", "trl>=1.14,<1.17"),
    "trl-1.14": ("trl==1.14.2",),
    "trl-1.15": ("trl==1.15.0",),
}
SHOWN = ("torch", "triton", "trl", "transformers", "numpy")
COUNTED = ("passed", "failed", "skipped")


class Outcome(NamedTuple):
    """What one run of pytest says at its end."""

    counts: dict[str, int]
    status: int
    seconds: float

    def __str__(self) -> str:
        return " / ".join(str(self.counts[name]) for name in COUNTED)


def main() -> int:
    """Every combination that can be had, one after the other; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMBINATIONS))
    parser.add_argument("--tests", default="tests", help="files and folders, separated by spaces")
    parser.add_argument("--interpreted", default="", help="arguments of the interpreted run")
    parser.add_argument("--workers", default="", help="pytest-xdist's options")
    given = parser.parse_args()
    for name in given.names:
        if name not in COMBINATIONS:
            parser.error(f"NAME: expected one of {', '.join(COMBINATIONS)}, got {name}")
    tests, workers = given.tests.split(), given.workers.split()
    interpreted = within(shlex.split(given.interpreted), tests)
    LOGS.mkdir(parents=True, exist_ok=True)
    lines, failed = [], False
    for name in given.names or COMBINATIONS:
        python, problem = environment(name)
        if problem:
            print(f"{name} is skipped, pip says: {problem}", flush=True)
            continue
        runs = [run(name, python, [*workers, *tests])]
        if interpreted:
            runs.append(run(name, python, [*workers, *interpreted], interpret=True))
        failed |= any(one.status for one in runs)
        seconds = sum(one.seconds for one in runs)
        cells = (name, *versions(python), *runs, *[""] * (2 - len(runs)), f"{seconds:.0f}")
        lines.append(" | ".join(str(cell) for cell in cells))
    heads = ("environment", *SHOWN, " / ".join(COUNTED), "interpreted", "seconds")
    print("\n| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    for line in lines:
        print(f"| {line} |")
    return int(failed or not lines)


def environment(name: str) -> tuple[Path, str]:
    """The Python of a combination's environment, and why it cannot be had, if so."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout
    everything = sysconfig.get_path("purelib")
    Path(own.strip(), "everything.pth").write_text(f"import site; site.addsitedir({everything!r})")
    first, *others = COMBINATIONS[name]
    if name == "newest":
        return python, pip(python, "--upgrade", first, *others)
    # PyTorch asks for one version of Triton, and works with others.
    return python, pip(python, first) or (others and pip(python, "--no-deps", *others)) or ""


def pip(python: Path, *arguments: str) -> str:
    """Install something; why that failed, if so."""
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    found = subprocess.run(command, capture_output=True, text=True)
    said = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
    return said[-1] if found.returncode else ""


def versions(python: Path) -> list[str]:
    """What an environment has of the packages that are shown."""
    code = f"from importlib.metadata import version\nfor name in {SHOWN}: print(version(name))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.split()


def within(interpreted: list[str], tests: list[str]) -> list[str]:
    """What of the interpreted run is left when it is narrowed to tests: [] if none is."""
    roots = [Path(one) for one in interpreted if one.startswith("tests")]
    options = [one for one in interpreted if not one.startswith("tests")]
    wanted = [Path(one) for one in tests]
    kept = [one for one in wanted if any(one.is_relative_to(root) for root in roots)]
    kept += [root for root in roots if any(root.is_relative_to(one) for one in wanted)]
    found = sorted({str(one) for one in kept})
    return [*found, *options] if found else []


def run(name: str, python: Path, arguments: list[str], *, interpret: bool = False) -> Outcome:
    """The suite in an environment, or what of it is interpreted."""
    log = LOGS / f"{name}{'-interpreted' if interpret else ''}.log"
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        variables["TRITON_INTERPRET"] = "1"
    print(f"{name}: {log.relative_to(ROOT)}", flush=True)
    start = time.monotonic()
    with log.open("w") as file:
        # -P as for the command `pytest`: else the folder kernels/ would be found before others.
        command = [python, "-P", "-m", "pytest", "-q", "-rs", *arguments]
        ended = subprocess.run(
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT
        )
    found = counts(log.read_text("utf-8"))
    return Outcome(found, ended.returncode, time.monotonic() - start)


def counts(report: str) -> dict[str, int]:
    """How many tests passed, failed and were skipped: 0 each where pytest did not come to say."""
    totals = re.findall(r"^=* ?(.*) in [\d.]+s\b", report, flags=re.MULTILINE)
    found = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", "".join(totals[-1:]))}
    errors = found.get("error", 0) + found.get("errors", 0)
    return {
        "passed": found.get("passed", 0),
        "failed": found.get("failed", 0) + errors,
        "skipped": found.get("skipped", 0),
    }


if __name__ == "__main__":
    sys.exit(main())
