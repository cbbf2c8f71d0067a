"""The teacher's signal for a whole dataset: one number per response."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from fastpref.checks import check_choice, check_number, refuse
from fastpref.data.rows import BadRowsError, read_rows
from fastpref.data.tokens import (
    IGNORE_INDEX,
    TokenizedPair,
    check_max_length,
    pad_pairs,
    tokenize_rows,
    tokenizer_settings,
)
from fastpref.extras import require_extra
from fastpref.models.lm_head import check_head, lm_head_of, run_to_head
from fastpref.ops import Head
from fastpref.sequences import labels_of_states
from fastpref.teacher.model import model_settings, this_process
from fastpref.teacher.shaping import (
    Form,
    Potential,
    Terminal,
    check_signal,
    shaping_from_values,
    state_potentials,
    teacher_shaping,
)
from fastpref.teacher.store import (
    FinishedBatches,
    check_settings,
    read_settings,
    shaping_feature,
    to_float32,
    write_dataset,
)

if TYPE_CHECKING:
    import datasets


class ShapingOptions(NamedTuple):
    """What the shaping of a response is; see `fastpref.teacher_shaping`."""

    potential: Potential = "value"
    temperature: float = 1.0
    gamma: float = 1.0
    terminal: Terminal = "bootstrap"
    form: Form = "difference"


def add_shaping(
    dataset: datasets.Dataset | Iterable[Mapping[str, Any]] | str | Path,
    model: Any,
    tokenizer: Any,
    output: str | Path,
    *,
    potential: Potential = "value",
    temperature: float = 1.0,
    gamma: float = 1.0,
    terminal: Terminal = "bootstrap",
    form: Form = "difference",
    per_token: bool = False,
    max_length: int | None = None,
    batch_size: int = 8,
    skip_bad_rows: bool = False,
) -> datasets.Dataset:
    r"""Add a teacher's shaping to every row of a preference dataset.

    .. math:: \Psi(y) = \sum_t \gamma \phi(s_{t+1}) - \phi(s_t)

    TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025). Telescoping makes it one number
    per response. It belongs to the *teacher's* tokens: the student may have another tokenizer and
    template. A precompute that was killed goes on where it stopped and ends in the same numbers.
    Under ``torchrun`` or ``accelerate launch`` the processes share the batches.

    Args:
        dataset: Preference pairs in TRL's standard or conversational format, with a ``prompt``
            or with one that ``chosen`` and ``rejected`` repeat: a dataset, an iterable of rows, a
            JSON-lines or Parquet file, or a name on the Hub, whose split "train" is read.
        model: The teacher, a causal language model of transformers, on its device; left in
            evaluation mode.
        tokenizer: The teacher's own tokenizer, whose chat template is applied as TRL's
            ``DPOTrainer`` does.
        output: The Parquet file to write. ``<output>.partial`` beside it keeps what is done.
        potential: As in `fastpref.teacher_shaping`, and so the next four.
        temperature: In the unit of the logits.
        gamma: Discount.
        terminal: The potential after the last token.
        form: Of the sum.
        per_token: Also add the potential of every state of a response.
        max_length: Cut sequences after so many of the teacher's tokens, as TRL's ``max_length``.
        batch_size: Pairs per batch. Another batch size may round other last digits.
        skip_bad_rows: Leave rows out that cannot be used, instead of refusing them all.

    Returns:
        The dataset with columns ``chosen_shaping`` and ``rejected_shaping``, float32 in the unit of
        the potential, and with ``per_token`` ``chosen_values`` and ``rejected_values``, lists of
        (T + 1) float32.

    Raises:
        ValueError: Rows that cannot be used, by their index; a model whose head fastpref does not
            know; an output that was made with other settings; a setting out of range.
        ImportError: Without the extra "teacher".

    Example:
        >>> from fastpref.teacher import add_shaping, load_teacher
        >>> def precompute(name, pairs):
        ...     model, tokenizer = load_teacher(name)
        ...     return add_shaping(pairs, model, tokenizer, "pairs-with-values.parquet")
    """
    options = ShapingOptions(potential, temperature, gamma, terminal, form)
    output = Path(output)
    check_arguments(output, options, max_length, batch_size)
    require_extra(
        "teacher",
        "fastpref.teacher.add_shaping",
        *("accelerate", "datasets", "safetensors", "tqdm", "transformers", "trl"),
    )
    head = lm_head_of(model)
    model.eval()
    rows = _rows_of(dataset)
    context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    pairs, bad = tokenize_rows(
        rows, tokenizer, max_length=max_length, context_length=context_length
    )
    if bad and not skip_bad_rows:
        raise BadRowsError(bad)
    if not pairs:
        refuse("dataset", "at least one preference pair", "none")
    settings: dict[str, Any] = {
        **model_settings(model),
        **tokenizer_settings(tokenizer),
        **options._asdict(),
        "per_token": per_token,
        "max_length": max_length,
        "batch_size": batch_size,
        "rows_digest": _digest(pairs),
        "skipped_rows": [index for index, _ in bad],
    }
    state = this_process()
    if output.exists():
        found = load_shaping(output, **settings)
        FinishedBatches.discard(output)
        return found
    finished = FinishedBatches(output, settings)
    batches = plan(pairs, batch_size)
    for number, batch in _with_progress(batches, finished, state):
        states, labels = read_states(model, head, batch, check=number < state.num_processes)
        results = shape_batch(states, head, labels, options, per_token=per_token)
        _check_finite(results["shaping"], batch)
        finished.save(number, {name: to_float32(values) for name, values in results.items()})
    state.wait_for_everyone()
    if state.is_main_process:
        found = _add_columns(rows, batches, finished, per_token, max_length)
        write_dataset(found, output, settings, finished.folder)
        FinishedBatches.discard(output)
    state.wait_for_everyone()
    return load_shaping(output)


def load_shaping(file: str | Path, **expected: Any) -> datasets.Dataset:
    """Load a dataset that `add_shaping` or ``fastpref values`` wrote, and hold it to its settings.

    Args:
        file: The Parquet file.
        **expected: Settings that it must have been made with: ``model``, ``tokenizer``,
            ``chat_template``, ``dtype``, ``potential``, ``temperature``, ``gamma``, ``terminal``,
            ``form``, ``max_length``, ``batch_size`` and the others in the file.

    Returns:
        The dataset; see `add_shaping`.

    Raises:
        ValueError: A file that was made with other settings, or not by fastpref.
        ImportError: Without the extra "teacher".

    Example:
        >>> def load():
        ...     return load_shaping("pairs-with-values.parquet", potential="value", gamma=1.0)
    """
    require_extra("teacher", "fastpref.teacher.load_shaping", "datasets")
    import datasets

    file = Path(file)
    check_settings(file, read_settings(file), expected)
    return datasets.Dataset.from_parquet(str(file))


def check_arguments(
    output: Path, options: ShapingOptions, max_length: int | None, batch_size: int
) -> None:
    """Refuse what would fail only after the model has been loaded."""
    if output.suffix != ".parquet":
        refuse("output", "a file name that ends in .parquet", repr(str(output)))
    if batch_size < 1:
        refuse("batch_size", "a number of pairs, at least 1", repr(batch_size))
    check_max_length(max_length)
    check_choice("potential", options.potential, get_args(Potential))
    check_choice("terminal", options.terminal, get_args(Terminal))
    check_choice("form", options.form, get_args(Form))
    check_number("temperature", options.temperature, above=0)
    check_number("gamma", options.gamma, at_least=0)
    check_signal(options.terminal, options.form, options.gamma)


def plan(pairs: list[TokenizedPair], batch_size: int) -> list[list[TokenizedPair]]:
    """Batches of like lengths, the longest first: what does not fit fails at once."""
    ordered = sorted(pairs, key=lambda pair: (-pair.length(), pair.row))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@torch.no_grad()
def read_states(
    model: Any, head: Head, batch: list[TokenizedPair], *, check: bool
) -> tuple[Tensor, Tensor]:
    """What the teacher's head reads (2B, T + 1, H), and labels (2B, T), on the head's device."""
    tokens, attention, labels = pad_pairs(batch)
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # off-loaded: its hooks move what it reads
        device = torch.device("cpu")
    states, outputs = run_to_head(
        model, model, input_ids=tokens.to(device), attention_mask=attention.to(device)
    )
    if check:
        check_head(head, states, outputs.logits)
    return states.to(head.weight.device), labels.to(head.weight.device)


@torch.no_grad()
def shape_batch(
    states: Tensor,  # (2B, T + 1, H)
    head: Head,
    labels: Tensor,  # (2B, T)
    options: ShapingOptions,
    *,
    per_token: bool,
) -> dict[str, Tensor]:
    """``shaping`` (2B,), and with ``per_token`` ``values`` (n,) of all responses' states, flat."""
    if not per_token:
        shaping = teacher_shaping(
            states,
            head,
            labels,
            **options._asdict(),
        )
        return {"shaping": shaping}
    # A state belongs to a response where it predicts a token of it, or follows the last one.
    predicts = labels_of_states(labels, None, IGNORE_INDEX) != IGNORE_INDEX
    in_response = predicts | predicts.roll(1, dims=1)
    values = state_potentials(
        states,
        head,
        torch.where(in_response, 0, IGNORE_INDEX),
        potential=options.potential,
        temperature=options.temperature,
        ignore_index=IGNORE_INDEX,
    )
    shaping = shaping_from_values(
        values, labels, gamma=options.gamma, terminal=options.terminal, form=options.form
    )
    return {"shaping": shaping, "values": values[in_response], "counts": in_response.sum(1)}


