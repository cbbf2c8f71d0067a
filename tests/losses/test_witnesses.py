"""With ``alpha=0`` TVKD is DPO: Liger's and TRL's own code say the same on the same batch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from closeness import assert_no_worse
from torch import Tensor

import fastpref
from fastpref import Head

BETA = 0.3


def dpo(hidden: Tensor, head: Head | Tensor, labels: Tensor, **options: Any) -> Tensor:
    nothing = hidden.new_zeros(len(labels))
    return fastpref.tvkd_loss(hidden, head, labels, nothing, alpha=0.0, beta=BETA, **options).loss


# Liger


@pytest.fixture(scope="module")
def liger() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported package, none of ours
        chunked_loss = pytest.importorskip(
            "liger_kernel.chunked_loss", reason="liger-kernel is not installed"
        )
    return chunked_loss.LigerFusedLinearDPOLoss


def liger_batch(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(70, (6, 7), generator=generator)
    labels[:, :2] = -100  # the prompt
    labels[1, 5:] = labels[3, 6:] = labels[4, 3:] = -100  # padding
    labels[2, 4] = -100  # a gap
    return {
        "hidden": normal(6, 7, 16).requires_grad_(),
        "weight": normal(70, 16).requires_grad_(),
        "bias": normal(70).requires_grad_(),
        "ref_hidden": normal(6, 7, 12),
        "ref_weight": normal(70, 12),
        "ref_bias": normal(70),
        "labels": labels,
    }


@pytest.mark.parametrize("referenced", [False, True], ids=["reference-free", "with a reference"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_equals_liger(liger, referenced, trained, chunk_size):
    def run(dtype: torch.dtype, theirs: bool) -> list[Tensor]:
        batch = liger_batch(dtype)
        for name in ("weight", "bias"):
            batch[name].requires_grad_(trained)
        if theirs:
            witness = liger(
                beta=BETA, compiled=False, use_ref_model=referenced, chunk_size=chunk_size
            )
            reference = [batch[f"ref_{name}"] for name in ("hidden", "weight", "bias")]
            loss, _ = witness(
                batch["weight"],
                batch["hidden"],
                batch["labels"],
                batch["bias"],
                *(reference if referenced else []),
            )
        else:
            ref_logps = fastpref.linear_logps(
                batch["ref_hidden"], Head(batch["ref_weight"], batch["ref_bias"]), batch["labels"]
            ).sum(1)
            loss = dpo(
                batch["hidden"],
                Head(batch["weight"], batch["bias"]),
                batch["labels"],
                ref_logps=ref_logps if referenced else None,
            )
        wanted = [batch[name] for name in ("hidden", "weight", "bias")]
        wanted = [leaf for leaf in wanted if leaf.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, wanted)]

    exact, ours, theirs = run(torch.float64, False), run(torch.float32, False), None
    theirs = run(torch.float32, True)
    for one, witness, expected in zip(ours, theirs, exact, strict=True):
        assert_no_worse(one, witness, expected, torch.float32)
        assert_no_worse(witness, one, expected, torch.float32)


# TRL


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real `DPOTrainer` with a tiny model, a tiny reference model and four pairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the imported packages, none of ours
        trl = pytest.importorskip("trl", "1.16", reason="trl >= 1.16 is not installed")
        datasets = pytest.importorskip("datasets")
        tokenizers = pytest.importorskip("tokenizers")
        transformers = pytest.importorskip("transformers")

        words = {word: n for n, word in enumerate("<pad> <eos> <unk> a b c d e f g h".split())}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.WhitespaceSplit(),
                tokenizers.pre_tokenizers.Split("<eos>", "isolated"),
            ]
        )
        pairs = datasets.Dataset.from_dict(
            {
                "prompt": ["a b c", "d", "e f", "g g g g"],
                "chosen": [" d e", " a b c d e f", " c", " h a"],
                "rejected": [" f", " b b", " d d d a", " b c d e"],
            }
        )

        def model(seed: int) -> Any:
            torch.manual_seed(seed)
            return transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=len(words),
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    initializer_range=0.5,
                    tie_word_embeddings=False,
                    pad_token_id=0,
                    bos_token_id=None,
                    eos_token_id=1,
                )
            )

        return trl.DPOTrainer(
            model(0),
            model(1),
            args=trl.DPOConfig(
                output_dir=str(tmp_path_factory.mktemp("trl")),
                beta=BETA,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                disable_tqdm=True,
                per_device_train_batch_size=4,
            ),
            train_dataset=pairs,
            processing_class=transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
            ),
        )


def gradients_of(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def our_dpo(model: Any, ref_model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients of every parameter from the hidden states of the same models."""
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    labels = ids.masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]

    def hidden(one: Any) -> Tensor:
        return one.model(input_ids=ids, attention_mask=attention).last_hidden_state[:, :-1]

    ref_logps = None
    if ref_model is not None:
        with torch.no_grad():
            head = ref_model.lm_head.weight
            ref_logps = fastpref.linear_logps(hidden(ref_model), head, labels).sum(1)
    loss = dpo(hidden(model), model.lm_head.weight, labels, ref_logps=ref_logps)
    return [loss.detach(), *gradients_of(model, loss)]


@pytest.mark.filterwarnings("ignore:::transformers", "ignore:::trl", "ignore:::accelerate")
@pytest.mark.parametrize("referenced", [False, True], ids=["zero reference", "with a reference"])
def test_equals_trl(trainer, referenced, monkeypatch):
    inputs = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
    assert inputs["completion_mask"].sum(1).tolist() == [3, 7, 2, 3, 2, 3, 5, 5]
    ref_model = trainer.ref_model if referenced else None
    their_inputs = dict(inputs)
    if not referenced:
        monkeypatch.setattr(trainer, "precompute_ref_logps", True)
        their_inputs |= {f"ref_{name}_logps": torch.zeros(4) for name in ("chosen", "rejected")}

    loss = trainer.compute_loss(trainer.model, their_inputs)
    theirs = [loss.detach(), *gradients_of(trainer.model, loss)]
    ours = our_dpo(trainer.model, ref_model, inputs)
    exact = our_dpo(
        copy.deepcopy(trainer.model).double(),
        None if ref_model is None else copy.deepcopy(ref_model).double(),
        inputs,
    )
    assert len(theirs) == len(list(trainer.model.parameters())) + 1
    assert all((gradient != 0).any() for gradient in exact)
    for one, witness, expected in zip(ours, theirs, exact, strict=True):
        assert_no_worse(one, witness, expected, torch.float32)
        assert_no_worse(witness, one, expected, torch.float32)
