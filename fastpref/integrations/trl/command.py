"""The command ``fastpref train``: options of TRL, a trainer of ours."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset, load_dataset
from transformers import AutoConfig, TrainerCallback
from trl.trainer.utils import get_peft_config, get_quantization_config

from fastpref.checks import check_choice, refuse
from fastpref.data import read_rows
from fastpref.data.rows import MISSING, RESPONSES, BadRow, BadRowsError, row_defect
from fastpref.integrations.trl.command_help import help_page
from fastpref.integrations.trl.command_line import CLASSES, STUDENT, OtherModels, parse
from fastpref.integrations.trl.command_report import report
from fastpref.integrations.trl.config import PreferenceConfig
from fastpref.integrations.trl.trainer import PreferenceTrainer
from fastpref.losses import METHODS
from fastpref.teacher.model import this_process

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


class _Saved(TrainerCallback):
    """Remembers the last checkpoint that is complete."""

    def __init__(self, args: PreferenceConfig) -> None:
        self.last = args.resume_from_checkpoint

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")


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
        trainer = _trainer(*parse(arguments))
    except ValueError as error:
        raise ValueError(_as_typed(str(error))) from error
    except KeyboardInterrupt:
        _stop("stopped before the first step")
    args = trainer.args
    saved = _Saved(args)
    trainer.add_callback(saved)
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except KeyboardInterrupt:
        kept = "nothing was saved"
        if saved.last is not None:
            advice = f"add --resume_from_checkpoint {saved.last}"
            kept = f"the last checkpoint is {saved.last}: {advice}"
        state = trainer.state
        _stop(f"stopped after step {state.global_step} of {state.max_steps}; {kept}")
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


def _stop(message: str) -> NoReturn:
    """End after Ctrl-C."""
    if this_process().is_main_process:
        print(message, file=sys.stderr)
    raise SystemExit(130) from None  # as shells count Ctrl-C


def _check_student(name: str, *, revision: str, trust: bool) -> None:
    """Refuse a student that is not there, before a teacher is loaded."""
    is_path = name.startswith((".", "~", "/")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():  # transformers would say that it is no name
        refuse("model_name_or_path", STUDENT, repr(name))
    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        refuse("model_name_or_path", STUDENT, f"{name!r} ({reason})")


def _trainer(script: Any, args: PreferenceConfig, model: Any, others: OtherModels) -> Any:
    student = model.model_name_or_path
    _check_student(student, revision=model.model_revision, trust=args.trust_remote_code)
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
        _check_columns(rows)
        return rows
    defects = [BadRow(index, row_defect(row) or "") for index, row in enumerate(rows)]
    if bad := [one for one in defects if one.reason]:
        raise BadRowsError(bad, "dataset", advice="", rows=rows)
    try:
        return Dataset.from_list(rows)
    except TypeError as error:
        raise ValueError(f"dataset: expected one type in each column ({error})") from error


def _check_columns(rows: Any) -> None:
    """Refuse a table without the responses, as text or as the tokens that TRL makes of them."""
    for side in RESPONSES:
        if not {side, f"{side}_ids"} & {*rows.column_names}:
            bad = [BadRow(index, f"{side}{MISSING}") for index in range(len(rows))]
            raise BadRowsError(bad, "dataset", advice="", rows=rows)


def _eval_rows(script: Any) -> Any:
    if Path(script.dataset_name).is_file():
        expected = "'no' with a file (a folder with train.jsonl and test.jsonl has two splits)"
        refuse("eval_strategy", expected, "a file for dataset_name")
    return _rows(script, script.dataset_test_split)


def _as_typed(message: str) -> str:
    """A message that begins with the option as it is typed."""
    names = {"config", *(one.name for cls in CLASSES for one in fields(cls))}

    def option(found: re.Match[str]) -> str:
        name = TYPED.get(found[1], found[1])
        return f"--{name}:" if name in names else found[0]

    return re.sub(r"^(\w+):", option, message)
