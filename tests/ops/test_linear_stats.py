from __future__ import annotations

import math

import formulas
import pytest
import torch
from cases import DTYPES, Case, cases
from closeness import assert_no_worse
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import fastpref
from fastpref import Head
from fastpref.ops import tiling
from fastpref.ops.linear_stats import FORMULAS, OF_LABELS
from fastpref.ops.linear_stats_op import (
    Partial,
    Sums,
    linear_stats_ops,
    merge,
    partial_of_tile,
)

EVERYTHING = list(FORMULAS)
NUMBERS = [name for name in EVERYTHING if name != "is_top1"]
OF_STATES = [name for name in EVERYTHING if name not in OF_LABELS]
Stats = dict[str, torch.Tensor]


def run(case: Case, stats: list[str] = EVERYTHING, **more: object) -> Stats:
    options = {**case.options, **more}
    with torch.no_grad():
        return fastpref.linear_stats(case.hidden, case.head, case.labels, stats=stats, **options)


def expected(case: Case) -> Stats:
    with torch.no_grad():
        return formulas.linear_stats(case.hidden, case.head, case.labels, **case.options)


def of_logits(logits: torch.Tensor, labels: torch.Tensor, **more: object) -> Stats:
    """Statistics of given logits: the head is the identity."""
    return run(Case(logits, Head(torch.eye(logits.shape[-1]).to(logits)), labels), **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases(), compact=st.booleans())
