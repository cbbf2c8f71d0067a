"""DRDO's two stages compute the paper's losses, and their reward heads survive saving."""

from __future__ import annotations

import copy

import formulas
import pytest
import torch
from counting import peak_bytes_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training import (
    TOKENIZER,
    assert_same,
    dataset,
    history,
    signal,
    student,
    trainer,
)
from transformers import AutoModelForCausalLM

from fastpref.integrations.trl import DRDOConfig, DRDOTrainer, OracleConfig, OracleTrainer
from fastpref.models.reward_head import add_reward_head, load_reward_head


def drdo(folder, model=None, **options):
    data = {"train_dataset": dataset(**signal("reward"))} if "oracle_model" not in options else {}
    return trainer(DRDOTrainer, DRDOConfig, folder, model or student(), **{**data, **options})


def oracle(folder, model=None, **options):
    return trainer(OracleTrainer, OracleConfig, folder, model or student(seed=7), **options)


def naive(found, batch):
    """States, shifted labels and rewards of the trainer's model, in plain PyTorch."""
    model = student()
    model.load_state_dict(found.model.state_dict(), strict=False)
    states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    last = batch["attention_mask"].sum(1) - 1
    weight = found.model.reward_head.weight.detach().clone().requires_grad_()
    rewards = states[torch.arange(len(last)), last] @ weight[0]
    return model, states[:, :-1], labels, rewards, weight


def assert_gradients(found, model, weight):
    torch.testing.assert_close(found.model.reward_head.weight.grad, weight.grad)
    ours = dict(found.model.named_parameters())
    for name, other in model.named_parameters():
        torch.testing.assert_close(ours[name].grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 0.5, "gamma": 1.0, "length_normalize": True}, {"detach_focal": True}],
    ids=["plain", "options", "detached"],
)
def test_the_loss_is_the_formula(tmp_path, settings):
    found = drdo(tmp_path, settings=settings)
    batch = found._prepare_inputs(next(iter(found.get_train_dataloader())))
    loss = found.compute_loss(found.model, dict(batch))
    loss.backward()
    model, states, labels, rewards, weight = naive(found, batch)
    oracle_rewards = torch.cat([batch["chosen_reward"], batch["rejected_reward"]])
    expected = formulas.drdo_loss(
        states, model.lm_head.weight, labels, rewards, oracle_rewards,
        **{"alpha": 0.1, "gamma": 2.0, **settings},
    )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_gradients(found, model, weight)


def test_the_oracles_loss_is_the_formula(tmp_path):
    found = oracle(tmp_path, student(), settings={"sft_weight": 0.3})
    batch = found._prepare_inputs(next(iter(found.get_train_dataloader())))
    loss = found.compute_loss(found.model, dict(batch))
    loss.backward()
    model, states, labels, rewards, weight = naive(found, batch)
    logps = formulas.linear_logps(states, model.lm_head.weight, labels).chunk(2)[0]
    chosen, rejected = rewards.chunk(2)
    lengths = (labels.chunk(2)[0] != -100).sum(1)
    expected = formulas.oracle_loss(chosen, rejected, logps.sum(1) / lengths, sft_weight=0.3)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_gradients(found, model, weight)


def test_both_stages(tmp_path):
    """The oracle's folder is the student's oracle; its rewards are those of the oracle itself."""
    first = oracle(tmp_path / "oracle", settings={"num_train_epochs": 4})
    logged = history(first)
    assert {"losses/preference", "losses/nll", "rewards/margins"} <= set(logged[0])
    assert logged[-2]["losses/preference"] < logged[0]["losses/preference"]
    first.save_model()

    second = drdo(tmp_path / "student", oracle_model=str(tmp_path / "oracle"))
    batch = second._prepare_inputs(next(iter(second.get_train_dataloader())))
    _, _, _, rewards, _ = naive(first, batch)
    second.compute_loss(second.model, dict(batch))
    chosen, rejected = rewards.detach().chunk(2)
    margin = second._metrics["train"]["rewards/oracle_margin"][0]
    assert margin == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)
    logged = history(second)
    assert {"losses/reward", "losses/preference", "rewards/oracle_margin"} <= set(logged[0])
    frozen = second.readers[0].model
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_the_reward_head_is_saved_and_found_again(tmp_path, monkeypatch):
    first = drdo(tmp_path)
    first.train()
    first.save_model()
    assert not any("reward_head" in name for name in load_file(tmp_path / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    load_reward_head(model, tmp_path)
    torch.testing.assert_close(model.state_dict(), first.model.state_dict())
    named = drdo(tmp_path / "again", str(tmp_path))
    torch.testing.assert_close(named.model.reward_head.weight, first.model.reward_head.weight)
    monkeypatch.chdir(tmp_path)  # which a new model, that has no name, did not come from
    new = drdo(tmp_path / "new", student())
    assert not new.model.reward_head.weight.equal(first.model.reward_head.weight)


def test_columns_are_as_good_as_the_oracle(tmp_path):
    teacher = student(seed=7)
    add_reward_head(teacher)
    along = drdo(
        tmp_path, settings={"per_device_train_batch_size": 8, "num_train_epochs": 1},
        oracle_model=teacher, oracle_processing_class=TOKENIZER,
    )  # fmt: skip
    loader = along.get_train_dataloader()
    batch = along._prepare_inputs(next(iter(loader)))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    rewards = along.readers[0](batch, labels, 8)[0]["oracle_rewards"]
    order = {tuple(ids): at for at, ids in enumerate(along.train_dataset["chosen_ids"][:])}
    lengths = batch["completion_mask"].sum(1)
    columns = {name: [0.0] * 8 for name in ("chosen_reward", "rejected_reward")}
    for at in range(8):
        ids = batch["input_ids"][at][batch["completion_mask"][at] == 1]
        assert len(ids) == lengths[at]
        row = order[tuple(ids.tolist())]
        columns["chosen_reward"][row] = rewards[at].item()
        columns["rejected_reward"][row] = rewards[at + 8].item()
    found = drdo(
        tmp_path / "columns", settings={"per_device_train_batch_size": 8, "num_train_epochs": 1},
        train_dataset=dataset(**columns),
    )  # fmt: skip
    found.model.load_state_dict(along.model.state_dict())
    assert_same(history(found), history(along))


def test_the_reward_head_has_the_dtype_of_what_trains():
    model = student().bfloat16()
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    add_reward_head(model)
    assert model.reward_head.weight.dtype == torch.bfloat16
    add_reward_head(adapted)
    assert adapted.get_base_model().reward_head.weight.dtype == torch.float32


def test_a_model_brings_the_reward_head_of_its_folder(tmp_path):
    first = oracle(tmp_path / "oracle")
    first.save_model()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "oracle")
    second = oracle(tmp_path / "on", model)
    torch.testing.assert_close(second.model.reward_head.weight, first.model.reward_head.weight)


@pytest.mark.parametrize("make", [drdo, oracle])
def test_no_logits_exist(tmp_path, make):
    vocab_size = 150_000
    model = student(vocab_size=vocab_size, hidden_size=4)
    settings = {"per_device_train_batch_size": 8, "scratch_bytes": 0}
    found = make(tmp_path, model, settings=settings)
    batch = found._prepare_inputs(next(iter(found.get_train_dataloader())))
    logits = batch["input_ids"].numel() * vocab_size * 4
    head = vocab_size * 4 * 4

    def step() -> None:
        found.compute_loss(found.model, dict(batch)).backward()

    step()
    # Gradients of head and embedding, as they are computed and added up; and tiles of 12 MiB.
    assert peak_bytes_of(step) < 6 * head + 2 * 12 * 2**20 < logits / 3
