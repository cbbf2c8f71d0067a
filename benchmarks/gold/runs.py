"""The runs of one world, each in a JSON file of its own: what is there is not done again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from methods import Method
from models import Decoder, labels_of, measure, responses_of
from settings import Settings, generator_of
from signals import Networks, ranking, signals_of, value_correlation
from torch import Tensor
from train import new_networks, student_data, train_networks, train_student
from world import World, sample_pairs

from fastpref import sequence_rewards

TEMPERATURES = (100.0, 30.0, 20.0, 15.0, 10.0, 8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0)
JUDGED = 2000  # fresh pairs


@dataclass(frozen=True)
class Start:
    """What is known of a world before any student is trained."""

    size: str  # of teacher and student
    world: int
    behaviour_return: float  # exact, as `best` is
    best: list[tuple[float, float]]  # KL from the behaviour, and the most return that it buys
    sft_return: float
    sft_error: float  # standard errors, here and below
    teacher_sft_return: float
    teacher_return: float
    teacher_kl: float  # from the teacher before DPO
    value_correlation: float
    value_correlation_before_dpo: float
    ranking: dict[str, float]  # share of fresh pairs that a signal ranks as the true rewards do
    seconds: float


@dataclass(frozen=True)
class Run:
    """A student by one method, at one strength and learning rate."""

    size: str
    world: int
    method: str
    strength: float
    rate: float  # of learning
    true_return: float
    return_error: float
    kl: float  # from the SFT student
    kl_error: float
    # Shares of fresh pairs whose truly better response is ranked first.
    margin_accuracy: float  # by the log-ratio of the student to the SFT student
    reward_accuracy: float | None  # by the student's reward head, where it has learned
    seconds: float


def check_settings(folder: Path, settings: Settings) -> None:
    """Note the settings of a folder's runs; refuse a folder that has runs of others."""
    file = folder / "settings.json"
    if not file.exists():
        write(file, settings)
    elif json.loads(file.read_text("utf-8")) != json.loads(json.dumps(asdict(settings))):
        raise SystemExit(f"{folder} has runs of other settings: choose another --folder")


class Plan(NamedTuple):
    """What a run does differently from the others of its world."""

    method: str
    strength: float
    rate: float  # of learning

    def file(self, folder: Path) -> Path:
        """Where the finished run is, in the folder of its world."""
        name = re.sub(r"[^a-z0-9]+", "-", self.method.lower())
        return folder / f"{name}-{self.strength:g}-rate-{self.rate:g}.json"


def plans(settings: Settings, methods: Mapping[str, Method]) -> list[Plan]:
    """All runs of a world."""
    return [
        Plan(name, strength, rate)
        for name, method in methods.items()
        for strength in method.strengths
        for rate in settings.student_rates
    ]


def files_of_world(
    number: int, settings: Settings, methods: Mapping[str, Method], folder: Path
) -> list[Path]:
    """Where the world's `Start` is, and then its runs, if they are finished."""
    folder = folder / f"world-{number}"
    return [folder / "start.json", *(plan.file(folder) for plan in plans(settings, methods))]


def read_world(files: Sequence[Path]) -> tuple[Start, list[Run]]:
    """What `finish_world` wrote."""
    start, *runs = (json.loads(file.read_text("utf-8")) for file in files)
    return Start(**start), [Run(**run) for run in runs]


def finish_world(
    number: int, size: str, settings: Settings, methods: Mapping[str, Method], folder: Path
) -> None:
    """Train and measure what is missing of a world."""
    world, folder = settings.world(number), folder / f"world-{number}"
    began = time.perf_counter()
    networks = networks_of_world(world, number, settings, folder)
    judged = torch.cat(sample_pairs(world, JUDGED, generator_of(number, 8)))
    if not (folder / "start.json").exists():
        write(folder / "start.json", begin(world, number, size, settings, networks, judged, began))
    data = student_data(world, number, settings, networks)
    for plan in plans(settings, methods):
        file, began = plan.file(folder), time.perf_counter()
        if file.exists():
            continue
        method, strength, rate = methods[plan.method], plan.strength, plan.rate
        student = train_student(world, number, settings, networks, data, method, strength, rate)
        measured = measure(
            world,
            student,
            networks.reference,
            samples=settings.samples,
            generator=generator_of(number, 7),
        )
        by_margin, by_reward = accuracies(world, student, networks.reference, judged)
        by_reward = by_reward if method.loss == "drdo" else None
        seconds = time.perf_counter() - began
        write(file, Run(size, number, *plan, *measured, by_margin, by_reward, seconds))


@torch.no_grad()
def accuracies(
    world: World, student: Decoder, reference: Decoder, sequences: Tensor
) -> tuple[float, float | None]:
    """How a student ranks pairs (2B, L): by its log-ratios, and by its reward head."""
    labels, hidden = labels_of(sequences, world.prompt_length), student(sequences)
    logps = responses_of(student, hidden, labels).logps
    margins = logps - responses_of(reference, reference(sequences), labels).logps
    rewards = sequence_rewards(hidden, labels, student.reward_head.weight)
    found = ranking(world, sequences, {"margins": margins, "rewards": rewards})
    return found["margins"], found["rewards"]


def networks_of_world(world: World, number: int, settings: Settings, folder: Path) -> Networks:
    """The networks that all runs of a world share, trained once and kept."""
    file = folder / "networks.pt"
    if file.exists():
        networks = new_networks(number, settings)
        for network, state in zip(networks, torch.load(file), strict=True):
            network.load_state_dict(state)
            network.requires_grad_(False)
        return networks
    networks = train_networks(world, number, settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save([network.state_dict() for network in networks], file.with_suffix(".unfinished"))
    file.with_suffix(".unfinished").rename(file)
    return networks


def begin(
    world: World,
    number: int,
    size: str,
    settings: Settings,
    networks: Networks,
    judged: Tensor,  # (2B, L)
    began: float,
) -> Start:
    """Measure what every method starts from."""
    reference, teacher_sft, teacher, *_ = networks
    options: dict[str, Any] = {"samples": settings.samples}
    before, teachers_before, after = (
        measure(world, *models, **options, generator=generator_of(number, 7))
        for models in (
            (reference, reference),
            (teacher_sft, teacher_sft),
            (teacher, teacher_sft),
        )
    )
    signals = signals_of(world, networks, judged, settings)
    early = {"teacher_states": signals["teacher_sft_states"]}
    return Start(
        size,
        number,
        world.mean_at_start(world.policy_values(world.behaviour())),
        [world.best_for_kl(temperature) for temperature in TEMPERATURES],
        before.true_return,
        before.return_error,
        teachers_before.true_return,
        after.true_return,
        after.kl,
        value_correlation(world, teacher, judged, signals),
        value_correlation(world, teacher_sft, judged, early),
        ranking(world, judged, signals),
        time.perf_counter() - began,
    )


def write(file: Path, result: Any) -> None:
    """Write a dataclass as a whole or not at all, whenever the process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(asdict(result), indent=1) + "\n", "utf-8")
    unfinished.replace(file)
