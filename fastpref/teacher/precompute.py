"""What a teacher says of a whole dataset, as columns: common to everything that is precomputed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastpref.checks import refuse
from fastpref.data.rows import RESPONSES, BadRowsError, read_parquet, read_rows
from fastpref.data.tokens import (
    TokenizedPair,
    check_max_length,
    pad_pairs,
    tokenize_rows,
    tokenizer_settings,
)
from fastpref.models.lm_head import check_head, lm_head_of, run_to_head
from fastpref.ops import Head
from fastpref.ops.head import head_on
from fastpref.teacher.model import model_settings, this_process
from fastpref.teacher.store import (
    FinishedBatches,
    check_settings,
    only_writer,
    read_settings,
    stored,
    write_dataset,
)

if TYPE_CHECKING:
    import datasets

MODULES = ("accelerate", "datasets", "safetensors", "tqdm", "transformers", "trl")
COUNTS = "counts"  # (S,) of each response's tokens, beside results that have one entry per token
BYTES_AT_ONCE = 64 * 2**20  # of columns that are written
ROWS_AT_ONCE = 1000


class Job(NamedTuple):
    """What is precomputed: all that differs between one precompute and another."""

    name: str  # beside the progress bar
    of_batch: Callable[..., dict[str, Tensor]]  # of states, head, labels; and a reference's two
    features: dict[str, Any]  # of the columns, by what follows "chosen_" and "rejected_"
    settings: dict[str, Any]  # which results depend on, beside those of model, tokens and rows
    finite: str  # the result that is finite where the model is
    sides: tuple[str, ...] = RESPONSES  # whose responses are read
    reference: Any = None  # a second model that reads the same tokens


def precompute(
    job: Job,
    dataset: Any,
    model: Any,
    tokenizer: Any,
    output: Path,
    *,
    max_length: int | None,
    batch_size: int,
    skip_bad_rows: bool,
) -> datasets.Dataset:
    """Write a dataset with the columns of a job, or go on where an earlier run was stopped."""
    models = [one for one in (model, job.reference) if one is not None]
    heads = [lm_head_of(one.eval()) for one in models]
    rows = rows_of(dataset)
    state = this_process()
    digest = hashlib.sha256()  # also of columns that nothing here reads: they are written, too
    pairs, bad = tokenize_rows(
        _digested(_shown(rows, state), digest),
        tokenizer,
        max_length=max_length,
        context_length=context_length(models),
    )
    if bad and not skip_bad_rows:
        raise BadRowsError(bad, rows=rows)
    if not pairs:
        refuse("dataset", "at least one preference pair", "none")
    settings: dict[str, Any] = {
        **model_settings(model),
        **tokenizer_settings(tokenizer),
        **job.settings,
        "max_length": max_length,
        "rows_digest": _digest(pairs),
        "skipped_rows": [index for index, _ in bad],
    }
    columns = [f"{side}_{ending}" for side in job.sides for ending in job.features]
    written = {**settings, "columns": columns, "columns_digest": digest.hexdigest()[:16]}
    if output.exists():
        found = load(output, written)
        FinishedBatches.discard(output)
        return found
    finished = FinishedBatches(output)
    with only_writer(output) if state.is_main_process else nullcontext():
        with state.main_process_first():
            finished.start(settings)
        if not output.exists():  # else another run has just finished it
            _compute(job, models, heads, pairs, batch_size, finished, state)
            state.wait_for_everyone()
            if state.is_main_process:
                finished.check()
                _write(job, rows, finished, output, written)
        state.wait_for_everyone()
    return load(output, written)


def _shown(rows: Any, state: Any) -> Iterator[Any]:
    """Rows, under a bar that counts those that have been read."""
    from tqdm import tqdm

    yield from tqdm(rows, desc="tokens", unit="row", disable=not state.is_main_process)


def _digested(rows: Iterable[Any], digest: Any) -> Iterator[Any]:
    """Rows, each of which a digest has been updated with; of what is no text or number the type."""
    for row in rows:
        digest.update(json.dumps(row, default=lambda value: type(value).__name__).encode())
        yield row


def _compute(
    job: Job,
    models: list[Any],
    heads: list[Head],
    pairs: list[TokenizedPair],
    batch_size: int,
    finished: FinishedBatches,
    state: Any,
) -> None:
    """Compute and keep this process's batches of the rows that are not done yet."""
    done = finished.places()
    first = max(finished.numbers(), default=-1) + 1
    state.wait_for_everyone()  # else one may save a batch before another has looked
    batches = plan([pair for pair in pairs if pair.row not in done], batch_size)
    for number in _with_progress(job.name, batches, len(done), state):
        batch = batches[number]
        options: Any = {"check": number < state.num_processes, "sides": len(job.sides)}
        read = [read_states(*one, batch, **options) for one in zip(models, heads, strict=True)]
        states, labels = read[0]
        given = [states, heads[0], labels]
        if job.reference is not None:
            given += [read[1][0].to(states.device), head_on(heads[1], states.device)]
        results = job.of_batch(*given)
        check_finite(results[job.finite], results.get(COUNTS), batch)
        rows = [pair.row for pair in batch]
        finished.save(first + number, rows, {name: stored(one) for name, one in results.items()})


def load(file: Path, expected: Mapping[str, Any]) -> datasets.Dataset:
    """A dataset that `precompute` wrote; refused is one that was made with other settings."""
    check_settings(file, read_settings(file), expected)
    return read_parquet(file)


