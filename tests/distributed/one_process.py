"""What one process computes on the whole batch, and how far another's gradients may be from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from closeness import assert_no_worse
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastpref

VOCABULARY = 53  # a prime: no shard is even
BETA, ALPHA = 0.7, 0.3


class Batch(NamedTuple):
    tokens: Tensor  # (2B, T + 1)
    labels: Tensor  # (2B, T)
    shaping: Tensor  # (2B,)

    def part(self, index: int, parts: int) -> Batch:
        """Every `parts`-th pair: chosen rows first, as in the whole."""
        return Batch(*(torch.cat([half[index::parts] for half in one.chunk(2)]) for one in self))


def tiny_model(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        **options,
    )
    return LlamaForCausalLM(config).train()


def batch() -> Batch:
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (8, 8))
    labels = tokens[:, 1:].clone()
    labels[:, :2] = -100
    labels[3, 5:] = -100
    return Batch(tokens, labels, torch.randn(8))


def at_head(data: Batch) -> Callable[..., dict[str, Tensor]]:
    def loss(states: Tensor, head: object) -> dict[str, Tensor]:
        return {"loss": tvkd(states[:, :-1], head.weight, data)}

    return loss


def tvkd(hidden: Tensor, weight: Tensor, data: Batch) -> Tensor:
    out = fastpref.tvkd_loss(hidden, weight, data.labels, data.shaping, beta=BETA, alpha=ALPHA)
    return out.loss


def plain_loss(model: nn.Module, data: Batch) -> Tensor:
    """The loss as its formula has it, from full logits."""
    logits = model(input_ids=data.tokens).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, data.labels.clamp_min(0).unsqueeze(2)).squeeze(2)
    sums = torch.where(data.labels == -100, 0, logps).sum(1)
    chosen, rejected = (BETA * sums - ALPHA * data.shaping).chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    return {name: whole(gradient) for name, gradient in found.items()}


def whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


class OneProcess:
    """Loss and gradients of a model on the whole batch, exact, and as plain PyTorch rounds them."""

    def __init__(self, model: nn.Module, data: Batch):
        self.rounded_loss, self.rounded = self._run(model, data)
        self.loss, self.exact = self._run(
            model.double(), data._replace(shaping=data.shaping.double())
        )
        model.float()
        model.zero_grad()

    @staticmethod
    def _run(model: nn.Module, data: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = plain_loss(model, data)
        loss.backward()
        return loss.detach(), {name: one.clone() for name, one in gradients(model).items()}

    def check(self, loss: Tensor, found: dict[str, Tensor]) -> None:
        """Hold loss and gradients to the error that plain PyTorch makes in one process."""
        assert_no_worse(loss.detach(), self.rounded_loss, self.loss, torch.float32)
        assert found.keys() == self.exact.keys(), found.keys() ^ self.exact.keys()
        for name, exact in self.exact.items():
            assert_no_worse(found[name], self.rounded[name], exact, torch.float32)


def mean_over_processes(loss: Tensor) -> Tensor:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def processes() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return dist.get_rank(), dist.get_world_size()
