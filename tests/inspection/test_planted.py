"""A teacher that was trained to know the preference is told from one that was not."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from looking import readable_tokenizer
from tiny_models import TEXT, conversation, tiny_model
from torch.nn.functional import softplus

import fastpref
from fastpref.inspection import inspect_teacher
from fastpref.inspection.verdicts import kind_of
from fastpref.models import head_states, lm_head_of

TOKENIZER = readable_tokenizer()
WORDS = TEXT[0].split()
PAIRS = 32  # to train on
KNOWS = ("value", "implicit_reward", "logp")


def planted_rows(count, seed):
    """The chosen response has "blue" at a random place, the rejected one "green"."""
    chance = random.Random(seed)

    def row():
        words = [chance.choice(WORDS[:9]) for _ in range(3)]
        place = chance.randrange(4)
        return conversation(
            chance.choice(WORDS),
            *(" ".join([*words[:place], colour, *words[place:]]) for colour in ("blue", "green")),
        )

    return [row() for _ in range(count)]


def swapped(rows):
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]


def trained(model):
    """A teacher whose values and log-probabilities rank the chosen responses first."""
    model = copy.deepcopy(model).train()
    batch = fastpref.collate_pairs(planted_rows(PAIRS, seed=1), TOKENIZER)
    labels = batch.pop("labels")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        states, head = head_states(model, **batch), lm_head_of(model)
        logps = fastpref.linear_logps(states[:, :-1], head, labels).sum(1)
        values = torch.logsumexp(states @ head.weight.T, -1)
        shaping = fastpref.shaping_from_values(values, labels)
        loss = sum(softplus(-(one[:PAIRS] - one[PAIRS:])).mean() for one in (logps, shaping))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def models():
    untrained = tiny_model(TOKENIZER)
    return untrained, trained(untrained), tiny_model(TOKENIZER, seed=1)


def verdicts(teacher, reference, rows):
    found = inspect_teacher(rows, teacher, TOKENIZER, reference=reference, pairs=100)
    return {one.name: (kind_of(one), one.ranked_first.share) for one in found.measures}


def test_the_verdict_turns(models):
    untrained, teacher, another = models
    rows = planted_rows(100, seed=2)  # which it has not seen
    before, after = verdicts(untrained, another, rows), verdicts(teacher, untrained, rows)
    for name in KNOWS:
        assert after[name][0] == "tells" and after[name][1] > 0.9
        assert before[name][1] < 0.9
    for name, (kind, share) in verdicts(teacher, untrained, swapped(rows)).items():
        assert share == pytest.approx(1 - after[name][1])
        assert name not in KNOWS or kind == "worse than chance"


def test_a_coin_does_not_tell(models):
    untrained, teacher, _ = models
    rows = planted_rows(100, seed=2)
    found = verdicts(teacher, untrained, rows[:50] + swapped(rows[50:]))
    assert {found[name][0] for name in KNOWS} == {"does not tell"}
