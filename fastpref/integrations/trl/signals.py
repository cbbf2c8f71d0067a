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

from fastpref.checks import is_finite_float32, refuse
from fastpref.data.rows import READ
from fastpref.data.tokens import IGNORE_INDEX, check_same_vocabulary
from fastpref.integrations.trl.config import OF_SHAPING, OPTIONS, PreferenceConfig, inputs_of
from fastpref.integrations.trl.passes import Sides, comparisons_of
from fastpref.integrations.trl.readers import Reader, load_frozen
from fastpref.models.reward_head import load_reward_head, reward_head_of, rewards_at_head
from fastpref.ops import Head, linear_logps
from fastpref.responses import sum_responses
from fastpref.sequences import labels_of_states
from fastpref.teacher import BadRowsError, add_shaping, shaping_from_values, teacher_shaping
from fastpref.teacher.implicit import rewards_so_far
from fastpref.teacher.store import note_of, read_settings


@dataclass
class Signal:
    """One number per response that a loss reads and the student does not compute.

    It is of one of three kinds: two columns of the dataset; the same columns, which ``compute``
    adds before training; or what ``read``, a model, says in every step.
    """

    columns: tuple[str, str]
    argument: str = ""  # of the trainer: the model that computes it
    advice: str = ""  # to someone whose dataset lacks the columns
    compute: Callable[[Any, str], Any] | None = None
    read: Reader | None = None
    # Of what is read of several models, and labels: makes one signal of theirs, which it removes.
    join: Callable[[dict[str, Tensor], Tensor], Tensor] | None = None

    def prepare(self, dataset: Any, name: str) -> Any:
        """A dataset with what is read of it; refused is one that lacks it, or has it twice."""
        missing = missing_columns(dataset, self.columns)
        columns = " and ".join(self.columns)
        if self.compute is not None or self.read is not None:
            needed = self.read is not None and self.read.sides is not None
            self.refuse_both(dataset, name, needed=needed)
            return dataset if self.compute is None else self.compute(dataset, name)
        if missing:
            absent = " and no ".join(missing)
            refuse(f"{name}_dataset", f"columns {columns}; {self.advice}", f"no {absent}")
        if isinstance(dataset, Dataset):
            for column in self.columns:
                finite(column, dataset.with_format(None)[column][:])
        return dataset

    def refuse_both(self, dataset: Any, name: str, *, needed: bool) -> None:
        """Refuse a model beside a dataset with its columns; ``needed`` says it is for more."""
        if missing_columns(dataset, self.columns):
            return
        columns = " and ".join(self.columns)
        if needed:
            refuse(f"{name}_dataset", f"no {columns}, which {self.argument} computes", "both")
        expected = f"None, since the {name} dataset has {columns} already (leave it out)"
        refuse(self.argument, expected, "a model")

    def of_batch(self, inputs: dict[str, Tensor]) -> Tensor:
        """(2B,) numbers of the columns of a batch, chosen responses first; (k, 2B) of lists."""
        found = torch.cat([inputs[column] for column in self.columns])
        return found if found.dim() == 1 else found.T


SHAPING = Signal(
    ("chosen_shaping", "rejected_shaping"),
    "teacher_model",
    "add them with `fastpref values`, or give the trainer a teacher_model (or alpha=0)",
)
REWARDS = Signal(
    ("chosen_reward", "rejected_reward"),
    "oracle_model",
    "add them with `fastpref rewards`, or give the trainer an oracle_model",
)
TEACHER_LOGPS = Signal(
    ("teacher_chosen_logps", "teacher_rejected_logps"),
    "teacher_model",
    "add them from your teacher, summed over each response, or give the trainer a teacher_model",
)
REFERENCE = Signal(("ref_chosen_logps", "ref_rejected_logps"))  # which DPOTrainer precomputes


def named_teacher(args: PreferenceConfig, teacher_model: Any) -> Any:
    """The teacher that a trainer was given, or the name of it in the configuration."""
    name = args.teacher_model_name_or_path
    if name is None and teacher_model is None and args.teacher_model_init_kwargs:
        refuse(
            "teacher_model_init_kwargs", "None without a teacher", args.teacher_model_init_kwargs
        )
    if name is not None and teacher_model is not None:
        refuse("teacher_model", f"None beside teacher_model_name_or_path={name!r}", "a teacher")
    return name if teacher_model is None else teacher_model


