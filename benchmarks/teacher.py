"""What a teacher's values cost over a dataset, whether they are right, and what they tell."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet
import torch
import typer
from inputs import SHIPPED_PAIRS, InputError, shipped_model
from report import describe_run, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from fastpref.integrations.transformers import head_states, lm_head_of
from fastpref.ops import linear_stats
from fastpref.teacher import add_shaping, load_teacher, precompute, read_rows
from fastpref.teacher.actions import ACTION_REWARDS
from fastpref.teacher.shaping import POTENTIALS
from fastpref.teacher.tokens import IGNORE_INDEX, TokenizedPair, pad_pairs, tokenize_rows

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
    output: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
) -> None:
    """Precompute values for all pairs, then hold them to full logits, one sequence at a time."""
    name = "SmolLM2-135M-Instruct" if model is None else Path(model).name
    teacher, tokenizer = load_teacher(str(shipped_model()) if model is None else model)
    rows = list(read_rows(str(pairs)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.parquet"
        cost, found = precompute_and_measure(rows, teacher, tokenizer, file)
    tokenized, _ = tokenize_rows(rows, tokenizer, max_length=None, context_length=None)
    naive, rewards = read_one_by_one(teacher, tokenized)
    wanted = torch.tensor(naive)  # (pairs, 2)
    got = torch.tensor([[row[f"{side}_shaping"] for side in SIDES] for row in found])
    report: dict[str, Any] = {
        **describe_run(),
        "model": name,
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "pairs": len(tokenized),
        "tokens": sum(int(pad_pairs([pair])[1].sum()) for pair in tokenized),
        **cost,
        "largest_difference_from_full_logits": float((got - wanted).abs().max()),
        "largest_shaping": float(wanted.abs().max()),
    }
    ranking = [rank(name, torch.tensor(sums)) for name, sums in rewards.items()]
    show(report, ranking)
    path = output or RESULTS / f"teacher-{'cpu' if teacher.device.type == 'cpu' else 'cuda'}.json"
    write_json(path, report, ranking)
    Console().print(f"Wrote {path}", soft_wrap=True)


def precompute_and_measure(
    rows: list[Any], model: Any, tokenizer: Any, file: Path
) -> tuple[dict[str, float], Any]:
    """Run `add_shaping` as anyone would; seconds of its parts and bytes of its columns."""
    with timed("read_states") as body, timed("shape_batch") as head:
        began = time.perf_counter()
        found = add_shaping(rows, model, tokenizer, file)
        seconds = time.perf_counter() - began
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
    return cost, found


@contextmanager
def timed(function: str) -> Iterator[list[float]]:
    """Note how long each call of a step of the precompute takes."""
    step: Callable[..., Any] = getattr(precompute, function)
    seconds: list[float] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = step(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return result

    setattr(precompute, function, noting)
    try:
        yield seconds
    finally:
        setattr(precompute, function, step)


@torch.no_grad()
def read_one_by_one(
    model: Any, pairs: list[TokenizedPair]
) -> tuple[list[list[float]], dict[str, list[list[float]]]]:
    """From full logits in float64 the shaping, and every reward of table 5: (pairs, 2) each."""
    head = lm_head_of(model)
    naive: list[list[float]] = []
    rewards: dict[str, list[list[float]]] = {}
    for pair in tqdm(pairs, desc="full logits", unit="pair"):
        naive.append([])
        for name in (*POTENTIALS, *ACTION_REWARDS):
            rewards.setdefault(name, []).append([])
        for response in (pair.chosen, pair.rejected):
            # A pair of the same response twice: one sequence by itself, without padding.
            alone = pair._replace(chosen=response, rejected=response)
            tokens, _, labels = (part[:1].to(model.device) for part in pad_pairs([alone]))
            states, _ = head_states(model, input_ids=tokens)
            values = torch.logsumexp(model.get_output_embeddings()(states).double(), -1)
            predicting = torch.nonzero(labels[0] != IGNORE_INDEX).squeeze(1)
            first, last = predicting[0], predicting[-1] + 1
            naive[-1].append(float(values[0, last] - values[0, first]))

            found = linear_stats(
                states[:, first : last + 1],
                head.weight,
                # No label after the last token, whose state counts all the same: any will do.
                torch.nn.functional.pad(labels[:, first:last], (0, 1)),
                stats=(*POTENTIALS.values(), *ACTION_REWARDS.values()),
                bias=head.bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
            )
            for name, statistic in POTENTIALS.items():
                rewards[name][-1].append(float(found[statistic][0, -1] - found[statistic][0, 0]))
            for name, statistic in ACTION_REWARDS.items():
                rewards[name][-1].append(float(found[statistic][0, :-1].sum()))
    return naive, rewards


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
