"""The head of a transformers model, and what it reads, give the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from fastpref import reference
from fastpref.integrations.transformers import check_head, head_states, lm_head_of

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SIZES, "intermediate_size": 16, "num_key_value_heads": 1, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Qwen2": LLAMA,
    "Gemma2": {**LLAMA, "head_dim": 8, "final_logit_softcapping": 5.0},
    "Cohere": {**LLAMA, "logit_scale": 0.25},
    "Granite": {**LLAMA, "logits_scaling": 4.0},
    "HyperCLOVAX": {**LLAMA, "logits_scaling": 4.0},
    "Phi": {**LLAMA, "partial_rotary_factor": 0.5},
    "GPT2": {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "GPTNeoX": {**SIZES, "intermediate_size": 16},
}


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(30)
        if getattr(head, "bias", None) is not None:
            head.bias.normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_models(family):
    model = tiny(family)
    tokens = torch.randint(1, 40, (2, 6))
    head = lm_head_of(model)
    states, first = head_states(model, input_ids=tokens)
    expected = model(input_ids=tokens).logits
    logits = reference.logits(
        states,
        head.weight,
        bias=head.bias,
        temperature=1.0,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )
    torch.testing.assert_close(logits, expected)
    assert first.shape == (2, 1, 40)
    torch.testing.assert_close(first, expected[:, :1])
    check_head(head, states, first)


def test_a_bias_and_a_softcap_are_found():
    assert lm_head_of(tiny("Phi")).bias is not None
    assert lm_head_of(tiny("Gemma2")).softcap == 5.0
    assert lm_head_of(tiny("HyperCLOVAX")).logit_scale == 4.0
    assert lm_head_of(tiny("Granite")).logit_scale == 0.25


@pytest.mark.parametrize(
    "change",
    [{"logit_scale": 2.0}, {"softcap": 1.0}, {"bias": torch.linspace(-3, 3, 40)}],
    ids=["scale", "softcap", "bias"],
)
@torch.no_grad()
def test_a_head_that_is_not_the_models_is_refused(change):
    model = tiny("Llama")
    states, first = head_states(model, input_ids=torch.randint(1, 40, (2, 6)))
    with pytest.raises(ValueError, match="does something else"):
        check_head(lm_head_of(model)._replace(**change), states, first)


def test_the_model_is_left_as_it_was():
    model = tiny("Llama")
    tokens = torch.randint(1, 40, (2, 6))
    head_states(model, input_ids=tokens)
    assert model(input_ids=tokens).logits.shape == (2, 6, 40)


def test_models_without_a_head_are_refused():
    config = transformers.LlamaConfig(**LLAMA)
    with pytest.raises(ValueError, match="LlamaModel, which has none"):
        lm_head_of(transformers.LlamaModel(config))
    with pytest.raises(ValueError, match="encoder-decoder"):
        lm_head_of(
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=40, d_model=16, num_layers=1, d_ff=16, num_heads=2)
            )
        )


def test_heads_that_cannot_be_read_are_refused():
    model = tiny("Llama")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="in memory"):
        lm_head_of(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(40, 16, dtype=torch.int8), False)
    with pytest.raises(ValueError, match="left out of quantisation"):
        lm_head_of(model)