def _check_finite(shaping: Tensor, batch: list[TokenizedPair]) -> None:
    wrong = ~shaping.isfinite().view(2, -1).all(0)
    if bool(wrong.any()):
        numbers = [
            pair.row for pair, is_wrong in zip(batch, wrong.tolist(), strict=True) if is_wrong
        ]
        raise ValueError(
            f"model: expected finite values, got NaN or infinity for rows {numbers}; "
            "float16 may overflow where bfloat16 or float32 do not"
        )


def _rows_of(dataset: Any) -> Any:
    """A dataset as it is, anything else as a list of rows."""
    if isinstance(dataset, str | Path):
        dataset = read_rows(str(dataset))
    if isinstance(dataset, Mapping):
        refuse("dataset", "rows, or one split of a dataset", f"a {type(dataset).__name__}")
    return dataset if hasattr(dataset, "select") else list(dataset)


def _with_progress(
    batches: list[list[TokenizedPair]], finished: FinishedBatches, state: Any
) -> Iterator[tuple[int, list[TokenizedPair]]]:
    """This process's batches that are not done yet, under a bar that counts pairs."""
    from tqdm import tqdm

    mine = range(state.process_index, len(batches), state.num_processes)
    done = sum(len(batches[number]) for number in mine if finished.has(number))
    bar = tqdm(
        total=sum(len(batches[number]) for number in mine),
        initial=done,
        desc="teacher values",
        unit="pair",
        disable=not state.is_main_process,
    )
    with bar:
        for number in mine:
            if not finished.has(number):
                yield number, batches[number]
                bar.update(len(batches[number]))


