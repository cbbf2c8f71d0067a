"""The teacher's likeliest token over the student's, against full logits."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import formulas
import pytest
import torch
from cases import DTYPES
from counting import flops_of, peak_bytes_of
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore
from torch.library import opcheck
from two_heads import TwoHeads, hold, two_heads

from fastpref import Head, linear_token_preference
from fastpref.ops import tiling
from fastpref.ops.token_preference_op import token_preference_ops

LABELS = torch.tensor([3, -100, 0, 10])


class Case(NamedTuple):
    models: TwoHeads
    beta: float
    tokens: tuple[torch.Tensor, ...]  # (...) each, the teacher's likeliest and the student's

    @classmethod
    def of(cls, models: TwoHeads, beta: float) -> Case:
        """Without positions where rounding could make another token the likeliest."""
        exact, labels = models.to(torch.float64, trained=False), models.student.labels
        tokens = []
        for model in (exact.teacher, exact.student[:2]):
            logits = formulas.logits(*model).detach()
            first = logits.topk(min(2, logits.shape[-1]))
            tokens.append(first.indices[..., 0])
            gap = first.values[..., 0] - first.values[..., -1]
            unclear = (gap < 1e-4 * (1 + logits.abs().amax(-1))) & (logits.shape[-1] > 1)
            labels = labels.masked_fill(unclear, models.student.options["ignore_index"])
        models = models._replace(student=models.student._replace(labels=labels))
        return cls(models, beta, tuple(tokens))

    def to(self, dtype: torch.dtype, *, trained: bool) -> Case:
        return self._replace(models=self.models.to(dtype, trained=trained))

    def run(self, **more: Any) -> torch.Tensor:
        hidden, head, labels, options = self.models.student
        options = {**options, "beta": self.beta, **more}
        return linear_token_preference(hidden, head, *self.models.teacher, labels, **options)

    def expected(self) -> torch.Tensor:
        hidden, head, labels, options = self.models.student
        options = {**options, "beta": self.beta, "tokens": self.tokens}
        models = (hidden, head), self.models.teacher
        return formulas.linear_token_preference(*models, labels, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    models=two_heads(max_vocab=40),
    beta=st.sampled_from([0.1, 2.0]),
    trained=st.booleans(),
    compact=st.booleans(),
)
def test_equals_the_reference(dtype, models, beta, trained, compact):
    ours = Case.of(models.to(dtype, trained=trained), beta)
    plain, exact = (ours.to(one, trained=trained) for one in (dtype, torch.float64))
    nearby = exact._replace(models=ours.models.nearby())
    found = ours.run(compact=compact)
    values = [found, *(one.expected() for one in (plain, nearby, exact))]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    hold(*(one.detach() for one in values), dtype)
    incoming = torch.randn(found.shape, dtype=torch.float64)
    for one in values:
        one.backward(incoming.to(one.dtype))
    cases = (ours, plain, nearby, exact)
    for gradients in zip(*(one.models.student.gradients() for one in cases), strict=True):
        assert gradients[0].dtype == dtype
        hold(*gradients, dtype)


def leaves(dtype: torch.dtype = torch.float32, *, trained: bool = False) -> list[torch.Tensor]:
    hidden = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=trained)
    return [hidden, weight, torch.randn(11, dtype=dtype, requires_grad=trained)]


def teacher(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(1)
    shapes = (4, 7), (11, 7), (11,)
    hidden, *head = (torch.randn(*one, generator=generator).to(dtype) for one in shapes)
    return hidden, Head(*head)


def test_where_the_likeliest_tokens_agree_there_is_no_gradient():
    hidden, weight, bias = leaves(trained=True)
    other = weight.detach() * 3  # surer of the same tokens
    found = linear_token_preference(
        hidden, Head(weight, bias), hidden, Head(other, 3 * bias), LABELS, beta=5.0
    )
    assert found.tolist() == pytest.approx([math.log(2), 0, math.log(2), math.log(2)], rel=1e-6)
    found.sum().backward()
    assert all((one.grad == 0).all() for one in (hidden, weight, bias))


def test_large_states_where_models_agree_cost_others_no_digit():
    hidden, weight = torch.tensor([[1.0, 0.0], [1e7, 0.0]]), torch.eye(2, requires_grad=True)
    states = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    labels = torch.zeros(2, dtype=torch.int64)
    linear_token_preference(hidden, weight, states, torch.eye(2), labels).sum().backward()
    slope = 0.1 / (1 + math.exp(-0.2))
    assert weight.grad.tolist() == [pytest.approx([slope, 0]), pytest.approx([-slope, 0])]


def test_nothing_of_the_teacher_has_a_gradient():
    hidden, head = teacher()
    wanted = [hidden, *head[:2]]
    for one in wanted:
        one.requires_grad_()
    linear_token_preference(*leaves()[:2], hidden, head, LABELS).sum().backward()
    assert all(one.grad is None for one in wanted)


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_vocabularies_of_other_sizes(padded):
    """Tokens that only one head has are no one's likeliest."""
    hidden, weight, bias = leaves(trained=True)
    models = {"student": (hidden, Head(weight, bias)), "teacher": teacher()}
    expected = linear_token_preference(*models["student"], *models["teacher"], LABELS)
    states, (weight, bias, *_) = models[padded]
    taller = torch.cat((weight.detach(), torch.zeros(3, weight.shape[1]))).requires_grad_()
    models[padded] = states, Head(taller, torch.cat((bias.detach(), torch.full((3,), 99.0))))
    found = linear_token_preference(*models["student"], *models["teacher"], LABELS)
    assert torch.equal(found, expected) and found.max() > 0.7
    found.sum().backward()
    assert (taller.grad is None) == (padded == "teacher")
    assert taller.grad is None or (taller.grad[11:] == 0).all()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize(
    ("of_student", "of_teacher", "expected"),
    [
        ([], [], 0.6),
        ([4], [4], 0.6),  # a token that both models mask is none
        ([3], [], math.inf),  # the student masks the teacher's likeliest
        ([], [0], math.inf),  # and the other way round
        ([3, 4], [0, 4], math.inf),
    ],
)
def test_masked_tokens(of_student, of_teacher, expected, compact):
    hidden = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0]], requires_grad=True)
    states = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0]])
    if expected < math.inf and of_student:  # it would be the likeliest of both
        states[0, 4], hidden.data[0, 4] = 9.0, 9.0
    eye, heads = torch.eye(5), []
    for masked in (of_student, of_teacher):
        bias = torch.zeros(5)
        bias[masked] = -torch.inf
        heads.append(Head(eye, bias))
    labels = torch.ones(1, dtype=torch.int64)
    models = hidden, heads[0], states, heads[1]
    found = linear_token_preference(*models, labels, beta=0.1, compact=compact)
    assert found.item() == pytest.approx(math.log1p(math.exp(expected)))
    found.sum().backward()
    slope = 0.1 / (1 + math.exp(-expected))
    assert hidden.grad.tolist() == [pytest.approx([slope, 0, 0, -slope, 0])]


