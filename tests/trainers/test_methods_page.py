"""The products that docs/methods.md says a step takes are those that it takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from counting import flops_of
from test_against_logits import batch_of, preference_trainer
from training import TOKENIZER, dataset, models_for, student

from fastpref.losses import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text("utf-8")
TABLES = re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.M)
VOCABULARY, WIDTH = 20_000, 16


def rows_of(table):
    """The cells of each method's row."""
    found = {}
    for line in table.splitlines()[2:]:
        names, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), cells)
    return found


WHAT, COST = map(rows_of, TABLES)


def test_every_method_has_its_rows():
    assert WHAT.keys() == COST.keys() == METHODS.keys()


def products(cell, head):
    """A number of products, all heads having the same size."""
    words = re.sub(r"\b(\d) [RT]", r"\1", cell.split(" / ")[head == "trained"])
    return sum(1 if word in "RT" else int(word) for word in words.split(" + "))


@pytest.mark.parametrize("method", METHODS)
def test_products(tmp_path, method):
    given = {"teacher_model": 0, "teacher_processing_class": TOKENIZER}
    given = {**(given if method == "tvkd" else {}), **models_for(method)}
    models = {
        name: student(seed=3, vocab_size=VOCABULARY) if name.endswith("model") else one
        for name, one in given.items()
    }
    if method == "tvkd":
        models["train_dataset"] = dataset()
    found = preference_trainer(tmp_path, method, model=student(vocab_size=VOCABULARY), **models)
    batch = batch_of(found)
    chosen, rejected = (int(one.sum()) for one in batch["completion_mask"][:, 1:].chunk(2))

    def step() -> None:
        found.compute_loss(found.model, dict(batch)).backward()

    step()
    for head in ("frozen", "trained"):
        found.model.lm_head.weight.requires_grad_(head == "trained")
        measured = flops_of(step) / (2 * VOCABULARY * WIDTH)
        of_chosen, of_rejected = (products(cell, head) for cell in COST[method][:2])
        expected = chosen * of_chosen + rejected * of_rejected
        if method == "tvkd":
            expected += 2 * len(batch["input_ids"])
        # The rest is the layers, and one position of each model for its own idea of its logits.
        assert expected < measured < expected + 6 + 0.02 * expected, head
