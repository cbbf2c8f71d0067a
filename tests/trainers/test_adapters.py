"""LoRA trains adapters only; adapters that a loss at the head would miss are refused."""

from __future__ import annotations

import pytest
from counting import flops_of
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from training import dataset, history, signal, student, trainer

from fastpref.integrations.trl import TVKDConfig, TVKDTrainer

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])


def tvkd(folder, model=None, **options):
    data = dataset(**signal("shaping"))
    return trainer(
        TVKDTrainer, TVKDConfig, folder, model or student(), train_dataset=data, **options
    )


def test_only_adapters_train(tmp_path):
    found = tvkd(tmp_path, peft_config=LORA)
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    history(found)
    for name, value in found.model.state_dict().items():
        assert value.equal(before[name]) == ("lora" not in name), name
    found.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_frozen_head_takes_two_passes_and_gets_no_gradient(tmp_path):
    """Over the vocabulary: logits and the states' gradient; a trained head takes one more.

    Entropy and accuracy come out of these.
    """
    vocab_size = 5000

    def passes(**options):
        found = tvkd(tmp_path, student(vocab_size=vocab_size), **options)
        batch = found._prepare_inputs(next(iter(found.get_train_dataloader())))
        found.compute_loss(found.model, dict(batch)).backward()
        head = found.model.get_output_embeddings()
        tokens = int(batch["completion_mask"][:, 1:].sum())

        def step():
            found.compute_loss(found.model, dict(batch)).backward()

        whole = flops_of(step)
        return whole / (2 * tokens * vocab_size * 16), head.weight.grad

    frozen, gradient = passes(peft_config=LORA)
    assert gradient is None
    trained, gradient = passes()
    assert gradient is not None
    # The rest is the model's layers, and one position for the model's own idea of its logits.
    assert 2 < frozen < 2.6
    assert 3 < trained < 3.8


@pytest.mark.parametrize("wrapped", [False, True], ids=["config", "wrapped"])
def test_an_adapter_on_the_head_is_refused(tmp_path, wrapped):
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(student(), config) if wrapped else student()
    with pytest.raises(ValueError, match="head"):
        tvkd(tmp_path, model, **({} if wrapped else {"peft_config": config}))


@pytest.mark.parametrize("wrapped", [False, True], ids=["config", "wrapped"])
def test_virtual_tokens_are_refused(tmp_path, wrapped):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(student(), config) if wrapped else student()
    with pytest.raises(ValueError, match="peft_config: expected .*virtual tokens"):
        tvkd(tmp_path, model, **({} if wrapped else {"peft_config": config}))
