"""Training: SFT, the teacher, the oracle, and students by any method, all by one loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from methods import Method
from models import Decoder, labels_of, responses_of, sample
from settings import Budget, Settings, generator_of
from signals import Networks, signals_of
from step import batch_loss
from torch import Tensor
from world import Pairs, World, sample_pairs

from fastpref import losses, sequence_rewards

# Tensors of 1000 pairs by who wrote the response: `signals_of` and the "sequences".
Data = dict[str, dict[str, Tensor]]
ORDERS = 100  # the purpose of random numbers from here on: orders of batches
CHUNK = 4000  # sequences that a model reads at once where nothing trains


def fit(
    model: Decoder,
    loss_of: Callable[[Tensor], Tensor],  # of the rows of a batch
    rows: int,
    budget: Budget,
    generator: torch.Generator,
    *,
    weight_decay: float = 0.0,
) -> None:
    """AdamW, a warm-up of a tenth, then a cosine to zero; gradients clipped at 1."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=budget.rate, weight_decay=weight_decay)
    warm_up = max(1, budget.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / budget.steps)) / 2),
    )
    for batch in batches(rows, budget, generator):
        optimizer.zero_grad()
        loss_of(batch).backward()  # type: ignore[no-untyped-call]  # PyTorch's own
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.requires_grad_(False)


