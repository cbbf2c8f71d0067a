"""The prediction counts what the code does, and its times follow from the counts."""

from __future__ import annotations

import json
import math

import predict
import pytest
import torch
from contenders import MODES, PASSES
from counting_engine import HostRead, Kernel, Product, count_steps
from device_model import (
    DEVICES,
    HOST_LAUNCH,
    LAUNCH,
    RAMP,
    Device,
    kernel_seconds,
    phases,
    product_seconds,
    wave_efficiency,
)
from floor import pass_flops
from head_shapes import SHAPES, HeadShape
from predict import app, instructions
from typer.testing import CliRunner

from fastpref.ops.linear_logps import AUTOMATIC_SCRATCH_BYTES

pytest.importorskip("triton")

H200 = DEVICES["h200"]
ROUND = Device("round", 1e12, 1e11, 1e11, 10, 1e6, 90)
SMALL = HeadShape("small", "Small", 256, 10_000)
EVERYTHING = 2**40


def flops(steps):
    return sum(step.flops for step in steps if not isinstance(step, HostRead))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [96, 4224])
@pytest.mark.parametrize("mode", MODES)
def test_products_are_the_passes_of_the_floor(mode, tokens, dtype):
    forward, backward = count_steps(SMALL, tokens, dtype, mode, scratch_bytes=EVERYTHING)
    assert flops(forward + backward) == PASSES[mode] * pass_flops(SMALL, tokens)


def test_without_scratch_the_logits_are_computed_twice():
    forward, backward = count_steps(SMALL, 512, torch.bfloat16, "trained", scratch_bytes=0)
    assert flops(forward) == pass_flops(SMALL, 512)
    assert flops(backward) == 3 * pass_flops(SMALL, 512)
    names = {step.name for step in backward if isinstance(step, Product)}
    assert names == {"logits", "hidden gradient", "weight gradient"}


@pytest.mark.parametrize(("mode", "kernel"), [("frozen", "fold"), ("trained", "gradient")])
def test_every_logit_passes_once_through_its_kernel(mode, kernel):
    steps = sum(count_steps(SMALL, 512, torch.bfloat16, mode), [])
    kernels = [step for step in steps if isinstance(step, Kernel) and step.name == kernel]
    assert sum(step.logits for step in kernels) == 512 * 10_000
    # float32 is read, what products take in 16 bits is written.
    assert sum(step.nbytes for step in kernels) == 6 * 512 * 10_000


def test_no_gradient_is_one_kernel_in_16_bits_and_products_in_32():
    (kernel,) = (
        step
        for step in count_steps(SMALL, 512, torch.bfloat16, "no-grad")[0]
        if isinstance(step, Kernel) and step.flops
    )
    assert kernel.name == "projection" and kernel.logits == 512 * 10_000
    assert kernel.nbytes == 2 * 256 * (512 + 10_000)
    wide = count_steps(SMALL, 512, torch.float32, "no-grad")[0]
    assert not any(isinstance(step, Kernel) and step.flops for step in wide)


def test_bytes_of_other_operations_and_reads_of_the_host():
    forward, backward = count_steps(SMALL, 512, torch.bfloat16, "frozen")
    assert sum(isinstance(step, HostRead) for step in forward + backward) == 1
    (scaled,) = (step for step in backward if isinstance(step, Kernel) and step.shape == (512, 256))
    # A coefficient each for rows of a float32 Jacobian; the gradient is bfloat16.
    assert scaled.nbytes == 512 * (4 + 4 * 256 + 2 * 256)
    picked = [step for step in forward if isinstance(step, Kernel) and step.name == "index_select"]
    # Rows of the weight, read and written, and an index each.
    assert [step.nbytes for step in picked] == [512 * (2 * 2 * 256 + 8)]


def test_a_product_of_the_engine_runs_at_the_rates_that_were_estimated():
    product = Product("logits", 4096, 2048, 4096, False, 2, 4)
    assert 680e12 < product.flops / product_seconds(product, H200) < 740e12
    product = Product("hidden gradient", 4096, 4096, 2048, True, 2, 4)
    assert 650e12 < product.flops / product_seconds(product, H200) < 700e12


def test_wave_efficiency():
    assert wave_efficiency(128 * 10, 256, 10) == 1
    assert wave_efficiency(128 * 11, 256, 10) == pytest.approx(11 / 20)
    assert wave_efficiency(64, 256, 10) == pytest.approx(1 / 20)
    # 32 x 5 blocks, of which the last column of blocks is half full, on 132 multiprocessors.
    assert wave_efficiency(4096, 1152, 132) == pytest.approx(32 * 4.5 / 264)


def test_times_follow_from_counts():
    arithmetic = Product("logits", 128, 10_000, 2560, False, 2, 4)
    assert product_seconds(arithmetic, ROUND) == pytest.approx(arithmetic.flops / 1e12 + RAMP)
    memory = Product("logits", 128, 10, 2560, False, 2, 4)
    nbytes = 2 * 10 * (128 + 2560) + 4 * 128 * 2560
    assert product_seconds(memory, ROUND) == pytest.approx(nbytes / 1e11 + RAMP)
    adding = Product("hidden gradient", 128, 10_000, 2560, True, 2, 4)
    more = product_seconds(adding, ROUND) - product_seconds(arithmetic, ROUND)
    assert more == pytest.approx(4 * 128 * 2560 / 1e11)  # half of read and written

    def ten(name):
        return 10.0

    assert kernel_seconds(Kernel("copy_", (5,), 3000), ROUND, ten) == pytest.approx(3e-8)
    bound_by_bytes = Kernel("fold", (1, 1), 10**11, logits=1)
    assert kernel_seconds(bound_by_bytes, ROUND, ten) == pytest.approx(1.0)
    issued = 128 * 1e6 * 10 * 0.7  # by 10 multiprocessors at 1 MHz
    bound_by_issue = Kernel("fold", (1, 1), 1, logits=1000)
    assert kernel_seconds(bound_by_issue, ROUND, ten) == pytest.approx(1e4 / issued)
    projection = Kernel("projection", (1, 1), 1, logits=1000, flops=9 * 10**11)
    expected = 1.0 + 1e4 / issued + RAMP
    assert kernel_seconds(projection, ROUND, ten) == pytest.approx(expected)


