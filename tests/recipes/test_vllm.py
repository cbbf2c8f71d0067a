"""A server's answers, as vLLM documents them, become columns that are those of the model."""

from __future__ import annotations

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from pages import blocks
from tiny_models import rows, tiny_model, tiny_tokenizer

import fastpref
from fastpref.models import head_states, lm_head_of

ASK, LOGPS, VALUES = blocks("docs/recipes.md", section="vLLM as a teacher")
TOKENIZER = tiny_tokenizer()
NOTHING = -9999.0  # what vLLM writes for minus infinity


def server(model, kind):
    """What `/v1/completions` answers: the prompt's own token, and the k likeliest."""

    @torch.no_grad()
    def ask(request):
        assert request["max_tokens"] == 1
        prompt = torch.tensor(request["prompt"])
        scores = model(prompt.unsqueeze(0)).logits[0, :-1]
        if kind == "raw_logprobs":
            scores = scores.log_softmax(-1)
        top = scores.topk(request["prompt_logprobs"]).indices
        entries = [
            {
                str(int(token)): {
                    "logprob": max(float(one[token]), NOTHING),
                    "rank": int((one > one[token]).sum()) + 1,
                    "decoded_token": TOKENIZER.decode(token),
                }
                for token in torch.cat([own.view(1), likeliest])
            }
            for one, own, likeliest in zip(scores, prompt[1:], top, strict=True)
        ]
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length",
                  "prompt_logprobs": [None, *entries]}  # fmt: skip
        return json.loads(json.dumps({"object": "text_completion", "choices": [choice]}))

    return ask


@contextmanager
def served(ask):
    """The port on which a server answers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/completions"
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert request.pop("model") == "my-teacher"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(ask(request)).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("localhost", 0), Handler) as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield str(found.server_port)
        found.shutdown()


def test_columns_of_servers():
    model, pairs = tiny_model(TOKENIZER), rows(3)
    names = {"rows": pairs, "tokenizer": TOKENIZER}
    kinds = ("raw_logprobs", "raw_logits")
    with served(server(model, kinds[0])) as first, served(server(model, kinds[1])) as second:
        exec(ASK.replace("8000", first).replace("8001", second), names)
        exec(LOGPS, names)
        exec(VALUES, names)
    batch = fastpref.collate_pairs(rows(3), TOKENIZER)
    labels = batch.pop("labels")
    with torch.no_grad():
        states, head = head_states(model, **batch), lm_head_of(model)
        logps = fastpref.linear_logps(states[:, :-1], head, labels)
        logps = fastpref.sum_responses(logps, labels).logps.tolist()
        shaping = fastpref.teacher_shaping(states, head, labels).tolist()
    for side, start in (("chosen", 0), ("rejected", 3)):
        for index, row in enumerate(pairs):
            assert row[f"ref_{side}_logps"] == pytest.approx(logps[start + index], rel=1e-5)
            found = row[f"{side}_shaping"]
            assert found == pytest.approx(shaping[start + index], rel=1e-5, abs=1e-4)
    assert max(map(abs, shaping)) > 0.1


def test_logits_are_not_taken_for_log_probabilities():
    """Of the wrong server, where `topk_of_server` can tell."""
    ask = server(tiny_model(TOKENIZER), "raw_logits")
    answer = ask({"prompt": [5, 6, 7], "max_tokens": 1, "prompt_logprobs": 4})
    with pytest.raises(ValueError, match="logprobs_mode='raw_logprobs'"):
        fastpref.data.topk_of_server(answer["choices"][0]["prompt_logprobs"][1:])
