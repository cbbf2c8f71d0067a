"""The study of logsumexp as a value: its measures, its losses, and that it resumes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import value_metrics
import value_teachers
import values
from settings import Budget, Settings, generator_of
from train import train_sft
from world import make_world, sample_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"states": 3, "tokens": 3, "length": 3, "prompt_length": 1}
SETTINGS = Settings(
    **TINY,
    teacher_layers=1,
    teacher_width=8,
    teacher_pairs=16,
    student_width=4,
    samples=64,
    sft=Budget(8, 2, 1e-2),
    teacher=Budget(8, 2, 1e-2),
)


def exact_values(world, sequences):
    places = world.states(sequences)[:, world.prompt_length :]
    return world.soft_values(world.temperature)[torch.arange(world.length + 1), places]


def test_true_values_are_told_from_noise():
    settings = Settings()
    world, generator = settings.world(0), generator_of(0, 0)
    sequences = torch.cat(sample_pairs(world, 3000, generator))
    exact = exact_values(world, sequences)
    offsets = 10 * torch.randn(world.length + 1, generator=generator, dtype=torch.float64)
    judged = values.judge(3 * exact + offsets, world, sequences, settings)
    assert judged.behaviour_correlation == pytest.approx(1, rel=1e-9)
    assert judged.of_state == pytest.approx(1, rel=1e-9)
    assert 0.02 < judged.of_token < 0.3
    # Both responses start in one state, and every response ends at the value 0.
    assert judged.bootstrap_ranking == 0.5
    assert judged.next_value_ranking > 0.53

    noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    judged = values.judge(noise, world, sequences, settings)
    assert abs(judged.behaviour_correlation) < 4 / noise[:, :-1].numel() ** 0.5
    assert abs(judged.dpo_correlation) < 4 / noise[:, :-1].numel() ** 0.5
    assert judged.std == pytest.approx(1, abs=0.02)
    assert judged.of_state < 0.01 and judged.of_token < 0.02
    assert judged.bootstrap_ranking == pytest.approx(0.5, abs=4 * 0.5 / 3000**0.5)


def test_values_of_dpo_are_those_of_its_optimum():
    settings = Settings(**TINY, teacher_beta=0.5, temperature=0.7)
    world = settings.world(4)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=4))[1:])  # an even number
    behaviour = world.behaviour()
    # The best for the return over the temperature, less beta times the KL from the behaviour.
    tilted = world.soft_policy(0.35, behaviour)
    soft = world.policy_values(tilted) - 0.35 * world.policy_kl(tilted, behaviour)
    places = world.states(sequences)[:, 1:]
    judged = values.judge(soft[torch.arange(4), places], world, sequences, settings)
    assert judged.dpo_correlation == pytest.approx(1, rel=1e-9)
    assert judged.behaviour_correlation < 0.999


def test_shares_by_hand():
    numbers = torch.tensor([[1.0, 7.0], [3.0, 9.0], [5.0, 7.0], [7.0, 9.0]])
    groups = torch.tensor([[0, 0], [0, 2], [1, 0], [1, 2]])
    # Between groups 16 of 20, and all 4 of 4.
    assert value_metrics.share_explained(numbers, groups) == pytest.approx(20 / 24)
    # Right, wrong, and a tie.
    signal = torch.tensor([2.0, 1.0, 1.0, 1.0, 2.0, 1.0])
    returns = torch.tensor([5.0, 5.0, 5.0, 4.0, 4.0, 4.0])
    assert value_metrics.share_ranked(signal, returns) == pytest.approx(0.5)
    assert value_metrics.share_ranked(signal[[0, 3]], returns[[0, 3]]) == 1
    assert value_metrics.share_ranked(signal[[1, 4]], returns[[1, 4]]) == 0


def test_what_hidden_states_tell_is_found_on_other_rows():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(400, 5, 4, generator=generator, dtype=torch.float64)
    truths = states @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + torch.arange(5)
    assert value_metrics.readable(states, truths) > 0.999
    noise = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    assert abs(value_metrics.readable(states, noise)) < 4 / 1000**0.5


def test_soft_q_ends_at_the_exact_values():
    world = make_world(5, **TINY, temperature=0.7)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=4)))  # all of them
    states, tokens = world.states(sequences)[:, 1:-1], sequences[:, 1:]
    rewards, steps = world.rewards[states, tokens] / 0.7, torch.arange(3)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss():
        found = logits[steps, states]
        lse = found.logsumexp(-1)
        logps = found.gather(2, tokens.unsqueeze(2)).squeeze(2) - lse
        return value_teachers.bellman_loss(logps, lse, rewards)

    assert loss().item() > 0.1
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    exact = world.action_values(world.soft_values(0.7)) / 0.7
    seen = torch.zeros(3, 3, dtype=torch.bool)
    seen[steps.expand_as(states), states] = True  # not every state is reached at every step
    torch.testing.assert_close(logits.detach()[seen], exact[seen], rtol=1e-5, atol=1e-5)
    lifted = logits.detach() + torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1)  # the same policy
    logits.data = lifted
    assert loss().item() > 0.1


def trained(count, settings):
    """The first teachers of a tiny world, trained."""
    world = settings.world(0)
    pairs = sample_pairs(world, settings.teacher_pairs, generator_of(0, 0))
    teachers = value_teachers.train_teachers(world, 0, settings, "states", pairs)
    return world, pairs, dict(itertools.islice(teachers, count))


def test_sft_is_that_of_the_comparison():
    world, pairs, teachers = trained(1, SETTINGS)
    other = value_teachers.new_teacher(world, 0, SETTINGS, "states")
    train_sft(other, pairs, SETTINGS, generator_of(0, 2))
    for one, two in zip(teachers["SFT"].parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_z_loss_and_decay_pull_where_they_should():
    world, pairs, teachers = trained(5, replace(SETTINGS, sft=Budget(8, 20, 3e-2)))
    lse, weights = {}, {}
    for name, model in teachers.items():
        found = value_teachers.read(model, pairs.chosen, world.prompt_length)
        lse[name] = found.values.square().mean().item()
        weights[name] = sum(float(each.square().sum()) for each in model.parameters())
    assert lse["SFT, z-loss 0.01"] < lse["SFT, z-loss 0.001"] < lse["SFT"]
    assert weights["SFT, decay 1"] < weights["SFT, decay 0.1"] < weights["SFT"]


def test_it_resumes_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(values, "describe_run", dict)
    folder, output = tmp_path / "runs", tmp_path / "values.json"
    values.study(SETTINGS, 2, folder, output)
    report = json.loads(output.read_text("utf-8"))
    assert [(row["reads"], row["world"]) for row in report["rows"]] == [
        ("states", 0),
        ("states", 1),
        ("tokens", 0),
        ("tokens", 1),
    ]
    assert [each["name"] for each in report["rows"][0]["teachers"]] == [*value_teachers.TEACHERS]
    for row in report["rows"]:
        numbers = [list(each["judged"].values()) + [each["kl"]] for each in row["teachers"]]
        assert np.isfinite(numbers).all()
        assert row["teachers"][0]["kl"] == pytest.approx(0, abs=1e-5)
        assert len({each["judged"]["std"] for each in row["teachers"]}) == len(row["teachers"])
    assert output.with_suffix(".png").is_file()
    assert "teacher sees the state; 2 worlds" in capsys.readouterr().out

    done, study_world = [], values.study_world

    def note(*arguments):
        done.append(arguments[::2])
        return study_world(*arguments)

    monkeypatch.setattr(values, "study_world", note)
    (folder / "tokens-1.json").unlink()
    values.study(SETTINGS, 2, folder, output)
    again = json.loads(output.read_text("utf-8"))
    assert done == [(1, "tokens")]
    for row in (*report["rows"], *again["rows"]):
        del row["seconds"]
    assert again["rows"] == report["rows"]
    with pytest.raises(SystemExit, match="other settings"):
        values.study(Settings(), 1, folder, output)
