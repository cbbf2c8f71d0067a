"""What ``fastpref train`` was given: options and a YAML file, checked before anything is made."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl.scripts.utils import ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig

from fastpref.checks import refuse
from fastpref.integrations.trl.config import PreferenceConfig
from fastpref.losses import METHODS

STUDENT = "a model folder or a name on the Hub"
REQUIRED = {
    "method": f"one or several of {', '.join(METHODS)}",
    "model_name_or_path": STUDENT,
    "dataset_name": "a file of preference pairs, a saved dataset or a name on the Hub",
}
HELP = "see fastpref train --method METHOD --help"


@dataclass
class OtherModels:
    """Models that neither TRL nor the trainer's configuration names."""

    teacher_ref_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The teacher before it was aligned, for ADPA and the implicit reward."},
    )
    oracle_model_name_or_path: str | None = field(
        default=None, metadata={"help": "For DRDO: a folder that method oracle has trained."}
    )


CLASSES: Any = (ScriptArguments, PreferenceConfig, ModelConfig, OtherModels)


class _Parser(TrlParser):
    """TrlParser that raises what is wrong, instead of printing 200 lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: list[str]) -> tuple[Any, ...]:
    """The dataclasses of a command line and of the file that it names.

    Unknown options are refused first, then missing ones: making the dataclasses already looks for
    devices, and a misspelt option would hide behind what is wrong with these.
    """
    parser = _Parser(CLASSES)
    file, arguments = _split_config(arguments)
    config = [] if file is None else ["--config", file]
    if file is not None and (unknown := parser.set_defaults_with_config(**_settings(file))):
        name = unknown[0].removeprefix("--")
        raise ValueError(f"{file}: {name}: no such option; {_advice(parser, name)}")
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse_unknown(parser, unknown)
    missing = [name for name in REQUIRED if not getattr(given, name)]
    if len(missing) == 1:
        raise ValueError(f"--{missing[0]}: required: {REQUIRED[missing[0]]}")
    if missing:
        *first, last = (f"--{name}" for name in missing)
        raise ValueError(f"{', '.join(first)} and {last}: required; {HELP}")
    try:
        return tuple(parser.parse_args_and_config([*config, *arguments]))
    except ValueError as error:
        if "bf16/gpu" not in str(error):  # transformers' check of the machine
            raise
        raise ValueError(
            "--bf16: this machine has no device that computes in bfloat16; "
            "add --use_cpu true --bf16 false"
        ) from error


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The name of the YAML file, and all other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    found, others = parser.parse_known_args(arguments)
    if found.config == "":
        refuse("config", "a YAML file", "none")
    return found.config, others


def _settings(file: str) -> dict[str, Any]:
    """The options in a YAML file, without the environment variables, which TrlParser sets."""
    if not Path(file).is_file():
        refuse("config", "a file that exists", file)
    try:
        settings = yaml.safe_load(Path(file).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: expected a YAML file, cannot read it ({error})") from error
    if not isinstance(settings, dict):
        refuse("config", "a YAML file with a line `option: value` for each", file)
    return {str(name): value for name, value in settings.items() if name != "env"}


def _refuse_unknown(parser: _Parser, unknown: list[str]) -> NoReturn:
    """Name the first unknown option, or the first word that belongs to no option."""
    options = [word for word in unknown if word.startswith("--")]
    if not options:
        raise ValueError(f"{unknown[0]!r}: expected options, --NAME VALUE; {HELP}")
    option = options[0].partition("=")[0]
    raise ValueError(f"{option}: no such option; {_advice(parser, option, '--')}")


def _advice(parser: _Parser, name: str, prefix: str = "") -> str:
    """The option that was probably meant."""
    names = [action.dest for action in parser._actions]
    near = get_close_matches(name.removeprefix("--").replace("-", "_"), names, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else HELP
