"""What inference servers answer, as columns of a dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.checks import refuse

NOTHING = -9999.0  # what servers write for minus infinity, which JSON does not have
ROUNDING = 1e-2  # of a server's probabilities


def topk_of_server(answer: Sequence[Mapping[str, Any] | None]) -> tuple[Tensor, Tensor]:
    r"""The likeliest tokens of every position, from the ``prompt_logprobs`` of a server's answer.

    .. math:: \log p(v \mid s_t), \quad v \in K_t

    That is how `vLLM <https://docs.vllm.ai/en/latest/api/vllm/logprobs.html>`_ and servers like it
    say what a model thinks of a text: ``choices[0].prompt_logprobs`` of an answer to
    ``/v1/completions`` with ``prompt_logprobs=k``. A position has ``k`` tokens, and that of the
    prompt itself where it is not among them.

    Args:
        answer: T positions: None, or a dictionary from tokens to dictionaries with a ``logprob`` in
            nats. Entry t is what the tokens before it say of token t of the prompt; of the first
            there is nothing to say. Other keys are not read.

    Returns:
        Tokens (T, K) int64, the likeliest first, and their log-probabilities (T, K) float32 in
        nats, K being the most tokens that a position has. Where one has fewer, token 0 with
        minus infinity fills it up.

    Raises:
        ValueError: Something else than such positions, none with a token, or numbers that are no
            log-probabilities: NaN, or probabilities of a position that are more than 1 together.

    Example:
        >>> answer = [None, {"7": {"logprob": -0.5, "rank": 1}},
        ...           {"3": {"logprob": -1.5, "rank": 2}, "9": {"logprob": -0.25, "rank": 1}}]
        >>> token_ids, token_logps = topk_of_server(answer)
        >>> token_ids.tolist()
        [[0, 0], [7, 0], [9, 3]]
        >>> token_logps.tolist()
        [[-inf, -inf], [-0.5, -inf], [-0.25, -1.5]]
    """
    if isinstance(answer, str | Mapping) or not isinstance(answer, Sequence):
        expected = "a list of positions (choices[0]['prompt_logprobs'])"
        refuse("answer", expected, type(answer).__name__)
    positions = [_tokens_of(entry, position) for position, entry in enumerate(answer)]
    count = max(map(len, positions), default=0)
    if not count:
        refuse("answer", "at least one position with tokens (prompt_logprobs above 0)", "none")
    token_ids = torch.zeros(len(positions), count, dtype=torch.int64)
    token_logps = torch.full((len(positions), count), -math.inf)
    for position, found in enumerate(positions):
        if found:
            tokens, logps = zip(*found, strict=True)
            token_ids[position, : len(found)] = torch.tensor(tokens)
            token_logps[position, : len(found)] = torch.tensor(logps)
    return token_ids, token_logps


def _tokens_of(entry: Mapping[str, Any] | None, position: int) -> list[tuple[int, float]]:
    """Tokens and log-probabilities of one position, the likeliest first."""
    if entry is None:
        return []
    try:
        found = [(int(token), float(one["logprob"])) for token, one in entry.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        expected = 'None, or tokens with their numbers ({"7": {"logprob": -0.5}})'
        refuse(f"answer[{position}]", expected, repr(entry)[:80])
    found = [(token, -math.inf if logp <= NOTHING else logp) for token, logp in found]
    if not sum(math.exp(min(logp, 1.0)) for _, logp in found) <= 1 + ROUNDING:  # nor NaN
        expected = "log-probabilities (in vLLM logprobs_mode='raw_logprobs')"
        refuse(f"answer[{position}]", expected, repr([logp for _, logp in found])[:80])
    return sorted(found, key=lambda one: -one[1])
