"""Model cards cite the papers of the methods that were trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import dataset, signal, student, trainer

from fastpref.integrations.trl import PreferenceConfig, PreferenceTrainer
from fastpref.integrations.trl.papers import PAPERS, cited
from fastpref.losses import METHODS

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_a_card_cites_the_papers_and_trl(tmp_path):
    model = student()
    options = {"settings": {"method": ["sft", "tvkd", "simpo"]}}
    options["train_dataset"] = dataset(**signal("shaping"))
    made = trainer(PreferenceTrainer, PreferenceConfig, tmp_path, model, **options)
    made.create_model_card(model_name="student")
    card = (tmp_path / "README.md").read_text("utf-8")
    first = PAPERS["tvkd"]
    assert f"[{first.title}](https://huggingface.co/papers/{first.arxiv})" in card
    assert {name for name, paper in PAPERS.items() if paper.bibtex() in card} == {"tvkd", "simpo"}
    assert "Cite TRL as" in card


def test_every_method_has_the_paper_of_its_docstring():
    assert set(PAPERS) == set(METHODS) - {"sft"}
    assert cited(["sft"]) == {}
    for method, paper in PAPERS.items():
        assert paper.arxiv in (METHODS[method].__doc__ or "").replace("\n", " "), method


@pytest.mark.parametrize("method", ["tvkd", "drdo"])
def test_readme_cites_the_same(method):
    paper = PAPERS[method]
    assert f"title = {{{paper.title}}}" in README and paper.arxiv in README
    assert f"author = {{{paper.authors}}}" in README
