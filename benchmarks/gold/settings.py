"""What a comparison is: sizes and budgets, the same for all worlds and methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from world import World, make_world


class Budget(NamedTuple):
    """How long and how fast one model is trained."""

    batch: int  # pairs, or sequences in SFT
    steps: int
    rate: float  # the highest learning rate


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on beside the code."""

    states: int = 12
    tokens: int = 24
    length: int = 10  # tokens of a response
    prompt_length: int = 1  # it leads to one of the states
    temperature: float = 3.0  # of behaviour and labels, in rewards
    teacher_layers: int = 3
    teacher_width: int = 96
    teacher_pairs: int = 20_000  # SFT, the student's too, reads all their responses
    student_layers: int = 1
    student_width: int = 24
    pairs: int = 1000  # that a student learns from
    samples: int = 2048  # responses that a model is measured on
    teacher_beta: float = 0.1  # of the teacher's DPO
    sft: Budget = Budget(100, 400, 3e-3)  # one epoch
    teacher: Budget = Budget(50, 400, 5e-4)  # one epoch, of DPO and of the oracle
    student_batch: int = 50  # pairs, the same for every method, as the next two
    student_steps: int = 100  # five epochs
    student_rates: tuple[float, ...] = (3e-3, 1e-2)  # every strength is trained with each

    def world(self, number: int) -> World:
        """A world by its number."""
        return make_world(
            number,
            states=self.states,
            tokens=self.tokens,
            length=self.length,
            prompt_length=self.prompt_length,
            temperature=self.temperature,
        )


def generator_of(world: int, purpose: int) -> torch.Generator:
    """Random numbers of their own for each purpose: a resumed run is what it would have been."""
    return torch.Generator().manual_seed(1000 * (world + 1) + purpose)
