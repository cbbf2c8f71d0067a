"""Random pairs of responses, and every option of the functions that read them."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import formulas
import torch
from batches import Batch, exact_everywhere
from torch import Tensor

from fastpref import Head
from fastpref.losses import METHODS
from fastpref.ops.divergences import KINDS

Given = dict[str, Tensor]
TAILS = ("bucket", "drop", "renormalize")
POTENTIALS = ("value", "max", "margin", "expectation", "implicit_reward")


class Problem(NamedTuple):
    """Pairs of responses, two more models that read them, and the options of all functions."""

    batch: Batch  # and the student's head
    more: Given  # float64, of numbers that every dtype holds
    ids: Tensor  # (2B, T, K) different tokens at a position
    known: Tensor  # (2B, T, K) their log-probabilities, float32
    desirable: Tensor  # (2B,) bool
    kind: str  # of a divergence
    tail: str
    potential: str
    method: str
    compact: bool
    scratch_bytes: int | None
    packed: bool
    length_normalize: bool

    def leaves(self, dtype: torch.dtype, *, trained: bool) -> Given:
        """All tensors in ``dtype``; hidden states want gradients, and with ``trained`` the head."""
        trains = {"states", "weight", "bias"} if trained else {"states"}
        return self.batch.leaves(dtype, trains, **self.more)

    @property
    def labels(self) -> Tensor:
        return self.batch.labels

    def head(self, given: Given) -> Head:
        return self.batch.head(given)

    def frozen(self, given: Given) -> Head:
        """The head as `linear_cached_kl` takes it."""
        weight, bias, *_ = self.head(given)
        bias = None if bias is None else bias.detach()
        return Head(weight.detach(), bias, self.batch.transform["logit_scale"])

    def plain(self) -> dict[str, Any]:
        """What a formula takes beside tensors."""
        batch = self.batch
        return {"temperature": batch.temperature, "ignore_index": batch.ignore_index}

    def options(self) -> dict[str, Any]:
        """What a function takes beside tensors."""
        return {**self.plain(), "compact": self.compact}

    def scratch(self) -> dict[str, Any]:
        """The same of a function that may keep what it read."""
        return {**self.options(), "scratch_bytes": self.scratch_bytes}

    def boundaries(self) -> dict[str, Tensor]:
        return {"cu_seqlens": self.batch.cu_seqlens()} if self.packed else {}

    def states(self, given: Given) -> tuple[Tensor, Tensor]:
        """All hidden states and the labels, padded or packed."""
        batch = self.batch
        if self.packed:
            return batch.pack(given["states"]), batch.packed_labels()
        return given["states"], batch.labels

    def tokens(self, given: Given) -> tuple[Tensor, Head, Tensor]:
        """Hidden states that predict the labels, the head and the labels, padded or packed."""
        hidden, labels = self.states(given)
        return (hidden if self.packed else hidden[:, :-1]), self.head(given), labels

    def student(self, given: Given) -> tuple[Tensor, Head]:
        """Hidden states (2B, T, H) that predict the labels, and the head that reads them."""
        return given["states"][:, :-1], self.head(given)

    def teacher(self, given: Given) -> tuple[Tensor, Tensor]:
        return given["teacher"][:, :-1], given["of_teacher"]

    def with_kind(self, given: Given) -> dict[str, Any]:
        """The options of a divergence but for a reference."""
        return {"kind": self.kind} | ({"clip": (-1.0, 0.5)} if self.kind == "advantage" else {})

    def without_ties(self) -> Problem:
        """Without labels where rounding could make another token the likeliest."""
        given, labels = self.leaves(torch.float64, trained=False), self.labels
        for model in (self.student(given), self.teacher(given)):
            logits = formulas.logits(*model)
            first, second = logits.topk(2).values.unbind(-1)
            tied = first - second < 1e-3 * (1 + logits.abs().amax(-1))
            labels = labels.masked_fill(tied, self.batch.ignore_index)
        return self._replace(batch=self.batch._replace(labels=labels))


def drawn(chance: random.Random) -> Problem:
    """A problem of any shape, with any options."""
    generator = torch.Generator().manual_seed(chance.randrange(2**31))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return exact_everywhere(scale * torch.randn(*shape, generator=generator))

    rows, length = 2 * chance.randint(1, 3), chance.choice([1, 2, 5, 7, 16])
    width, vocab = chance.choice([1, 3, 8, 16]), chance.choice([2, 7, 33, 130])
    ignore_index = chance.choice([-100, -1, 0])
    labels = torch.randint(min(1, vocab - 1), vocab, (rows, length), generator=generator)
    ignored = torch.rand(rows, length, generator=generator) < chance.choice([0.0, 0.4, 0.4, 1.0])
    position = torch.arange(1, length + 1)
    used = position.masked_fill(ignored, 0).amax(1).tolist()
    states = normal(rows, length + 1, width, scale=chance.choice([0.25, 1.0]))
    batch = Batch(
        states,
        labels.masked_fill(ignored, ignore_index),
        [chance.randint(end, length) for end in used],
        normal(vocab, width),
        normal(vocab) if chance.random() < 0.5 else None,
        {
            "logit_scale": chance.choice([1.0, 0.25, -1.5]),
            "softcap": chance.choice([None, None, 3.0, 30.0]),
        },
        chance.choice([1.0, 0.5, 2.3]),
        ignore_index,
        generator,
    )
    more = {name: normal(rows) for name in ("first", "second", "third")} | {
        "teacher": normal(rows, length + 1, 5), "of_teacher": normal(vocab, 5),
        "reference": normal(rows, length + 1, 4), "of_reference": normal(vocab, 4),
        "token_weights": normal(rows, length).abs(), "reward_head": normal(1, width),
    }  # fmt: skip
    of_teacher = torch.randn(rows, length, vocab, generator=generator).log_softmax(-1)
    known, ids = of_teacher.topk(min(3, vocab - 1))
    return Problem(
        batch, more, ids, known, torch.rand(rows, generator=generator) < 0.5,
        chance.choice(list(KINDS)), chance.choice(TAILS), chance.choice(POTENTIALS),
        chance.choice(list(METHODS)), chance.random() < 0.5, chance.choice([None, 0, 4000]),
        chance.random() < 0.3, chance.random() < 0.5,
    )  # fmt: skip