@pytest.mark.parametrize("compact", [True, False])
def test_what_is_ignored_spoils_nothing(compact):
    hidden, *own = leaves()
    own, (states, head) = Head(*own), teacher()
    expected = linear_token_preference(hidden, own, states, head, LABELS)
    with torch.no_grad():
        hidden[1] = states[1] = torch.nan
    found = linear_token_preference(hidden, own, states, head, LABELS, compact=compact)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert hidden.grad.isfinite().all() and (hidden.grad[1] == 0).all()


def test_what_is_no_number_is_seen():
    """Even where the tokens would agree."""
    weight, labels = torch.randn(11, 5), torch.arange(4)
    for spoiled in (0, 1):
        states = [torch.randn(4, 5) for _ in range(2)]
        states[spoiled][2] = torch.nan
        found = linear_token_preference(states[0], weight, states[1], weight, labels)
        assert found.isnan().tolist() == [False, False, True, False]
    both = torch.full((4, 5), torch.nan)
    assert linear_token_preference(both, weight, both, weight, labels).isnan().all()


def test_without_compact_labels_outside_are_nan():
    labels = torch.tensor([11, 3, -1, -100])
    found = linear_token_preference(*leaves()[:2], *teacher(), labels, compact=False)
    assert found.isnan().tolist() == [True, False, True, False] and found[3] == 0


def test_no_rows_at_all_and_all_ignored():
    for count, labels in ((0, torch.zeros(0, dtype=torch.int64)), (4, torch.full((4,), -100))):
        hidden, weight = torch.randn(count, 8, requires_grad=True), torch.randn(5, 8)
        weight.requires_grad_()
        for compact in (True, False):
            models = hidden, weight, torch.randn(count, 3), torch.randn(5, 3)
            found = linear_token_preference(*models, labels, compact=compact)
            assert found.tolist() == [0] * count
            found.sum().backward()
            assert (hidden.grad == 0).all() and (weight.grad == 0).all()


ROWS, WIDTH, OF_TEACHER, VOCABULARY = 64, 8, 12, 1000


def step(rows: int = ROWS, *, trained: bool = False, ignored: int = 0) -> Any:
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=trained)
    states, head = torch.randn(rows, OF_TEACHER), torch.randn(VOCABULARY, OF_TEACHER)
    labels = torch.randint(0, VOCABULARY, (rows,))
    labels[:ignored] = -100

    def run() -> torch.Tensor:
        found = linear_token_preference(hidden, weight, states, head, labels).sum()
        if found.requires_grad:
            found.backward()
        return found.detach()

    return run


