"""What ``fastpref train --help`` prints."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from functools import partial
from typing import Any

from trl.scripts.utils import ScriptArguments
from trl.trainer.model_config import ModelConfig

from fastpref.integrations.trl.config import (
    ALL_OPTIONS,
    OF_OTHER_LOSSES,
    OPTIONS,
    PreferenceConfig,
    texts_of,
)
from fastpref.losses import METHODS

TEACHER = ("teacher_model_name_or_path", "teacher_model_init_kwargs")
# Where a configuration's own text is of Python, or too short.
TEXTS = {
    "teacher_model_name_or_path": "The teacher: a folder or a name on the Hub.",
    "teacher_model_init_kwargs": "What from_pretrained takes beside its name, as JSON.",
    "dataset_name": (
        "Preference pairs: a .jsonl, .csv or .parquet file, a saved dataset, a folder with "
        "train.jsonl and test.jsonl, or a name on the Hub."
    ),
    "model_name_or_path": "The student: a folder or a name on the Hub.",
}
COMMON = (
    "output_dir learning_rate lr_scheduler_type num_train_epochs max_steps max_length "
    "per_device_train_batch_size gradient_accumulation_steps activation_checkpointing bf16 use_cpu "
    "seed logging_steps report_to eval_strategy eval_steps save_strategy resume_from_checkpoint"
).split()
DESCRIPTION = "Train a student by one of the methods, or by several at once, with TRL's trainer."
BRACKETS = (
    "In brackets are the methods that have an option; `--method METHOD --help` shows those of a "
    "method, in full."
)
CONFIG = "A YAML file with any of these options; the command line overrides it."
EPILOG = (
    "On several GPUs: accelerate launch -m fastpref train ... or "
    "torchrun --nproc-per-node 4 -m fastpref train ..."
)
Add = Any  # argparse's add_argument, whose type is private


def help_page(others: Iterable[Field[Any]], methods: list[str]) -> str:
    """The options in three groups: ours, those of the model, those of the trainer.

    Args:
        others: The models that no configuration of TRL names.
        methods: Whose options are shown, in full; where there are none, all in a line each.
    """
    parser = argparse.ArgumentParser(
        "fastpref train",
        usage="fastpref train --method METHOD [--config FILE] [--OPTION VALUE ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        add_help=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34, width=100),
    )
    ours = {one.name: one for one in fields(PreferenceConfig)}
    brackets = "" if methods else BRACKETS
    add = parser.add_argument_group("method and what it reads", brackets).add_argument
    add("--method", metavar="METHOD", help=f"One or several of {', '.join(METHODS)}.")
    add("--config", metavar="FILE", help=CONFIG)
    for one in [*(ours[name] for name in TEACHER), *others, *fields(ScriptArguments)]:
        if one.name != "ignore_bias_buffers":  # refused
            _add(add, one)
    _add(add, ours["method_weights"])
    for name in ALL_OPTIONS:
        if not methods or any(name in OPTIONS[method] for method in methods):
            _add(add, ours[name], _of_methods(name, methods))
    _add(add, ours["scratch_bytes"])

    group = parser.add_argument_group("model and adapters")
    for one in fields(ModelConfig):
        _add(group.add_argument, one)

    group = parser.add_argument_group("trainer, the most used")
    for name in COMMON:
        _add(group.add_argument, ours[name])
    shown = {*TEACHER, *ALL_OPTIONS, *COMMON, "method", "method_weights", "scratch_bytes"}
    rest = ", ".join(sorted(ours.keys() - shown - {*OF_OTHER_LOSSES}))
    parser.add_argument_group("trainer, all others", f"As `trl dpo --help` says: {rest}.")
    return parser.format_help()


def _add(add: Add, one: Field[Any], text: str | None = None) -> None:
    """An option, with the first sentence of its help and its default if nothing else is said."""
    if text is None:
        help_text = re.sub(r"\s+", " ", one.metadata.get("help", "")).replace("%%", "%")
        text = TEXTS.get(one.name) or _sentence(help_text) + _default(one)
    choices = one.metadata.get("choices")
    metavar = f"{{{','.join(map(str, choices))}}}" if choices else _kind(one)
    add(f"--{one.name}", metavar=metavar, help=text.replace("%", "%%"))


def _kind(one: Field[Any]) -> str:
    """A word for what a field takes, in capitals as argparse has it."""
    names = re.findall(r"\w+", str(one.type))  # of a class, or of an annotation as it is written
    if "dict" in names:
        return "JSON"
    word = next((name.upper() for name in names if name in ("bool", "int", "float")), "TEXT")
    return f"{word} ..." if "list" in names else word


def _sentence(text: str) -> str:
    """The first sentence."""
    return re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(";.") + "."


def _default(one: Field[Any]) -> str:
    return "" if one.default in (None, MISSING) else f" By default {_plain(one.default)}."


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))  # of an enumeration, what is typed


def _of_methods(name: str, methods: list[str]) -> str:
    """What an option is in these methods, or in a line in which methods it is something."""
    texts = texts_of(name)
    if methods:
        found = {text: [one for one in methods if one in of] for text, of in texts.items()}
        texts = {text: of for text, of in found.items() if of}
    if len(methods) == 1:
        return " ".join(texts)
    if methods:
        return " ".join(f"[{', '.join(of)}] {text}" for text, of in texts.items())
    owners = [method for method in METHODS if name in OPTIONS[method]]
    text = f" {_sentence(next(iter(texts)))}" if len(texts) == 1 else ""
    return f"[{', '.join(owners)}]{text}"