def test_equals_the_reference(dtype, case, compact):
    ours = case.to(dtype, trained=False)
    rough, exact = expected(ours), expected(ours.to(torch.float64, trained=False))
    found = run(ours, compact=compact)
    assert list(found) == EVERYTHING
    for name in NUMBERS:
        assert found[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_no_worse(found[name], rough[name], exact[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases())
def test_is_top1_wherever_rounding_cannot_decide(dtype, case):
    ours = case.to(dtype, trained=False)
    exact = ours.to(torch.float64, trained=False)
    labels = torch.where(case.labels == case.options["ignore_index"], 0, case.labels)
    temperature = case.options["temperature"]
    logits = formulas.logits(exact.hidden, exact.head, temperature=temperature)
    single = ours.to(torch.float32, trained=False)
    single = formulas.logits(single.hidden, single.head, temperature=temperature)
    gap = logits.gather(-1, labels.unsqueeze(-1)) - logits
    gap.scatter_(-1, labels.unsqueeze(-1), torch.inf)
    clear = gap.abs().amin(-1) > 4 * (single - logits).abs().amax()
    found = run(ours, ["is_top1"])["is_top1"]
    assert found.dtype == torch.bool
    right = (gap > 0).all(-1) & (case.labels != case.options["ignore_index"])
    assert (found == right)[clear].all()


@given(case=cases())
def test_each_is_the_same_whatever_else_is_asked(case):
    everything = run(case)
    for name in EVERYTHING:
        alone = run(case, [name])
        assert list(alone) == [name]
        torch.testing.assert_close(alone[name], everything[name], rtol=0, atol=0)
    assert list(run(case, EVERYTHING[::-1])) == EVERYTHING[::-1]


@given(case=cases())
def test_agrees_with_the_primitives(case):
    found = run(case)
    logps, lse, *_ = fastpref.linear_logps_with_stats(
        case.hidden, case.head, case.labels, **case.options
    )
    torch.testing.assert_close(found["target_logp"], logps)
    torch.testing.assert_close(found["logsumexp"], lse)


@given(case=cases())
def test_without_labels_every_position_counts(case):
    with_labels = run(case._replace(labels=torch.zeros_like(case.labels)), ignore_index=-100)
    temperature = case.options["temperature"]
    found = fastpref.linear_stats(case.hidden, case.head, stats=OF_STATES, temperature=temperature)
    assert list(found) == OF_STATES
    for name, values in found.items():
        torch.testing.assert_close(values, with_labels[name], rtol=0, atol=0)


@given(case=cases())
def test_is_the_same_for_any_tiling(case):
    case = case.to(torch.float64, trained=False)
    whole = run(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "ROWS_PER_TILE", 4)
        patch.setattr(tiling, "CPU_TILE_BYTES", 1)
        patch.setattr(tiling, "COLUMN_MULTIPLE", 16)
        tiled = run(case)
    for name in EVERYTHING:
        torch.testing.assert_close(tiled[name], whole[name], rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    scale=st.sampled_from([0.0, 1.0, 40.0]),
    masked=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_merging_parts_is_the_same_as_one_part(seed, widths, scale, masked):
    """Ties, far apart maxima and parts of -inf alone included."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(5, sum(widths), generator=generator, dtype=torch.float64)
    hidden = torch.rand(logits.shape, generator=generator) < masked
    logits.masked_fill_(hidden, -torch.inf)
    sums = Sums(second=True, shortfall=True, squares=True)
    parts = [partial_of_tile(part.clone(), sums) for part in logits.split(widths, dim=1)]
    merged = merge(Partial(*(torch.stack(numbers) for numbers in zip(*parts, strict=True))))
    whole = partial_of_tile(logits.clone(), sums)
    for one, other in zip(merged, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("gap", [0.5, 9.0, 22.0, 40.0, 80.0])
def test_certain_models_keep_their_digits(gap, tiled, monkeypatch):
    """p(top) is up to 1 - 5e-35: what is near zero is right to its last digits, not to 1e-7."""
    if tiled:
        monkeypatch.setattr(tiling, "CPU_TILE_BYTES", 1)
    vocab = 300
    logits = torch.zeros(2, vocab)
    logits[:, 200] = gap
    found = of_logits(logits, torch.tensor([200, 7]))
    others = (vocab - 1) * torch.exp(torch.tensor(-gap, dtype=torch.float64))
    log_sum = others.log1p()
    exact = {
        "entropy": log_sum + others / (1 + others) * gap,
        "log_sum_squared_probs": torch.log1p(others**2 / (vocab - 1)) - 2 * log_sum,
        "max_prob": 1 / (1 + others),
        "margin": -math.expm1(-gap) / (1 + others),
    }
    for name, value in exact.items():
        torch.testing.assert_close(found[name].double(), value.expand(2), rtol=4e-6, atol=0)
    exact_logps = torch.stack([-log_sum, -gap - log_sum])
    torch.testing.assert_close(found["target_logp"].double(), exact_logps, rtol=4e-6, atol=0)
    assert found["is_top1"].tolist() == [True, False]


def test_a_small_margin_keeps_its_digits():
    logits = torch.tensor([[2**-8, 2**-8 + 3 * 2**-26, 0.0]])  # 1 - exp would be a third off
    found = of_logits(logits, torch.tensor([0]))
    first, second, _ = logits.double().softmax(-1).sort(-1, descending=True).values[0]
    torch.testing.assert_close(found["margin"].double(), (first - second)[None], rtol=2e-6, atol=0)


def test_ties():
    """Equal largest logits in one tile and in several, on either side of the label."""
    logits = torch.full((1, 300), -1.0)
    logits[0, [3, 4, 299]] = 30.0
    for label, is_top1 in ((3, True), (299, True), (5, False)):
        found = of_logits(logits, torch.tensor([label]))
        assert found["margin"].item() == 0
        assert found["is_top1"].item() is is_top1
        torch.testing.assert_close(found["max_prob"], torch.tensor([1 / 3]))
        torch.testing.assert_close(found["entropy"], torch.tensor([math.log(3)]))
        torch.testing.assert_close(found["log_sum_squared_probs"], torch.tensor([-math.log(3)]))
        torch.testing.assert_close(found["expected_logit"], torch.tensor([30.0]))


@pytest.mark.parametrize("kept", [slice(3, 8), slice(390, 400), slice(0, 1), slice(128, 256)])
def test_masked_vocabulary_counts_for_nothing(kept):
    hidden, weight = torch.randn(3, 8), torch.randn(400, 8)
    bias = torch.full((400,), -torch.inf)
    bias[kept] = 0.5
    size = kept.stop - kept.start
    labels = torch.randint(0, size, (3,))
    case = Case(hidden, Head(weight, bias), labels + kept.start)
    small = Case(hidden, Head(weight[kept], bias[kept]), labels)
    found, exact = run(case), expected(small.to(torch.float64, trained=False))
    for name in NUMBERS:
        assert_no_worse(found[name], expected(small)[name], exact[name], torch.float32)
    assert run(case._replace(labels=torch.full((3,), 20)))["target_logp"].eq(-torch.inf).all()


def test_a_row_without_any_logit_has_no_distribution():
    case = Case(torch.randn(2, 8), Head(torch.randn(9, 8), torch.full((9,), -torch.inf)), None)
    found = run(case, OF_STATES)
    assert found.pop("logsumexp").eq(-torch.inf).all()
    for name, values in found.items():
        assert values.isnan().all(), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
def test_nan_stays_nan():
    hidden = torch.randn(2, 8)
    hidden[0, 3] = torch.nan
    found = run(Case(hidden, Head(torch.randn(300, 8)), torch.tensor([3, 3])))
    for name in NUMBERS:
        assert found[name].isnan().tolist() == [True, False], name
    assert not found["is_top1"][0]


def test_a_vocabulary_of_one():
    found = of_logits(torch.tensor([[2.5], [-3.0]]), torch.tensor([0, 0]), temperature=0.5)
    values = {name: found[name].tolist() for name in EVERYTHING}
    logit, zero, one = [2.5, -3.0], [0.0, 0.0], [1.0, 1.0]
    assert values == {
        "logsumexp": logit, "max_prob": one, "margin": one, "expected_logit": logit,
        "entropy": zero, "target_logit": logit, "target_logp": zero,
        "log_sum_squared_probs": zero, "is_top1": [True, True],
    }  # fmt: skip


def test_no_rows_at_all_and_all_ignored():
    weight = torch.randn(5, 8)
    for hidden, labels in (
        (torch.randn(0, 8), torch.zeros(0, dtype=torch.int64)),
        (torch.randn(4, 8), torch.full((4,), -100)),
    ):
        for compact in (True, False):
            found = run(Case(hidden, Head(weight), labels), compact=compact)
            for values in found.values():
                assert values.tolist() == [0] * len(labels)
    assert run(Case(torch.randn(0, 8), Head(weight), None), OF_STATES)["entropy"].shape == (0,)


def test_without_compaction_a_bad_label_is_nan_and_the_rest_is_right():
    hidden, weight = torch.randn(4, 8), torch.randn(10, 8)
    labels = torch.tensor([3, 10, -100, -1])
    found = run(Case(hidden, Head(weight), labels), compact=False)
    right = run(Case(hidden, Head(weight), torch.tensor([3, -100, -100, -100])))
    for name in NUMBERS:
        assert found[name].isnan().tolist() == [False, True, False, True]
        torch.testing.assert_close(found[name][[0, 2]], right[name][[0, 2]])
    assert found["is_top1"][1:].tolist() == [False] * 3


LABELS = torch.tensor([3, -100, 0, 10])
WEIGHT = torch.zeros(11, 5)


def operands() -> list[torch.Tensor]:
    return [torch.randn(4, 5), torch.randn(11, 5), torch.randn(11)]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("labels", [LABELS, None], ids=["labels", "no labels"])
@pytest.mark.parametrize("sums", [True, False])
def test_opcheck(labels, compact, sums):
    if labels is not None and not compact:
        labels = labels.clamp(min=0)  # an ignored label's logit is NaN there, which equals nothing
    arguments = (*operands(), labels, 1.5, 0.5, 3.0, -100, compact, sums, sums, sums)
    for op in linear_stats_ops:
        opcheck(op, arguments)


def test_compiles_without_graph_breaks():
    hidden, weight, bias = operands()

    def stats(hidden: torch.Tensor) -> Stats:
        return fastpref.linear_stats(hidden, Head(weight, bias), LABELS, stats=EVERYTHING)

    compiled = torch.compile(stats, fullgraph=True)
    for name, values in compiled(hidden).items():
        torch.testing.assert_close(values, stats(hidden)[name])


def test_autocast_casts_like_a_linear_layer():
    hidden, weight, bias = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(Case(hidden, Head(weight, bias), LABELS))
    hidden, *halves = (one.bfloat16() for one in (hidden, weight, bias))
    for name, values in run(Case(hidden, Head(*halves), LABELS)).items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0)


def test_non_contiguous_inputs_and_narrow_labels():
    hidden = torch.randn(6, 3, 10)[:, :, ::2].transpose(0, 1)
    weight, labels = torch.randn(5, 11).T, torch.randint(0, 11, (6, 3), dtype=torch.int32).T
    found = run(Case(hidden, Head(weight), labels))
    copies = run(Case(hidden.contiguous(), Head(weight.contiguous()), labels.contiguous()))
    for name in EVERYTHING:
        assert found[name].shape == (3, 6)
        torch.testing.assert_close(found[name], copies[name])


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_gradients_are_refused(trained):
    inputs = operands()
    inputs[trained].requires_grad_()
    hidden, weight, bias = inputs

    def stats() -> Stats:
        return fastpref.linear_stats(hidden, Head(weight, bias), stats=["entropy"])

    with pytest.raises(NotImplementedError, match=r"call it under torch\.no_grad\(\)"):
        stats()
    with torch.no_grad():
        assert not stats()["entropy"].requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by jvp itself
def test_forward_mode_is_refused():
    hidden, weight, _ = operands()

    def entropy(hidden: torch.Tensor) -> torch.Tensor:
        return fastpref.linear_stats(hidden, weight, stats=["entropy"])["entropy"]

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(entropy, (hidden,), (hidden,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stats": []}, r"stats: expected a sequence of names out of 'logsumexp', .*, got \[\]"),
        ({"stats": "entropy"}, "stats: expected a sequence of names .*, got 'entropy'"),
        ({"stats": None}, "stats: expected a sequence of names .*, got None"),
        ({"stats": ["entropie"]}, r"'entropy', .*, got \['entropie'\]"),
        ({"stats": ["entropy", "margin", "entropy"]}, "stats: expected every name once, got"),
        ({"labels": None}, "labels: expected a tensor of integers, for target_logp, got None"),
        ({"labels": torch.zeros(4)}, "labels: expected an integer dtype"),
        ({"labels": LABELS[:3]}, r"labels: expected shape \(4,\)"),
        ({"labels": LABELS + 1}, r"labels: expected -100 \(ignore_index\) or values in \[0, 11\)"),
        ({"labels": LABELS.to("meta")}, "labels: expected device cpu, like hidden"),
        ({"hidden": None}, "hidden: expected a tensor, got NoneType"),
        ({"head": WEIGHT[:, :4]}, r"weight: expected shape \(V, 5\)"),
        ({"head": Head(WEIGHT, torch.zeros(10))}, r"bias: expected shape \(11,\)"),
        ({"head": Head(WEIGHT, torch.zeros(11).half())}, "bias: expected dtype torch.float32"),
        ({"head": Head(WEIGHT, 1.0)}, "bias: expected a tensor, got float"),
        ({"head": [WEIGHT]}, r"head: expected a Head or a tensor \(V, H\), its weight, got list"),
        ({"head": torch.nn.Linear(5, 11)}, "head: expected a Head or a tensor .*, got Linear"),
        ({"head": Head(torch.nn.Linear(5, 11))}, "weight: expected a tensor, got Linear"),
        ({"head": Head(WEIGHT, logit_scale=math.inf)}, "logit_scale: expected a finite number"),
        ({"head": Head(WEIGHT, softcap=-1.0)}, "softcap: expected a finite number above 0, got -1"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"ignore_index": 1.5}, "ignore_index: expected an integer, got 1.5"),
    ],
)
def test_bad_input_is_named(changes, message):
    arguments = {
        "hidden": torch.zeros(4, 5), "head": WEIGHT, "labels": LABELS,
        "stats": ["entropy", "target_logp"], **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fastpref.linear_stats(**arguments)
