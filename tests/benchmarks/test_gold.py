"""The gold benchmark: its exact values, its labels, its frontiers, and that it resumes."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

GOLD = Path(__file__).parents[2] / "benchmarks" / "gold"
sys.path.insert(0, str(GOLD))  # its scripts import one another

import frontier  # noqa: E402
import gold  # noqa: E402
import runs  # noqa: E402
from methods import METHODS  # noqa: E402
from models import Decoder, labels_of, measure  # noqa: E402
from settings import Budget, Settings, generator_of  # noqa: E402
from step import batch_loss  # noqa: E402
from train import student_data, train_networks, train_student  # noqa: E402
from world import make_world, sample_pairs  # noqa: E402

TINY = {"states": 3, "tokens": 3, "length": 3, "prompt_length": 2}
SETTINGS = Settings(
    **TINY,
    teacher_layers=1,
    teacher_width=8,
    teacher_pairs=8,
    student_width=4,
    pairs=8,
    samples=64,
    sft=Budget(4, 2, 1e-3),
    teacher=Budget(4, 2, 1e-3),
    student_batch=4,
    student_steps=2,
    student_rates=(1e-3, 3e-3),
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are slower on many threads than on one; the command sets it, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def every_response(world, prompt):
    """All sequences (n, P + T) that begin with a prompt."""
    tokens = range(world.rewards.shape[1])
    return torch.tensor([(*prompt, *rest) for rest in itertools.product(tokens, repeat=3)])


def every_prompt():
    return itertools.product(range(3), repeat=2)


def walk(world, sequence):
    """The return of one sequence and the states of its response, one token after the other."""
    state, total, states = 0, 0.0, []
    for place, token in enumerate(sequence.tolist()):
        if place >= world.prompt_length:
            states.append(state)
            total += float(world.rewards[state, token])
        state = int(world.next_states[state, token])
    return total, states


def probability(world, policy, sequence):
    _, states = walk(world, sequence)
    tokens = sequence[world.prompt_length :].tolist()
    return np.prod([float(policy[step, *at]) for step, at in enumerate(zip(states, tokens))])  # noqa: B905  # of one length


def test_exact_values_are_those_of_all_responses():
    world = make_world(3, **TINY, temperature=0.7)
    behaviour, target = world.behaviour(), world.soft_policy(0.4, world.behaviour())
    soft, steered = world.soft_values(0.7), world.soft_values(0.4, behaviour)
    kl = world.policy_kl(target, behaviour)
    means = {"return": [], "kl": []}
    for prompt in every_prompt():
        sequences = every_response(world, prompt)
        returns = torch.tensor([walk(world, one)[0] for one in sequences], dtype=torch.float64)
        torch.testing.assert_close(world.returns(sequences), returns)
        start = world.states(sequences)[0, world.prompt_length]
        p, q = (
            torch.tensor([probability(world, policy, one) for one in sequences])
            for policy in (behaviour, target)
        )
        torch.testing.assert_close(p, (returns / 0.7).softmax(0), rtol=1e-9, atol=0)
        torch.testing.assert_close(q, (p.log() + returns / 0.4).softmax(0), rtol=1e-9, atol=0)
        for values, expected in (
            (soft, 0.7 * (returns / 0.7).logsumexp(0)),
            (steered, 0.4 * (p.log() + returns / 0.4).logsumexp(0)),
            (world.policy_values(target), (q * returns).sum()),
            (kl, (q * (q / p).log()).sum()),
        ):
            torch.testing.assert_close(values[0, start], expected, rtol=1e-9, atol=1e-9)
        means["return"].append((q * returns).sum())
        means["kl"].append((q * (q / p).log()).sum())
    found_kl, found_return = world.best_for_kl(0.4)
    assert found_kl == pytest.approx(torch.stack(means["kl"]).mean().item(), rel=1e-9)
    assert found_return == pytest.approx(torch.stack(means["return"]).mean().item(), rel=1e-9)


def test_labels_and_responses_are_as_frequent_as_they_should_be():
    world, generator = make_world(1, **TINY, temperature=0.7), generator_of(0, 0)
    count = 4000
    pair = world.sample(world.behaviour(), world.sample_prompts(2, generator), generator)
    first, second = (each.expand(count, -1) for each in pair.split(1))
    share = world.prefers_first(first, second, generator).double().mean().item()
    margin = (walk(world, pair[0])[0] - walk(world, pair[1])[0]) / 0.7
    expected = 1 / (1 + np.exp(-margin))
    assert 0.02 < abs(expected - 0.5) < 0.48  # or the check below would say little
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)

    pairs = sample_pairs(world, count, generator)
    assert (pairs.chosen[:, :2] == pairs.rejected[:, :2]).all()
    chosen, rejected = (world.returns(side) for side in pairs)
    both = torch.cat([chosen, rejected])
    exact = world.mean_at_start(world.policy_values(world.behaviour()))
    assert both.mean().item() == pytest.approx(
        exact, abs=4 * both.std().item() / (2 * count) ** 0.5
    )
    # Of labels by Bradley-Terry: the share that is right, given the margins.
    margins = (chosen - rejected) / 0.7
    right = margins.abs().sigmoid()[margins != 0]
    error = (right * (1 - right)).sum().sqrt().item() / len(right)
    found = (margins > 0)[margins != 0].double().mean().item()
    assert found == pytest.approx(right.mean().item(), abs=4 * error)


def test_monte_carlo_agrees_with_all_responses():
    world = make_world(2, **TINY)
    torch.manual_seed(0)
    model, other = (Decoder(3, 5, 1, 8).requires_grad_(False) for _ in range(2))
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    returns, kls = [], []
    for prompt in every_prompt():
        sequences = every_response(world, prompt)
        logps = [
            each.lm_head(each(sequences)).double().log_softmax(-1)[:, 1:-1]
            for each in (model, other)
        ]
        of_model, of_other = (each.gather(2, sequences[:, 2:, None]).sum((1, 2)) for each in logps)
        returns.append((of_model.exp() * world.returns(sequences)).sum().item())
        kls.append((of_model.exp() * (of_model - of_other)).sum().item())
    found = measure(world, model, other, samples=3000, generator=generator_of(0, 0))
    assert 0 < found.return_error < 0.05 and 0 < found.kl_error < 0.1 * np.mean(kls)
    assert found.true_return == pytest.approx(np.mean(returns), abs=4 * found.return_error)
    assert found.kl == pytest.approx(np.mean(kls), abs=4 * found.kl_error)
    same = measure(world, model, model, samples=10, generator=generator_of(0, 0))
    assert same.kl == pytest.approx(0, abs=1e-5)


def test_a_frontier_is_the_upper_hull():
    points = [(1.0, 3.0), (2.0, 3.5), (4.0, 5.0), (3.0, 2.0), (6.0, 4.0), (0.5, 0.5)]
    kls, returns = frontier.frontier(points, 1.0)
    assert kls.tolist() == [0, 1, 4] and returns.tolist() == [1, 3, 5]
    gains = frontier.gains_at(points, 1.0, [0, 0.5, 1, 2.5, 4, 9])
    assert gains.tolist() == [0, 1, 2, 3, 4, 4]
    assert frontier.gains_at([(1.0, 0.5)], 1.0, [0, 5]).tolist() == [0, 0]


def test_methods_are_compared_within_worlds():
    better = [[(1.0, 2.0)], [(1.0, 12.0)], [(1.0, 7.0)]]
    worse = [[(1.0, 1.5)], [(1.0, 11.5)], [(1.0, 6.5)]]
    rows = frontier.summarize(
        {"worse": worse, "better": better}, [1.0, 2.0, 3.0], (0.5, 1.0), against="worse"
    )
    assert [row.method for row in rows] == ["better", "better", "worse", "worse"]
    assert rows[1].gain == pytest.approx((1 + 10 + 4) / 3) and rows[1].low < 3 < 7 < rows[1].high
    assert [rows[1].ahead, rows[1].ahead_low, rows[1].ahead_high] == pytest.approx([0.5] * 3)
    assert rows[0].ahead == pytest.approx(0.25)


@pytest.fixture(scope="module")
def trained():
    world = SETTINGS.world(0)
    networks = train_networks(world, 0, SETTINGS)
    return world, networks, student_data(world, 0, SETTINGS, networks)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name, trained):
    world, networks, data = trained
    method = METHODS[name]
    assert len(method.strengths) == len(METHODS["DPO"].strengths)
    student = train_student(world, 0, SETTINGS, networks, data, method, method.strengths[-1], 1e-3)
    changes = [
        (one - other).abs().max().item()
        for one, other in zip(student.parameters(), networks.reference.parameters(), strict=True)
    ]
    assert max(changes) > 1e-4 and all(np.isfinite(changes))


def test_losses_read_the_right_signals(trained):
    world, networks, data = trained
    sides = [data[side] for side in ("chosen", "rejected")]
    tensors = {name: torch.cat([side[name] for side in sides]) for name in sides[0]}
    sequences = tensors.pop("sequences")

    def loss(name, **options):
        arguments = (networks.reference, networks, sequences, tensors, world)
        return batch_loss(METHODS[name], options, *arguments).item()

    assert loss("DPO", beta=0.3) == pytest.approx(np.log(2), rel=1e-6)  # nothing has moved yet
    true = (world.returns(sequences) / world.temperature).view(2, -1)
    assert loss("TVKD, true reward") == pytest.approx(
        torch.nn.functional.softplus(true[0] - true[1]).mean().item(), rel=1e-5
    )
    labels = labels_of(sequences, world.prompt_length)
    logps = [
        model.lm_head(model(sequences)[:, 1:-1]).log_softmax(-1).gather(2, labels[:, 1:, None])
        for model in (networks.teacher, networks.teacher_sft)
    ]
    implicit = SETTINGS.teacher_beta * (logps[0] - logps[1]).sum((1, 2))
    torch.testing.assert_close(tensors["implicit_reward"], implicit, rtol=1e-3, atol=1e-6)


def test_it_resumes_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    trained = []

    def note(*arguments):
        trained.append(arguments[-2:])
        return train_student(*arguments)

    monkeypatch.setattr(runs, "train_student", note)
    monkeypatch.setattr(gold, "describe_run", dict)
    methods, folder, output = ["DPO", "SFT"], tmp_path / "runs", tmp_path / "gold.json"
    for world in range(2):
        runs.finish_world(world, SETTINGS, methods, folder)
    assert len(trained) == 32
    gold.compare(SETTINGS, 2, methods, folder, output, jobs=1)  # there is nothing left to train
    report = json.loads(output.read_text("utf-8"))
    assert len(report["rows"]) == 32 and len(report["starts"]) == 2
    assert output.with_suffix(".png").is_file()
    assert "above the SFT student's" in capsys.readouterr().out

    file = folder / "world-1" / "dpo-0.3-rate-0.003.json"
    removed = json.loads(file.read_text("utf-8"))
    file.unlink()
    runs.finish_world(1, SETTINGS, methods, folder)
    assert trained[32:] == [(0.3, 3e-3)]
    assert json.loads(file.read_text("utf-8")) | {"seconds": removed["seconds"]} == removed
    with pytest.raises(SystemExit, match="other settings"):
        gold.compare(Settings(), 1, methods, folder, output, jobs=1)
