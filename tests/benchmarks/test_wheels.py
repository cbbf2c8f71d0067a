"""What a machine without a network is given is all that the contenders import."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path

from contenders import CONTENDERS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

WHEELS = {
    requirement.name: requirement.specifier
    for requirement in map(
        Requirement,
        (Path(__file__).parents[2] / "benchmarks/wheels.txt").read_text("utf-8").splitlines(),
    )
}
ON_THE_MACHINE = {"torch", "triton"}
PROGRAMS = ("matplotlib", "psutil", "rich", "typer")  # what this folder's programs import


def needs(name):
    """The packages that an installed one needs here."""
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def test_nothing_is_forgotten_that_a_wheel_needs():
    """Of those that are installed here."""
    seen = {canonicalize_name(found.metadata["Name"]) for found in metadata.distributions()}
    needed = {need for name in seen & set(WHEELS) for need in needs(name)}
    assert "accelerate" in needed  # of TRL
    assert needed <= set(WHEELS) | ON_THE_MACHINE


def test_every_contender_and_program_is_given():
    commands = {contender.install for contender in CONTENDERS.values() if contender.install}
    installs = [shlex.split(command)[2:] for command in commands if command.startswith("pip ")]
    wanted = {re.split(r"[\[<>=]", text)[0] for texts in installs for text in texts}
    assert {"liger-kernel", "quack-kernels", "cut-cross-entropy", "trl"} < wanted
    assert wanted - ON_THE_MACHINE | set(PROGRAMS) <= set(WHEELS)


def test_the_versions_are_those_that_the_contenders_are_written_for():
    for contender in CONTENDERS.values():
        if not contender.install.startswith("pip "):
            continue
        for text in shlex.split(contender.install)[2:]:
            requirement = Requirement(text)
            if requirement.name in WHEELS:
                (pin,) = WHEELS[requirement.name]
                assert requirement.specifier.contains(pin.version)
