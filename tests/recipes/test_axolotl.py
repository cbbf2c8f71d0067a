"""axolotl's DPO trainer with the recipe's loss, made by axolotl's own builder."""

from __future__ import annotations

import re
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from pages import blocks
from pairs import pairs_with_shaping, tvkd
from recipes_page import needs
from tiny_models import tiny_model, tiny_tokenizer

import fastpref

pytestmark = pytest.mark.filterwarnings("default")  # of what axolotl imports
TOKENIZER = tiny_tokenizer()
TOKENIZER.pad_token = "<unk>"


@pytest.fixture(scope="module")
def recipe():
    needs("axolotl")
    assert version("trl").startswith("1.9.")  # which axolotl wants, not ours
    import axolotl_tvkd

    return axolotl_tvkd


def options_of(recipe):
    """The page's YAML, which is the docstring's."""
    (page,) = blocks("docs/recipes.md", "yaml", "axolotl")
    found = yaml.safe_load(page)
    text = re.search(r"(?:^    \w+:.*\n)+", recipe.__doc__, flags=re.MULTILINE)
    assert yaml.safe_load(text[0]) == found
    return found


def test_the_plug_in_brings_alpha_to_the_arguments(recipe):
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    given = options_of(recipe)
    manager = PluginManager.get_instance()
    manager.register(*given["plugins"])
    config = recipe.TVKDArgs(**given).model_dump()
    assert manager.get_training_args(DictDefault(config)) == {"tvkd_alpha": 0.7}
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig  # after the plug-in is there

    assert AxolotlDPOConfig("out", tvkd_alpha=0.7, bf16=False, use_cpu=True).tvkd_alpha == 0.7


def test_the_builder_gives_a_plug_ins_trainer_no_model(recipe):
    """Hence the page names `trainer_cls`."""
    from axolotl.core.builders.rl import HFRLTrainerBuilder
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.schemas.enums import RLType

    builder = SimpleNamespace(
        model="model", model_ref=None,
        cfg=SimpleNamespace(plugins=None, rl=RLType.DPO, **{
            name: one for name, one in options_of(recipe).items() if name == "trainer_cls"}),
    )  # fmt: skip
    cls, arguments = HFRLTrainerBuilder._get_trainer_cls(builder, {})
    assert (cls, arguments) == (recipe.TVKDTrainer, ["model", None])
    builder.cfg.plugins = ["one"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PluginManager, "get_trainer_cls", lambda self, cfg: recipe.TVKDTrainer)
        assert HFRLTrainerBuilder._get_trainer_cls(builder, {})[1] == []


def test_it_trains(recipe, tmp_path):
    from axolotl.integrations.base import PluginManager

    PluginManager.get_instance().register(options_of(recipe)["plugins"][0])
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig

    pairs = pairs_with_shaping(4)
    args = AxolotlDPOConfig(
        str(tmp_path), tvkd_alpha=0.7, beta=0.1, use_cpu=True, bf16=False, report_to="none",
        per_device_train_batch_size=4, max_steps=1, save_strategy="no", optim="sgd",
        learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, disable_tqdm=True,
        gradient_checkpointing=False, remove_unused_columns=False, logging_steps=1,
    )  # fmt: skip
    student = tiny_model(TOKENIZER)
    trainer = recipe.TVKDTrainer(
        student, tiny_model(TOKENIZER, seed=1), args=args, processing_class=TOKENIZER,
        train_dataset=Dataset.from_list(pairs),
    )  # fmt: skip
    trainer.train()
    plain = tiny_model(TOKENIZER)
    out = tvkd(plain, fastpref.collate_pairs(pairs, TOKENIZER), beta=0.1, alpha=0.7)
    out.loss.backward()
    for name, value in plain.named_parameters():
        found = trainer.model.state_dict()[name]
        expected = (value - value.grad).detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
    logged = trainer.state.log_history[0]
    margin = float((out.chosen_rewards - out.rejected_rewards).mean())
    assert logged["rewards/margins"] == pytest.approx(margin, rel=1e-4)
    assert logged["loss"] == pytest.approx(float(out.loss.detach()), rel=1e-3)