def _add_columns(
    rows: Any,
    batches: list[list[TokenizedPair]],
    finished: FinishedBatches,
    per_token: bool,
    max_length: int | None,
) -> datasets.Dataset:
    """The rows of all batches in their first order, with the columns that were computed."""
    import datasets

    found: dict[int, dict[str, Any]] = {}
    for number, batch in enumerate(batches):
        results = finished.load(number)
        shaping = results["shaping"].tolist()
        values: list[list[float]] = []
        if per_token:
            counts = results["counts"].int().tolist()
            values = [part.tolist() for part in torch.split(results["values"], counts)]
        for position, pair in enumerate(batch):
            found[pair.row] = new = {}
            for side, at in (("chosen", position), ("rejected", position + len(batch))):
                new[f"{side}_shaping"] = shaping[at]
                if per_token:
                    new[f"{side}_values"] = values[at]
    kept = sorted(found)
    dataset = (
        rows.select(kept)
        if hasattr(rows, "select")
        else datasets.Dataset.from_list([rows[index] for index in kept])
    )
    for column in found[kept[0]]:
        is_shaping = column.endswith("_shaping")
        values_feature = datasets.List(datasets.Value("float32"))
        feature = shaping_feature(max_length) if is_shaping else values_feature
        numbers = [found[index][column] for index in kept]
        if column in dataset.column_names:
            dataset = dataset.remove_columns(column)
        dataset = dataset.add_column(column, numbers, feature=feature)
    return dataset


def _digest(pairs: list[TokenizedPair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for part in pair[1:]:
            digest.update(len(part).to_bytes(4, "little") + part.tobytes())
    return digest.hexdigest()[:16]
