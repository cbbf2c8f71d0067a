"""The command of GPU checks, up to the device: a sanitizer that only says what it is told."""

from __future__ import annotations

import json
import shutil

import gpu_check
import pytest
import torch

CLEAN = "echo launched 9 kernels; echo ========= ERROR SUMMARY: 0 errors"
SEES = "echo ========= ERROR SUMMARY: 1 error; exit 77"
FAKE = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING.$TRITON_INTERPRET.$@" >> {calls}
case "$*" in
    *--planted*) {planted};;
    *) {otherwise};;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a number of CUDA devices, and a sanitizer if something is given for it."""

    def make(devices, planted=SEES, otherwise=CLEAN, *, sanitizer=True):
        monkeypatch.setattr(gpu_check, "look", lambda: {"devices": ["a device"] * devices})
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "git").symlink_to(shutil.which("true", path="/bin:/usr/bin"))
        if sanitizer:
            fake = tmp_path / "bin" / gpu_check.SANITIZER
            calls = tmp_path / "calls"
            fake.write_text(FAKE.format(calls=calls, planted=planted, otherwise=otherwise))
            fake.chmod(0o755)

        def run(*options):
            output = tmp_path / "out.json"
            code = gpu_check.main([*options, "--output", str(output)])
            found = json.loads(output.read_text("utf-8"))
            return code, {step["name"]: step for step in found["steps"]}

        return run

    return make


def test_sanitizers_are_called_as_they_should_be(machine, tmp_path):
    code, steps = machine(1)("--only", "check")
    assert code == 0 and len(steps) == 8
    assert {one["status"] for one in steps.values()} == {"passed"}
    calls = (tmp_path / "calls").read_text("utf-8").splitlines()
    for tool, planted, call in zip(
        gpu_check.TOOLS, calls[::2], calls[1::2], strict=True
    ):  # fmt: skip
        start = f"1..--tool {tool} --error-exitcode 77 --target-processes application-only"
        assert planted.startswith(start) and planted.endswith(f"launches.py --planted {tool}")
        assert call.startswith(start) and call.endswith("launches.py")
        assert ("--padding 512" in call) == (tool == "memcheck")


@pytest.mark.parametrize(
    "said",
    [
        "echo launched 9 kernels; echo ========= ERROR SUMMARY: 3 errors; exit 77",
        "echo launched 9 kernels; echo ========= ERROR SUMMARY: 3 errors",
        "echo launched; echo '========= RACECHECK SUMMARY: 1 hazard displayed (0 errors)'",
        "exit 0",
        "echo ========= ERROR SUMMARY: 0 errors",
        "echo launched 9 kernels",
        "echo launched 9 kernels; echo ========= ERROR SUMMARY: 0 errors; exit 1",
        "kill -SEGV $$",
    ],
)
def test_what_is_not_clean_fails(machine, said, capsys):
    code, steps = machine(1, otherwise=said)("--only", "initcheck")
    assert code == 1
    found = {name: one["status"] for name, one in steps.items()}
    assert found == {"initcheck sees a planted error": "passed", "initcheck": "failed"}
    assert "1 passed, 1 failed, 0 not run" in capsys.readouterr().out


@pytest.mark.parametrize("said", [CLEAN, "exit 77", "exit 1", "kill -SEGV $$", f"{SEES[:-2]}1"])
def test_a_planted_error_that_is_not_seen_fails(machine, said):
    code, steps = machine(1, planted=said)("--only", "synccheck")
    assert code == 1
    assert steps["synccheck sees a planted error"]["status"] == "failed"
    assert steps["synccheck"]["status"] == "passed"


def test_a_sanitizer_that_is_not_there(machine):
    run = machine(1, sanitizer=False)
    for options, expected in (((), 1), (("--allow-missing",), 0)):
        code, steps = run("--only", "check", *options)
        assert code == expected and len(steps) == 8
        assert {one["why"] for one in steps.values()} == {"compute-sanitizer not found"}
        assert {one["status"] for one in steps.values()} == {"not run"}


def test_without_a_gpu(machine, monkeypatch):
    """What can be interpreted runs; all else has not run, and says so."""
    called = []
    passed = gpu_check.Outcome("passed", "")
    real = gpu_check.run

    def run(step, log):
        called.append(step.name) if not step.missing else None
        return real(step, log) if step.missing else passed

    monkeypatch.setattr(gpu_check, "run", run)
    code, steps = machine(0)()
    assert code == 1
    assert {name for name, one in steps.items() if one["interpreted"]} == set(called)
    missing = [name for name, one in steps.items() if one["status"] == "not run"]
    assert len(missing) == 10
    assert {steps[name]["why"] for name in missing} == {"no CUDA device"}
    assert not [one for one in gpu_check.steps(2) if one.interpreted]


def test_one_device_is_enough(machine):
    code, steps = machine(1)("--only", "second device")
    assert (code, steps["second device"]["why"]) == (0, "one CUDA device")
    assert [one.missing for one in gpu_check.steps(2) if one.name == "second device"] == [""]


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ("def test_a(): pass\ndef test_b(): pytest.skip('so')", "passed", "1 passed, 1 skipped"),
        ("def test_a(): pytest.skip('no GPU')", "not run", "0 passed, 1 skipped; no GPU"),
        ("pytest.skip('none', allow_module_level=True)", "not run", "0 passed, 1 skipped; ("),
        ("def test_a(): pass\ndef test_b(): assert False", "failed", "1 failed, 1 passed"),
        ("import nothing_of_this_name", "failed", "1 failed, 0 passed"),
    ],
)
def test_tests_that_are_skipped_have_not_passed(tmp_path, monkeypatch, body, status, why):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a third of the time
    file = tmp_path / "test_it.py"
    file.write_text(f"import pytest\n{body}\n", "utf-8")
    found = gpu_check.run(gpu_check.Step("", gpu_check.pytest(str(file))), tmp_path / "log")
    assert found.status == status and found.why.startswith(why)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU: there the command runs")
def test_the_command_itself(machine, capsys):
    """A kernel that reads beyond a tensor, interpreted, is seen."""
    exec(gpu_check.LOOK)
    assert json.loads(capsys.readouterr().out)["devices"] == []
    run = machine(0)
    code, steps = run("--only", "error: memcheck")
    (step,) = steps.values()
    assert (code, step["status"], step["why"]) == (0, "passed", "seen: SIGSEGV")
    with pytest.raises(SystemExit, match="--only"):
        run("--only", "no such step")
