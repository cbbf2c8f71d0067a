"""The command ``fastpref train``: options of TRL, a trainer of ours."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from datasets import Dataset, load_dataset
from trl.scripts.utils import ScriptArguments, TrlParser
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from fastpref.checks import check_choice, refuse
from fastpref.data import read_rows
from fastpref.data.rows import BadRow, BadRowsError, row_defect
from fastpref.integrations.trl.command_help import help_page
from fastpref.integrations.trl.command_report import report
from fastpref.integrations.trl.config import PreferenceConfig
from fastpref.integrations.trl.trainer import PreferenceTrainer
from fastpref.losses import METHODS

# Options, by the arguments that functions call them.
TYPED = {
    "dataset": "dataset_name",
    "train_dataset": "dataset_name",
    "eval_dataset": "dataset_name",
    "split": "dataset_train_split",
    **{
        name: f"{name}_name_or_path"
        for name in ("model", "teacher_model", "teacher_ref_model", "oracle_model")
    },
}


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


_CLASSES: Any = (ScriptArguments, PreferenceConfig, ModelConfig, OtherModels)


class _Parser(TrlParser):
    """TrlParser that raises what is wrong, instead of printing 200 lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def run(arguments: list[str]) -> None:
    """Train as the command line says, save the model, and report.

    Args:
        arguments: Of the command line, what follows ``fastpref train``.

    Raises:
        ValueError: Unknown options, values out of range, rows that cannot be used, missing models.

    Example:
        >>> from fastpref.integrations.trl.command import run
        >>> run(["--method", "simpo", "--help"])  # doctest: +ELLIPSIS
        usage: fastpref train --method METHOD [--config FILE] [--OPTION VALUE ...]
        ...
    """
    try:
        if {"-h", "--help"} & {*arguments}:
            print(help_page(fields(OtherModels), _methods(arguments)))
            return
        trainer = _trainer(*_parse(arguments))
    except ValueError as error:
        raise ValueError(_as_typed(str(error))) from error
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        report(trainer.state.log_history, Path(args.output_dir))
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


def _methods(arguments: list[str]) -> list[str]:
    """The methods that a command line names, whatever else there is in it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", nargs="*", default=[])
    methods: list[str] = parser.parse_known_args(arguments)[0].method
    for method in methods:
        check_choice("method", method, tuple(METHODS))
    return methods


def _parse(arguments: list[str]) -> tuple[Any, ...]:
    if arguments[-1:] == ["--config"]:
        refuse("config", "a YAML file", "none")
    parser = _Parser(_CLASSES)
    try:
        return tuple(parser.parse_args_and_config(arguments))
    except yaml.YAMLError as error:
        raise ValueError(f"config: expected a YAML file, cannot read it ({error})") from error


def _trainer(script: Any, args: PreferenceConfig, model: Any, others: OtherModels) -> Any:
    for name, given in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset_name", script.dataset_name),
    ):
        if given is None:
            refuse(name, "a name on the Hub, or where it is here", "none")
    student = model.model_name_or_path
    is_path = student.startswith((".", "~", "/")) or student.count("/") > 1
    if is_path and not Path(student).is_dir():  # transformers would say that it is no name
        refuse("model_name_or_path", "a model folder or a name on the Hub", student)
    if script.ignore_bias_buffers:
        refuse("ignore_bias_buffers", "False", True)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    return PreferenceTrainer(
        student,
        args=args,
        teacher_ref_model=others.teacher_ref_model_name_or_path,
        oracle_model=others.oracle_model_name_or_path,
        train_dataset=_rows(script, script.dataset_train_split),
        eval_dataset=_eval_rows(script) if args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )


def _rows(script: Any, split: str) -> Any:
    """A split of the dataset; of a file here, rows that cannot be used are refused by number."""
    name = script.dataset_name
    if script.dataset_config or script.dataset_streaming:
        streaming = script.dataset_streaming
        return load_dataset(name, script.dataset_config, split=split, streaming=streaming)
    rows: Any = read_rows(name, split)
    if not len(rows):
        refuse("dataset", "rows", "none")
    if not isinstance(rows, list):
        return rows
    defects = [BadRow(index, row_defect(row) or "") for index, row in enumerate(rows)]
    if bad := [one for one in defects if one.reason]:
        raise BadRowsError(bad, "dataset", advice="")
    try:
        return Dataset.from_list(rows)
    except TypeError as error:
        raise ValueError(f"dataset: expected one type in each column ({error})") from error


def _eval_rows(script: Any) -> Any:
    if Path(script.dataset_name).is_file():
        expected = "'no' with a file (a folder with train.jsonl and test.jsonl has two splits)"
        refuse("eval_strategy", expected, "a file for dataset_name")
    return _rows(script, script.dataset_test_split)


def _as_typed(message: str) -> str:
    """A message that begins with the option as it is typed."""
    names = {"config", *(one.name for cls in _CLASSES for one in fields(cls))}

    def option(found: re.Match[str]) -> str:
        name = TYPED.get(found[1], found[1])
        return f"--{name}:" if name in names else found[0]

    return re.sub(r"^(\w+):", option, message)
