"""The teachers whose logsumexp is compared with true values, and the losses that train them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from models import Decoder
from settings import Budget, Settings, generator_of
from torch import Tensor
from train import CHUNK, fit
from world import Pairs, World

from fastpref import Responses, linear_logps_with_stats, losses, sum_responses

SOFT_Q_RATE = 1e-2  # chosen in world 0 over 3e-3 by the correlation; 2e-2 gave still more
Reads = Literal["states", "tokens"]


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained."""

    objective: Literal["sft", "dpo", "true rewards", "learned rewards"]
    start: str | None = None  # the teacher whose weights it begins with
    z_loss: float = 0.0  # weight of the mean squared logsumexp
    decay: float = 0.0  # AdamW's


TEACHERS = {
    "SFT": Recipe("sft"),
    "SFT, z-loss 0.001": Recipe("sft", z_loss=0.001),
    "SFT, z-loss 0.01": Recipe("sft", z_loss=0.01),
    "SFT, decay 0.1": Recipe("sft", decay=0.1),
    "SFT, decay 1": Recipe("sft", decay=1.0),
    "DPO": Recipe("dpo", "SFT"),
    "DPO, z-loss 0.01": Recipe("dpo", "SFT, z-loss 0.01", z_loss=0.01),
    "DPO, decay 1": Recipe("dpo", "SFT, decay 1", decay=1.0),
    "soft Q, true rewards": Recipe("true rewards", "SFT"),
    "soft Q, learned rewards": Recipe("learned rewards", "SFT"),
}
# The large network takes most of the time: fewer of it.
OF_READER: dict[Reads, tuple[str, ...]] = {
    "states": tuple(TEACHERS),
    "tokens": (
        "SFT",
        "SFT, z-loss 0.01",
        "SFT, decay 1",
        "DPO",
        "DPO, z-loss 0.01",
        "soft Q, true rewards",
    ),
}


class SeesStates(Decoder):
    """A decoder that reads the automaton's states in the place of tokens."""

    def __init__(self, world: World, *shape: int) -> None:
        super().__init__(*shape)
        self.world = world

    def forward(self, sequences: Tensor) -> Tensor:
        """Hidden states (n, L, H) of token sequences (n, L)."""
        return super().forward(self.world.states(sequences)[:, 1:])


def new_teacher(world: World, number: int, settings: Settings, reads: Reads) -> Decoder:
    """Untrained: one of the teacher's size that reads tokens, or the student's that sees states."""
    torch.manual_seed(number)
    length = settings.prompt_length + settings.length
    if reads == "tokens":
        return Decoder(settings.tokens, length, settings.teacher_layers, settings.teacher_width)
    shape = settings.tokens, length, settings.student_layers, settings.student_width
    return SeesStates(world, *shape)


class Read(NamedTuple):
    """What a model says of responses (n, T)."""

    hidden: Tensor  # (n, T + 1, H), the state before the first token to the one after the last
    logps: Tensor  # (n, T) of the tokens
    values: Tensor  # (n, T) the logsumexp of the state before each token, in logits
    entropy: Tensor  # (n, T) of each token's distribution, in nats, detached

    def responses(self, tokens: Tensor) -> Responses:
        """Summed log-probabilities."""
        return sum_responses(self.logps, tokens)


def read(model: Decoder, sequences: Tensor, prompt_length: int) -> Read:
    """Run a model over sequences (n, P + T)."""
    hidden = model(sequences)[:, prompt_length - 1 :]
    tokens = sequences[:, prompt_length:]
    found = linear_logps_with_stats(hidden[:, :-1], model.head(), tokens)
    return Read(hidden, found.logps, found.lse, found.entropy)


