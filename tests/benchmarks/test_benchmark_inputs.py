import json

import pytest
import torch
from inputs import (
    ROWS,
    SHIPPED_PAIRS,
    Batch,
    InputError,
    fill_row,
    load_batch,
    read_pairs,
    save_batch,
)


def test_shipped_pairs_are_conversations():
    pairs = read_pairs(SHIPPED_PAIRS)
    assert len(pairs) == 8
    for pair in pairs:
        assert pair["prompt"][-1]["role"] == "user"
        assert pair["chosen"] != pair["rejected"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not UTF-8 JSON lines"),
        (json.dumps({"prompt": "text", "chosen": [], "rejected": []}), "pair 1: 'prompt' must be"),
        ("", "at least 2 pairs, found 0"),
    ],
)
def test_bad_pairs_are_named(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_pairs(path)


def test_fill_row_stops_early_or_repeats():
    def parts(count):
        for i in range(count):
            yield torch.full((3, 2), float(i)), torch.tensor([10 * i, 10 * i + 1, 10 * i + 2])

    source = parts(100)
    states, tokens = fill_row(source, 4)
    assert tokens.tolist() == [0, 1, 2, 10]
    assert states[:, 0].tolist() == [0, 0, 0, 1]
    assert next(source)[1].tolist() == [20, 21, 22]  # nothing beyond what was needed was computed

    assert fill_row(parts(1), 7)[1].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_shorter_batch_is_the_beginning_of_the_longer(tmp_path):
    hidden, weight = torch.randn(ROWS, 17, 8), torch.randn(30, 8)
    labels = torch.randint(30, (ROWS, 16))
    save_batch(Batch("test", hidden, weight, labels), [32, 64], tmp_path / "batch.pt")
    for tokens in (32, 64):
        length = tokens // ROWS
        got = load_batch(tmp_path / "batch.pt", tokens, torch.device("cpu"))
        torch.testing.assert_close(got[0], hidden[:, :length])
        torch.testing.assert_close(got[2], labels[:, :length])
        values = torch.logsumexp(hidden @ weight.T, dim=-1)
        torch.testing.assert_close(got[3], values[:, length] - values[:, 0])
