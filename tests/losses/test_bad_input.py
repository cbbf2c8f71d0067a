"""Every refusal names the argument, what was expected and what came."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import Head

HEADED = ("linear_logps", "linear_logsumexp", "tvkd_loss", "drdo_loss", "teacher_shaping")
LOSSES = ("tvkd_loss", "drdo_loss")
OF_STATES = ("teacher_shaping", "shaping_from_values", "sequence_rewards")
OF_PAIRS = (*LOSSES, *OF_STATES)
PER_SEQUENCE = [
    ("tvkd_loss", "shaping"),
    ("tvkd_loss", "ref_logps"),
    ("drdo_loss", "student_rewards"),
    ("drdo_loss", "oracle_rewards"),
]
META = torch.device("meta")


def arguments(name: str, *, packed: bool = False) -> dict[str, Any]:
    """Four sequences of three labels, H = 8, V = 20, that ``name`` accepts."""
    labels = torch.tensor([[1, 2, 3], [-100, 4, -100], [5, -100, 6], [-100, 7, 8]])
    positions = (16,) if packed else (4, 4 if name in OF_STATES else 3)
    found: dict[str, Any] = {"hidden": torch.randn(*positions, 8), "labels": labels}
    if packed:
        found["labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100).reshape(-1)
        found["cu_seqlens"] = torch.arange(5) * 4
    if name in HEADED:
        found["head"] = torch.randn(20, 8)
    if name == "linear_logsumexp":
        del found["labels"]
    if name == "tvkd_loss":
        found["shaping"] = torch.zeros(4)
    if name == "drdo_loss":
        found |= {"student_rewards": torch.zeros(4), "oracle_rewards": torch.zeros(4)}
    if name == "sequence_rewards":
        found["head_weight"] = torch.randn(1, 8)
    if name == "shaping_from_values":
        found["values"] = found.pop("hidden")[..., 0]
    return found


def call(name: str, given: dict[str, Any]) -> Any:
    """The function of a name; what belongs to a head goes into it."""
    parts = {one: given[one] for one in Head._fields if one in given}
    if parts:
        rest = {one: value for one, value in given.items() if one not in parts}
        given = {**rest, "head": Head(**{"weight": given.get("head"), **parts})}
    return getattr(fastpref, name)(**given)


def refused(
    name: str,
    argument: str,
    expected: str,
    got: str,
    *,
    packed: bool = False,
    **changes: Any,
) -> None:
    """``name`` refuses ``changes`` to its arguments in these words."""
    with pytest.raises(ValueError) as caught:
        call(name, {**arguments(name, packed=packed), **changes})
    message = str(caught.value)
    named, _, rest = message.partition(": expected ")
    wanted, _, came = rest.rpartition(", got ")
    assert named == argument, message
    assert expected in wanted, message
    assert got in came, message


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", OF_PAIRS)
def test_good_input_is_taken(name, packed):
    getattr(fastpref, name)(**arguments(name, packed=packed))


@pytest.mark.parametrize("name", ["linear_logps", "linear_logsumexp"])
def test_good_input_without_pairs_is_taken(name):
    getattr(fastpref, name)(**arguments(name))


# Rows


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("rows", [3, 1, 0])
def test_an_odd_number_of_rows(name, rows):
    labels = torch.zeros(rows, 3, dtype=torch.int64)
    refused(name, "labels", "(2B, T)", f"({rows}, 3)", labels=labels)


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("shape", [(12,), (2, 2, 3)], ids=str)
def test_labels_that_are_not_rows(name, shape):
    refused(name, "labels", "(2B, T)", str(shape), labels=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_rows_beside_cu_seqlens(name):
    labels = torch.zeros(4, 4, dtype=torch.int64)
    refused(name, "labels", "(N,)", "(4, 4)", packed=True, labels=labels)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_nothing_packed(name):
    labels, boundaries = torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    refused(name, "labels", "N above 0", "(0,)", packed=True, labels=labels, cu_seqlens=boundaries)


# Shapes


@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
@pytest.mark.parametrize("shape", [(4, 4, 8), (2, 3, 8), (12, 8), (8,)], ids=str)
def test_hidden_that_does_not_fit_labels(name, shape):
    expected = str(tuple(shape[:-1]))
    refused(name, "labels", expected, "(4, 3)", hidden=torch.randn(shape))


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("shape", [(20, 7), (8, 20), (20,), (2, 20, 8), (0, 8)], ids=str)
def test_weight_of_another_shape(name, shape):
    refused(name, "weight", "(V, ", str(shape), weight=torch.randn(shape))


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("shape", [(8,), (1,), (20, 1), ()], ids=str)
def test_bias_of_another_shape(name, shape):
    refused(name, "bias", "(20,) ((V,))", str(shape), bias=torch.zeros(shape))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("name", "argument"), PER_SEQUENCE)
@pytest.mark.parametrize("shape", [(2,), (4, 1), ()], ids=str)
def test_other_than_one_number_a_sequence(name, argument, shape, packed):
    changes = {argument: torch.zeros(shape)}
    refused(name, argument, "(4,)", str(shape), packed=packed, **changes)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (3, 4), (12,)], ids=str)
def test_token_weights_of_another_shape(shape):
    refused("tvkd_loss", "token_weights", "(4, 3)", str(shape), token_weights=torch.ones(shape))


@pytest.mark.parametrize("name", OF_STATES)
def test_states_without_the_extra_position(name):
    argument = "values" if name == "shaping_from_values" else "hidden"
    states = arguments(name)[argument][:, :-1]
    refused(name, argument, "the state after the last token", "(4, 3", **{argument: states})


@pytest.mark.parametrize("name", OF_STATES)
def test_packed_states_of_another_length(name):
    argument = "values" if name == "shaping_from_values" else "hidden"
    states = arguments(name, packed=True)[argument][:-1]
    refused(name, argument, "one position for each", "(15", packed=True, **{argument: states})


@pytest.mark.parametrize("name", OF_STATES)
@pytest.mark.parametrize("more", [True, False], ids=["more", "less"])
def test_states_of_another_rank(name, more):
    argument = "values" if name == "shaping_from_values" else "hidden"
    states = arguments(name)[argument]
    states = states.unsqueeze(-1) if more else states[..., 0]
    expected = "(4, 4)" if name == "shaping_from_values" else "(4, 4, H)"
    refused(name, argument, expected, str(tuple(states.shape)), **{argument: states})


@pytest.mark.parametrize("shape", [(8, 1), (2, 8), (7,)], ids=str)
def test_a_reward_head_of_another_shape(shape):
    expected = "(1, 8) or (8,)"
    refused("sequence_rewards", "head_weight", expected, str(shape), head_weight=torch.ones(shape))
    refused("sequence_rewards", "head_bias", "(1,) or ()", "(2,)", head_bias=torch.ones(2))


# Dtypes


@pytest.mark.parametrize("name", HEADED)
@pytest.mark.parametrize("argument", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_head_of_another_dtype(name, argument, dtype):
    value = torch.zeros((20, 8) if argument == "weight" else 20, dtype=dtype)
    refused(name, argument, "torch.float32, like hidden", str(dtype), **{argument: value})


@pytest.mark.parametrize("name", [*HEADED, "sequence_rewards"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_hidden_that_is_not_floating(name, dtype):
    hidden = torch.zeros(arguments(name)["hidden"].shape, dtype=dtype)
    refused(name, "hidden", "float64, float32, float16 or bfloat16", str(dtype), hidden=hidden)


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [
        *((name, "weight", (20, 8)) for name in HEADED),
        *((name, "bias", (20,)) for name in HEADED),
        *((name, argument, (4,)) for name, argument in PER_SEQUENCE),
        ("tvkd_loss", "token_weights", (4, 3)),
        ("shaping_from_values", "values", (4, 4)),
        ("sequence_rewards", "head_weight", (1, 8)),
        ("sequence_rewards", "head_bias", (1,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_numbers_that_are_not_floating(name, argument, shape, dtype):
    changes = {argument: torch.zeros(shape, dtype=dtype)}
    refused(name, argument, "float64, float32, float16 or bfloat16", str(dtype), **changes)


@pytest.mark.parametrize("name", ["linear_logps", *OF_PAIRS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_labels_that_are_not_integers(name, dtype):
    refused(name, "labels", "integer", str(dtype), labels=torch.zeros(4, 3, dtype=dtype))


@pytest.mark.parametrize("name", ["linear_logps", *OF_PAIRS])
def test_labels_that_are_no_tensor(name):
    refused(name, "labels", "a tensor", "list", labels=[[1, 2], [3, 4]])


@pytest.mark.parametrize(("name", "argument"), PER_SEQUENCE)
def test_a_number_a_sequence_that_is_no_tensor(name, argument):
    refused(name, argument, "a tensor", "list", **{argument: [0.0] * 4})


# Devices


@pytest.mark.parametrize(
    ("name", "argument", "like"),
    [
        *((name, "weight", "hidden") for name in HEADED),
        *((name, "bias", "hidden") for name in HEADED),
        *((name, "labels", "hidden") for name in ("linear_logps",)),
        *((name, argument, "labels") for name, argument in PER_SEQUENCE),
        ("tvkd_loss", "token_weights", "labels"),
        ("teacher_shaping", "hidden", "labels"),
        ("shaping_from_values", "values", "labels"),
        ("sequence_rewards", "hidden", "labels"),
        ("sequence_rewards", "head_weight", "hidden"),
        ("sequence_rewards", "head_bias", "hidden"),
    ],
)
def test_another_device(name, argument, like):
    optional = {
        "weight": torch.zeros(20, 8),
        "bias": torch.zeros(20),
        "ref_logps": torch.zeros(4),
        "token_weights": torch.zeros(4, 3),
        "head_bias": torch.zeros(1),
    }
    value: Tensor = {**optional, **arguments(name)}[argument]
    refused(name, argument, f"cpu, like {like}", "meta", **{argument: value.to(META)})


@pytest.mark.parametrize("name", LOSSES)
def test_hidden_on_another_device(name):
    hidden = torch.zeros(4, 3, 8, device=META)
    refused(name, "labels", "meta, like hidden", "cpu", hidden=hidden)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", LOSSES)
def test_labels_on_another_device(name, packed):
    labels = arguments(name, packed=packed)["labels"].to(META)
    refused(name, "labels", "cpu, like hidden", "meta", packed=packed, labels=labels)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_cu_seqlens_on_another_device(name):
    boundaries = torch.zeros(5, dtype=torch.int64, device=META)
    refused(name, "cu_seqlens", "cpu, like labels", "meta", packed=True, cu_seqlens=boundaries)


# Labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("label", [20, 10**12, -1, -99, -101])
def test_labels_outside_the_vocabulary(name, label, trained, dtype):
    changes = {
        "hidden": torch.randn(4, 3, 8, dtype=dtype, requires_grad=True),
        "head": torch.randn(20, 8, dtype=dtype, requires_grad=trained),
        "labels": arguments(name)["labels"],
    }
    changes["labels"][2, 1] = label
    expected = "-100 (ignore_index) or values in [0, 20)"
    refused(name, "labels", expected, f"1 outside, the first of them {label}", **changes)
    with torch.no_grad():
        refused(name, "labels", expected, f"1 outside, the first of them {label}", **changes)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("potential", ["value", "margin"])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("label", [20, 10**12, -1])
def test_a_teachers_labels_outside_its_vocabulary(label, position, potential, packed):
    given = arguments("teacher_shaping", packed=packed)
    given["labels"].view(4, -1)[0, position] = label
    expected = "-100 (ignore_index) or values in [0, 20)"
    got = f"1 outside, the first of them {label}"
    refused("teacher_shaping", "labels", expected, got, packed=packed, **given, potential=potential)
    found = fastpref.teacher_shaping(**given, potential=potential, compact=False)
    assert found[0].isnan() and found[1:].isfinite().all()


@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
def test_another_ignore_index_is_not_spared(name):
    refused(name, "labels", "-1 (ignore_index)", "the first of them -100", ignore_index=-1)


@pytest.mark.parametrize("name", LOSSES)
def test_packed_labels_outside_the_vocabulary(name):
    labels = arguments(name, packed=True)["labels"]
    labels[4] = 33
    refused(name, "labels", "[0, 20)", "the first of them 33", packed=True, labels=labels)


@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("label", [20, 10**12, -1])
def test_without_compaction_a_bad_label_is_nan(name, label, trained):
    changed = arguments(name)
    changed["labels"][1, 1] = label
    changed["hidden"].requires_grad_()
    changed["head"].requires_grad_(trained)
    found = getattr(fastpref, name)(**changed, compact=False)
    if name == "linear_logps":
        assert found[1, 1].isnan() and found[0].isfinite().all() and found[2:].isfinite().all()
    else:
        assert found.loss.isnan() and found.chosen_logps[0].isfinite()
        assert found.chosen_logps[1].isnan() and found.rejected_logps.isfinite().all()


# Boundaries of packed sequences


WRONG_OR_RIGHT = [
    [0, 4, 8, 12, 16],  # the one that is right
    [1, 4, 8, 12, 16],
    [0, 4, 8, 12, 15],
    [0, 4, 8, 12, 99],
    [0, 8, 4, 12, 16],
    [0, 4, 8, 12, -16],
    [0, 0, 0, 0, 0],
    [16, 16, 16, 16, 16],
    [0, 99, 99, 99, 99],
]


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize(
    "boundaries",
    [[1, 4, 8, 12, 16], [0, 4, 8, 12, 15], [0, 4, 8, 12, 17], [0, 8, 4, 12, 16], [0, -4, 4, 8, 16]],
    ids=["late start", "early end", "late end", "falling", "negative"],
)
def test_wrong_boundaries(name, boundaries):
    refused(
        name, "cu_seqlens", "never fall, from 0 to 16", str(boundaries),
        packed=True, cu_seqlens=torch.tensor(boundaries),
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("boundaries", WRONG_OR_RIGHT, ids=str)
def test_wrong_boundaries_are_nan_where_nobody_reads_them(name, boundaries):
    given = arguments(name, packed=True) | {"cu_seqlens": torch.tensor(boundaries)}
    found = getattr(fastpref, name)(**given, compact=False)
    numbers = torch.cat((found.loss[None], found.chosen_logps, found.rejected_logps))
    assert (torch.isnan(numbers) == (boundaries != [0, 4, 8, 12, 16])).all()


@pytest.mark.parametrize("boundaries", WRONG_OR_RIGHT, ids=str)
@pytest.mark.parametrize("potential", ["value", "margin"])
def test_wrong_boundaries_are_nan_shaping_where_nobody_reads_them(boundaries, potential):
    given = arguments("teacher_shaping", packed=True) | {"cu_seqlens": torch.tensor(boundaries)}
    found = fastpref.teacher_shaping(**given, compact=False, potential=potential)
    assert (torch.isnan(found) == (boundaries != [0, 4, 8, 12, 16])).all()


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """What the host read from a tensor, of all ways that the code knows."""
    found: list[str] = []
    for way in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero"):
        original = getattr(Tensor, way)

        def noting(self: Tensor, *rest: Any, way: str = way, original: Any = original) -> Any:
            found.append(way)
            return original(self, *rest)

        monkeypatch.setattr(Tensor, way, noting)
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", [*LOSSES, "teacher_shaping"])
def test_how_often_the_host_reads(reads, name, trained, packed):
    given = arguments(name, packed=packed)
    given["hidden"].requires_grad_()
    given["head"].requires_grad_(trained)

    def run(*, compact: bool) -> int:
        reads.clear()
        found = getattr(fastpref, name)(**given, compact=compact)
        in_forward = len(reads)
        if name in LOSSES:
            found.loss.backward()
        # The backward pass knows the number of rows from a tensor that lies on the host.
        assert reads[in_forward:] in ([], ["__int__"] if compact else [])
        return in_forward

    assert run(compact=False) == 0
    # The labels, and with them the boundaries in a loss.
    assert run(compact=True) == (1 if name in LOSSES else 1 + packed)


def test_compiled_code_checks_boundaries_too():
    given = arguments("tvkd_loss", packed=True)

    def loss(cu_seqlens: Tensor) -> Tensor:
        return fastpref.tvkd_loss(**{**given, "cu_seqlens": cu_seqlens}).loss

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(given["cu_seqlens"]), loss(given["cu_seqlens"]))
    with pytest.raises(ValueError, match="cu_seqlens: expected boundaries that never fall"):
        compiled(torch.tensor([0, 8, 4, 12, 16]))


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("boundaries", [[0, 4, 8, 16], [0], [0, 16], [[0, 8, 16]], []], ids=str)
def test_boundaries_that_make_no_pairs(name, boundaries):
    boundaries = torch.tensor(boundaries, dtype=torch.int64)
    refused(
        name, "cu_seqlens", "(2B + 1,)", str(tuple(boundaries.shape)),
        packed=True, cu_seqlens=boundaries,
    )  # fmt: skip


@pytest.mark.parametrize("name", OF_PAIRS)
def test_boundaries_of_another_kind(name):
    boundaries = torch.arange(5) * 4
    refused(name, "cu_seqlens", "integer", "torch.float32", packed=True, cu_seqlens=boundaries / 1)
    refused(name, "cu_seqlens", "a tensor", "list", packed=True, cu_seqlens=boundaries.tolist())


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("position", [3, 15])
def test_a_token_at_the_end_of_a_packed_sequence(name, position):
    labels = arguments(name, packed=True)["labels"]
    labels[position] = 1
    refused(
        name, "labels", "-100 (ignore_index) at the last position", "a token there",
        packed=True, labels=labels,
    )  # fmt: skip


# Hyper-parameters


NUMBERS = [
    *((name, "temperature", (0, -1.0)) for name in HEADED),
    *((name, "softcap", (0.0, -30)) for name in HEADED),
    *((name, "logit_scale", ()) for name in HEADED),
    ("tvkd_loss", "beta", (0, -0.1)),
    ("tvkd_loss", "alpha", (-0.1,)),
    ("tvkd_loss", "label_smoothing", (-0.1, 0.9)),
    ("tvkd_loss", "sft_weight", (-1,)),
    ("drdo_loss", "alpha", (-0.1,)),
    ("drdo_loss", "gamma", (-1,)),
    ("teacher_shaping", "gamma", (-1,)),
    ("shaping_from_values", "gamma", (-0.5,)),
]
NEVER = (math.nan, math.inf, -math.inf, "1", True, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [(name, argument, value) for name, argument, out in NUMBERS for value in (*NEVER, *out)],
    ids=str,
)
def test_numbers_that_are_not_finite_or_out_of_range(name, argument, value):
    got = str(value) if isinstance(value, (int, float)) else repr(value)
    refused(name, argument, "a finite number", got, **{argument: value})


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name, argument, _ in NUMBERS])
def test_numbers_of_tensors(name, argument):
    value = torch.tensor(0.5)
    refused(name, argument, "(use .item())", repr(value), **{argument: value})


@pytest.mark.parametrize(("name", "argument"), [(name, argument) for name, argument, _ in NUMBERS])
@pytest.mark.parametrize("kind", [numpy.float32, numpy.float64, Fraction])
def test_real_numbers_of_other_kinds(name, argument, kind):
    given = arguments(name) | {argument: 0.5}
    expected = call(name, given)
    found = call(name, given | {argument: kind(0.5)})
    torch.testing.assert_close(found, expected)


FLAGS = [
    *((name, "compact") for name in ("linear_logps", *LOSSES, "teacher_shaping")),
    *((name, "length_normalize") for name in LOSSES),
    ("drdo_loss", "detach_focal"),
]


@pytest.mark.parametrize(("name", "argument"), FLAGS)
@pytest.mark.parametrize("value", ["no", 0, None, 1.0])
def test_flags_that_are_not_true_or_false(name, argument, value):
    refused(name, argument, "True or False", repr(value), **{argument: value})


@pytest.mark.parametrize("name", ["linear_logps", *OF_PAIRS])
@pytest.mark.parametrize("value", [None, -100.0, "a", True])
def test_an_ignore_index_that_is_no_integer(name, value):
    refused(name, "ignore_index", "an integer", repr(value), ignore_index=value)


@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
@pytest.mark.parametrize("value", [-1, 1.5, True, math.inf])
def test_scratch_bytes_that_are_no_size(name, value):
    refused(name, "scratch_bytes", "a whole number of bytes", repr(value), scratch_bytes=value)


@pytest.mark.parametrize("name", ["teacher_shaping", "shaping_from_values"])
@pytest.mark.parametrize("value", ["end", "", None])
def test_unknown_conventions(name, value):
    refused(name, "terminal", "'bootstrap' or 'zero'", repr(value), terminal=value)
    refused(name, "form", "'difference' or 'next_value'", repr(value), form=value)


@pytest.mark.parametrize("name", [*HEADED, *OF_PAIRS])
def test_an_unknown_keyword(name):
    with pytest.raises(TypeError, match=rf"{name}\(\).*temprature"):
        getattr(fastpref, name)(**arguments(name), temprature=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_do_not_return_the_lse(name):
    with pytest.raises(TypeError, match=rf"{name}\(\).*return_lse"):
        getattr(fastpref, name)(**arguments(name), return_lse=True)


# Sums over responses


def test_sums_refuse_what_does_not_fit():
    labels, logps = torch.ones(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    assert fastpref.sum_responses(logps, labels).logps.shape == (3,)  # no pairs are asked for
    for changes, expected in (
        ({"logps": logps[:2]}, r"logps: expected shape \(3, 2\)"),
        ({"logps": logps.long()}, "logps: expected float64"),
        ({"labels": labels[0]}, r"labels: expected shape \(S, T\)"),
        ({"token_weights": logps[0]}, r"token_weights: expected shape \(3, 2\)"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"labels: expected shape \(N,\)"),
        ({"compact": 1}, "compact: expected True or False"),
    ):
        with pytest.raises(ValueError, match=expected):
            fastpref.sum_responses(**{"logps": logps, "labels": labels, **changes})


@pytest.mark.parametrize("boundaries", WRONG_OR_RIGHT, ids=str)
def test_sums_over_wrong_boundaries_are_nan_where_nobody_reads_them(boundaries):
    labels = arguments("tvkd_loss", packed=True)["labels"]
    given = {"cu_seqlens": torch.tensor(boundaries), "compact": False}
    found = fastpref.sum_responses(torch.zeros(16), labels, **given)
    assert (found.logps.isnan() == (boundaries != [0, 4, 8, 12, 16])).all()
