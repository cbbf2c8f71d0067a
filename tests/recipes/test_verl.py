"""verl's own batches and micro-batches of pairs, and the recipe's loss of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from pairs import pairs_with_shaping, tvkd
from recipes_page import needs
from tiny_models import tiny_model, tiny_tokenizer

import fastpref

pytestmark = pytest.mark.filterwarnings("default")  # of ray, and of what it imports
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def recipe():
    needs("verl")
    import verl_tvkd

    return verl_tvkd


def test_the_parts_of_micro_batches_are_the_loss_of_the_batch(recipe, tmp_path):
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.utils import tensordict_utils as tu
    from verl.workers.engine.utils import prepare_micro_batches

    pairs = pairs_with_shaping(4)
    Dataset.from_list(pairs).to_parquet(tmp_path / "pairs.parquet")
    model = tiny_model(TOKENIZER)
    data = recipe.Pairs(str(tmp_path / "pairs.parquet"), TOKENIZER, 64)
    assert len(data) == 4
    loader = StatefulDataLoader(data, batch_size=4, collate_fn=lambda rows: rows)
    loader.collate_fn = recipe.PairCollator("no_padding")  # as the recipe does
    (rows,) = loader
    settings = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4, "global_batch_size": 4,
                "dp_size": 2, "pad_mode": "no_padding"}  # fmt: skip
    batch = tu.get_tensordict(tensor_dict=rows, non_tensor_dict=settings)
    micro_batches, _ = prepare_micro_batches(batch)
    assert len(micro_batches) == 2
    total = 0
    for micro in micro_batches:
        ids = micro["input_ids"]
        logps = [
            model(one.unsqueeze(0)).logits[0].log_softmax(-1).gather(-1, after.unsqueeze(-1))
            for one, after in zip(ids.unbind(), _following(ids), strict=True)
        ]
        logps = torch.nested.nested_tensor_from_jagged(torch.cat(logps).squeeze(-1), ids.offsets())
        loss, metrics = recipe.tvkd({"log_probs": logps}, micro, dp_group=None)
        total = total + loss
        assert metrics == {}
    expected = tvkd(model, fastpref.collate_pairs(pairs, TOKENIZER, max_length=64),
                    beta=recipe.BETA, alpha=recipe.ALPHA).loss  # fmt: skip
    # Two processes' mean halves what each makes of its part.
    torch.testing.assert_close(total, 2 * expected, rtol=1e-5, atol=1e-6)
    found, right = (
        torch.autograd.grad(one, [*model.parameters()]) for one in (total, 2 * expected)
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def _following(ids):
    """What verl takes for the token after each: at the end of a sequence, the next one's first."""
    flat = ids.values().roll(-1)
    return torch.nested.nested_tensor_from_jagged(flat, ids.offsets()).unbind()


def test_the_trainer_is_verls(recipe, monkeypatch):
    """The methods that it changes exist, and set what verl's read."""
    from verl.trainer.sft_trainer import SFTTrainer

    given = []
    monkeypatch.setattr(
        SFTTrainer, "_build_engine",
        lambda self: setattr(self, "training_client", SimpleNamespace(
            set_loss_fn=lambda loss_fn: given.append(loss_fn))),
    )  # fmt: skip
    monkeypatch.setattr(
        SFTTrainer, "_build_dataloader",
        lambda self: self.__dict__.update(
            train_dataloader=SimpleNamespace(collate_fn=None), val_dataloader=None),
    )  # fmt: skip
    trainer = object.__new__(recipe.TVKDTrainer)
    data = SimpleNamespace(use_dynamic_bsz=True, micro_batch_size_per_gpu=2, pad_mode="no_padding")
    trainer.config = SimpleNamespace(data=data)
    trainer.model_config = SimpleNamespace(tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="expected use_dynamic_bsz=False"):
        trainer._build_dataset()
    trainer._build_engine()
    assert given == [recipe.tvkd]
    trainer._build_dataloader()
    assert isinstance(trainer.train_dataloader.collate_fn, recipe.PairCollator)


def test_the_names_of_the_configuration(recipe):
    """Every option of the docstring's command is one of verl's."""
    import re
    from importlib.resources import files

    from omegaconf import OmegaConf

    config = OmegaConf.load(str(files("verl.trainer.config") / "sft_trainer_engine.yaml"))
    names = re.findall(r"((?:data|trainer)\.\w+)=", recipe.__doc__)
    assert len(names) >= 6
    for name in names:
        group, option = name.split(".")
        assert option in config[group], name
