"""OpenRLHF's DPO trainer with the recipe's loss, on the CPU and without DeepSpeed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from recipes_page import needs
from tiny_models import tiny_model, tiny_tokenizer

import fastpref

TOKENIZER = tiny_tokenizer()
TOKENIZER.pad_token = "<unk>"
BETA = 0.1


@pytest.fixture(scope="module")
def recipe():
    """flash-attn wants a GPU; what OpenRLHF imports of it is used for packed batches only."""
    needs("openrlhf")
    names = ["index_first_axis", "pad_input", "rearrange", "unpad_input"]
    for name, inside in {"flash_attn": [], "flash_attn.utils": [], "flash_attn.bert_padding": names,
                         "flash_attn.utils.distributed": ["all_gather"]}.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(dict.fromkeys(inside))
        sys.modules[name] = module
    import openrlhf_tvkd

    return openrlhf_tvkd


class Strategy:
    """What the trainer asks of OpenRLHF's DeepSpeed strategy, in plain PyTorch."""

    accumulated_gradient, ring_attn_group = 1, None

    def __init__(self, packing: bool = False) -> None:
        data = {"prompt_key": None, "chosen_key": "chosen", "rejected_key": "rejected",
                "apply_chat_template": True}  # fmt: skip
        model = {"label_smoothing": 0.0, "ipo_enable": False, "aux_loss_coef": 0.0,
                 "nll_loss_coef": 0.0}  # fmt: skip
        self.args = SimpleNamespace(
            model=SimpleNamespace(**model), ds=SimpleNamespace(packing_samples=packing),
            logger=SimpleNamespace(
                wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1
            ),
            data=SimpleNamespace(**data), train=SimpleNamespace(batch_size=2),
            eval=SimpleNamespace(steps=1), ckpt=SimpleNamespace(save_steps=10),
        )  # fmt: skip
        self.losses: list[float] = []

    def is_rank_0(self):
        return False

    def backward(self, loss, model, optimizer):
        self.losses.append(loss.item())
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler):
        optimizer.step()
        optimizer.zero_grad()

    def all_reduce(self, numbers):
        return numbers

    def get_grad_norm(self, model):
        return 0.0


def conversation(answer):
    return [{"role": "user", "content": "what"}, {"role": "assistant", "content": answer}]


def test_it_trains(recipe):
    from openrlhf.models import Actor

    pairs = [
        {
            "chosen": conversation(good), "rejected": conversation(bad),
            "chosen_shaping": 0.5 * index, "rejected_shaping": -0.25,
        }
        for index, (good, bad) in enumerate(
            (("the sky is blue", "rain"), ("green", "snow and the long winter nights"))
        )
    ]  # fmt: skip
    strategy = Strategy()
    data = recipe.PairsWithShaping(
        Dataset.from_list(pairs), TOKENIZER, 64, strategy, is_dpo=True, num_processors=None
    )
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=data.collate_fn)
    model = recipe.teach_head(Actor(tiny_model(TOKENIZER)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = recipe.TVKDTrainer(
        model=model, ref_model=Actor(tiny_model(TOKENIZER, seed=1)), strategy=strategy,
        tokenizer=TOKENIZER, optim=optimizer, train_dataloader=loader, eval_dataloader=loader,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), beta=BETA, max_epochs=1,
    )  # fmt: skip
    trainer.fit(strategy.args)

    plain = tiny_model(TOKENIZER)
    chosen, chosen_mask, rejected, rejected_mask, extras = next(iter(loader))
    logps = []
    for tokens, mask in ((chosen, chosen_mask), (rejected, rejected_mask)):
        tokens, mask = tokens.squeeze(1), mask.squeeze(1)
        found = plain(tokens, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        found = found.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
        prompts = torch.tensor([[one[0]] for one in extras])
        response = (torch.arange(1, tokens.shape[1]) >= prompts) & (mask[:, 1:] == 1)
        logps.append((found * response).sum(1))
    shaping = torch.tensor([0.0, 0.5, -0.25, -0.25])
    values = BETA * torch.cat(logps) - recipe.TVKDTrainer.alpha * shaping
    loss = -torch.nn.functional.logsigmoid(values[:2] - values[2:]).mean()
    assert strategy.losses == pytest.approx([float(loss.detach())], rel=1e-5)
    loss.backward()
    for name, value in plain.named_parameters():
        found = model.model.state_dict()[name]
        expected = (value - value.grad).detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
    assert fastpref.models.lm_head_of(model.model).softcap is None


def test_packing_is_refused(recipe):
    with pytest.raises(ValueError, match="packing_samples: expected False"):
        recipe.TVKDTrainer(None, strategy=Strategy(packing=True))
