from __future__ import annotations

import math
from typing import Any

import formulas
import pytest
import torch
from batches import DTYPES, Batch, batches, hold_difference, hold_equal, hold_to_reference
from closeness import assert_no_worse
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastpref import linear_logsumexp, shaping_from_values, teacher_shaping
from fastpref.ops import forward
from fastpref.sequences import sequence_sum
from fastpref.teacher.shaping import check_signal

OPTIONS = st.fixed_dictionaries(
    {
        "gamma": st.sampled_from([1.0, 1, 0.9, 0.0, 1.5]),
        "terminal": st.sampled_from(["bootstrap", "zero"]),
        "form": st.sampled_from(["difference", "next_value"]),
    }
)
# One response with a gap, one after a prompt, one that is all response, one without labels.
LABELS = torch.tensor(
    [
        [-100, 3, 0, -100, -100, 4, 5],
        [-100, -100, 1, 2, 3, -100, -100],
        [1, 2, 3, 4, 5, 6, 7],
        [-100, -100, -100, -100, -100, -100, -100],
    ]
)
RUN_ENDS = [[1, 3, 5, 7], [2, 5], [0, 7], []]


def shaping(batch: Batch, leaves: dict[str, Tensor], function: Any, **options: Any) -> Tensor:
    return function(
        leaves["states"],
        batch.head(leaves),
        batch.labels,
        ignore_index=batch.ignore_index,
        temperature=batch.temperature,
        **options,
    )


def packed_states(labels: Tensor) -> dict[str, Tensor]:
    rows, length = labels.shape
    with_last = torch.nn.functional.pad(labels, (0, 1), value=-100)
    return {
        "labels": with_last.reshape(-1),
        "cu_seqlens": torch.arange(rows + 1) * (length + 1),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=batches(), options=OPTIONS, compact=st.booleans())