def signals_of(
    args: PreferenceConfig,
    student: Any,
    models: dict[str, tuple[Any, Any]],
    dataset: Any,
    cached: bool,
) -> tuple[dict[str, Signal], list[Reader]]:
    """What losses read beside the student's own numbers, by the names of their parameters.

    ``models`` are models and tokenizers, by the trainer's arguments; none is loaded where
    ``dataset``, to train on, has its columns. ``cached`` says that columns have what a teacher says
    at every token. The second result are the models that read along in every step.
    """
    sides = sides_of_models(args)
    if cached:
        del sides["teacher_model"]
    signals: dict[str, Signal] = {}
    readers: dict[str, Reader] = {}
    beside: list[str] = []  # what is read for a signal of the teacher's
    if args.reads_implicit_reward() and models["teacher_model"][0] is not None:
        beside = ["teacher_ref_model"]
    for argument, (model, tokenizer) in models.items():
        wanted = {
            name: (signal, ask)
            for name, (signal, ask) in ASK.items()
            if signal.argument == argument and args.reads(name)
        }
        if model is student:
            refuse(argument, "another model than the student", "the student itself")
        if model is None:
            if argument in sides:
                reason = f"at every token, by method {args.method!r}"
                expected = f"a model, which the student is compared with {reason}"
                columns = " (or, for the forward KL, columns of `fastpref kd-cache`)"
                refuse(argument, expected + columns * (argument == "teacher_model"), None)
            if argument in beside:
                before = "a model, the teacher before it was aligned"
                refuse(argument, f"{before}, with potential 'implicit_reward'", None)
            signals |= {name: signal for name, (signal, _) in wanted.items()}
            continue
        if not wanted and argument not in [*sides, *beside]:
            reason = f"the loss reads nothing of it (method={args.method!r}, alpha={args.alpha})"
            refuse(argument, f"None, since {reason}", type(model).__name__)
        for signal, _ in wanted.values():
            if dataset is not None:
                signal.refuse_both(dataset, "train", needed=argument in sides)
        init: Any = args.teacher_model_init_kwargs if argument == "teacher_model" else None
        loaded = load_frozen(argument, model, tokenizer, **(init or {}))
        readers[argument] = Reader(argument, *loaded, sides=sides.get(argument))
        for name, (signal, ask) in wanted.items():
            signals[name] = ask(args, signal, readers, model)
    if models["teacher_model"][0] is None:
        _refuse_options_of_shaping(args)
    return signals, [one for one in readers.values() if one.signals or one.sides]


def _refuse_options_of_shaping(args: PreferenceConfig) -> None:
    """Refuse options of a shaping that no other loss has, where no teacher computes one."""
    others = [OPTIONS[one] for one in args.methods if "shaping" not in inputs_of(one)]
    if len(others) < len(args.methods):
        names = [name for name in OF_SHAPING if not any(name in options for options in others)]
        args.refuse_set(names, "there is no teacher_model that it is for")


def sides_of_models(args: PreferenceConfig) -> dict[str, Sides]:
    """Of which responses the states of each model are read, by the trainer's arguments."""
    found: dict[str, Sides] = {}
    for comparison, sides in comparisons_of(args).items():
        for argument in comparison.models:
            found[argument] = sides.union(found.get(argument, sides))
    return found


Readers = dict[str, Reader]  # by argument: the one that is asked, and those before it


def _ask_for_shaping(args: PreferenceConfig, signal: Signal, readers: Readers, _: Any) -> Signal:
    options = args.shaping_options()
    reader = readers[signal.argument]
    reference = readers["teacher_ref_model"] if args.reads_implicit_reward() else None
    if reference is not None and reference.model is reader.model:
        refuse(reference.argument, "another model than the teacher", "the teacher itself")

    def of_states(states: Tensor, head: Head, labels: Tensor) -> Tensor:
        return teacher_shaping(states, head, labels, **options)

    def compute(dataset: Any, name: str) -> Any:
        if not isinstance(dataset, Dataset):
            advice = "(`fastpref values` adds the columns to the rows of a file)"
            refuse(f"{name}_dataset", f"a Dataset to precompute {advice}", type(dataset).__name__)
        file = Path(args.output_dir) / f"{name}-shaping.parquet"
        sizes = {"max_length": args.max_length, "batch_size": args.per_device_train_batch_size}
        model, tokenizer = reader.model, reader.tokenizer
        models = {} if reference is None else {"reference": reference.model}
        read = [one for one in READ if one in dataset.column_names]
        few = dataset.select_columns(read)  # else a file of another run may have others
        try:
            found = add_shaping(
                few, model, tokenizer, file, **models, **sizes, **options,
                skip_bad_rows=bool(args.skip_bad_rows),
            )  # fmt: skip
        except BadRowsError as error:
            raise ValueError(
                f"{name}_dataset: expected rows that the teacher can read; take the others "
                "out, or set skip_bad_rows=True. " + str(error)
            ) from error
        if skipped := read_settings(file)["skipped_rows"]:
            warnings.warn(
                f"{name}_dataset: {len(skipped)} rows that the teacher cannot read are left out: "
                + ", ".join(map(str, skipped)),
                stacklevel=2,
            )
            dataset = dataset.select(sorted(set(range(len(dataset))) - set(skipped)))
        for column in signal.columns:
            values = found[column][:]
            dataset = dataset.add_column(column, values, feature=found.features[column])
        return dataset

    if args.precompute_shaping:
        if reference is not None:
            tokenizers = reference.tokenizer, reader.tokenizer
            check_same_vocabulary(reference.argument, *tokenizers, whose="teacher")
        return replace(signal, compute=compute)
    if reference is not None:
        return replace(signal, read=reader, join=_log_ratios(options, reader, reference))
    reader.signals["shaping"] = of_states
    return replace(signal, read=reader)


