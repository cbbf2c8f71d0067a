"""Numbers that a loss reads beside the student's own: where they come from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import get_config_model_id

from fastpref.checks import is_finite_float32, refuse
from fastpref.data.tokens import tokenizer_settings
from fastpref.integrations.trl.config import OF_SHAPING, PreferenceConfig, inputs_of
from fastpref.models.fused_head import add_fused_head
from fastpref.models.reward_head import load_reward_head, reward_head_of, rewards_at_head
from fastpref.ops import Head
from fastpref.teacher import BadRowsError, add_shaping, load_teacher, teacher_shaping
from fastpref.teacher.store import made_with_max_length


@dataclass
class Signal:
    """One number per response that a loss reads and the student does not compute.

    It is of one of three kinds: two columns of the dataset; the same columns, which ``compute``
    adds before training; or what ``read`` says in every step, which asks a model.
    """

    columns: tuple[str, str]
    argument: str = ""  # of the trainer: the model that computes it
    advice: str = ""  # to someone whose dataset lacks the columns
    compute: Callable[[Any, str], Any] | None = None
    read: Callable[[dict[str, Tensor], Tensor], Tensor] | None = None

    def prepare(self, dataset: Any, name: str) -> Any:
        """A dataset with what is read of it; refused is one that lacks it, or has it twice."""
        if not self.argument:  # a reference's, which DPOTrainer adds
            return dataset
        missing = missing_columns(dataset, self.columns)
        columns = " and ".join(self.columns)
        if self.compute is not None or self.read is not None:
            if not missing:
                refuse(self.argument, f"None, since the {name} dataset has {columns}", "a model")
            return dataset if self.compute is None else self.compute(dataset, name)
        if missing:
            absent = " and no ".join(missing)
            refuse(f"{name}_dataset", f"columns {columns}; {self.advice}", f"no {absent}")
        if isinstance(dataset, Dataset):
            for column in self.columns:
                finite(column, dataset.with_format(None)[column][:])
        return dataset

    def of_batch(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """(2B,) numbers of a batch, chosen responses first."""
        if self.read is not None:
            return self.read(inputs, labels)
        return torch.cat([inputs[column] for column in self.columns])


SHAPING = Signal(
    ("chosen_shaping", "rejected_shaping"),
    "teacher_model",
    "add them with `fastpref values`, or give the trainer a teacher_model (or alpha=0)",
)
REWARDS = Signal(
    ("chosen_reward", "rejected_reward"),
    "oracle_model",
    "add them from your oracle, or give the trainer an oracle_model",
)
REFERENCE = Signal(("ref_chosen_logps", "ref_rejected_logps"))  # which DPOTrainer precomputes


@dataclass
class Reader:
    """A teacher or an oracle that reads the student's batches."""

    argument: str
    model: Any
    tokenizer: Any
    at_head: Callable[[Tensor, Head, Tensor], Tensor]  # states, head, labels -> (2B,)

    def join(self, trainer: Any) -> None:
        """Check that it reads the student's tokens; place it as TRL places a reference."""
        key = "tokenizer_digest"
        theirs, student = self.tokenizer, trainer._tokenizer
        if tokenizer_settings(theirs)[key] != tokenizer_settings(student)[key]:
            refuse(
                self.argument,
                "the student's vocabulary, since it reads the student's tokens in every step "
                "(precompute_shaping=True or `fastpref values` let a teacher read its own)",
                f"another one (tokenizers {theirs.name_or_path!r} and {student.name_or_path!r})",
            )
        self.model.eval().requires_grad_(False)
        add_fused_head(self.model)
        if trainer.is_deepspeed_enabled:
            self.model = prepare_deepspeed(self.model, trainer.accelerator)
        elif trainer.is_fsdp_enabled:
            self.model = prepare_fsdp(self.model, trainer.accelerator)
        else:
            self.model = trainer.accelerator.prepare_model(self.model, evaluation_mode=True)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """(2B,) what ``at_head`` makes of a batch."""

        def at_head(states: Tensor, head: Head) -> dict[str, Tensor]:
            return {"signal": self.at_head(states, head, labels.to(states.device))}

        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        found: Tensor = self.model(**tokens, at_head=at_head)["signal"]
        return found


