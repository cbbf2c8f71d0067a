"""The command line of `speed.py`, its inputs and what it shows."""

import json
from dataclasses import asdict

import pytest
import torch
from contenders import CONTENDERS
from floor import Floor, measure_floor, pass_flops
from head_shapes import SHAPES, HeadShape, make_inputs, parse_shapes
from inputs import InputError
from points import Row
from report import describe_run, write_json
from rich.console import Console
from speed import app, parse_peers
from speed_plot import plot_speed
from speed_report import add_floors, better_floors, drift, print_speed
from timing import input_sets, repeat, timed
from typer.testing import CliRunner

SHAPE = HeadShape("a", "Head A", 100, 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt-9"], "--shapes: expected names (llama-3.2-1b, "),
        (["--shapes", "0x20"], "got '0x20'"),
        (["--tokens", "7"], "--tokens: expected multiples of 4"),
        (["--peers", "full,nobody"], "--peers: expected some of full, fastpref, "),
        (["--output", "out.txt"], "--output: expected a name that ends in .json"),
    ],
)
def test_wrong_arguments_give_one_line(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_names_become_shapes_and_contenders():
    named, free = parse_shapes("gemma-3-1b, 64x500")
    assert named is SHAPES["gemma-3-1b"]
    assert (free.hidden_size, free.vocab_size) == (64, 500)
    assert parse_peers("trl, full") == ["full", "trl"]
    assert parse_peers(None) == list(CONTENDERS)
    with pytest.raises(InputError, match="'64'"):
        parse_shapes("64")


def test_inputs_are_as_concentrated_as_a_language_model():
    inputs = make_inputs(HeadShape("", "", 128, 50_000), 64, 0, "cpu")
    logps = torch.log_softmax(inputs.hidden @ inputs.weight.T, -1)
    large = logps > -12 * torch.log(torch.tensor(2.0))
    assert 50 < large.sum(1).float().mean() < 300
    assert 0.02 < logps.exp().masked_fill(large, 0).sum(1).mean() < 0.15
    assert -6 < logps.gather(1, inputs.labels.unsqueeze(1)).mean() < -1


def test_input_sets_differ_and_exceed_the_cache(monkeypatch):
    one, again, other = (make_inputs(SHAPE, 32, seed, "cpu") for seed in (0, 0, 1))
    assert torch.equal(one.weight, again.weight)
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    monkeypatch.setattr("timing.cache_bytes", lambda device: 100)
    assert [input_sets(nbytes, "cpu") for nbytes in (1, 70, 1000)] == [6, 3, 2]


def test_timed_parts_and_repeats():
    calls = []

    def call(number, clock):
        calls.append(number)
        clock()
        torch.ones(1000, 1000).sum()

    (first, second), *_ = repeat(call, "cpu", 0.0, between=lambda: calls.append("between"))
    assert calls == ["between", 0]
    assert 0 < first < second
    assert len(timed(lambda clock: None, "cpu")) == 1


def test_floor_is_the_fastest_tile():
    floor = measure_floor(SHAPE, 32, "cpu", 0.0)
    assert floor.seconds == min(floor.seconds_by_tile.values())
    assert floor.flops_per_second(SHAPE) == pytest.approx(2 * 32 * 100 * 1000 / floor.seconds)
    slow, fast = (Floor("a", 32, seconds, 1000, {}) for seconds in (2.0, 1.0))
    assert better_floors([slow], [fast]) == [fast]


@pytest.fixture
def rows():
    numbers = {"forward_seconds": 0.5, "backward_seconds": 1.0, "seconds": 1.5, "repeats": 3}
    errors = {"peak_extra_bytes": 10**6, "value_error": 1e-6, "hidden_grad_error": 2e-6}
    return [
        Row("a", 32, "frozen", "full", "ok", **numbers, **errors),
        Row("a", 32, "frozen", "fastpref", "wrong", "relative error 0.5 in the value"),
        Row("a", 32, "frozen", "trl", "out of memory"),
        Row("a", 32, "frozen", "quack", "missing", "No module named 'quack'"),
        Row("a", 32, "trained", "full", "ok", **numbers, **errors, weight_grad_error=3e-6),
    ]


@pytest.fixture
def floors():
    return [Floor("a", 32, 0.25, 1000, {1000: 0.25})]


def settings():
    return {"tokens": [32], "dtype": "float32", "errors_relative_to": "float64"}


def test_ratio_counts_the_passes_of_each_mode(rows, floors):
    add_floors(rows, floors, [SHAPE])
    assert [row.floor_ratio for row in rows] == [3.0, None, None, None, 2.0]
    assert rows[0].useful_flops_per_second == pytest.approx(2 * pass_flops(SHAPE, 32) / 1.5)


def test_table_shows_ratios_and_says_who_is_missing_or_wrong(rows, floors):
    add_floors(rows, floors, [SHAPE])
    console = Console(width=80)
    with console.capture() as capture:
        moved = [{"seconds_before_and_after": [0.25, 0.5]}]
        report = {"settings": settings(), "floors": moved}
        print_speed(console, report, rows, floors, [SHAPE])
    text = capture.get()
    assert "3.00" in text and "2.00" in text
    assert "floor: 2 mm" in text and "floor: 3 mm" in text
    assert "wrong: relative error 0.5 in the value" in text
    assert "out of" in text
    assert "torch.mm took up to 2.00x as long" in text
    assert "Quack missing: No module named 'quack'" in text
    assert "…" not in text  # it fits an 80-column terminal


def test_a_steady_floor_is_not_mentioned():
    assert drift([{"seconds_before_and_after": [0.25, 0.26]}]) == []


def test_plot_from_json(tmp_path, rows, floors):
    add_floors(rows, floors, [SHAPE])
    path = tmp_path / "speed.json"
    report = describe_run() | {
        "settings": settings(),
        "shapes": {"a": SHAPE._asdict()},
        "floors": [asdict(floors[0]) | {"flops_per_second": 1e9}],
    }
    write_json(path, report, rows)
    assert json.loads(path.read_text())["rows"][1]["status"] == "wrong"
    plot_speed(path, path.with_suffix(".png"))
    assert path.with_suffix(".png").stat().st_size > 10_000
