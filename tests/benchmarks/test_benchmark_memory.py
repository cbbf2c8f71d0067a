import json

import pytest
from floor import Floor
from inputs import InputError
from measure import Measurement
from memory import add_ratios, app, parse_tokens
from report import describe_run, plot, print_report, write_json
from rich.console import Console
from typer.testing import CliRunner

ROWS = [
    Measurement(
        *("model", 1000, "frozen", "full logits", "ok", "", 1_500_000_000, 1.0, 2.0, 3, 0, 0),
        floor_ratio=2.5,
    ),
    Measurement(
        *("model", 1000, "frozen", "fastpref", "ok", "", 75_000_000, 0.5, 1.0, 3, 0, 0),
        floor_ratio=1.25,
    ),
    Measurement("model", 1000, "frozen", "Liger fused DPO", "missing", "No module named 'l'"),
    Measurement(
        *("model", 1000, "trained", "torch linear_cross_entropy", "ok", ""),
        *(1_000_000_000, 12.34, 23.45, 1, 1e-5, 1e-5, 1e-5, 4.56),
    ),
]


def report():
    return describe_run() | {
        "missing_models": {"other": "not installed"},
        "heads": {"model": {"weight": [100, 10], "dtype": "float32"}},
    }


def test_parse_tokens_sorts():
    assert parse_tokens("1000,500,500") == [500, 1000]


@pytest.mark.parametrize("text", ["", "x", "500,", "501", "-4", "4"])
def test_parse_tokens_names_what_came(text):
    with pytest.raises(InputError, match=f"--tokens: expected multiples of 4 .* got {text!r}"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "7"], "--tokens: expected multiples of 4"),
        (["--pairs", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--output", "out.txt"], "--output: expected a name that ends in .json"),
    ],
)
def test_wrong_arguments_give_one_line(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_table_shows_ratios_and_names_what_is_missing():
    console = Console(width=80)
    with console.capture() as capture:
        print_report(console, report(), ROWS)
    text = capture.get()
    assert "0.05x" in text
    assert "1.25" in text and "2.50" in text
    assert "Liger fused DPO missing: No module named 'l'" in text
    assert "other missing: not installed" in text
    assert "…" not in text  # it fits an 80-column terminal


def test_times_are_multiples_of_the_products_that_nobody_can_do_without():
    frozen, trained = (
        Measurement("model", 1000, head, "fastpref", "ok", seconds=1.2)
        for head in ("frozen", "trained")
    )
    failed = Measurement("model", 1000, "frozen", "other", "failed")
    add_ratios([frozen, trained, failed], [Floor("model", 1000, 0.2, 128, {})])
    assert frozen.floor_ratio == pytest.approx(3.0)
    assert trained.floor_ratio == pytest.approx(2.0)
    assert failed.floor_ratio is None


def test_json_and_plot(tmp_path):
    path = tmp_path / "results" / "memory.json"
    write_json(path, report(), ROWS)
    content = json.loads(path.read_text())
    assert [row["status"] for row in content["rows"]] == ["ok", "ok", "missing", "ok"]
    assert {"machine", "versions", "commit"} <= content.keys()
    plot(path, path.with_suffix(".png"))
    assert path.with_suffix(".png").stat().st_size > 10_000