def signals_of(
    args: PreferenceConfig, student: Any, models: dict[str, tuple[Any, Any]]
) -> dict[str, Signal]:
    """What the loss reads beside the student's own numbers, by the names of its parameters.

    ``models`` are models and tokenizers, by the trainer's arguments.
    """
    inputs = inputs_of(args.method)
    signals = {}
    for name, signal, ask in (
        ("shaping", SHAPING, _ask_teacher),
        ("oracle_rewards", REWARDS, _ask_oracle),
    ):
        model, tokenizer = models[signal.argument]
        is_read = name in inputs and not (name == "shaping" and args.alpha == 0)
        if model is not None and not is_read:
            reason = f"the loss reads no {name} (method={args.method!r}, alpha={args.alpha})"
            refuse(signal.argument, f"None, since {reason}", type(model).__name__)
        if model is student:
            refuse(signal.argument, "another model than the student", "the student itself")
        if name == "shaping" and name in inputs and model is None:
            args.refuse_set(OF_SHAPING, "there is no teacher_model that it is for")
        if is_read:
            signals[name] = signal if model is None else ask(args, model, tokenizer)
    return signals


def _ask_teacher(args: PreferenceConfig, teacher: Any, tokenizer: Any) -> Signal:
    model, tokenizer = load_frozen("teacher_model", teacher, tokenizer)
    options = args.shaping_options()

    def at_head(states: Tensor, head: Head, labels: Tensor) -> Tensor:
        return teacher_shaping(states, head, labels, **options)

    def compute(dataset: Any, name: str) -> Any:
        if not isinstance(dataset, Dataset):
            refuse(f"{name}_dataset", "a Dataset to precompute", type(dataset).__name__)
        file = Path(args.output_dir) / f"{name}-shaping.parquet"
        sizes = {"max_length": args.max_length, "batch_size": args.per_device_train_batch_size}
        try:
            found = add_shaping(dataset, model, tokenizer, file, **sizes, **options)
        except BadRowsError as error:
            raise ValueError(
                f"{name}_dataset: expected rows that the teacher can read; take the others "
                "out, or add the columns with `fastpref values --skip-bad-rows`. " + str(error)
            ) from error
        # Its columns only: a file of an earlier run knows the rows as they were then.
        for column in SHAPING.columns:
            values = found[column][:]
            dataset = dataset.add_column(column, values, feature=found.features[column])
        return dataset

    if args.precompute_shaping:
        return replace(SHAPING, compute=compute)
    return replace(SHAPING, read=Reader("teacher_model", model, tokenizer, at_head))


def _ask_oracle(args: PreferenceConfig, oracle: Any, tokenizer: Any) -> Signal:
    model, tokenizer = load_frozen("oracle_model", oracle, tokenizer)
    if isinstance(oracle, str):
        load_reward_head(model, oracle)
    reward_head_of(model)

    def at_head(states: Tensor, _: Head, labels: Tensor) -> Tensor:
        return rewards_at_head(model, states, labels)

    return replace(REWARDS, read=Reader("oracle_model", model, tokenizer, at_head))


def load_frozen(argument: str, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """A model that is given or named, and its tokenizer, found where the model came from."""
    if isinstance(model, str):
        model, found = load_teacher(model)
        return model, tokenizer or found
    model.eval()
    if tokenizer is None:
        source = get_config_model_id(model.config)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{argument.removesuffix('_model')}_processing_class: expected the tokenizer of "
                f"{argument}, got None, and none is found at {source!r}"
            ) from error
    return model, tokenizer


@dataclass
class CollatorWithColumns:
    """TRL's collator, and beside its tensors one (B,) float32 tensor per column."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, ...]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, refusing rows without a number: streamed ones were not seen before."""
        batch = dict(self.collator(examples))
        for column in self.columns:
            values = finite(column, [example.get(column) for example in examples])
            batch[column] = torch.tensor(values, dtype=torch.float32)
        return batch


def finite(column: str, values: list[Any]) -> list[Any]:
    """``values`` of a column; refused is one with a row that has no finite number."""
    for row, value in enumerate(values):
        if not is_finite_float32(value):
            refuse(column, "a finite number in every row", f"{value!r} (row {row})")
    return values


def missing_columns(dataset: Any, columns: Iterable[str]) -> list[str]:
    """Those of ``columns`` that the first row of a dataset lacks."""
    first: dict[str, Any] = next(iter(dataset), {})
    return [column for column in columns if column not in first]


def warn_of_other_lengths(dataset: Any, max_length: int | None) -> None:
    """Warn where a teacher read other parts of responses than the student will.

    What `fastpref.teacher.add_shaping` wrote says how long its sequences were; other columns say
    nothing. ``dataset`` has TRL's tokens.
    """
    known, teachers = made_with_max_length(dataset)
    if not known or teachers == max_length or not isinstance(dataset, Dataset):
        return
    limit = min(length for length in (teachers, max_length) if length is not None)
    tokens = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format(None)
    for row in tokens:
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) > limit:
            warnings.warn(
                f"max_length={max_length}, but chosen_shaping and rejected_shaping were made with "
                f"max_length={teachers}: the teacher's numbers of longer rows are not of the "
                "tokens that the student reads; use the same max_length for both",
                stacklevel=3,
            )
            return
