"""Packed batches give what padded ones give, and what the page warns of happens."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_no_worse
from pages import blocks
from tiny_models import rows, tiny_model, tiny_tokenizer

import fastpref
from fastpref.models import head_states, lm_head_of

RECIPE, OWN_CALL = blocks("docs/recipes.md", section="Packed batches")
TOKENIZER = tiny_tokenizer()


def padded(student, teacher, batch):
    """The loss of the same batch, as README's loop has it."""
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = head_states(teacher, **tokens)
        shaping = fastpref.teacher_shaping(states, lm_head_of(teacher), batch["labels"])
    states = head_states(student, **tokens)[:, :-1]
    return fastpref.tvkd_loss(states, lm_head_of(student), batch["labels"], shaping)


def gradient(loss, student):
    grads = torch.autograd.grad(loss, [*student.parameters()])
    return torch.cat([one.flatten() for one in grads])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_packed_is_padded(attention, training):
    batch = fastpref.collate_pairs(rows(4), TOKENIZER)
    found = {}
    for dtype in (torch.float64, torch.float32):
        models = [
            tiny_model(TOKENIZER, seed=seed, attn_implementation=attention)
            .to(dtype).train(training)
            for seed in (0, 1)
        ]  # fmt: skip
        names = dict(zip(("student", "teacher"), models, strict=True), batch=dict(batch))
        exec(RECIPE, names)
        found[dtype] = names["out"], padded(*models, batch), models[0], names
    (_, exact, model, _), (packed, plain, student, names) = found.values()
    for name in ("chosen_logps", "rejected_logps", "loss"):
        three = (getattr(out, name).detach() for out in (packed, plain, exact))
        assert_no_worse(*three, torch.float32)
    gradients = gradient(packed.loss, student), gradient(plain.loss, student)
    assert_no_worse(*gradients, gradient(exact.loss, model), torch.float32)

    exec(OWN_CALL, names)
    assert_no_worse(
        names["states"], head_states(student, **names["tokens"])[0],
        head_states(model, **names["tokens"])[0], torch.float32,
    )  # fmt: skip
    wrong = student.model(**names["tokens"]).last_hidden_state[0]
    assert (wrong - names["states"]).abs().max() > 0.1  # hence the page's warning
