"""The README's code, run as it stands, and the numbers of its table."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import re

import pytest
import torch

import fastpref

pytest.importorskip("trl")
from datasets import Dataset
from pages import ROOT, blocks, pages
from tiny_models import rows, tiny_model, tiny_tokenizer

README = (ROOT / "README.md").read_text("utf-8")
(LOOP,) = blocks("README.md")
TOKENIZER = tiny_tokenizer()


def run(student, learning_rate=0.0, times=1):
    """The losses of all steps."""
    names = {
        "tokenizer": TOKENIZER,
        "pairs": rows(8),
        "teacher": tiny_model(TOKENIZER, seed=1),
        "student": student,
        "optimizer": torch.optim.SGD(student.parameters(), lr=learning_rate),
    }
    losses = []
    # The last line of the loop's body, so that every step's loss is kept.
    code = LOOP.rstrip() + "\n    losses.append(out.loss.item())\n"
    for _ in range(times):
        exec(code, names | {"losses": losses})
    return losses


def adapted(targets):
    """A student with LoRA's adapters, which no longer are zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    student = peft.get_peft_model(tiny_model(TOKENIZER), config)
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return student


def test_the_loop_trains():
    losses = run(tiny_model(TOKENIZER), learning_rate=0.1, times=5)
    assert len(losses) == 10 and sum(losses[-2:]) < sum(losses[:2])


def test_the_loop_trains_an_adapter():
    student = adapted("all-linear")
    losses = run(student, learning_rate=1.0, times=5)
    assert sum(losses[-2:]) < sum(losses[:2])
    merged = copy.deepcopy(student).merge_and_unload().requires_grad_(True)
    assert run(student) == pytest.approx(run(merged), rel=1e-4)


def test_an_adapter_on_the_head_is_refused_not_forgotten():
    with pytest.raises(ValueError, match="expected a head without an adapter"):
        run(adapted(["lm_head"]))


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_padding_on_the_left_gives_the_same_loss(kind, monkeypatch):
    student = tiny_model(TOKENIZER) if kind == "whole" else adapted("all-linear")
    expected = run(student)
    collate = fastpref.collate_pairs

    def padded_left(*arguments, **options):
        batch = collate(*arguments, **options)
        padding = (batch["attention_mask"] == 0).sum(1)
        assert padding.any()
        return {
            name: torch.stack(
                [row.roll(int(count)) for row, count in zip(values, padding, strict=True)]
            )
            for name, values in batch.items()
        }

    monkeypatch.setattr(fastpref, "collate_pairs", padded_left)
    assert run(student) == pytest.approx(expected, rel=1e-5)


def test_the_three_layers_are_the_call():
    (code,) = blocks("docs/how_it_works.md")
    hidden, weight, shaping = torch.randn(4, 6, 8), torch.randn(40, 8), torch.randn(4)
    labels = torch.randint(40, (4, 6))
    head = fastpref.Head(weight, softcap=5.0)
    names = {"fastpref": fastpref, "hidden": hidden, "head": head, "labels": labels}
    exec(code, names := names | {"shaping": shaping})
    expected = fastpref.tvkd_loss(hidden, head, labels, shaping, beta=0.1)
    torch.testing.assert_close(names["out"].loss, expected.loss)


def test_the_changed_line(tmp_path, monkeypatch):
    """Of the trainer, what follows the plus sign makes one."""
    (diff,) = blocks("README.md", "diff")
    (line,) = re.findall(r"^\+(.*)$", diff, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    tiny_model(TOKENIZER, seed=1).save_pretrained("a-folder-or-hub-name")
    TOKENIZER.save_pretrained("a-folder-or-hub-name")
    student = tiny_model(TOKENIZER)
    student.save_pretrained("student")
    TOKENIZER.save_pretrained("student")
    trl = importlib.import_module("fastpref.integrations.trl")
    small = functools.partial(trl.TVKDConfig, use_cpu=True, bf16=False, report_to="none")
    names = {"TVKDTrainer": trl.TVKDTrainer, "TVKDConfig": small, "model": "student"}
    exec(line, names | {"pairs": Dataset.from_list(rows(4))}, names)
    assert type(names["trainer"]) is trl.TVKDTrainer


def test_one_page():
    assert len(README.splitlines()) <= 110


def test_the_table_is_that_of_the_committed_results():
    report = json.loads((ROOT / "benchmarks/results/memory-cpu.json").read_text("utf-8"))
    found = {
        (row["peer"], row["head"]): (
            f"{row['peak_extra_bytes'] / 1e6:.0f} MB", f"{row['floor_ratio']:.2f}"
        )
        for row in report["rows"]
        if row["tokens"] == 3000 and row["status"] == "ok"
    }  # fmt: skip
    peers = {
        "full logits": "full logits",
        "torch `linear_cross_entropy`, chunked": "torch linear_cross_entropy",
        "TRL `ChunkedLogProbFunction`": "TRL ChunkedLogProb",
        "Liger scaled cross-entropy": "Liger scaled cross-entropy",
        "Liger fused DPO": "Liger fused DPO",
        "fastpref": "fastpref",
        "fastpref, `scratch_bytes=0`": "fastpref, scratch_bytes=0",
    }
    lines = [line for line in README.replace("**", "").splitlines() if " MB | " in line]
    shown = {}
    for line in lines:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for head, cell in (("frozen", cells[:2]), ("trained", cells[2:])):
            if any(cell):
                shown[peers[name], head] = tuple(cell)
    assert shown == found


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
