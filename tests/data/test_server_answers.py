"""A server's answer becomes tokens and log-probabilities, or is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastpref.data import topk_of_server

INF = math.inf
ANSWER = json.loads("""[null,
  {"14924": {"logprob": -1.18, "rank": 1, "decoded_token": "Question"},
   "791": {"logprob": -3.68, "rank": 4, "decoded_token": "The"},
   "755": {"logprob": -2.18, "rank": 2, "decoded_token": "def"}},
  {"3": {"logprob": 0.0, "rank": 1, "decoded_token": "a"},
   "9": {"logprob": -9999.0, "rank": 2, "decoded_token": "b"}}]""")


def test_what_vllm_writes():
    tokens, logps = topk_of_server(ANSWER)
    assert (tokens.dtype, logps.dtype) == (torch.int64, torch.float32)
    assert tokens.tolist() == [[0, 0, 0], [14924, 755, 791], [3, 9, 0]]
    expected = [[-INF] * 3, [-1.18, -2.18, -3.68], [0.0, -INF, -INF]]
    assert torch.equal(logps, torch.tensor(expected))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": []}, "answer: expected a list of positions .*, got dict"),
        ("[]", "answer: expected a list of positions"),
        ([], "answer: expected at least one position with tokens"),
        ([None, {}], "answer: expected at least one position with tokens"),
        ([{"7": -0.5}], r"answer\[0\]: expected None, or tokens with their numbers"),
        ([None, [1]], r"answer\[1\]: expected None, or tokens"),
        ([{"the": {"logprob": -0.5}}], r"answer\[0\]: expected None, or tokens"),
        ([{"7": {"logprob": 21.5}}], r"answer\[0\]: expected log-probabilities .*raw_logprobs"),
        ([{"7": {"logprob": -0.1}, "8": {"logprob": -0.1}}], "expected log-probabilities"),
        ([{"7": {"logprob": float("nan")}}], "expected log-probabilities"),
    ],
)
def test_what_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        topk_of_server(answer)