def test_shaping_equals_the_reference(dtype, batch, options, compact):
    exact, plain, ours = (
        batch.leaves(one, {"states", "weight"}) for one in (torch.float64, dtype, dtype)
    )
    found = shaping(batch, ours, teacher_shaping, compact=compact, **options)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.requires_grad
    expected, rough = (
        shaping(batch, one, formulas.teacher_shaping, **options).detach() for one in (exact, plain)
    )
    values = formulas.linear_logsumexp(
        batch.states, batch.head(batch._asdict()), temperature=batch.temperature
    )
    hold_difference(found, rough, expected, dtype, float(values.abs().sum(1).max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=batches(), options=OPTIONS)
def test_shaping_from_values_equals_the_reference(dtype, batch, options):
    values = 4 * batch.normal(*batch.states.shape[:2])

    def run(function: Any) -> Any:
        return lambda leaves: function(
            leaves["values"], batch.labels, ignore_index=batch.ignore_index, **options
        )

    hold_to_reference(
        run(shaping_from_values),
        run(formulas.shaping_from_values),
        lambda dtype: {"values": values.to(dtype).clone().requires_grad_()},
        dtype,
        scale=float(values.abs().sum(1).max()),
    )


@given(batch=batches(), options=OPTIONS, compact=st.booleans())
def test_packed_equals_padded(batch, options, compact):
    leaves = batch.leaves(torch.float64, set())
    values = batch.normal(*batch.states.shape[:2])
    packed_options = {
        **options, "cu_seqlens": batch.cu_seqlens(), "ignore_index": batch.ignore_index
    }  # fmt: skip

    def from_values(packed: bool) -> dict[str, Tensor]:
        leaf = values.clone().requires_grad_()
        if packed:
            found = shaping_from_values(batch.pack(leaf), batch.packed_labels(), **packed_options)
        else:
            found = shaping_from_values(
                leaf, batch.labels, ignore_index=batch.ignore_index, **options
            )
        (found * torch.arange(1, len(found) + 1)).sum().backward()
        return {"shaping": found.detach(), "values": leaf.grad}

    hold_equal(from_values(packed=True), from_values(packed=False))
    found = teacher_shaping(
        batch.pack(leaves["states"]),
        batch.head(leaves),
        batch.packed_labels(),
        compact=compact,
        temperature=batch.temperature,
        **packed_options,
    )
    hold_equal(
        {"shaping": found},
        {"shaping": shaping(batch, leaves, teacher_shaping, compact=compact, **options)},
    )


@given(batch=batches(), terminal=st.sampled_from(["bootstrap", "zero"]))
def test_two_positions_a_run_equal_the_sum_over_all(batch, terminal):
    leaves = batch.leaves(torch.float64, set())
    found = shaping(batch, leaves, teacher_shaping, terminal=terminal)
    values = linear_logsumexp(leaves["states"], batch.head(leaves), temperature=batch.temperature)
    for row, row_labels, total in zip(values, batch.labels, found, strict=True):
        steps = (row_labels != batch.ignore_index).nonzero().flatten().tolist()
        terms = [
            (0.0 if terminal == "zero" and t == steps[-1] else row[t + 1].item()) - row[t].item()
            for t in steps
        ]
        torch.testing.assert_close(total.item(), math.fsum(terms), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("terminal", ["bootstrap", "zero"])
def test_only_the_ends_of_runs_are_projected(packed, terminal, monkeypatch):
    projected = []
    original = forward.read_by_tiles

    def counting(logits: Any, **options: Any) -> Any:
        projected.append(logits.hidden_of(slice(None)).detach().clone())
        return original(logits, **options)

    # Float64 takes this path whatever the device and the kernels.
    monkeypatch.setattr(forward, "read_by_tiles", counting)
    states = torch.randn(4, 8, 3, dtype=torch.float64)
    weight = torch.randn(9, 3, dtype=torch.float64)
    ends = [list(row) for row in RUN_ENDS]
    if terminal == "zero":  # the last end has its value by definition
        ends = [row[:-1] for row in ends]
    expected = torch.cat([states[row, ends[row]] for row in range(4)])
    arguments = {"hidden": states, "labels": LABELS}
    if packed:
        arguments = {"hidden": states.reshape(-1, 3), **packed_states(LABELS)}
    found = teacher_shaping(head=weight, terminal=terminal, **arguments)
    assert len(projected) == 1
    assert torch.equal(projected[0], expected)

    # Every position counts under a discount.
    teacher_shaping(head=weight, terminal="bootstrap", gamma=0.9, **arguments)
    assert len(projected[1]) == 6 + 4 + 8
    assert found[3] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_nothing_but_the_ends_of_runs_matters(dtype, packed):
    states, weight = torch.randn(4, 8, 3).to(dtype), torch.randn(9, 3).to(dtype)
    poisoned = torch.full_like(states, math.nan)
    for row, ends in enumerate(RUN_ENDS):
        poisoned[row, ends] = states[row, ends]
    if packed:
        states, poisoned = (one.reshape(-1, 3) for one in (states, poisoned))
        arguments = packed_states(LABELS)
    else:
        arguments = {"labels": LABELS}
    for compact in (True, False):  # whose products may differ in their last bits
        expected = teacher_shaping(states, weight, compact=compact, **arguments)
        assert expected.isfinite().all()
        found = teacher_shaping(poisoned, weight, compact=compact, **arguments)
        assert torch.equal(found, expected)


@given(
    seed=st.integers(0, 2**31), prompt=st.integers(0, 4), temperature=st.sampled_from([1.0, 0.5])
)
def test_ending_at_zero_leaves_the_prompt_alone(seed, prompt, temperature):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(4, 7, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    states[2:, : prompt + 1] = states[:2, : prompt + 1]  # chosen and rejected share the prompt
    labels = torch.randint(9, (4, 6), generator=generator)
    labels[:, :prompt] = -100
    labels[2:, 5] = -100  # and are not of one length
    found = teacher_shaping(states, weight, labels, terminal="zero", temperature=temperature)
    assert torch.equal(found[:2], found[2:])
    at_prompt = linear_logsumexp(states[:2, prompt], weight, temperature=temperature)
    torch.testing.assert_close(found[:2], -at_prompt, rtol=1e-12, atol=0)
    bootstrapped = teacher_shaping(states, weight, labels, temperature=temperature)
    assert not torch.allclose(bootstrapped[:2], bootstrapped[2:])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("options", "expected"),  # with V(s_t) = 2^t
    [
        ({}, [(8 - 2) + (128 - 32), 32 - 4, 128 - 1, 0]),
        ({"terminal": "zero"}, [(8 - 2) - 32, -4, -1, 0]),
        ({"form": "next_value"}, [4 + 8 + 64, 8 + 16, 2 + 4 + 8 + 16 + 32 + 64, 0]),
        ({"form": "next_value", "terminal": "zero"}, [76, 24, 126, 0]),
        ({"form": "next_value", "gamma": 0.5}, [38, 12, 63, 0]),
        ({"gamma": 0.5}, [0, 0, 0, 0]),
        ({"gamma": 0.5, "terminal": "zero"}, [-64, -16, -64, 0]),
        ({"gamma": 0.0}, [-(2 + 4 + 32 + 64), -(4 + 8 + 16), -127, 0]),
        (
            {"gamma": 2, "terminal": "zero"},
            [3 * 2 + 3 * 4 + 3 * 32 - 64, 12 + 24 - 16, 189 - 64, 0],
        ),
    ],
    ids=str,
)
def test_what_the_formula_says(packed, options, expected):
    values = (2.0 ** torch.arange(8)).expand(4, 8)
    if packed:
        found = shaping_from_values(values.reshape(-1), **packed_states(LABELS), **options)
    else:
        found = shaping_from_values(values, LABELS, **options)
    assert found.tolist() == expected


def test_values_that_no_label_needs_may_hold_anything():
    values = torch.full((4, 8), math.nan)
    for row, ends in enumerate(RUN_ENDS):
        values[row, ends] = 1.0
    values.requires_grad_()
    found = shaping_from_values(values, LABELS)
    found.sum().backward()
    assert found.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert values.grad.isfinite().all()
    assert values.grad.nonzero().tolist() == [
        [row, end] for row, ends in enumerate(RUN_ENDS) for end in ends
    ]


@pytest.mark.parametrize("gamma", [1.0, 0.999])
@pytest.mark.parametrize(
    ("dtype", "length"),
    [(torch.bfloat16, 2000), (torch.float16, 2000), (torch.float32, 8000)],
    ids=str,
)
def test_long_packed_responses_add_up_as_exactly_as_padded_ones(dtype, length, gamma):
    values = (2 * torch.randn(4, length + 1) + 20).to(dtype)
    labels = torch.ones(4, length, dtype=torch.int64)
    exact = formulas.shaping_from_values(values.double(), labels, gamma=gamma)
    padded = shaping_from_values(values, labels, gamma=gamma)
    packed = shaping_from_values(values.reshape(-1), gamma=gamma, **packed_states(labels))
    assert padded.dtype == packed.dtype == torch.float32
    # Plain PyTorch in float32 is no witness: it rounds gamma, and that thousands of times.
    assert_no_worse(padded, exact.float(), exact, torch.float32)
    assert_no_worse(packed, exact.float(), exact, torch.float32)


def test_long_packed_sums_round_no_more_than_padded_ones():
    numbers = -torch.rand(4, 8001)
    padded = sequence_sum(numbers, None)
    packed = sequence_sum(numbers.reshape(-1), torch.arange(5) * 8001)
    exact = numbers.double().sum(1)
    assert packed.dtype == torch.float32
    assert (packed - exact).norm() <= 2 * (padded - exact).norm()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiled_code_follows_a_schedule(packed):
    weight = torch.randn(9, 3)
    labels = packed_states(LABELS) if packed else {"labels": LABELS}
    shape = (-1,) if packed else (4, 8)

    def both(states: Tensor, values: Tensor, gamma: float, temperature: float) -> Tensor:
        return torch.stack(
            (
                teacher_shaping(states, weight, gamma=gamma, temperature=temperature, **labels),
                shaping_from_values(values, gamma=gamma, **labels),
            )
        )

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for numbers in ((1.0, 1.0), (0.9, 0.7), (0.8, 0.5), (0.7, 2.0)):
        states, values = torch.randn(4, 8, 3), torch.randn(4, 8)
        given = (states.reshape(*shape, 3), values.reshape(shape), *numbers)
        torch.testing.assert_close(compiled(*given), both(*given), rtol=1e-5, atol=1e-5)


def test_gradcheck():
    values = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"gamma": 0.9, "terminal": "zero"}, {"form": "next_value"}):
        assert torch.autograd.gradcheck(
            lambda leaf, options=options: shaping_from_values(leaf, LABELS, **options), values
        )


def test_what_teaches_nothing_is_refused():
    with pytest.raises(ValueError, match="terminal: expected 'bootstrap', or a gamma below 1"):
        check_signal("zero", "difference", 1.0)
    for taught in (("zero", "difference", 0.0), ("zero", "next_value", 1.0)):
        check_signal(*taught)
    check_signal("bootstrap", "difference", 1.0)