def bellman_loss(logps: Tensor, values: Tensor, rewards: Tensor) -> Tensor:
    r"""Soft Q-learning on whole responses (n, T): the mean squared soft-Bellman residual.

    .. math:: z(s_t, a_t) - r_t - V(s_{t+1}), \qquad V(s) = \log \sum_a \exp z(s, a),
              \quad V(s_T) = 0

    The logit :math:`z` is log-probability plus logsumexp; ``rewards`` are in units of the
    temperature. Residuals are all 0 where the logits are the soft values of actions, and nowhere
    else if all actions are seen. The gradient goes through the next value, too: it is certain.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    return (logps + values - rewards - following).square().mean()


def train_teachers(
    world: World, number: int, settings: Settings, reads: Reads, pairs: Pairs
) -> Iterator[tuple[str, Decoder]]:
    """Every teacher of a world by its name, each trained when it is asked for.

    Teachers share the initial weights and, within an objective, the rows of every batch.
    """
    trained: dict[str, Decoder] = {}
    for name in OF_READER[reads]:
        recipe = TEACHERS[name]
        if recipe.start is None:
            model = new_teacher(world, number, settings, reads)
        else:
            model = copy.deepcopy(trained[recipe.start])
        _OBJECTIVES[recipe.objective](Task(model, recipe, world, number, settings, pairs))
        trained[name] = model
        yield name, model


class Task(NamedTuple):
    """A teacher to be trained, in place."""

    model: Decoder
    recipe: Recipe
    world: World
    number: int  # of the world
    settings: Settings
    pairs: Pairs

    def read(self, sequences: Tensor) -> Read:
        """What the teacher says."""
        return read(self.model, sequences, self.world.prompt_length)

    def tokens(self, sequences: Tensor) -> Tensor:
        """Those of responses."""
        return sequences[:, self.world.prompt_length :]

    def fit(
        self, loss_of: Callable[[Tensor], Tensor], rows: int, budget: Budget, purpose: int
    ) -> None:
        """Train with the recipe's decay."""
        generator = generator_of(self.number, purpose)
        fit(self.model, loss_of, rows, budget, generator, weight_decay=self.recipe.decay)


def _train_sft(task: Task) -> None:
    sequences = torch.cat(task.pairs)

    def loss_of(rows: Tensor) -> Tensor:
        found = task.read(sequences[rows])
        loss = losses.sft(found.responses(task.tokens(sequences[rows]))).loss
        return loss + task.recipe.z_loss * found.values.square().mean()

    task.fit(loss_of, len(sequences), task.settings.sft, 2)


def _train_dpo(task: Task) -> None:
    reference = copy.deepcopy(task.model)

    @torch.no_grad()
    def logps_of(sequences: Tensor) -> Tensor:
        return read(reference, sequences, task.world.prompt_length).logps.sum(1)

    ref_logps = [torch.cat([*map(logps_of, torch.split(side, CHUNK))]) for side in task.pairs]

    def loss_of(rows: Tensor) -> Tensor:
        sequences = torch.cat([side[rows] for side in task.pairs])
        found, logps = task.read(sequences), torch.cat([side[rows] for side in ref_logps])
        responses = found.responses(task.tokens(sequences))
        loss = losses.dpo(responses, logps, beta=task.settings.teacher_beta).loss
        return loss + task.recipe.z_loss * found.values.square().mean()

    task.fit(loss_of, len(task.pairs.chosen), task.settings.teacher, 3)


def _train_with_true_rewards(task: Task) -> None:
    world, sequences = task.world, torch.cat(task.pairs)
    states = world.states(sequences)[:, world.prompt_length : -1]
    rewards = world.rewards[states, task.tokens(sequences)] / world.temperature
    _train_soft_q(task, sequences, rewards.float())


def _train_with_learned_rewards(task: Task) -> None:
    """The rewards of tokens are a model's whose sums fit the labels of pairs (Bradley-Terry)."""
    judge = copy.deepcopy(task.model)

    def rewards_of(found: Read) -> Tensor:
        rewards: Tensor = judge.reward_head(found.hidden[:, 1:])
        return rewards.squeeze(-1)

    def loss_of(rows: Tensor) -> Tensor:
        sequences = torch.cat([side[rows] for side in task.pairs])
        found = read(judge, sequences, task.world.prompt_length)
        chosen = sum_responses(found.logps[: len(rows)], task.tokens(sequences)[: len(rows)])
        return losses.oracle(chosen, rewards_of(found).sum(1)).loss

    task._replace(model=judge).fit(loss_of, len(task.pairs.chosen), task.settings.teacher, 4)
    sequences = torch.cat(task.pairs)
    with torch.no_grad():
        rewards = [
            rewards_of(read(judge, each, task.world.prompt_length))
            for each in torch.split(sequences, CHUNK)
        ]
    _train_soft_q(task, sequences, torch.cat(rewards))


def _train_soft_q(task: Task, sequences: Tensor, rewards: Tensor) -> None:
    def loss_of(rows: Tensor) -> Tensor:
        found = task.read(sequences[rows])
        return bellman_loss(found.logps, found.values, rewards[rows])

    budget = task.settings.sft._replace(rate=SOFT_Q_RATE)
    task.fit(loss_of, len(sequences), budget, 9)


_OBJECTIVES: Mapping[str, Callable[[Task], None]] = {
    "sft": _train_sft,
    "dpo": _train_dpo,
    "true rewards": _train_with_true_rewards,
    "learned rewards": _train_with_learned_rewards,
}
