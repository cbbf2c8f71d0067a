"""GKD on responses that the student writes, and KTO beside TRL's own trainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_against_logits import assert_same_gradients, batch_of, naive_loss, preference_trainer
from tiny_models import conversation
from training import (
    TOKENIZER,
    dataset,
    history,
    models_for,
    student,
    trainer,
)
from transformers import GenerationConfig
from trl import KTOConfig, KTOTrainer
from trl_trainer import needs_trls_trainer

from fastpref.integrations.trl import PreferenceConfig, PreferenceTrainer
from fastpref.integrations.trl import trainer as trainer_module
from fastpref.integrations.trl.batches import mismatched, written_by

END = TOKENIZER.eos_token_id
WORDS = "what is the color of the sky when the sun goes down".split()
PAIRS = [  # whose prompts have various lengths
    conversation(" ".join(WORDS[: at + 1]), " ".join(WORDS[at:]), " ".join(WORDS[: 2 + at % 4]))
    for at in range(8)
]
DATA = Dataset.from_list(PAIRS)


def gkd(folder, **settings):
    options = {"settings": settings, "train_dataset": DATA, **models_for("gkd")}
    return preference_trainer(folder, "gkd", **options)


def prompts_of(batch):
    prompts = batch["attention_mask"] - batch["completion_mask"]
    rows = zip(batch["input_ids"], prompts, strict=True)
    return [ids[prompt == 1].tolist() for ids, prompt in rows]


def responses_of(batch):
    rows = zip(batch["input_ids"], batch["completion_mask"], strict=True)
    return [ids[response == 1].tolist() for ids, response in rows]


def watch(monkeypatch):
    """The batches that the student wrote, as they come."""
    batches = []

    def watched(*arguments):
        batches.append(written_by(*arguments))
        return batches[-1]

    monkeypatch.setattr(trainer_module, "written_by", watched)
    return batches


def test_the_loss_is_that_of_what_the_student_wrote(tmp_path, monkeypatch):
    batches = watch(monkeypatch)
    found = gkd(tmp_path, lmbda=1.0, max_new_tokens=6)
    batch = batch_of(found)
    torch.manual_seed(0)
    loss = found.compute_loss(found.model, dict(batch))
    loss.backward()
    (written,) = batches
    assert prompts_of(written) == prompts_of(batch)[:2]
    assert responses_of(written) != responses_of(batch)[:2]
    assert all(1 <= len(one) <= 6 for one in responses_of(written))
    naive = student()
    both = {name: torch.cat([values, values]) for name, values in written.items()}
    expected = naive_loss("gkd", naive, both, models_for("gkd"))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, naive)


def test_the_share_of_steps(tmp_path, monkeypatch):
    """The same steps again with the same seed, and none in evaluation."""
    batches, steps = watch(monkeypatch), []
    for _ in "12":
        found = gkd(tmp_path, lmbda=0.4, max_new_tokens=2)
        steps.append([])
        for step in range(100):
            found.state.global_step = step
            steps[-1].append(found._is_on_policy())
    assert steps[0] == steps[1]
    assert 25 < sum(steps[0]) < 55
    found = gkd(tmp_path, lmbda=1.0, max_new_tokens=2, num_train_epochs=1)
    history(found)
    assert len(batches) == 4
    found.evaluate(dataset(4))
    assert len(batches) == 4


def test_responses_end_where_the_student_ends_them(tmp_path):
    """Its end token is the last one, what is written after it is not a response."""
    model = student()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)  # every token is as likely as the next
        model.lm_head.weight[END] += 0.05 * model.model.norm.weight
    found = gkd(tmp_path)
    batch = {name: values[:2] for name, values in batch_of(found).items()}
    torch.manual_seed(2)
    lengths = set()
    for _ in range(10):
        written = written_by(model, batch, TOKENIZER, {"max_new_tokens": 40, "temperature": 0.1})
        for tokens in responses_of(written):
            assert END not in tokens[:-1]
            assert tokens[-1] == END or len(tokens) == 40
            lengths.add(len(tokens))
        # Padding is on the right, where a state never reads it.
        attended = written["attention_mask"]
        assert torch.equal(attended, attended.sort(1, descending=True).values)
    assert len(lengths) > 3


def test_sampling_is_that_of_the_model(tmp_path):
    """Shorter prompts are padded as generation wants them: greedily, alone or in a batch."""
    model = student().eval()
    batch = {name: values[::3] for name, values in batch_of(gkd(tmp_path)).items()}
    lengths = {len(one) for one in prompts_of(batch)}
    options = {"max_new_tokens": 5, "temperature": 1e-4}
    written = written_by(model, batch, TOKENIZER, options)
    greedy = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=END)
    for prompt, response in zip(prompts_of(batch), responses_of(written), strict=True):
        tokens = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(tokens), "generation_config": greedy}
        alone = model.generate(tokens, **options)
        assert alone[0, len(prompt) :].tolist() == response
    assert len(lengths) > 1


@pytest.mark.parametrize("adapter", [False, True])
def test_trains(tmp_path, adapter):
    """And checkpoints activations as before, though not where it generates."""
    checkpointing = {"use_reentrant": False, "preserve_rng_state": False}
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    settings |= {"max_new_tokens": 4, "bf16": True, "lmbda": 1.0}
    lora = LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None
    options = {"settings": settings, "peft_config": lora, **models_for("gkd")}
    found = preference_trainer(tmp_path, "gkd", **options)
    logged = history(found)
    calls = [getattr(one, "_gradient_checkpointing_func", None) for one in found.model.modules()]
    kept = [one.keywords for one in calls if one is not None]
    assert kept and all(one == checkpointing for one in kept)
    assert {"divergence/chosen", "logps/chosen", "logits/chosen"} <= set(logged[0])
    assert "logits/rejected" not in logged[0]


@needs_trls_trainer
def test_kto_follows_trls_own_trainer(tmp_path):
    """Whose dataset has single responses, here in the order of a batch of all pairs."""
    settings = {"train_sampling_strategy": "sequential", "beta": 0.3, "num_train_epochs": 3}
    found = trainer(
        PreferenceTrainer, PreferenceConfig, tmp_path, student(),
        settings={**settings, "method": "kto", "per_device_train_batch_size": 8},
        train_dataset=DATA, **models_for("kto"),
    )  # fmt: skip
    single = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for pair in PAIRS
    ]
    theirs = trainer(
        KTOTrainer, KTOConfig, tmp_path, student(),
        settings={**settings, "per_device_train_batch_size": 16},
        train_dataset=Dataset.from_list(single), **models_for("kto"),
    )  # fmt: skip
    ours, expected = history(found), history(theirs)
    for one, other in zip(ours[:-1], expected[:-1], strict=True):
        for name in ("loss", "grad_norm", "kl", "logps/chosen", "rewards/rejected"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert any(one["kl"] > 0 for one in ours[:-1])
    for one, other in zip(found.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_mismatched_sequences_are_cut():
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0]]),
    }
    found = mismatched(batch, None)
    assert prompts_of(found) == [[1, 2, 3], [5]]
    assert responses_of(found) == [[6, 7], [4]]
    cut = mismatched(batch, 4)
    assert responses_of(cut) == [[6], [4]] and cut["input_ids"].shape == (2, 4)


def test_kto_of_one_pair_has_no_reference_point(tmp_path):
    """Its two responses have the same prompt: nothing is mismatched."""
    settings = {"method": "kto", "per_device_train_batch_size": 7, "num_train_epochs": 1}
    found = preference_trainer(tmp_path, "kto", settings=settings, **models_for("kto"))
    logged = history(found)
    assert logged[1]["kl"] == 0
