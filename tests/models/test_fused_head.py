"""A model runs a function at its head, and is otherwise as it was."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from tiny_models import tiny_model, tiny_tokenizer

import fastpref
from fastpref.models.fused_head import add_fused_head

TOKENIZER = tiny_tokenizer()
TOKENS = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(0))


def logps(states, head):
    return {"logps": fastpref.linear_logps(states[:, :-1], head, TOKENS[:, 1:])}


def test_the_function_gets_the_states_and_the_head():
    model = tiny_model(TOKENIZER)
    add_fused_head(model)
    found = model(input_ids=TOKENS, at_head=logps)["logps"]
    logits = tiny_model(TOKENIZER)(input_ids=TOKENS).logits[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected)


def test_without_a_function_nothing_changes():
    plain, model = tiny_model(TOKENIZER), tiny_model(TOKENIZER)
    add_fused_head(model)
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    expected = plain.generate(TOKENS, max_new_tokens=3, do_sample=False)
    assert model.generate(TOKENS, max_new_tokens=3, do_sample=False).equal(expected)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_copy_runs_its_own_layers():
    model = tiny_model(TOKENIZER)
    add_fused_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = tiny_model(TOKENIZER)
    torch.testing.assert_close(other(TOKENS).logits, expected(TOKENS).logits)
    add_fused_head(expected)
    found = other(input_ids=TOKENS, at_head=logps)["logps"]
    torch.testing.assert_close(found, expected(input_ids=TOKENS, at_head=logps)["logps"])


@pytest.mark.parametrize("wrap", [None, convert_outputs_to_fp32], ids=["plain", "mixed precision"])
def test_a_second_time_changes_nothing(wrap):
    model = tiny_model(TOKENIZER)
    add_fused_head(model)
    if wrap is not None:
        model.forward = wrap(model.forward)
    forward = model.forward
    add_fused_head(model)
    assert model.forward == forward


def test_the_model_is_whole_after_a_failure():
    model = tiny_model(TOKENIZER)
    add_fused_head(model)

    def fails(states, head):
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        model(input_ids=TOKENS, at_head=fails)
    torch.testing.assert_close(model(TOKENS).logits, tiny_model(TOKENIZER)(TOKENS).logits)


def test_logits_that_the_head_does_not_explain_are_refused():
    model = tiny_model(TOKENIZER)
    run = model.forward

    def shifted(*inputs, **named):
        outputs = run(*inputs, **named)
        outputs.logits = outputs.logits + 1
        return outputs

    model.forward = shifted
    add_fused_head(model)
    with pytest.raises(ValueError, match="does something else"):
        model(input_ids=TOKENS, at_head=logps)
