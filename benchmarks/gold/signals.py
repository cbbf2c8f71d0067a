"""What teacher, oracle and reference say of a response, and how well it tells good from bad."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from models import Decoder, labels_of, responses_of
from settings import Settings
from torch import Tensor
from value_metrics import correlation
from world import World

from fastpref import linear_logsumexp, sequence_rewards, teacher_shaping
from fastpref.teacher import action_rewards
from fastpref.teacher.actions import ActionReward
from fastpref.teacher.shaping import POTENTIALS


class Networks(NamedTuple):
    """The models that students of one world have in common."""

    reference: Decoder  # the student after SFT: what every method starts from
    teacher_sft: Decoder  # the teacher before DPO
    teacher: Decoder
    oracle: Decoder  # as large as the teacher, with a reward head
    small_oracle: Decoder  # as large as the student


@torch.no_grad()
def signals_of(
    world: World, networks: Networks, sequences: Tensor, settings: Settings
) -> dict[str, Tensor]:
    """Hidden states (n, L, H) of models, and numbers (n,) of responses, by name; n is even."""
    labels, policies = labels_of(sequences, world.prompt_length), networks._asdict()
    oracles = [policies.pop(name) for name in ("oracle", "small_oracle")]
    oracle, small_oracle = (
        sequence_rewards(each(sequences), labels, each.reward_head.weight) for each in oracles
    )
    states = {f"{name}_states": model(sequences) for name, model in policies.items()}
    logps = {
        f"{name}_logps": responses_of(model, states[f"{name}_states"], labels).logps
        for name, model in policies.items()
    }
    seeded = torch.Generator().manual_seed(int(sequences.sum()))  # other responses, other numbers
    noise = torch.randn(len(sequences), generator=seeded)
    true = (world.returns(sequences) / world.temperature).float()
    of_teacher = states["teacher_states"], networks.teacher.head(), labels
    return {
        **states,
        **logps,
        **{name: teacher_shaping(*of_teacher, potential=name) for name in POTENTIALS},
        **{name: action_rewards(*of_teacher, reward=name) for name in get_args(ActionReward)},
        # These and the next ones are logits of Bradley-Terry preferences.
        "implicit_reward": teacher_shaping(
            *of_teacher,
            potential="implicit_reward",
            reference_hidden=states["teacher_sft_states"],
            reference_head=networks.teacher_sft.head(),
            beta=settings.teacher_beta,
        ),
        "oracle_reward": oracle,
        "small_oracle_reward": small_oracle,
        "true_reward": true,
        "true_reward_noise_1": true + noise,
        "true_reward_noise_3": true + 3 * noise,
        "random": torch.randn(len(sequences), generator=seeded),
    }


def ranking(world: World, sequences: Tensor, signals: dict[str, Tensor]) -> dict[str, float]:
    """The share of pairs (2B, L) whose truly better response a signal ranks first, by its name."""
    first, second = world.returns(sequences).chunk(2)
    found = {}
    for name, values in signals.items():
        if values.dim() == 1:
            one, other = values.chunk(2)
            found[name] = ((one > other) == (first > second)).double().mean().item()
    return found


@torch.no_grad()
def value_correlation(
    world: World, teacher: Decoder, sequences: Tensor, signals: dict[str, Tensor]
) -> float:
    """Of a teacher's logsumexp with the true soft value of the state, at the same position.

    At the same one, since later states are worth less in any world. The last state is left out: its
    true value is 0.
    """
    states = signals["teacher_states"][:, world.prompt_length - 1 : -1]
    guesses = linear_logsumexp(states, teacher.head()).double()
    values = world.soft_values(world.temperature)
    places = world.states(sequences)[:, world.prompt_length : -1]
    truths = values[torch.arange(world.length), places]
    return correlation(guesses, truths)
