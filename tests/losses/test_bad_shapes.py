"""Shapes that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from bad_input import HEADED, LOSSES, OF_PAIRS, OF_STATES, PER_SEQUENCE, arguments, refused

import fastpref


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", OF_PAIRS)
def test_good_input_is_taken(name, packed):
    getattr(fastpref, name)(**arguments(name, packed=packed))


@pytest.mark.parametrize("name", ["linear_logps", "linear_logsumexp"])
def test_good_input_without_pairs_is_taken(name):
    getattr(fastpref, name)(**arguments(name))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_an_odd_number_of_rows(name):
    for rows in (3, 1, 0):
        labels = torch.zeros(rows, 3, dtype=torch.int64)
        refused(name, "labels", "(2B, T)", f"({rows}, 3)", labels=labels)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_labels_that_are_not_rows(name):
    for shape in ((12,), (2, 2, 3)):
        refused(name, "labels", "(2B, T)", str(shape), labels=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("name", OF_PAIRS)
def test_rows_beside_cu_seqlens(name):
    labels = torch.zeros(4, 4, dtype=torch.int64)
    refused(name, "labels", "(N,)", "(4, 4)", packed=True, labels=labels)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_nothing_packed(name):
    labels, boundaries = torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    refused(name, "labels", "N above 0", "(0,)", packed=True, labels=labels, cu_seqlens=boundaries)


@pytest.mark.parametrize("name", ["linear_logps", *LOSSES])
def test_hidden_that_does_not_fit_labels(name):
    for shape in ((4, 4, 8), (2, 3, 8), (12, 8), (8,)):
        expected = str(tuple(shape[:-1]))
        refused(name, "labels", expected, "(4, 3)", hidden=torch.randn(shape))


@pytest.mark.parametrize("name", HEADED)
def test_weight_of_another_shape(name):
    for shape in ((20, 7), (8, 20), (20,), (2, 20, 8), (0, 8)):
        refused(name, "weight", "(V, ", str(shape), weight=torch.randn(shape))


@pytest.mark.parametrize("name", HEADED)
def test_bias_of_another_shape(name):
    for shape in ((8,), (1,), (20, 1), ()):
        refused(name, "bias", "(20,) ((V,))", str(shape), bias=torch.zeros(shape))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("name", "argument"), PER_SEQUENCE)
def test_other_than_one_number_a_sequence(name, argument, packed):
    for shape in ((2,), (4, 1), ()):
        changes = {argument: torch.zeros(shape)}
        refused(name, argument, "(4,)", str(shape), packed=packed, **changes)


def test_token_weights_of_another_shape():
    for shape in ((4,), (4, 4), (3, 4), (12,)):
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


def test_a_reward_head_of_another_shape():
    for shape in ((8, 1), (2, 8), (7,)):
        expected = "(1, 8) or (8,)"
        refused(
            "sequence_rewards", "head_weight", expected, str(shape), head_weight=torch.ones(shape)
        )
        refused("sequence_rewards", "head_bias", "(1,) or ()", "(2,)", head_bias=torch.ones(2))


FLAT = {"labels": torch.tensor([1, 2, -100]), "logps": torch.full((3,), -0.5)}


def test_sums_refuse_what_does_not_fit():
    one = fastpref.sum_responses(**FLAT, cu_seqlens=torch.tensor([0, 3]))
    assert one.logps.tolist() == [-1.0] and one.lengths.tolist() == [2]
    labels, logps = torch.ones(3, 2, dtype=torch.int64), torch.zeros(3, 2)
    assert fastpref.sum_responses(logps, labels).logps.shape == (3,)  # no pairs are asked for
    for changes, expected in (
        ({"logps": logps[:2]}, r"logps: expected shape \(3, 2\)"),
        ({"logps": logps.long()}, "logps: expected float64"),
        ({"labels": labels[0]}, r"labels: expected shape \(S, T\)"),
        ({"logps": logps.to("meta")}, "logps: expected device cpu, like labels"),
        ({"token_weights": logps[0]}, r"token_weights: expected shape \(3, 2\)"),
        ({"token_weights": logps.to("meta")}, "token_weights: expected device cpu, like labels"),
        ({"token_weights": logps.long()}, "token_weights: expected float64"),
        ({"cu_seqlens": torch.tensor([0, 6])}, r"labels: expected shape \(N,\)"),
        ({**FLAT, "cu_seqlens": torch.tensor([0])}, r"cu_seqlens: expected shape \(S \+ 1,\)"),
        ({**FLAT, "cu_seqlens": torch.tensor([[0, 6]])}, r"cu_seqlens: expected shape \(S \+ 1,\)"),
        ({"compact": 1}, "compact: expected True or False"),
    ):
        with pytest.raises(ValueError, match=expected):
            fastpref.sum_responses(**{"logps": logps, "labels": labels, **changes})
