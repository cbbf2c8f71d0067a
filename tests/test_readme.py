"""The README's code, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_training_loop_trains():
    transformers = pytest.importorskip("transformers")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    teacher, student = (transformers.LlamaForCausalLM(config) for _ in range(2))
    input_ids = torch.randint(0, 64, (4, 9))
    labels = input_ids.clone()
    labels[:, :3] = -100
    names = {
        "teacher": teacher,
        "student": student,
        "optimizer": torch.optim.SGD(student.parameters(), lr=1.0),
        "loader": [{"input_ids": input_ids, "labels": labels}] * 5,
    }
    losses = []
    for _ in range(2):
        exec(code, names)
        losses.append(names["loss"].item())
    assert losses[1] < losses[0]
