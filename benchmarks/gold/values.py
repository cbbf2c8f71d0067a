"""When is a teacher's logsumexp a value? Teachers by many objectives in worlds of known values.

python benchmarks/gold/values.py --quick  # a first look
python benchmarks/gold/values.py

Every finished world is written at once: a study that was stopped resumes where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from models import Decoder, measure
from rich.console import Console
from rich.progress import Progress
from runs import JUDGED, check_settings, write
from settings import Settings, generator_of
from shared import describe_run, write_json
from tables import FIRST_SIZE, QUICK_SIZES, SIZES
from torch import Tensor
from value_metrics import (
    centred,
    correlation,
    readable,
    share_explained,
    share_ranked,
)
from value_teachers import OF_READER, TEACHERS, Reads, read, train_teachers
from values_show import plot, print_report
from world import World, sample_pairs

from fastpref import linear_logsumexp, shaping_from_values

HERE = Path(__file__).resolve().parent
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Judged:
    """What numbers of states are worth as values, on fresh responses of the behaviour."""

    behaviour_correlation: float  # with the soft values at the behaviour's temperature
    dpo_correlation: float  # with the values of what DPO with these labels converges to
    std: float  # at one position, pooled
    of_state: float  # share of the variance that the automaton's state explains, from t = 1 on
    of_token: float  # the same of the last token
    bootstrap_ranking: float  # share of pairs that V(s_T) - V(s_0) ranks as the true rewards do
    next_value_ranking: float  # the same by the sum of V(s_1) to V(s_{T-1})


@dataclass(frozen=True)
class Teacher:
    """One teacher of one world."""

    name: str
    judged: Judged  # its logsumexp, in logits
    readable: float  # correlation of a linear regression from its hidden states, of the behaviour's
    confidence_correlation: float  # of its logsumexp with the entropy of its next token, negated
    true_return: float
    return_error: float  # standard error
    kl: float  # from the SFT teacher, nats per response


@dataclass(frozen=True)
class Study:
    """All teachers of a world that read the same."""

    world: int
    reads: Reads
    behaviour_return: float
    uniform_return: float  # of tokens drawn uniformly
    exact: Judged  # the true values themselves, over the temperature
    teachers: list[Teacher]
    seconds: float  # of one core


@app.command()
def main(
    worlds: Annotated[int | None, typer.Option(min=1, help="How many: 5, or 2 if quick.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: teachers with a quarter of the training.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Where finished worlds are kept, one JSON file each.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="The results; the plot goes beside it as .png."),
    ] = None,
) -> None:
    """Train and measure what is missing, then print a table, write JSON and a plot."""
    kind = "values-quick" if quick else "values"
    folder = folder or HERE / "outputs" / kind
    study(
        (QUICK_SIZES if quick else SIZES)[FIRST_SIZE],
        worlds or (2 if quick else 5),
        folder,
        output or (folder if quick else HERE / "results") / f"{kind}.json",
    )


def study(settings: Settings, worlds: int, folder: Path, output: Path) -> None:
    """Everything after the command line."""
    torch.set_num_threads(1)  # small models are slower on many
    console = Console()
    check_settings(folder, settings)
    files = []
    with Progress(console=console) as progress:
        task = progress.add_task("teachers", total=worlds * sum(map(len, OF_READER.values())))
        for reads, number in product(OF_READER, range(worlds)):
            files.append(folder / f"{reads}-{number}.json")
            if files[-1].exists():
                progress.advance(task, len(OF_READER[reads]))
            else:
                found = study_world(number, settings, reads, lambda: progress.advance(task))
                write(files[-1], found)
    rows = [Study(**json.loads(file.read_text("utf-8"))) for file in files]
    report = describe_run() | {
        "settings": asdict(settings),
        "teachers": {name: asdict(recipe) for name, recipe in TEACHERS.items()},
        "minutes_of_one_core": sum(row.seconds for row in rows) / 60,
    }
    write_json(output, report, rows)
    print_report(console, output)
    plot(output, output.with_suffix(".png"))
    console.print(f"Wrote {output} and {output.with_suffix('.png')}", soft_wrap=True)


def study_world(
    number: int, settings: Settings, reads: Reads, advance: Callable[[], None]
) -> Study:
    """Train and judge the teachers of a world; ``advance`` is called after each."""
    began, world = time.process_time(), settings.world(number)
    pairs = sample_pairs(world, settings.teacher_pairs, generator_of(number, 0))
    sequences = torch.cat(sample_pairs(world, JUDGED, generator_of(number, 8)))
    models: dict[str, Decoder] = {}
    teachers = []
    for name, model in train_teachers(world, number, settings, reads, pairs):
        models[name] = model
        teachers.append(judge_teacher(world, number, settings, sequences, name, models))
        advance()
    values = world.soft_values(world.temperature)
    places = world.states(sequences)[:, world.prompt_length :]
    exact = values[torch.arange(world.length + 1), places] / world.temperature
    behaviour = world.behaviour()
    uniform = torch.full_like(behaviour, 1 / behaviour.shape[-1])
    return Study(
        number,
        reads,
        world.mean_at_start(world.policy_values(behaviour)),
        world.mean_at_start(world.policy_values(uniform)),
        judge(exact, world, sequences, settings),
        teachers,
        time.process_time() - began,
    )


@torch.no_grad()
def judge_teacher(
    world: World,
    number: int,
    settings: Settings,
    sequences: Tensor,  # (2B, P + T) fresh responses, pairs as everywhere
    name: str,
    models: dict[str, Decoder],  # the teacher and the SFT teacher, by name
) -> Teacher:
    """Everything that the table says of one teacher."""
    model = models[name]
    found = read(model, sequences, world.prompt_length)
    values = linear_logsumexp(found.hidden, model.head()).double()
    truths = true_values(world, sequences, world.soft_values(world.temperature))
    measured = measure(
        world,
        model,
        models["SFT"],
        samples=settings.samples,
        generator=generator_of(number, 7),
    )
    return Teacher(
        name,
        judge(values, world, sequences, settings),
        readable(found.hidden[:, :-1].double(), truths),
        correlation(values[:, :-1], -found.entropy.double()),
        measured.true_return,
        measured.return_error,
        measured.kl,
    )


def judge(values: Tensor, world: World, sequences: Tensor, settings: Settings) -> Judged:
    """Compare numbers (2B, T + 1) of the states of responses with their true values."""
    # Labels are Bradley-Terry's of returns over the temperature: DPO's optimum is the behaviour
    # times exp(return / (beta * temperature)), which is soft-optimal with that prior.
    tilted = world.soft_values(settings.teacher_beta * world.temperature, world.behaviour())
    tokens, guesses = sequences[:, world.prompt_length :], values[:, :-1]
    states = world.states(sequences)[:, world.prompt_length : -1]
    returns = world.returns(sequences)
    next_values = shaping_from_values(values, tokens, terminal="zero", form="next_value")
    return Judged(
        correlation(guesses, true_values(world, sequences, world.soft_values(world.temperature))),
        correlation(guesses, true_values(world, sequences, tilted)),
        centred(guesses).square().mean().sqrt().item(),
        # Each prompt leads to one state, so that any function of prompts would seem to know it.
        share_explained(guesses[:, 1:], states[:, 1:]),
        share_explained(guesses[:, 1:], tokens[:, :-1]),
        share_ranked(shaping_from_values(values, tokens), returns),
        share_ranked(next_values, returns),
    )


def true_values(world: World, sequences: Tensor, values: Tensor) -> Tensor:
    """Values (T + 1, S) of the states before each token of responses: (n, T)."""
    states = world.states(sequences)[:, world.prompt_length : -1]
    return values[torch.arange(world.length), states]


if __name__ == "__main__":
    app()