def test_products():
    """One with each head, of labelled rows, whatever has a gradient."""
    products = 2 * ROWS * VOCABULARY * (WIDTH + OF_TEACHER)
    assert flops_of(step()) == flops_of(step(trained=True)) == products
    assert flops_of(step(ignored=ROWS // 2)) == products // 2
    with torch.no_grad():
        assert flops_of(step()) == products


@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_a_block_and_blocks_change_nothing(trained, monkeypatch):
    torch.manual_seed(1)
    whole = step(trained=trained)
    expected = whole()
    block, tile = 16 * 4 * VOCABULARY, 2**14
    monkeypatch.setattr(tiling, "CPU_BLOCK_BYTES", block)  # 16 rows
    monkeypatch.setattr(tiling, "CPU_FEWEST_ROWS", 1)
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", tile)
    torch.testing.assert_close(whole(), expected)
    head = 2 * 4 * WIDTH * VOCABULARY if trained else 0
    small, large = (peak_bytes_of(step(rows, trained=trained)) for rows in (ROWS, 2 * ROWS))
    assert large < block + 4 * tile + head + (large - small)
    assert large - small < ROWS * 4 * (4 * WIDTH + 40)


def test_gradcheck():
    def values(hidden: Any, weight: Any, bias: Any) -> torch.Tensor:
        head = Head(weight, bias, -1.5, softcap=2.0)
        given = hidden, head, *teacher(torch.float64), LABELS
        return linear_token_preference(*given, beta=2.0, temperature=0.7)

    assert torch.autograd.gradcheck(values, leaves(torch.float64, trained=True))


@pytest.mark.parametrize("compact", [False, True])
def test_opcheck(compact):
    student = (one.detach() for one in leaves())
    hidden, head = teacher()
    op = token_preference_ops[compact]
    opcheck(op, (*student, LABELS, 1.5, 0.5, 3.0, -100, compact, hidden, *head[:2], 1.5, 1.0, 4.0))
    assert (torch.Tag.cudagraph_unsafe in op._opoverload.tags) == compact


def test_compiles_without_graph_breaks():
    tensors = leaves(trained=True)

    def total(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        given = hidden, Head(weight, bias), *models, LABELS
        return linear_token_preference(*given).square().sum()

    models = teacher()
    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*tensors), tensors)
    for one, other in zip(found, torch.autograd.grad(total(*tensors), tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_are_refused():
    hidden, weight, _ = leaves()
    values = linear_token_preference(hidden, weight, *teacher(), LABELS)
    (gradient,) = torch.autograd.grad(values.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="fastpref"):
        gradient.sum().backward()


REFUSALS = [
    ({"student_head": torch.zeros(11, 4)}, r"student_weight: expected shape \(V, 5\)"),
    ({"teacher_head": torch.zeros(11, 4)}, r"teacher_weight: expected shape \(V, 7\)"),
    ({"teacher_head": None}, "teacher_head: expected a Head or a tensor"),
    ({"teacher_hidden": torch.zeros(3, 7)}, r"teacher_hidden: expected shape \(4, H\), like stude"),
    ({"teacher_hidden": torch.zeros(4, 7).long()}, "teacher_hidden: expected float64"),
    ({"teacher_hidden": torch.zeros(4, 7).to("meta")}, "teacher_hidden: expected device cpu"),
    ({"labels": LABELS[:3]}, r"labels: expected shape \(4,\) \(student_hidden without"),
    ({"labels": LABELS + 1}, r"labels: expected -100 \(ignore_index\) or values in \[0, 11\)"),
    ({"beta": 0.0}, "beta: expected a finite number above 0, got 0.0"),
    ({"temperature": -1.0}, "temperature: expected a finite number above 0, got -1.0"),
    ({"ignore_index": None}, "ignore_index: expected an integer, got None"),
    ({"compact": 1}, "compact: expected True or False, got 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_bad_input_is_refused(changes, message):
    hidden, head = teacher()
    given = {"student_hidden": torch.zeros(4, 5), "student_head": torch.zeros(11, 5)}
    given |= {"teacher_hidden": hidden, "teacher_head": head, "labels": LABELS}
    with pytest.raises(ValueError, match=f"^{message}"):
        linear_token_preference(**{**given, **changes})


def test_heads_over_several_processes_are_refused():
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        sharded = Head(torch.zeros(11, 5), group=torch.distributed.group.WORLD)
        heads = {"student": sharded[0], "teacher": sharded[0]}
        for name in heads:
            message = f"^{name}_head: expected one that is not sharded over the vocabulary"
            student, of_teacher = (heads | {name: sharded}).values()
            with pytest.raises(ValueError, match=message):
                states = torch.zeros(4, 5)
                linear_token_preference(states, student, states, of_teacher, LABELS)
    finally:
        torch.distributed.destroy_process_group()
