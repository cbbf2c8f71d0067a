"""What trainers log of what losses return."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest
import torch

from fastpref import Responses
from fastpref.integrations.trl.metrics import of_output
from fastpref.losses import METHODS, kto, vanilla_kd

NAMES = {
    "chosen_logps": "logps/chosen",
    "rejected_logps": "logps/rejected",
    "chosen_rewards": "rewards/chosen",
    "chosen_divergence": "divergence/chosen",
    "rejected_divergence": "divergence/rejected",
    "rejected_advantage": "advantage/rejected",
    "chosen_divergences": "divergences/chosen",
    "reward_loss": "losses/reward",
    "odds_loss": "losses/odds",
    "log_odds": "log_odds",
    "weights": "weights",
    "kl": "kl",
}


def output_of(method):
    """What a loss returns, with numbers in all of it."""
    output = get_type_hints(METHODS[method])["return"]
    values = dict.fromkeys(output._fields, torch.tensor([1.0, 2.0, 4.0]))
    if method == "kto":
        values |= {"desirable": torch.tensor([True, False, False]), "kl": torch.tensor(1.0)}
    return output(**values)


@pytest.mark.parametrize("method", METHODS)
def test_every_output_is_logged(method):
    output = output_of(method)
    weighs = "sft_weight" in inspect.signature(METHODS[method]).parameters
    found = of_output(output, {"sft_weight": 1.0} if weighs else {})
    expected = {NAMES[name] for name in output._fields if name in NAMES}
    assert expected <= set(found) and "loss" not in found
    assert ("losses/nll" in found) == weighs
    assert ("rewards/margins" in found) == ("chosen_rewards" in output._fields)


def test_desirable_responses_count_as_chosen():
    responses = Responses(torch.tensor([-1.0, -6.0, -4.0]), torch.tensor([1, 2, 2]))
    good = torch.tensor([True, False, True])
    output = kto(responses, torch.tensor([-2.0, -4.0, -4.0]), good, torch.tensor(0.5), beta=0.5)
    found = {name: one.tolist() for name, one in of_output(output, {}).items()}
    assert found == {
        "logps/chosen": [-5.0, 2.0],
        "logps/rejected": [-6.0, 1.0],
        "rewards/chosen": [0.5, 2.0],
        "rewards/rejected": [-1.0, 1.0],
        "kl": [0.5, 1.0],
    }


@pytest.mark.parametrize("sft_weight", [0.0, 0.1])
def test_the_likelihood_is_logged_where_it_is_a_part(sft_weight):
    chosen = Responses(torch.tensor([-1.0, -7.0]), torch.tensor([1, 3]))
    found = of_output(vanilla_kd(chosen, torch.ones(2)), {"sft_weight": sft_weight})
    assert ("losses/nll" in found) == bool(sft_weight)
    assert found["divergence/chosen"].tolist() == [0.5, 1.0]


def test_no_name_is_a_folder_of_another():
    """MLflow's file store takes names for paths: it cannot keep ``loss`` beside ``loss/nll``."""
    found = {"loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"}
    for method in METHODS:
        found |= {f"losses/{method}", *of_output(output_of(method), {"sft_weight": 1.0})}
    assert {"losses/nll", "losses/reward", "rewards/margins"} <= found
    assert [one for one in found for other in found if other.startswith(f"{one}/")] == []
