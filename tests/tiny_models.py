"""Small language models with tokenizers and templates of their own, and rows to read."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = [
    "what is the color of the sky it is blue or green when the sun goes down",
    "say something nice about rain and snow and the long winter nights of the north",
]


def tiny_tokenizer(vocab_size: int = 120) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer: another vocabulary size gives other tokens for the same text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 256,
        special_tokens=["<unk>", "<s>", "</s>", "<user>", "<assistant>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(tokenizer: Any, *, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random Llama; its head is scaled up, so that states differ in value."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            **options,
        }
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    return model


def conversation(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """A row in the conversational format with an explicit prompt."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def rows(count: int = 7) -> list[dict[str, Any]]:
    """Conversations of various lengths."""
    words = " ".join(TEXT * 4).split()
    return [
        conversation(
            f"what is {words[i]}", " ".join(words[: 3 + i % 9]), " ".join(words[i : 2 * i + 2])
        )
        for i in range(count)
    ]
