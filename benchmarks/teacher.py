"""What a teacher's values cost over a dataset, whether they are right, and what they tell."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args

import pyarrow.parquet
import torch
import typer
from inputs import SHIPPED_PAIRS, InputError, shipped_model
from report import describe_run, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from fastpref import Head
from fastpref.data.tokens import TokenIds, TokenizedPair, tokenize_rows
from fastpref.teacher import (
    action_rewards,
    add_shaping,
    load_teacher,
    precompute,
    read_rows,
    shaping_columns,
    teacher_shaping,
)
from fastpref.teacher.actions import ActionReward
from fastpref.teacher.shaping import POTENTIALS

RESULTS = Path(__file__).with_name("results")
SIDES = ("chosen", "rejected")


@dataclass
class Ranking:
    """How a reward ranks the responses of all pairs."""

    reward: str
    margin_accuracy: float  # share of pairs whose chosen response has the larger sum
    standard_error: float
    mean_margin: float
    median_margin: float


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[
        str | None, typer.Option(help="The teacher. By default SmolLM2-135M-Instruct.")
    ] = None,
    pairs: Annotated[
        Path, typer.Option(help="Preference pairs: JSON lines or Parquet.")
    ] = SHIPPED_PAIRS,
    compare: Annotated[
        int, typer.Option(min=1, help="Hold at most so many pairs to full logits.")
    ] = 1_000_000,
    output: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
) -> None:
    """Precompute values for all pairs, then hold them to full logits, one sequence at a time."""
    name = "SmolLM2-135M-Instruct" if model is None else Path(model).name
    teacher, tokenizer = load_teacher(str(shipped_model()) if model is None else model)
    rows = list(read_rows(str(pairs)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.parquet"
        cost, found, rewards = precompute_and_measure(rows, teacher, tokenizer, file)
    tokenized, _ = tokenize_rows(rows, tokenizer, max_length=None, context_length=None)
    compared = tokenized[:: max(1, -(-len(tokenized) // compare))]
    naive = torch.tensor(shaping_from_full_logits(teacher, compared))  # (compared pairs, 2)
    got = torch.tensor(
        [[found[pair.row][f"{side}_shaping"] for side in SIDES] for pair in compared]
    )
    report: dict[str, Any] = {
        **describe_run(),
        "model": name,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "pairs": len(tokenized),
        "tokens": sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in tokenized),
        **cost,
        "compared_pairs": len(compared),
        "largest_difference_from_full_logits": float((got - naive).abs().max()),
        "largest_shaping": float(naive.abs().max()),
    }
    ranking = [rank(name, torch.cat(sums)) for name, sums in rewards.items()]
    show(report, ranking)
    path = output or RESULTS / f"teacher-{'cpu' if teacher.device.type == 'cpu' else 'cuda'}.json"
    write_json(path, report, ranking)
    Console().print(f"Wrote {path}", soft_wrap=True)


def precompute_and_measure(
    rows: list[Any], model: Any, tokenizer: Any, file: Path
) -> tuple[dict[str, float], Any, dict[str, list[Tensor]]]:
    """Run `add_shaping` as anyone would; its cost, its dataset, and all of table 5's rewards.

    The rewards (pairs, 2) come from the same hidden states, outside the time.
    """
    rewards: dict[str, list[Tensor]] = {}
    besides: list[float] = []

    def note_rewards(states: Tensor, head: Head, labels: Tensor, *_: Any, **__: Any) -> None:
        began = time.perf_counter()
        for name, sums in table_5(states, head, labels).items():
            rewards.setdefault(name, []).append(sums.view(2, -1).T.cpu())
        besides.append(time.perf_counter() - began)

    with (
        timed(precompute, "read_states") as body,
        timed(shaping_columns, "shape_batch", then=note_rewards) as head,
    ):
        began = time.perf_counter()
        found = add_shaping(rows, model, tokenizer, file)
        seconds = time.perf_counter() - began - sum(besides)
    columns = pyarrow.parquet.ParquetFile(file).metadata
    added = sum(
        column.total_compressed_size
        for group in range(columns.num_row_groups)
        for column in map(columns.row_group(group).column, range(columns.num_columns))
        if column.path_in_schema.endswith("_shaping")
    )
    cost = {
        "seconds": seconds,
        "model_seconds": sum(body),
        "head_seconds": sum(head),
        "head_share": sum(head) / seconds,
        "bytes_a_response": added / (2 * len(found)),
    }
    return cost, found, rewards


@contextmanager
def timed(
    module: ModuleType, function: str, then: Callable[..., None] | None = None
) -> Iterator[list[float]]:
    """Note how long each call of a step of the precompute takes; ``then`` gets its arguments."""
    step: Callable[..., Any] = getattr(module, function)
    seconds: list[float] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = step(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if then is not None:
            then(*args, **kwargs)
        return result

    setattr(module, function, noting)
    try:
        yield seconds
    finally:
        setattr(module, function, step)


def table_5(states: Tensor, head: Head, labels: Tensor) -> dict[str, Tensor]:
    """The sum (2B,) of each potential's shaping and of each action-dependent reward."""
    return {name: teacher_shaping(states, head, labels, potential=name) for name in POTENTIALS} | {
        name: action_rewards(states, head, labels, reward=name) for name in get_args(ActionReward)
    }


@torch.no_grad()
def shaping_from_full_logits(model: Any, pairs: list[TokenizedPair]) -> list[list[float]]:
    """The shaping of both responses the naive way, one sequence at a time."""

    def shaping(prompt: TokenIds, response: TokenIds) -> float:
        tokens = torch.tensor([[*prompt.tolist(), *response.tolist()]], device=model.device)
        logits = model(input_ids=tokens).logits[0]
        before, after = torch.logsumexp(logits[[len(prompt) - 1, -1]].double(), -1)
        return float(after - before)

    return [
        [shaping(pair.prompt, pair.chosen), shaping(pair.prompt, pair.rejected)]
        for pair in tqdm(pairs, desc="full logits", unit="pair")
    ]


def rank(name: str, sums: Tensor) -> Ranking:
    """Compare a reward's sums over chosen and rejected responses, (pairs, 2)."""
    margins = sums[:, 0] - sums[:, 1]
    accuracy = float((margins > 0).double().mean())
    error = (accuracy * (1 - accuracy) / len(margins)) ** 0.5
    return Ranking(name, accuracy, error, float(margins.mean()), float(margins.median()))


def show(report: dict[str, Any], ranking: list[Ranking]) -> None:
    """Print what was found."""
    console = Console()
    console.print(
        f"{report['model']}, {report['dtype']}: {report['pairs']} pairs, {report['tokens']} tokens "
        f"in {report['seconds']:.1f} s, of which the model {report['model_seconds']:.1f} s and the "
        f"head {report['head_seconds']:.2f} s ({report['head_share']:.1%}).\n"
        f"{report['bytes_a_response']:.1f} bytes a response. Largest difference from full logits "
        f"over {report['compared_pairs']} pairs "
        f"{report['largest_difference_from_full_logits']:.1e}, of shapings up to "
        f"{report['largest_shaping']:.1f}."
    )
    table = Table("reward", "chosen above rejected", "mean margin", "median margin")
    for row in ranking:
        table.add_row(
            row.reward,
            f"{row.margin_accuracy:.1%} ± {row.standard_error:.1%}",
            f"{row.mean_margin:.3g}",
            f"{row.median_margin:.3g}",
        )
    console.print(table)


if __name__ == "__main__":
    try:
        app()
    except (InputError, ValueError) as error:
        sys.exit(f"error: {error}")
