"""The gold benchmark: its exact values, its labels, its frontiers, and that it resumes."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import frontier
import gold
import numpy as np
import plot
import pytest
import runs
import torch
import train
from methods import METHODS
from models import Decoder, labels_of, measure
from settings import Budget, Settings, generator_of
from show import gains, tables
from step import batch_loss
from tables import TABLES
from train import relabelled, student_data, train_networks, train_student
from world import make_world, sample_pairs

GOLD = Path(__file__).parents[2] / "benchmarks" / "gold"
pytestmark = pytest.mark.usefixtures("one_thread")

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
    assert [row.method for row in rows] == ["worse", "worse", "better", "better"]
    half, last = rows[2:]
    assert last.gain == pytest.approx((1 + 10 + 4) / 3) and last.low < 3 < 7 < last.high
    assert [last.ahead, last.ahead_low, last.ahead_high] == pytest.approx([0.5] * 3)
    assert half.ahead == pytest.approx(0.25)


@pytest.fixture(scope="module")
def trained():
    world = SETTINGS.world(0)
    networks = train_networks(world, 0, SETTINGS)
    return world, networks, student_data(world, 0, SETTINGS, networks)


EVERY = {name: method for table in TABLES.values() for name, method in table.methods.items()}
TRAINED = (*METHODS, "implicit reward, gaps 5", "DRDO, no preference term", "DRDO, sums")


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains(name, trained):
    world, networks, data = trained
    method = EVERY[name]
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
        return batch_loss(EVERY[name], options, *arguments).item()

    assert loss("DPO", beta=0.3) == pytest.approx(np.log(2), rel=1e-6)  # nothing has moved yet
    true = (world.returns(sequences) / world.temperature).view(2, -1)
    assert loss("true reward, gaps 1.5") == pytest.approx(
        torch.nn.functional.softplus(true[0] - true[1]).mean().item(), rel=1e-5
    )
    labels = labels_of(sequences, world.prompt_length)
    logps = [
        model.lm_head(model(sequences)[:, 1:-1]).log_softmax(-1).gather(2, labels[:, 1:, None])
        for model in (networks.teacher, networks.teacher_sft)
    ]
    implicit = SETTINGS.teacher_beta * (logps[0] - logps[1]).sum((1, 2))
    torch.testing.assert_close(tensors["implicit_reward"], implicit, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_docs_are_those_of_the_results(name):
    report = json.loads((GOLD / "results" / f"{name}.json").read_text("utf-8"))
    evidence = (GOLD.parents[1] / "docs" / "evidence.md").read_text("utf-8")
    assert report["sizes"] and all(gains(report, size) in evidence for size in report["sizes"])


def test_methods_of_a_panel_have_as_many_strengths():
    for table in TABLES.values():
        groups = {}
        for method in table.methods.values():
            groups.setdefault(method.group, set()).add(len(method.strengths))
        budgets = {
            group: sizes - {len(METHODS["DPO"].strengths)} for group, sizes in groups.items()
        }
        # Where gamma is swept over labels each has two strengths, and DPO beside them four.
        assert all(
            left <= {2} if "labels" in group else not left for group, left in budgets.items()
        )
        assert set(table.quick) <= set(table.methods) and "DPO" in table.quick


def test_runs_have_files_of_their_own():
    files = [plan.file(Path()) for plan in runs.plans(SETTINGS, EVERY)]
    assert len(set(files)) == len(files)
    for table in TABLES.values():  # the same name is the same run, in whatever panel it is drawn
        for name, method in table.methods.items():
            assert replace(EVERY[name], group=method.group) == method


def test_shaping_is_scaled_to_its_gap(trained, monkeypatch):
    world, networks, data = trained
    seen = []

    def note(method, options, *rest):
        seen.append(options["alpha"])
        return batch_loss(method, options, *rest)

    monkeypatch.setattr(train, "batch_loss", note)
    method = EVERY["true reward, gaps 5"]
    train_student(world, 0, SETTINGS, networks, data, method, 0.1, 1e-3)
    returns = [world.returns(data[side]["sequences"]) for side in ("chosen", "rejected")]
    gaps = seen[0] * (returns[0] - returns[1]) / world.temperature
    assert gaps.std().item() == pytest.approx(5.0, rel=1e-5)


def test_labels_anew_are_right_as_often_as_asked():
    world, generator = SETTINGS.world(0), generator_of(0, 5)
    pairs = sample_pairs(world, 4000, generator)
    data = {side: {"sequences": sequences} for side, sequences in pairs._asdict().items()}
    for right in (1.0, 0.75, 0.5):
        found = relabelled(world, 0, data, right)
        chosen, rejected = (found[side]["sequences"] for side in ("chosen", "rejected"))
        gaps = world.returns(chosen) - world.returns(rejected)
        share = (gaps > 0)[gaps != 0].double().mean().item()
        assert share == pytest.approx(right, abs=4 * (right * (1 - right) / 3000) ** 0.5)
        both = torch.cat([chosen, rejected], 1).sort(1).values  # no response is lost
        assert torch.equal(both, torch.cat(pairs, 1).sort(1).values)


def test_drdo_without_reward_distillation_leaves_the_reward_head(trained):
    world, networks, data = trained
    method = EVERY["DRDO, no reward distillation"]
    student = train_student(world, 0, SETTINGS, networks, data, method, 1.0, 1e-3)
    before = networks.reference.reward_head.weight
    assert torch.equal(student.reward_head.weight, before)
    student = train_student(world, 0, SETTINGS, networks, data, EVERY["DRDO"], 1.0, 1e-3)
    assert not torch.equal(student.reward_head.weight, before)


def test_students_are_judged_by_their_log_ratios(trained):
    world, networks, _ = trained
    sequences = torch.cat(sample_pairs(world, 50, generator_of(0, 8)))
    margin, reward = runs.accuracies(world, networks.teacher, networks.teacher_sft, sequences)
    labels = labels_of(sequences, world.prompt_length)[:, 1:, None]
    logps = [
        model.lm_head(model(sequences)[:, 1:-1]).double().log_softmax(-1).gather(2, labels).sum(1)
        for model in (networks.teacher, networks.teacher_sft)
    ]
    first, second = (logps[0] - logps[1]).flatten().chunk(2)
    true = world.returns(sequences).chunk(2)
    assert margin == pytest.approx(((first > second) == (true[0] > true[1])).double().mean().item())
    assert 0 <= reward <= 1


def test_it_resumes_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    trained = []

    def note(*arguments):
        trained.append(arguments[-2:])
        return train_student(*arguments)

    monkeypatch.setattr(runs, "train_student", note)
    monkeypatch.setattr(gold, "describe_run", dict)
    methods = {name: METHODS[name] for name in ("DPO", "SFT")}
    folder, output = tmp_path / "runs", tmp_path / "gold.json"
    for world in range(2):
        runs.finish_world(world, "tiny", SETTINGS, methods, folder / "tiny")
    assert len(trained) == 32
    rest = 2, methods, (1.0, 2.0), folder, output
    gold.compare({"tiny": SETTINGS}, *rest, jobs=1)  # there is nothing left to train
    report = json.loads(output.read_text("utf-8"))
    assert len(report["rows"]) == 32 and len(report["starts"]) == 2
    assert output.with_suffix(".png").is_file()
    printed = capsys.readouterr().out
    assert tables(report) in printed and "| DPO |" in printed
    assert [panel.methods for panel in plot.panels(report)] == [["DPO", "SFT"]]

    file = folder / "tiny" / "world-1" / "dpo-0.3-rate-0.003.json"
    removed = json.loads(file.read_text("utf-8"))
    file.unlink()
    runs.finish_world(1, "tiny", SETTINGS, methods, folder / "tiny")
    assert trained[32:] == [(0.3, 3e-3)]
    assert json.loads(file.read_text("utf-8")) | {"seconds": removed["seconds"]} == removed
    with pytest.raises(SystemExit, match="other settings"):
        gold.compare({"tiny": Settings()}, *rest, jobs=1)
