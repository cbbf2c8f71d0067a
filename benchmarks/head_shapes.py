"""Head shapes of real models, and random hidden states and weights that behave like theirs."""

from typing import NamedTuple

import torch
from inputs import InputError
from torch import Tensor

# A softmax over independent normal logits is far flatter than a language model's, which would
# flatter no one and wrong those who skip small probabilities. With these numbers a row has about
# 130 probabilities above 2**-12, and 7 % of the mass lies below.
POPULARITY_EXPONENT = 1.2  # logit of a token with rank r, before its context: -1.2 log r
CONTEXT_DEVIATION = 2.5  # standard deviation of the logits that the context adds
LARGEST_LABEL_BONUS = 16.0  # the label's logit gains between 0 and this: tokens differ in certainty


class HeadShape(NamedTuple):
    """A language-model head: `key` for the command line, `name` for tables."""

    key: str
    name: str
    hidden_size: int
    vocab_size: int


SHAPES = {
    shape.key: shape
    for shape in (
        HeadShape("llama-3.2-1b", "Llama-3.2-1B", 2048, 128_256),
        HeadShape("qwen3-1.7b", "Qwen3-1.7B", 2048, 151_936),
        HeadShape("gemma-3-1b", "Gemma-3-1B", 1152, 262_144),
        HeadShape("llama-3.1-8b", "Llama-3.1-8B", 4096, 128_256),
        HeadShape("smollm2-135m", "SmolLM2-135M", 576, 49_152),
    )
}
DEFAULT_SHAPES = {
    "cuda": "llama-3.2-1b,qwen3-1.7b,gemma-3-1b,llama-3.1-8b",
    "cpu": "smollm2-135m",
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


class InputSet(NamedTuple):
    """What one call reads. No tensor is shared between two sets, so that none waits in a cache."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,) int64, all valid
    coefficients: Tensor  # (N,) float32, the incoming gradient of each token's log-probability

    def nbytes(self) -> int:
        """Bytes of the hidden states and the weight."""
        return self.hidden.nbytes + self.weight.nbytes


def parse_shapes(text: str) -> list[HeadShape]:
    """Parse "llama-3.2-1b,2048x32000" into shapes: names from `SHAPES`, or hidden x vocabulary."""
    return [_parse_shape(part.strip()) for part in dict.fromkeys(text.split(","))]


def _parse_shape(text: str) -> HeadShape:
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 1 for size in sizes):
        raise InputError(
            f"--shapes: expected names ({', '.join(SHAPES)}) or HIDDENxVOCABULARY such as "
            f"2048x32000; got {text!r}"
        )
    return HeadShape(text, f"{text} head", int(sizes[0]), int(sizes[1]))


def make_inputs(shape: HeadShape, tokens: int, seed: int, device: str) -> InputSet:
    """Draw hidden states, weight, labels and coefficients in the dtype that the device trains in.

    The logit of token j is its popularity (Zipf's law, carried by the first hidden dimension) plus
    a normal number from the other dimensions; labels follow the popularity and gain a bonus.
    """
    generator = torch.Generator(device).manual_seed(seed)
    size, vocab = shape.hidden_size, shape.vocab_size

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    ranks = 1 + torch.randperm(vocab, generator=generator, device=device)
    popularity = -POPULARITY_EXPONENT * ranks.float().log()
    shares = torch.softmax(popularity, 0)
    labels = torch.multinomial(shares, tokens, replacement=True, generator=generator)

    weight, hidden = normal(vocab, size), normal(tokens, size)
    weight *= CONTEXT_DEVIATION / size**0.5
    weight[:, 0] = 0
    towards_label = weight[labels]
    bonus = torch.rand(tokens, 1, generator=generator, device=device) * LARGEST_LABEL_BONUS
    hidden += bonus * towards_label / towards_label.square().sum(1, keepdim=True)
    loudness = size**0.5 / 2  # of the first dimension; such dimensions are usual in real models
    hidden[:, 0] = loudness
    weight[:, 0] = (popularity - popularity.mean()) / loudness

    signs = torch.randint(0, 2, (tokens,), generator=generator, device=device) * 2.0 - 1
    dtype = DTYPES[device]
    return InputSet(hidden.to(dtype), weight.to(dtype), labels, signs / tokens)