def batches(rows: int, budget: Budget, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows of each step: one shuffled epoch after another."""
    wanted = budget.batch * budget.steps
    epochs = [torch.randperm(rows, generator=generator) for _ in range(-(-wanted // rows))]
    return iter(torch.cat(epochs)[:wanted].view(budget.steps, budget.batch))


def train_networks(world: World, number: int, settings: Settings) -> Networks:
    """SFT of student and teacher on the behaviour's text, then the teacher's DPO and the oracle."""
    pairs = sample_pairs(world, settings.teacher_pairs, generator_of(number, 0))
    student, teacher_sft, teacher, oracle, small_oracle = networks = new_networks(number, settings)
    train_sft(student, pairs, settings, generator_of(number, 1))
    train_sft(teacher_sft, pairs, settings, generator_of(number, 2))
    for copy_of_sft, source in (
        (teacher, teacher_sft),
        (oracle, teacher_sft),
        (small_oracle, student),
    ):
        copy_of_sft.load_state_dict(source.state_dict())
    train_dpo(teacher, teacher_sft, pairs, settings, generator_of(number, 3))
    for each in (oracle, small_oracle):
        train_oracle(each, pairs, settings, generator_of(number, 4))
    return networks


def new_networks(number: int, settings: Settings) -> Networks:
    """Networks of the right shapes, untrained."""
    torch.manual_seed(number)
    length = settings.prompt_length + settings.length
    student = settings.student_layers, settings.student_width
    teacher = settings.teacher_layers, settings.teacher_width
    sizes = student, teacher, teacher, teacher, student  # in the order of `Networks`
    return Networks(*[Decoder(settings.tokens, length, *size) for size in sizes])


def train_sft(model: Decoder, pairs: Pairs, settings: Settings, generator: torch.Generator) -> None:
    """Supervised fine-tuning from scratch, on chosen and rejected responses alike."""
    sequences = torch.cat(pairs)
    labels = labels_of(sequences, settings.prompt_length)

    def loss_of(rows: Tensor) -> Tensor:
        found: Tensor = losses.sft(responses_of(model, model(sequences[rows]), labels[rows])).loss
        return found

    fit(model, loss_of, len(sequences), settings.sft, generator)


def train_dpo(
    model: Decoder,
    reference: Decoder,
    pairs: Pairs,
    settings: Settings,
    generator: torch.Generator,
) -> None:
    """The teacher's preference tuning."""

    def logps_of(sequences: Tensor) -> Tensor:
        labels = labels_of(sequences, settings.prompt_length)
        return responses_of(reference, reference(sequences), labels).logps

    with torch.no_grad():
        ref_logps = [torch.cat([*map(logps_of, _chunks(side))]) for side in pairs]

    def loss_of(rows: Tensor) -> Tensor:
        sequences = torch.cat([side[rows] for side in pairs])
        labels = labels_of(sequences, settings.prompt_length)
        responses = responses_of(model, model(sequences), labels)
        logps = torch.cat([side[rows] for side in ref_logps])
        return losses.dpo(responses, logps, beta=settings.teacher_beta).loss

    fit(model, loss_of, len(pairs.chosen), settings.teacher, generator)


def _chunks(sequences: Tensor) -> tuple[Tensor, ...]:
    return sequences.chunk(-(-len(sequences) // CHUNK))


def train_oracle(
    model: Decoder, pairs: Pairs, settings: Settings, generator: torch.Generator
) -> None:
    """DRDO's oracle, of the same pairs and budget as the teacher."""

    def loss_of(rows: Tensor) -> Tensor:
        sequences = torch.cat([side[rows] for side in pairs])
        labels = labels_of(sequences, settings.prompt_length)
        hidden = model(sequences)
        chosen = responses_of(model, *(each[: len(rows)] for each in (hidden, labels)))
        rewards = sequence_rewards(hidden, labels, model.reward_head.weight)
        return losses.oracle(chosen, rewards).loss

    fit(model, loss_of, len(pairs.chosen), settings.teacher, generator)


def student_data(world: World, number: int, settings: Settings, networks: Networks) -> Data:
    """The pairs of the students, and what teacher and student before training write instead."""
    generator = generator_of(number, 5)
    pairs = sample_pairs(world, settings.pairs, generator)
    prompts = pairs.chosen[:, : world.prompt_length]
    written = {
        **pairs._asdict(),
        "teacher": sample(networks.teacher, prompts, world.length, generator),
        "student": sample(networks.reference, prompts, world.length, generator),
    }
    return {
        side: {"sequences": sequences, **signals_of(world, networks, sequences, settings)}
        for side, sequences in written.items()
    }


def train_student(
    world: World,
    number: int,
    settings: Settings,
    networks: Networks,
    data: Data,
    method: Method,
    strength: float,
    rate: float,
) -> Decoder:
    """A student by one method; without a strength of its own it stops after a share of the steps.

    Every method starts from the same student and sees the same rows in the same order.
    """
    student = copy.deepcopy(networks.reference)
    generator = generator_of(number, ORDERS + method.order)
    if method.labels_right is not None:
        data = relabelled(world, number, data, method.labels_right)
    options = {**method.options, **dict.fromkeys(method.swept, strength)}
    if method.shaping_gap is not None:
        name = str(method.signals["shaping"])
        gaps = data["chosen"][name] - data["rejected"][name]
        options["alpha"] = method.shaping_gap / gaps.std().item()
    budget = Budget(settings.student_batch, settings.student_steps, rate)
    if not method.swept:
        budget = budget._replace(steps=max(1, round(strength * budget.steps)))

    def loss_of(rows: Tensor) -> Tensor:
        sides = [data[side] for side in method.sides]
        tensors = {name: torch.cat([side[name][rows] for side in sides]) for name in sides[0]}
        sequences = tensors.pop("sequences")
        if torch.rand((), generator=generator) < method.on_policy:
            prompts = sequences[:, : world.prompt_length]
            sequences = sample(student, prompts, world.length, generator)
            tensors = signals_of(world, networks, sequences, settings)
        return batch_loss(method, options, student, networks, sequences, tensors, world)

    fit(student, loss_of, settings.pairs, budget, generator)
    return student


def relabelled(world: World, number: int, data: Data, right: float) -> Data:
    """The pairs with labels that agree with the true rewards with a probability."""
    chosen, rejected = (world.returns(data[side]["sequences"]) for side in ("chosen", "rejected"))
    draws = torch.rand(len(chosen), generator=generator_of(number, 10))
    swap = (chosen > rejected) != (draws < right)

    def pick(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(swap.view(-1, *[1] * (one.dim() - 1)), one, other)

    sides = data["rejected"], data["chosen"]
    return {
        **data,
        "chosen": {name: pick(sides[0][name], sides[1][name]) for name in sides[0]},
        "rejected": {name: pick(sides[1][name], sides[0][name]) for name in sides[0]},
    }
