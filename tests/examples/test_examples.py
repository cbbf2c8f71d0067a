"""The examples run from end to end on tiny models, and their recipes are read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import train_drdo
import train_loop
import train_tvkd
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import TrlParser

from fastpref.data.tokens import tokenize_rows
from fastpref.teacher import read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PAIRS = EXAMPLES / "pairs.jsonl"
PUBLIC = {
    "fastpref",
    "fastpref.data",
    "fastpref.integrations.trl",
    "fastpref.models",
    "fastpref.teacher",
}
ARGUMENTS = {
    "smollm2_tvkd": (train_tvkd.Arguments, train_tvkd.TVKDConfig),
    "llama_tvkd": (train_tvkd.Arguments, train_tvkd.TVKDConfig),
    "smollm2_oracle": (train_drdo.Arguments, train_drdo.OracleConfig),
    "llama_oracle": (train_drdo.Arguments, train_drdo.OracleConfig),
    "smollm2_drdo": (train_drdo.Arguments, train_drdo.DRDOConfig),
    "llama_drdo": (train_drdo.Arguments, train_drdo.DRDOConfig),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model of two layers that reads the shipped pairs."""
    folder = tmp_path_factory.mktemp("models") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_model(tokenizer, max_position_embeddings=2048).save_pretrained(folder)
    return str(folder)


def arguments(recipe, **options):
    """A recipe with other models: without bars, and on the CPU wherever the tests run."""
    options |= {"disable_tqdm": True, "use_cpu": True, "num_train_epochs": 1, "max_length": 1024}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["--config", str(EXAMPLES / f"{recipe}.yaml"), *given]


def changed(trainer, folder):
    """The parameters that training changed, by name."""
    begun = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir, dtype=torch.float32)
    return {
        name for name, value in trained.state_dict().items() if not torch.equal(value, begun[name])
    }


def assert_evaluated(trainer):
    """It logged margin and accuracy of the 12 pairs that are held out."""
    assert len(trainer.train_dataset) == 52 and len(trainer.eval_dataset) == 12
    logged = [entry for entry in trainer.state.log_history if "eval_rewards/margins" in entry]
    assert logged and 0 <= logged[-1]["eval_rewards/accuracies"] <= 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_page_and_public_names(script):
    code = script.read_text("utf-8")
    assert len(code.splitlines()) <= 70
    found = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in found}
    assert {name for name in modules if name.startswith("fastpref")} <= PUBLIC
    assert not modules & {each.stem for each in SCRIPTS}  # no module that they share


@pytest.mark.parametrize("recipe", [file.stem for file in EXAMPLES.glob("*.yaml")])
def test_every_key_of_a_recipe_is_known(recipe):
    argv = ["--config", str(EXAMPLES / f"{recipe}.yaml")]
    if recipe.startswith("llama"):  # TrainingArguments would look for a GPU
        argv += ["--bf16", "false"]
    args, _ = TrlParser(ARGUMENTS[recipe]).parse_args_and_config(argv)
    assert args.dataset == (
        "argilla/dpo-mix-7k" if recipe.startswith("llama") else str(EXAMPLES / "pairs.jsonl")
    )


def test_tvkd(model, tmp_path):
    argv = arguments("smollm2_tvkd", student=model, teacher=model, output_dir=tmp_path)
    trainer = train_tvkd.main([*argv, "--trained_layers", "1"])
    assert_evaluated(trainer)
    assert {name.rsplit(".", 3)[0] for name in changed(trainer, model)} >= {"model.layers.1"}
    assert all(name.startswith("model.layers.1.") for name in changed(trainer, model))


def test_drdo_in_two_stages(model, tmp_path):
    argv = arguments("smollm2_oracle", model=model, output_dir=tmp_path / "oracle")
    oracle = train_drdo.main(["oracle", *argv])
    assert_evaluated(oracle)
    assert all(name.startswith("model.layers.1.") for name in changed(oracle, model))
    argv = arguments("smollm2_drdo", model=model, output_dir=tmp_path / "student")
    student = train_drdo.main(["student", *argv, "--oracle", str(tmp_path / "oracle")])
    assert_evaluated(student)
    for stage in ("oracle", "student"):
        assert (tmp_path / stage / "reward_head.safetensors").is_file()


def test_drdo_wants_a_stage():
    with pytest.raises(SystemExit, match="expected a stage first"):
        train_drdo.main(["--config", "examples/smollm2_drdo.yaml"])


def test_loop(model, tmp_path, capsys):
    options = {"student": model, "teacher": model, "dataset": PAIRS, "output_dir": tmp_path}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    train_loop.main([*given, "--learning_rate", "1e-2"])
    before, *steps, after = capsys.readouterr().out.strip().splitlines()
    assert steps[-1].startswith("step 13 of 13: loss ")
    assert before.startswith("before training: margin") and after.startswith("after training:")
    assert before.split("margin")[1] != after.split("margin")[1]
    assert (tmp_path / "model.safetensors").is_file()


def test_the_shipped_pairs():
    pairs = read_rows(str(PAIRS))
    assert len(pairs) == 64
    tokenized, bad = tokenize_rows(pairs, tiny_tokenizer(), max_length=None, context_length=None)
    assert not bad and len(tokenized) == 64
    words = {
        name: [sum(len(turn["content"].split()) for turn in pair[name]) for pair in pairs]
        for name in ("prompt", "chosen", "rejected")
    }
    assert all(5 <= count <= 40 for count in words["prompt"])
    assert all(25 <= count <= 110 for side in ("chosen", "rejected") for count in words[side])
    # A loss that only counts tokens must not find the better response.
    assert sum(words["chosen"]) == pytest.approx(sum(words["rejected"]), rel=0.05)
    longer = sum(c > r for c, r in zip(words["chosen"], words["rejected"], strict=True))
    assert 25 <= longer <= 39