def _log_ratios(
    options: dict[str, Any], reader: Reader, reference: Reader
) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """Ask two models for the parts of their log-ratios; what makes the shaping of them."""
    names = ("shaping_logps", "shaping_ref_logps")
    temperature, beta = options["temperature"], options["beta"]
    of_sum = {name: options[name] for name in ("gamma", "terminal", "form")}

    def of_states(states: Tensor, head: Head, labels: Tensor) -> Tensor:
        targets = labels_of_states(labels, None, IGNORE_INDEX)
        return linear_logps(states, head, targets, temperature=temperature)

    def join(signals: dict[str, Tensor], labels: Tensor) -> Tensor:
        logps, reference_logps = (signals.pop(name).to(labels.device) for name in names)
        values = rewards_so_far(logps - reference_logps, beta)
        return shaping_from_values(values, labels, **of_sum)

    for name, one in zip(names, (reader, reference), strict=True):
        one.signals[name] = of_states
    return join


def _ask_for_logps(_: PreferenceConfig, signal: Signal, readers: Readers, __: Any) -> Signal:
    reader = readers[signal.argument]
    reader.signals["teacher_logps"] = responses_logps
    return replace(signal, read=reader)


def _ask_for_rewards(_: PreferenceConfig, signal: Signal, readers: Readers, oracle: Any) -> Signal:
    reader = readers[signal.argument]
    model = reader.model
    if isinstance(oracle, str):
        load_reward_head(model, oracle)
    reward_head_of(model)

    def of_states(states: Tensor, _: Head, labels: Tensor) -> Tensor:
        return rewards_at_head(model, states, labels)

    reader.signals["oracle_rewards"] = of_states
    return replace(signal, read=reader)


# By the parameter of a loss: the columns that have it, and how to ask a model for it.
ASK: dict[str, tuple[Signal, Callable[[PreferenceConfig, Signal, Readers, Any], Signal]]] = {
    "shaping": (SHAPING, _ask_for_shaping),
    "teacher_logps": (TEACHER_LOGPS, _ask_for_logps),
    "oracle_rewards": (REWARDS, _ask_for_rewards),
}


def responses_logps(states: Tensor, head: Head, labels: Tensor) -> Tensor:
    """(S,) summed log-probabilities of responses, from (S, T + 1, H) states, (S, T) labels."""
    targets = labels_of_states(labels.to(states.device), None, IGNORE_INDEX)
    return sum_responses(linear_logps(states, head, targets), targets).logps


@dataclass
class CollatorWithColumns:
    """TRL's collator, and beside its tensors one float32 tensor per column.

    It is (B,) of numbers, (B, k) of lists, which have one number for each of k models.
    """

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
    """``values`` of a column; refused is one with a row that has no finite number.

    Rows may be lists of such numbers, all as long as the first.
    """
    for row, value in enumerate(values):
        many = value if isinstance(value, list) else [value]
        if not many or not all(is_finite_float32(one) for one in many):
            refuse(column, "a finite number in every row", f"{value!r} (row {row})")
        if _count(value) != _count(values[0]):
            refuse(column, "as many numbers in every row as in the first", f"{value!r} (row {row})")
    return values


def _count(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None


def missing_columns(dataset: Any, columns: Iterable[str]) -> list[str]:
    """Those of ``columns`` that the first row of a dataset lacks."""
    first: dict[str, Any] = next(iter(dataset), {})
    return [column for column in columns if column not in first]


def warn_of_other_lengths(dataset: Any, signal: Signal, max_length: int | None) -> None:
    """Warn where a teacher or oracle read other parts of responses than the student will.

    What `fastpref.teacher` wrote says how long its sequences were; other columns say nothing.
    ``dataset`` has TRL's tokens.
    """
    note = note_of(dataset, signal.columns[0])
    if note is None or note["max_length"] == max_length or not isinstance(dataset, Dataset):
        return
    teachers = note["max_length"]
    limit = min(length for length in (teachers, max_length) if length is not None)
    tokens = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format(None)
    for row in tokens:
        if len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) > limit:
            warnings.warn(
                f"max_length={max_length}, but {' and '.join(signal.columns)} were made with "
                f"max_length={teachers}: the numbers of longer rows are not of the tokens that the "
                "student reads; use the same max_length for both",
                stacklevel=3,
            )
            return
