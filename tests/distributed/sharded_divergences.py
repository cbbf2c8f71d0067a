"""`linear_divergence` of heads that are sharded over the vocabulary: the numbers of one process."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from closeness import assert_no_worse
from counting import flops_of
from one_process import whole
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastpref
from fastpref import Head
from fastpref.ops import tiling
from fastpref.ops.divergences import KINDS

VOCABULARY, STUDENT, TEACHER = 17, 6, 5
ROWS = (slice(0, 12), slice(12, None))  # of the head, on each process
BLOCK_BYTES = 6 * 3 * 16 * 4  # three rows of the longer shard: two heads, and four tiles beside
SETTINGS: list[dict[str, Any]] = [
    *({"kind": kind} for kind in KINDS),
    {"kind": "jsd", "beta": 0.1},
    {"kind": "skew_reverse_kl", "alpha": 0.3, "detach_mixture": True},
    {"kind": "advantage", "clip": (-1.0, 0.5)},
]
CAPPED = {"logit_scale": -0.8, "softcap": 3.0}
MASKED = [(True, False), (False, True), (True, True)]  # student and teacher


class Situation(NamedTuple):
    student: str  # how its head is placed
    others: str
    head: dict[str, float] = {}
    call: dict[str, Any] = {}
    stats: bool = True


SITUATIONS = [
    Situation("dtensor", "dtensor"),
    Situation("group", "whole", CAPPED, {"temperature": 1.7, "teacher_temperature": 0.7}),
    Situation("group", "group", CAPPED, {"compact": False}),
    Situation("dtensor", "whole", {}, {"scratch_bytes": 0, "ignore_index": 0}),
    Situation("group", "group", {}, {"scratch_bytes": 2 * 3 * 16 * 4}),  # three rows
    Situation("group", "whole", {}, {"scratch_bytes": 0}, stats=False),
    Situation("dtensor", "dtensor", {}, {"compact": False}, stats=False),
]


class Model(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor


class Models(NamedTuple):
    student: Model
    teacher: Model
    reference: Model
    labels: Tensor

    def to(self, dtype):
        models = (Model(*(tensor.to(dtype) for tensor in one)) for one in self[:3])
        return Models(*models, self.labels)


def models(*, near=False):
    """The student is certain of one of the labels."""
    torch.manual_seed(4)
    labels = torch.randint(1, 12, (2, 5))
    labels[1, 4] = VOCABULARY - 1
    student, teacher, reference = (
        Model(torch.randn(2, 5, width), torch.randn(VOCABULARY, width), torch.randn(VOCABULARY))
        for width in (STUDENT, TEACHER, TEACHER)
    )
    student.bias[labels[1, 1]] += 20
    if near:
        teacher = Model(*(one + 1e-3 * torch.randn_like(one) for one in student))
    return Models(student, teacher, reference, labels)


class Processes(NamedTuple):
    rank: int
    mesh: DeviceMesh
    rows: tuple[slice, slice] = ROWS

    def head(self, how, model, *, trains=False, **more):
        weight, bias = (one.detach() for one in model[1:])
        if how == "dtensor":
            weight, bias = (distribute_tensor(one, self.mesh, [Shard(0)]) for one in (weight, bias))
        if how == "group":
            weight, bias = (one[self.rows[self.rank]].clone() for one in (weight, bias))
            more["group"] = dist.group.WORLD
        return Head(weight.requires_grad_(trains), bias.requires_grad_(trains), **more)

    def numbers(self, given, settings, situation, *, trains):
        """Outputs, and the gradients of a loss that reads all of them."""
        student, *others, labels = given
        options = {"ignore_index": -100, **settings, **situation.call}
        labels = labels.clone()
        labels[0, :2] = labels[1, 2] = options["ignore_index"]
        nothing = (labels == options["ignore_index"]).unsqueeze(-1)
        hidden, *states = (one.hidden.masked_fill(nothing, torch.nan) for one in (student, *others))
        hidden.requires_grad_()
        head = self.head(situation.student, student, trains=trains, **situation.head)
        compared = [
            (state, self.head(situation.others, one, **situation.head))
            for state, one in zip(states, others, strict=True)
        ]
        if settings["kind"] == "advantage":
            options["reference_hidden"], options["reference_head"] = compared[1]
        if situation.stats:
            found = fastpref.linear_divergence_with_stats(
                hidden, head, *compared[0], labels, **options
            )
        else:
            found = [fastpref.linear_divergence(hidden, head, *compared[0], labels, **options)]
        torch.manual_seed(5)
        sum((torch.randn(one.shape) * one).sum() for one in found[:3]).backward()
        gradients = [self.whole(one, situation.student) for one in head[:2]] if trains else []
        return [*(one.detach() for one in found), hidden.grad, *gradients]

    @staticmethod
    def whole(leaf, how):
        """The gradient of a head's tensor, of all processes."""
        if how != "group":
            return whole(leaf.grad)
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, leaf.grad)
        return torch.cat(parts)

    def compare(self, given, settings, situation, *, trains):
        """With one process, in the same dtype and in float64."""
        alone = situation._replace(student="whole", others="whole")
        exact = self.numbers(given.to(torch.float64), settings, alone, trains=trains)
        plain = self.numbers(given, settings, alone, trains=trains)
        found = self.numbers(given, settings, situation, trains=trains)
        for ours, theirs, witness in zip(found, plain, exact, strict=True):
            assert_no_worse(ours.float(), theirs.float(), witness.double(), torch.float32)


def check_every_kind(here):
    """Every kind of either sort of head, and every situation of several kinds.

    Digits are few where the models are near one another and gradients small: in frozen heads' here.
    """
    situations = cycle(SITUATIONS)
    for settings, trains in product(SETTINGS, (False, True)):
        here.compare(models(near=not trains), settings, next(situations), trains=trains)


