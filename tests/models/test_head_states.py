"""`head_states` and `lm_head_of` give the loss of a plain loop: with LoRA and with padding, too."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import tiny_model, tiny_tokenizer
from torch.nn.functional import logsigmoid
from torch.nn.parallel import DistributedDataParallel

import fastpref
from fastpref.models import head_states, lm_head_of

TOKENIZER = tiny_tokenizer()
PROMPT, LENGTHS = 3, (9, 6, 7, 8)  # of two pairs, with the prompt
SHAPING = torch.tensor([0.5, -1.0, 2.0, 0.25])
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def model_of(lora: bool):
    model = tiny_model(TOKENIZER)
    torch.manual_seed(1)
    return get_peft_model(model, LORA) if lora else model


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and shifted labels of the same sequences, padded on either side."""
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS)
    tokens, mask = (torch.zeros(len(LENGTHS), width, dtype=torch.int64) for _ in range(2))
    labels = torch.full((len(LENGTHS), width), -100)
    for row, length in enumerate(LENGTHS):
        start = width - length if side == "left" else 0
        part = slice(start, start + length)
        tokens[row, part] = torch.randint(5, 300, (length,), generator=generator)
        mask[row, part] = 1
        response = slice(start + PROMPT, start + length)
        labels[row, response] = tokens[row, response]
    return tokens, mask, labels[:, 1:]


def loss_of(model, side: str) -> torch.Tensor:
    tokens, mask, labels = padded(side)
    hidden = head_states(model, input_ids=tokens, attention_mask=mask)[:, :-1]
    return fastpref.tvkd_loss(hidden, lm_head_of(model), labels, SHAPING).loss


@pytest.mark.parametrize("lora", [False, True], ids=["bare", "lora"])
def test_the_loss_is_that_of_the_models_logits_whatever_the_padding(lora):
    tokens, mask, labels = padded("right")
    model = model_of(lora)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums = torch.where(labels != -100, logps, 0).sum(1)
    chosen, rejected = (0.1 * sums - SHAPING).chunk(2)
    expected = -logsigmoid(chosen - rejected).mean()
    for side in ("right", "left"):
        torch.testing.assert_close(loss_of(model, side), expected)


def test_the_gradient_reaches_the_adapters_and_them_only():
    model = model_of(lora=True)
    loss_of(model, "left").backward()
    for name, parameter in model.named_parameters():
        trained = "lora" in name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name


def test_a_teacher_without_gradients():
    tokens, mask, labels = padded("right")
    model = tiny_model(TOKENIZER, seed=7)
    with torch.no_grad():
        states = head_states(model, input_ids=tokens, attention_mask=mask)
    assert not states.requires_grad
    found = fastpref.teacher_shaping(states, lm_head_of(model), labels)
    values = model(input_ids=tokens, attention_mask=mask).logits.logsumexp(-1)
    last = torch.tensor(LENGTHS) - 1
    expected = values[torch.arange(4), last] - values[:, PROMPT - 1]
    torch.testing.assert_close(found, expected)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_wrapped_model_is_refused():
    """The wrapper would not see what the loss used, and not add up its gradients."""
    wrapped = DistributedDataParallel(tiny_model(TOKENIZER))
    for function in (lm_head_of, lambda model: head_states(model, input_ids=padded("left")[0])):
        with pytest.raises(ValueError, match=r"model: .*add_fused_head before .* Distributed"):
            function(wrapped)


def test_what_else_is_refused():
    tokens = padded("right")[0]
    with pytest.raises(ValueError, match="LlamaModel, which has none"):
        head_states(tiny_model(TOKENIZER).model, input_ids=tokens)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="merge_and_unload"):
        head_states(get_peft_model(tiny_model(TOKENIZER), config), input_ids=tokens)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="virtual tokens"):
        head_states(get_peft_model(tiny_model(TOKENIZER), config), input_ids=tokens)


def test_logits_that_the_head_does_not_explain_are_refused():
    model = tiny_model(TOKENIZER)
    run = model.forward

    def shifted(*inputs, **named):
        outputs = run(*inputs, **named)
        outputs.logits = outputs.logits + 1
        return outputs

    model.forward = shifted
    with pytest.raises(ValueError, match="does something else"):
        head_states(model, input_ids=padded("right")[0])
