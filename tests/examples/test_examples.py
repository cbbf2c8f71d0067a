"""The examples run from end to end on tiny models, and their recipes are read."""

from __future__ import annotations

import json
from pathlib import Path

import compare
import pytest
import torch
import train_drdo
import train_loop
import train_tvkd
from common import forget_oldest_turns, load_student
from tiny_models import rows, tiny_model, tiny_tokenizer
from trl import TrlParser

from fastpref.models.reward_head import FILE

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "smollm2_tvkd": (train_tvkd.Arguments, train_tvkd.TVKDConfig),
    "llama_tvkd": (train_tvkd.Arguments, train_tvkd.TVKDConfig),
    "smollm2_oracle": (train_drdo.Arguments, train_drdo.OracleConfig),
    "llama_oracle": (train_drdo.Arguments, train_drdo.OracleConfig),
    "smollm2_drdo": (train_drdo.Arguments, train_drdo.DRDOConfig),
    "llama_drdo": (train_drdo.Arguments, train_drdo.DRDOConfig),
    "smollm2_loop": (train_loop.Arguments,),
    "compare": (compare.Arguments,),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a model, and pairs beside it."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    tiny_model(tokenizer).save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows(10))), "utf-8")
    return folder


def arguments(models, recipe, **options):
    """A recipe at its smallest."""
    options = {
        "dataset": models / "pairs.jsonl",
        "student": models / "model",
        "student_layers": 1,
        "max_pairs": 8,
        "held_out": 4,
        "sft_steps": 1,
        **options,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["--config", str(EXAMPLES / f"{recipe}.yaml"), *given]


def quiet(argv):
    """Without bars, and on the CPU wherever the tests run."""
    return [*argv, "--disable_tqdm", "true", "--use_cpu", "true"]


def assert_shown(capsys, folder):
    printed = capsys.readouterr().out
    for label in ("reward margin", "reward accuracy", "peak memory", "held out"):
        assert label in printed
    assert (folder / "training.png").stat().st_size > 1000


@pytest.mark.parametrize("recipe", [file.stem for file in EXAMPLES.glob("*.yaml")])
def test_every_key_of_a_recipe_is_known(recipe, tmp_path):
    argv = ["--config", str(EXAMPLES / f"{recipe}.yaml"), "--dataset", "pairs.jsonl"]
    if recipe.startswith("llama"):  # TrainingArguments would look for a GPU
        argv += ["--bf16", "false"]
    parsed = TrlParser(ARGUMENTS[recipe]).parse_args_and_config(argv)
    assert parsed[0].dataset == "pairs.jsonl"


def test_tvkd(models, tmp_path, capsys):
    argv = arguments(models, "smollm2_tvkd", output_dir=tmp_path, teacher=models / "model")
    trainer = train_tvkd.main(quiet(argv))
    assert trainer.model.config.num_hidden_layers == len(trainer.model.model.layers) == 1
    assert not trainer.model.lm_head.weight.requires_grad
    assert (tmp_path / "model.safetensors").is_file()
    assert_shown(capsys, tmp_path)


def test_drdo_in_two_stages(models, tmp_path, capsys):
    argv = arguments(models, "smollm2_oracle", output_dir=tmp_path / "oracle", student_layers=2)
    oracle = train_drdo.main(["oracle", *quiet(argv)])
    frozen, trained = oracle.model.model.layers
    assert not any(weight.requires_grad for weight in frozen.parameters())
    assert all(weight.requires_grad for weight in trained.parameters())
    assert_shown(capsys, tmp_path / "oracle")
    argv = arguments(
        models, "smollm2_drdo", output_dir=tmp_path / "student", oracle=tmp_path / "oracle"
    )
    train_drdo.main(["student", *quiet(argv)])
    assert (tmp_path / "student" / FILE).is_file()
    assert_shown(capsys, tmp_path / "student")


def test_drdo_wants_a_stage():
    with pytest.raises(SystemExit, match="expected a stage first"):
        train_drdo.main(["--config", "examples/smollm2_drdo.yaml"])


def test_loop(models, tmp_path, capsys):
    argv = arguments(models, "smollm2_loop", output_dir=tmp_path, teacher=models / "model")
    history = train_loop.main([*argv, "--learning_rate", "1e-3"])
    assert len(history) == 2 and all("eval_rewards/margins" in entry for entry in history)
    assert (tmp_path / "model.safetensors").is_file()
    assert_shown(capsys, tmp_path)


def test_comparison_goes_on_where_it_stopped(models, tmp_path, capsys):
    output = tmp_path / "results" / "compare.json"
    options = {"teacher": models / "model", "oracle_layers": 1, "seeds": 3}
    shared = arguments(models, "compare", work=tmp_path, output=output, **options)
    compare.main([*shared, "--methods", "DRDO", "SimPO"])
    first = json.loads(output.read_text("utf-8"))["runs"]
    report = compare.main(shared)
    assert report["runs"][:2] == first
    assert [run["method"] for run in report["runs"]] == ["DRDO", "SimPO", "TVKD", "DPO"]
    assert set(report["summary"]["DRDO"]["held_out"]) > {"implicit_accuracy", "head_margin"}
    assert output.with_suffix(".png").is_file()
    assert "standard error" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="of other settings"):
        compare.main([*shared, "--learning_rate", "1"])


def test_oldest_turns_are_forgotten():
    tokenizer = tiny_tokenizer()
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    options = {"tokenizer": tokenizer, "max_length": 1000}
    assert forget_oldest_turns({"prompt": turns}, **options)["prompt"] == turns
    options["max_length"] = 12
    assert forget_oldest_turns({"prompt": turns}, **options)["prompt"] == turns[2:]
    system = [{"role": "system", "content": "kind"}]
    assert (
        forget_oldest_turns({"prompt": system + turns}, **options)["prompt"] == system + turns[2:]
    )
    assert forget_oldest_turns({"prompt": "a" * 100}, **options)["prompt"] == "a" * 100


def test_a_whole_student(models):
    args = train_tvkd.Arguments("pairs.jsonl", student=str(models / "model"))
    model = load_student(args)
    assert len(model.model.layers) == 2
    assert all(weight.requires_grad for weight in model.parameters())