def check_cuts(here):
    """Vocabularies of other sizes, also so small that a process has nothing left."""
    for size, trains in product((20, 14, 12), (False, True)):
        given = models()
        teacher = Model(given.teacher.hidden, torch.randn(size, TEACHER), torch.randn(size))
        labels = given.labels.clamp_max(11)
        given = given._replace(teacher=teacher, labels=labels)
        situation = Situation("group", "whole", CAPPED, {"compact": trains})
        here.compare(given, {"kind": "jsd"}, situation, trains=trains)


def check_a_process_without_tokens(here):
    here = here._replace(rows=(slice(0, None), slice(VOCABULARY, None)))
    given = models()
    for trains in (False, True):
        here.compare(
            given, {"kind": "reverse_kl"}, Situation("group", "group", CAPPED), trains=trains
        )
    hidden, labels = given.student.hidden, given.labels
    heads = [here.head(how, given.student, **CAPPED) for how in ("group", "whole")]
    with torch.no_grad():
        for found, expected in zip(
            *(fastpref.linear_logps_with_stats(hidden, head, labels) for head in heads), strict=True
        ):
            torch.testing.assert_close(found, expected)
        names = ["logsumexp", "margin", "log_sum_squared_probs"]
        found, expected = (fastpref.linear_stats(hidden, head, stats=names) for head in heads)
        torch.testing.assert_close(found, expected)


def check_masked_shards(here):
    """All tokens of a process are masked, by the student, by the teacher or by both."""
    for of_student, of_teacher in MASKED:
        given = models()
        for one, masks in ((given.student, of_student), (given.teacher, of_teacher)):
            if masks:
                one.bias[ROWS[1]] = -torch.inf
        given = given._replace(labels=given.labels.clamp_max(11))
        for kind, trains in (("jsd", True), ("total_variation", False)):
            here.compare(given, {"kind": kind}, Situation("group", "whole"), trains=trains)
        hidden, head = given.student.hidden, here.head("group", given.student)
        teacher = given.teacher.hidden, here.head("whole", given.teacher)
        for kind, masked, other in (
            ("forward_kl", of_student, of_teacher),
            ("reverse_kl", of_teacher, of_student),
        ):
            found = fastpref.linear_divergence(hidden, head, *teacher, given.labels, kind=kind)
            assert bool(found.isinf().all()) == (masked and not other)


def check_equal_models(here):
    """Nothing is left of normalisers that came from several processes."""
    student, *_, labels = models()
    head = here.head("group", student)
    for kind in KINDS:
        more = {}
        if kind == "advantage":
            more = {"reference_hidden": student.hidden, "reference_head": head}
        with torch.no_grad():
            found = fastpref.linear_divergence(
                student.hidden, head, student.hidden, head, labels, kind=kind, **more
            )
        assert not found.any()


def check_products_and_traffic(here):
    """One reading of each shard and teacher; a few numbers for a block of rows."""
    given = models()
    head = here.head("group", given.student)
    count, tokens = given.labels.numel(), head.weight.shape[0]
    S, T = (2 * count * tokens * width for width in (STUDENT, TEACHER))

    def step(kind, trains, scratch_bytes):
        hidden = given.student.hidden.detach().requires_grad_()
        head = here.head("group", given.student, trains=trains)
        teacher = given.teacher.hidden, here.head("whole", given.teacher)
        return fastpref.linear_divergence(
            hidden, head, *teacher, given.labels, kind=kind, scratch_bytes=scratch_bytes
        ).sum()

    def steps():
        for trains, scratch_bytes in ((False, None), (True, None), (True, 0)):
            step("jsd", trains, scratch_bytes).backward()

    assert flops_of(steps) == (T + 2 * S) + (T + 3 * S) + (2 * T + 4 * S)
    for kind, exchanges in (("forward_kl", 2), ("reverse_kl", 3)):
        with CommDebugMode() as forward:
            loss = step(kind, trains=False, scratch_bytes=0)
        with CommDebugMode() as backward:
            loss.backward()
        sizes, blocks = 1, 4
        assert forward.get_total_counts() == sizes + blocks * exchanges + 1
        assert backward.get_total_counts() == 1


def check_refusals(here):
    student, teacher, _, labels = models()
    head = here.head("group", student)
    sharded, others = (here.head(how, teacher) for how in ("group", "dtensor"))
    wrong = labels + 10

    def call(student_head, teacher_head, labels=labels, **more):
        return fastpref.linear_divergence(
            student.hidden, student_head, teacher.hidden, teacher_head, labels, kind="jsd", **more
        )

    for words, arguments in {
        "teacher_head: expected a whole one, like student_head": (student.weight, sharded),
        "teacher_head: expected a whole one, or shards of (12, 5) tokens": (head, others),
        "in [0, 17)": (head, sharded, wrong),
        "teacher_weight: expected a plain": (head, others._replace(group=dist.group.WORLD)),
    }.items():
        try:
            call(*arguments)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"not refused: {words}")
    found = call(head, sharded, wrong, compact=False)
    assert torch.equal(found.isnan(), wrong >= VOCABULARY) and found.isnan().any()


def check_all(rank, mesh):
    here, block_bytes = Processes(rank, mesh), tiling.CPU_BLOCK_BYTES
    tiling.CPU_BLOCK_BYTES = BLOCK_BYTES
    try:
        check_every_kind(here)
        check_cuts(here)
        check_a_process_without_tokens(here)
        check_masked_shards(here)
        check_equal_models(here)
        check_products_and_traffic(here)
        check_refusals(here)
    finally:
        tiling.CPU_BLOCK_BYTES = block_bytes
