"""Small transformers that live in the world, and how well they do there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from world import World

from fastpref import Head, Responses, linear_divergence, linear_logps, sum_responses

HEADS = 2  # of attention
IGNORED = -100


class Decoder(nn.Module):
    """A causal transformer: tokens (n, L) to the hidden states (n, L, H) that its head reads."""

    def __init__(self, tokens: int, length: int, layers: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, HEADS, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, tokens, bias=False)
        self.reward_head = nn.Linear(width, 1, bias=False)  # which only DRDO and its oracle read

    def forward(self, sequences: Tensor) -> Tensor:
        """Hidden states, of which each has read the tokens up to its own."""
        length = sequences.shape[1]
        hidden = self.tokens(sequences) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        normalised: Tensor = self.norm(hidden)
        return normalised

    def head(self) -> Head:
        """The language-model head."""
        return Head(self.lm_head.weight)


def labels_of(sequences: Tensor, prompt_length: int) -> Tensor:
    """The token (n, L - 1) that each state but the last predicts, ignored in prompts."""
    labels = sequences[:, 1:].clone()
    labels[:, : prompt_length - 1] = IGNORED
    return labels


def responses_of(model: Decoder, hidden: Tensor, labels: Tensor) -> Responses:
    """Summed log-probabilities of responses, from states (n, L, H) and labels (n, L - 1)."""
    return sum_responses(linear_logps(hidden[:, :-1], model.head(), labels), labels)


@torch.no_grad()
def sample(model: Decoder, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Prompts (n, P) and a response of the model to each: (n, P + length)."""
    sequences = prompts
    for _ in range(length):
        logits = model.lm_head(model(sequences)[:, -1])
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        sequences = torch.cat([sequences, tokens], 1)
    return sequences


class Measured(NamedTuple):
    """Means over sampled responses with their standard errors."""

    true_return: float
    return_error: float
    kl: float  # from the reference, nats per response
    kl_error: float


@torch.no_grad()
def measure(
    world: World, model: Decoder, reference: Decoder, *, samples: int, generator: torch.Generator
) -> Measured:
    r"""True return of a model, and its KL from a reference, by Monte Carlo.

    Both are unbiased. Only the path is sampled: at each of its steps the KL is that of the two
    distributions, and the return is written as

    .. math:: E[R] = E[V^\mu(s_0)] + E \sum_t \sum_a \pi(a | s_t) (Q^\mu(s_t, a) - V^\mu(s_t))

    with the behaviour's exact values, which leaves less to chance than sums of rewards.
    """
    prompts = world.sample_prompts(samples, generator)
    sequences = sample(model, prompts, world.length, generator)
    labels = labels_of(sequences, world.prompt_length)
    hidden, others = (each(sequences)[:, :-1] for each in (model, reference))
    kls = linear_divergence(
        hidden, model.head(), others, reference.head(), labels, kind="reverse_kl"
    ).sum(1)

    values = world.policy_values(world.behaviour())
    advantages = world.action_values(values) - values[:-1].unsqueeze(-1)
    states = world.states(sequences)[:, world.prompt_length : -1]
    policy = model.lm_head(hidden[:, world.prompt_length - 1 :]).double().softmax(-1)
    gains = (policy * advantages[torch.arange(world.length), states]).sum((1, 2))
    gain, gain_error = mean_and_error(gains)
    return Measured(world.mean_at_start(values) + gain, gain_error, *mean_and_error(kls))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of independent numbers (n,) and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5
