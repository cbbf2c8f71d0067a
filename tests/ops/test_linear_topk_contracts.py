"""What top-k divergences cost, what PyTorch expects of their operator, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import flops_of, peak_bytes_of
from torch.distributed import HashStore
from torch.library import opcheck

from fastpref import Head, linear_topk_divergence, linear_topk_divergence_with_stats
from fastpref.ops import tiling
from fastpref.ops.softmax_rows import NO_TOKEN
from fastpref.ops.topk_op import Found, topk_backward_ops, topk_ops
from fastpref.ops.topk_tails import forward_kl_op

TAILS = ["bucket", "drop", "renormalize"]
LABELS = torch.tensor([3, -100, 0, 10])

ROWS, WIDTH, VOCAB, K = 64, 8, 1000, 5
S = 2 * ROWS * WIDTH * VOCAB


def step(rows: int = ROWS, *, trained: bool = False, ignored: int = 0, **more: Any) -> Any:
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=trained)
    logps, ids = torch.randn(rows, VOCAB).log_softmax(-1).topk(K)
    labels = torch.randint(0, VOCAB, (rows,))
    labels[:ignored] = -100
    stats = more.pop("stats", False)

    def run() -> torch.Tensor:
        function = linear_topk_divergence_with_stats if stats else linear_topk_divergence
        found = function(hidden, weight, ids, logps, labels, **more)
        return sum(one.sum() for one in found[:3]) if stats else found.sum()

    return run


@pytest.mark.parametrize(
    ("tail", "stats"),
    [("bucket", False), ("drop", True), ("renormalize", False), ("renormalize", True)],
)
def test_products(tail, stats):
    none = tail == "renormalize" and not stats
    for trained, products in ((False, 2), (True, 4)):
        run = step(tail=tail, stats=stats, trained=trained)
        assert flops_of(lambda: run().backward()) == (0 if none else products * S)  # noqa: B023  # called before the loop goes on
    half = step(tail=tail, stats=stats, ignored=ROWS // 2)
    assert flops_of(lambda: half().backward()) == (0 if none else S)
    with torch.no_grad():
        assert flops_of(step(tail=tail, stats=stats)) == (0 if none else S)


@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_a_block_and_flat(trained, monkeypatch):
    block, piece, tile = 2 * 16 * 4 * VOCAB, 4 * 4 * VOCAB, 2**16
    monkeypatch.setattr(tiling, "CPU_BLOCK_BYTES", block)  # two tiles of 16 rows
    monkeypatch.setattr(tiling, "CPU_PIECE_BYTES", piece)
    monkeypatch.setattr(tiling, "CPU_TILE_BYTES", tile)

    def peak(rows: int) -> int:
        run = step(rows, trained=trained)
        return peak_bytes_of(lambda: run().backward())

    small, large = peak(ROWS), peak(2 * ROWS)
    head = 2 * 4 * WIDTH * VOCAB if trained else 0
    assert large < block / 2 + 4 * piece + 3 * tile + head + (large - small)
    assert large - small < ROWS * 4 * (6 * WIDTH + 12 * K + 32)


def leaves(dtype: torch.dtype = torch.float32, *, trained: bool = False) -> list[torch.Tensor]:
    hidden = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=trained)
    return [hidden, weight, torch.randn(11, dtype=dtype, requires_grad=trained)]


GENERATOR = torch.Generator().manual_seed(1)
LOGPS, IDS = torch.randn(4, 11, generator=GENERATOR).log_softmax(-1).topk(4)


@pytest.mark.parametrize("trained", [False, True])
def test_gradcheck(trained):
    def values(hidden: Any, weight: Any, bias: Any) -> tuple[torch.Tensor, ...]:
        given = hidden, Head(weight, bias, -1.5, softcap=2.0), IDS, LOGPS, LABELS
        return linear_topk_divergence_with_stats(*given, temperature=0.7)[:3]

    assert torch.autograd.gradcheck(values, leaves(torch.float64, trained=trained))


@pytest.mark.parametrize(("trained", "compact"), [(False, True), (True, False)])
def test_opcheck(trained, compact):
    hidden, weight, bias = leaves(trained=trained)
    ids = IDS.clone()
    ids[:, 1] = NO_TOKEN
    given = hidden, weight, bias, LABELS, 1.5, 0.5, 3.0, -100, compact, ids
    for rest in (False, True):
        opcheck(topk_ops[compact], (*given, rest, rest and not trained))
    given = tuple(one.detach() if isinstance(one, torch.Tensor) else one for one in given)
    found = Found(*topk_ops[compact](*given, True, not trained))
    left = torch.randn(4, 4), torch.randn(4), found.logits, found.rows, found.n_rows
    opcheck(topk_backward_ops[compact], (*given, *left, found.jacobian, True, trained, trained))


def test_opcheck_of_two_distributions():
    log_p = torch.randn(4, 5).log_softmax(1)
    opcheck(forward_kl_op, (torch.randn(4, 5).log_softmax(1).requires_grad_(), log_p))


def test_what_the_host_reads_stays_out_of_cuda_graphs():
    for pair in (topk_ops, topk_backward_ops):
        tagged = [torch.Tag.cudagraph_unsafe in op._opoverload.tags for op in pair]
        assert tagged == [False, True]


def test_compiles_without_graph_breaks():
    tensors = leaves(trained=True)
    wanted = [leaf for leaf in tensors if leaf.requires_grad]

    def total(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        given = hidden, Head(weight, bias), IDS, LOGPS, LABELS
        found = linear_topk_divergence_with_stats(*given)
        more = linear_topk_divergence(*given, tail="renormalize")
        return found.divergence.square().sum() + (found.logps * more).sum() + found.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*tensors), wanted)
    for one, other in zip(found, torch.autograd.grad(total(*tensors), wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("trained", [False, True])
def test_second_derivatives_are_refused(trained, tail):
    hidden, weight, _ = leaves(trained=trained)
    values = linear_topk_divergence(hidden, weight, IDS, LOGPS, LABELS, tail=tail)
    (gradient,) = torch.autograd.grad(values.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="fastpref"):
        gradient.sum().backward()


def test_a_position_without_leading_dimensions():
    hidden, weight = torch.randn(4, 5), torch.randn(11, 5)
    found = linear_topk_divergence(hidden[0], weight, IDS[0], LOGPS[0], LABELS[0])
    assert found.shape == ()
    torch.testing.assert_close(found, linear_topk_divergence(hidden, weight, IDS, LOGPS, LABELS)[0])


REFUSALS = [
    ({"tail": "rest"}, "tail: expected 'bucket' or 'drop' or 'renormalize', got 'rest'"),
    ({"student_head": torch.zeros(11, 4)}, r"student_weight: expected shape \(V, 5\)"),
    ({"token_ids": IDS[:3]}, r"token_ids: expected shape \(4, K\), K at least 1, got \(3, 4\)"),
    ({"token_ids": IDS[:, :0]}, r"token_ids: expected shape \(4, K\), K at least 1, got \(4, 0\)"),
    ({"token_ids": LOGPS}, "token_ids: expected an integer dtype"),
    ({"token_ids": IDS.to("meta")}, "token_ids: expected device cpu, like student_hidden"),
    ({"token_ids": IDS + 11}, r"token_ids: expected values in \[0, 11\) where .*, got 12 outside"),
    ({"token_ids": -1 - IDS}, r"token_ids: expected values in \[0, 11\) where .*, got 12 outside"),
    ({"token_logps": LOGPS[:, :3]}, r"token_logps: expected shape \(4, 4\) \(like token_ids\)"),
    ({"token_logps": IDS}, "token_logps: expected float64, float32"),
    ({"labels": LABELS[:3]}, r"labels: expected shape \(4,\) \(student_hidden without"),
    ({"labels": LABELS + 1}, r"labels: expected -100 \(ignore_index\) or values in \[0, 11\)"),
    ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
    ({"ignore_index": None}, "ignore_index: expected an integer, got None"),
]


@pytest.mark.parametrize("function", [linear_topk_divergence, linear_topk_divergence_with_stats])
@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_bad_input_is_refused(changes, message, function):
    given = {"student_hidden": torch.zeros(4, 5), "student_head": torch.zeros(11, 5)}
    given |= {"token_ids": IDS, "token_logps": LOGPS, "labels": LABELS}
    with pytest.raises(ValueError, match=f"^{message}"):
        function(**{**given, **changes})


def test_a_head_over_several_processes_is_refused():
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        head = Head(torch.zeros(11, 5), group=torch.distributed.group.WORLD)
        message = "student_head: expected one that is not sharded over the vocabulary"
        with pytest.raises(ValueError, match=message):
            linear_topk_divergence(torch.zeros(4, 5), head, IDS, LOGPS, LABELS)
    finally:
        torch.distributed.destroy_process_group()
