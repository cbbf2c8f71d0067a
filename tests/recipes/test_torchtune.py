"""A DPO recipe of torchtune trains with the mix-in, on a tiny Llama, as plain PyTorch does."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from pages import blocks
from recipes_page import needs

import fastpref

needs("torchtune")
import torchtune_tvkd  # noqa: E402  # after the skip
from omegaconf import OmegaConf  # noqa: E402  # after the skip
from torchtune import config  # noqa: E402  # after the skip
from torchtune.models.llama3_1 import llama3_1  # noqa: E402  # after the skip
from torchtune.models.llama3_2 import lora_llama3_2  # noqa: E402  # after the skip
from torchtune.rlhf import get_batch_log_probs  # noqa: E402  # after the skip

pytestmark = pytest.mark.filterwarnings("default")  # of torchao, and of torchtune's imports
SIZES = {"vocab_size": 40, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16,
         "max_seq_len": 64, "intermediate_dim": 24}  # fmt: skip


class Words:
    """A tokenizer of torchtune's protocol: a letter is a token."""

    pad_id = 0

    def tokenize_messages(self, messages: list, **_: object):
        found = [(1 + ord(one) % 38, each.masked) for each in messages for one in each.text_content]
        return tuple(map(list, zip(*found, strict=True)))


def recipe_class():
    """The recipe's own class: torchtune ships recipes as files that nothing may import."""
    path = importlib.util.find_spec("recipes").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("recipe", f"{path}/lora_dpo_single_device.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRADPORecipeSingleDevice


@pytest.mark.parametrize("tied", [False, True])
def test_log_probabilities(tied):
    torch.manual_seed(0)
    build = lora_llama3_2 if tied else llama3_1
    lora = {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4} if tied else {}
    model = build(**SIZES, **lora)
    tokens, labels = torch.randint(40, (4, 9)), torch.randint(40, (4, 9))
    labels[:, :3] = labels[1, 6:] = -100
    found = torchtune_tvkd.logps_of_responses(model, tokens, labels)
    expected = get_batch_log_probs(model(tokens), labels)  # the model is as it was
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found, expected = (
        torch.autograd.grad(one.sum(), model.layers[0].mlp.w1.weight) for one in (found, expected)
    )
    torch.testing.assert_close(*found, *expected, rtol=1e-4, atol=1e-5)


def test_other_outputs_are_refused():
    model = llama3_1(**SIZES)
    model.output = torch.nn.Sequential(model.output)
    with pytest.raises(ValueError, match="expected a plain output projection, got Sequential"):
        torchtune_tvkd.logps_of_responses(model, *torch.zeros(2, 1, 4, dtype=torch.int64))


def test_the_recipe_trains(tmp_path):
    pairs = [
        {
            "chosen": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": good}],
            "rejected": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": bad}],
            "chosen_shaping": 0.5, "rejected_shaping": -0.25,
        }
        for good, bad in (("yes", "nothing"), ("of course", "no"))
    ]  # fmt: skip
    file = str(tmp_path / "pairs.parquet")
    Dataset.from_list(pairs).to_parquet(file)
    (page,) = blocks("docs/recipes.md", "yaml", "torchtune")
    options = yaml.safe_load(page)
    options["dataset"]["data_files"] = file

    class Recipe(torchtune_tvkd.TVKDRecipe, recipe_class()):
        def save_checkpoint(self, epoch):
            pass

    recipe = object.__new__(Recipe)  # its __init__ wants the checkpoint of a real model
    torch.manual_seed(0)
    lora = {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4}
    recipe._model = lora_llama3_2(**SIZES, **lora)
    recipe._tokenizer, recipe._device = Words(), torch.device("cpu")
    options = OmegaConf.create(options)
    recipe._loss_fn = config.instantiate(options.loss)
    recipe._sampler, recipe._dataloader = recipe._setup_data(options.dataset, False, 2)
    batch = next(iter(recipe._dataloader))
    before = copy.deepcopy(recipe._model)
    logged = []
    recipe.__dict__ |= {
        "activations_handling_ctx": contextlib.nullcontext(), "_model_compile": False,
        "epochs_run": 0, "total_epochs": 1, "_steps_per_epoch": 1, "max_steps_per_epoch": None,
        "_gradient_accumulation_steps": 1, "_lr_scheduler": None, "global_step": 0,
        "_log_every_n_steps": 1, "_log_peak_memory_stats": False,
        "_optimizer": torch.optim.SGD(recipe._model.parameters(), lr=1.0),
        "_metric_logger": SimpleNamespace(log_dict=lambda one, step: logged.append(one)),
    }  # fmt: skip
    recipe.train()
    tokens, labels, shaping = batch
    logps = get_batch_log_probs(before(tokens), labels)
    lengths = (labels[:, 1:] != -100).sum(1)
    out = fastpref.losses.tvkd(fastpref.Responses(logps, lengths), shaping, beta=0.01, alpha=0.7)
    assert shaping.tolist() == [0.5, 0.5, -0.25, -0.25]
    assert logged[0]["loss"] == pytest.approx(float(out.loss.detach()), rel=1e-5)
    out.loss.backward()
    for (name, old), new in zip(before.named_parameters(), recipe._model.parameters(), strict=True):
        torch.testing.assert_close(new, old - old.grad, rtol=1e-4, atol=1e-5, msg=name)