def test_phases_are_sums_of_their_steps():
    product = Product("logits", 128, 10_000, 2560, False, 2, 4)
    kernel = Kernel("mul", (128, 64), 10**6)
    found = phases([HostRead(), product, product, kernel], [kernel], 64, ROUND, lambda name: 0.0)
    by_name = {phase.name: phase for phase in found}
    assert by_name["forward: logits, product"].count == 2
    assert by_name["forward: logits, product"].flops == 2 * product.flops
    assert by_name["forward: logits, product"].seconds == 2 * product_seconds(product, ROUND)
    assert by_name["backward: passes over rows of H numbers"].seconds == pytest.approx(1e-5)
    assert by_name["between kernels"].seconds == pytest.approx(2 * LAUNCH)
    assert by_name["host reads"].count == 1
    assert "waiting for the host" not in by_name


def test_the_host_may_be_what_takes_the_time():
    tiny = Kernel("mul", (8,), 8)
    found = phases([tiny] * 1000, [], 64, ROUND, lambda name: 0.0)
    assert found[-1].name == "waiting for the host"
    assert sum(phase.seconds for phase in found) == pytest.approx(1000 * HOST_LAUNCH)


def test_instructions_come_from_the_compiled_kernels():
    fold = instructions("fold", torch.bfloat16, 90)
    gradient = instructions("gradient", torch.bfloat16, 90)
    assert 4 < gradient < fold < 13
    assert instructions("projection", torch.bfloat16, 90) == fold


@pytest.fixture
def few_instructions(monkeypatch):
    """No kernel is compiled."""
    monkeypatch.setattr(predict, "instructions", lambda kernel, dtype, capability: 8.0)


def run(*arguments):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert "…" not in result.output  # it fits an 80-column terminal
    return result


@pytest.mark.usefixtures("few_instructions")
def test_it_prints_every_phase_beside_what_was_measured(tmp_path):
    rows = [
        {"shape": "256x10000", "tokens": 512, "mode": mode, "contender": contender,
         "status": status, "seconds": seconds, "floor_ratio": 1.5}
        for mode, contender, status, seconds in (
            ("frozen", "fastpref", "ok", 0.012345), ("trained", "fastpref", "ok", 0.023456),
            ("trained", "fastpref-least", "ok", 0.034567), ("no-grad", "fastpref", "failed", None),
        )
    ]  # fmt: skip
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"rows": rows}))
    automatic = AUTOMATIC_SCRATCH_BYTES // 2**20
    result = run(
        *("--shapes", "256x10000", "--tokens", "512", "--results", str(results)),
        *("--scratch", f"0,{automatic},1"),
    )
    assert result.exit_code == 0, result.output
    for text in (
        "no gradient", "frozen", f"trained, {automatic} MiB", "trained, 0 MiB", "trained, 1 MiB",
        "forward: projection kernel", "forward: fold kernel", "backward: gradient kernel",
        "forward: logits, product", "backward: weight gradient, product", "host reads",
        "12.345", "23.456", "34.567",
    ):  # fmt: skip
        assert text in result.output


@pytest.mark.usefixtures("few_instructions")
def test_numbers_of_the_device_can_be_given():
    def total(*arguments):
        result = run("--shapes", "2048x32000", "--tokens", "4096", "--summary", *arguments)
        assert result.exit_code == 0, result.output
        (line,) = (line for line in result.output.splitlines() if "frozen" in line)
        return float(line.split()[2])

    assert "product" in run("--shapes", "256x10000", "--tokens", "512").output
    assert "product," not in run("--shapes", "256x10000", "--tokens", "512", "--summary").output
    assert total("--rate", "79") > total()
    assert total("--bandwidth", "0.43") > total()
    assert total("--multiprocessors", "1") > total()
    assert total("--clock", "0.001") > total()
    assert total("--device", "a100") > total()
    assert total("--dtype", "float32") > total()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt-9"], "--shapes: expected names (llama-3.2-1b, "),
        (["--tokens", "7"], "--tokens: expected multiples of 4"),
        (["--scratch", "many"], "--scratch: expected numbers of MiB"),
        (["--device", "b900"], "--device: expected one of h200, h100, a100; got 'b900'"),
        (["--dtype", "int8"], "--dtype: expected one of bfloat16, "),
    ],
)
def test_wrong_arguments_give_one_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("few_instructions")
@pytest.mark.parametrize("key", ["llama-3.2-1b", "gemma-3-1b"])
def test_no_time_is_below_its_floor(key):
    for case in predict.cases(SHAPES[key], 4096, [0, AUTOMATIC_SCRATCH_BYTES]):
        found = predict.predict(case, H200, torch.bfloat16)
        total = sum(phase.seconds for phase in found)
        floor = predict.floor_seconds(case, H200, torch.bfloat16)
        assert floor < total < 3 * floor
        assert all(math.isfinite(phase.seconds) and phase.seconds > 0 for phase in found)