def check_run(output: Path, max_length: int | None, batch_size: int) -> None:
    """Refuse what would fail only after the model has been loaded."""
    if output.suffix != ".parquet":
        refuse("output", "a file name that ends in .parquet", repr(str(output)))
    folder = next(one for one in output.absolute().parents if one.exists())
    if not output.exists() and not os.access(folder, os.W_OK | os.X_OK):
        refuse("output", "a file in a folder that can be written to", repr(str(output)))
    check_batch_size(batch_size)
    check_max_length(max_length)


def check_batch_size(batch_size: int) -> None:
    """Refuse batches of nothing."""
    if batch_size < 1:
        refuse("batch_size", "a number of rows, at least 1", repr(batch_size))


def context_length(models: list[Any]) -> int | None:
    """The most tokens that all of the models read; None where none of them says."""
    configs = [model.config.get_text_config() for model in models]
    lengths = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((length for length in lengths if length is not None), default=None)


def plan(pairs: list[TokenizedPair], batch_size: int) -> list[list[TokenizedPair]]:
    """Batches of like lengths, the longest first: what does not fit fails at once."""
    ordered = sorted(pairs, key=lambda pair: (-pair.length(), pair.row))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@torch.no_grad()
def read_states(
    model: Any, head: Head, batch: list[TokenizedPair], *, check: bool, sides: int = 2
) -> tuple[Tensor, Tensor]:
    """What the teacher's head reads (S, T + 1, H), and labels (S, T), on the head's device.

    S is B chosen responses, and as many rejected ones where there are two ``sides``.
    """
    tokens, attention, labels = (one[: sides * len(batch)] for one in pad_pairs(batch))
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # off-loaded: its hooks move what it reads
        device = torch.device("cpu")
    states, outputs = run_to_head(
        model, model, input_ids=tokens.to(device), attention_mask=attention.to(device)
    )
    if check:
        check_head(head, states, outputs.logits)
    return states.to(head.weight.device), labels.to(head.weight.device)


def check_finite(values: Tensor, counts: Tensor | None, batch: list[TokenizedPair]) -> None:
    """Refuse numbers of responses, or with ``counts`` of their tokens, that are not finite.

    Of several numbers of a token the first says it.
    """
    wrong = ~values.reshape(len(values), -1)[:, 0].isfinite()
    if not bool(wrong.any()):
        return
    pairs = torch.arange(len(values) if counts is None else len(counts)) % len(batch)
    if len(pairs) != len(values):
        assert counts is not None
        pairs = pairs.repeat_interleave(counts.cpu())
    rows = sorted({batch[pair].row for pair in pairs[wrong.cpu()].tolist()})
    raise ValueError(
        f"model: expected finite values, got NaN or infinity for rows {rows}; "
        "float16 may overflow where bfloat16 or float32 do not"
    )


def rows_of(dataset: Any) -> Any:
    """A dataset as it is, anything else as a list of rows."""
    if isinstance(dataset, str | Path):
        dataset = read_rows(str(dataset))
    if isinstance(dataset, Mapping):
        refuse("dataset", "rows, or one split of a dataset", f"a {type(dataset).__name__}")
    return dataset if hasattr(dataset, "select") else list(dataset)


def _with_progress(
    name: str, batches: list[list[TokenizedPair]], done: int, state: Any
) -> Iterator[int]:
    """The numbers of this process's batches, under a bar that counts all pairs."""
    from tqdm import tqdm

    total = done + sum(map(len, batches))
    main = state.is_main_process
    with tqdm(total=total, initial=done, desc=name, unit="pair", disable=not main) as bar:
        for step in range(0, len(batches), state.num_processes):
            number = step + state.process_index
            if number < len(batches):
                yield number
            # The others' batches are of like lengths, and about as far.
            bar.update(sum(map(len, batches[step : step + state.num_processes])))


def _write(
    job: Job, rows: Any, finished: FinishedBatches, output: Path, settings: dict[str, Any]
) -> None:
    """Write the rows of all batches in their first order, with the columns that were computed.

    The columns need not fit into memory: some rows at a time are read and written.
    """
    import datasets

    places = finished.places()
    kept = sorted(places)
    dataset = (
        rows.select(kept)
        if hasattr(rows, "select")
        else datasets.Dataset.from_list([rows[index] for index in kept])
    )

    def columns(chosen: range) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for index in chosen:
            place = places[kept[index]]
            with finished.open(place.batch) as results:
                for side, name in enumerate(job.sides):
                    response = place.position + side * place.pairs
                    for ending, feature in job.features.items():
                        per_token = isinstance(feature, datasets.List)
                        value = _of_response(results, ending, response, per_token)
                        found.setdefault(f"{name}_{ending}", []).append(value)
        return found

    step = BYTES_AT_ONCE // finished.bytes_per_pair(places)
    features = {f"{name}_{ending}": job.features[ending] for name in job.sides
                for ending in job.features}  # fmt: skip
    write_dataset(
        dataset, columns, features, output, settings, finished.folder,
        step=min(max(step, 1), ROWS_AT_ONCE),
    )  # fmt: skip


def _of_response(results: Any, ending: str, response: int, per_token: bool) -> Tensor:
    """One response's part of a result: its entry, or those of its tokens."""
    start, count = response, 1
    if per_token:
        counts = results.get_tensor(COUNTS)
        start, count = int(counts[:response].sum()), int(counts[response])
    part: Tensor = results.get_slice(ending)[start : start + count]
    return part if per_token else part.squeeze(0)


def _digest(pairs: list[TokenizedPair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for part in pair[1:]:
            digest.update(len(part).to_bytes(4, "little") + part.tobytes())
    return digest.hexdigest()[:16]
