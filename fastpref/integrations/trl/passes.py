"""What a loss reads at the student's head, in as few passes over the vocabulary as will do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.integrations.trl.config import PreferenceConfig, inputs_of
from fastpref.integrations.trl.options import TOKEN_PREFERENCE
from fastpref.ops import (
    DivergenceWithStats,
    Head,
    LogpsWithStats,
    TeacherMeans,
    linear_cached_kl,
    linear_cached_kl_with_stats,
    linear_divergence,
    linear_divergence_with_stats,
    linear_logps_with_stats,
    linear_stats,
    linear_token_preference,
    linear_topk_divergence,
    linear_topk_divergence_with_stats,
)
from fastpref.ops.head import head_on
from fastpref.responses import sum_responses
from fastpref.teacher.kd_cache import BIASES, ENTROPIES, TOKEN_IDS, TOKEN_LOGPS, WEIGHTS

Compare = Callable[..., DivergenceWithStats | Tensor]


class Sides(NamedTuple):
    """Which responses of pairs are meant, as a range of the two sides of a batch."""

    first: int
    end: int

    def rows(self, pairs: int) -> slice:
        """Their rows in a batch of so many pairs, chosen ones first."""
        return slice(self.first * pairs, self.end * pairs)

    def union(self, other: Sides) -> Sides:
        """Those of both."""
        return Sides(min(self.first, other.first), max(self.end, other.end))

    def within(self, others: Sides) -> Sides:
        """Their place among others, of which they are a part."""
        return Sides(self.first - others.first, self.end - others.first)


CHOSEN, REJECTED, BOTH = Sides(0, 1), Sides(1, 2), Sides(0, 2)


class Reading(NamedTuple):
    """What another model's head reads of a batch, and that head."""

    states: Tensor  # (n, T + 1, H)
    head: Head
    sides: Sides  # of which responses

    def of(self, sides: Sides, device: torch.device) -> tuple[Tensor, Head]:
        """The states of some of its responses, and the head, on the student's device."""
        pairs = len(self.states) // (self.sides.end - self.sides.first)
        states = self.states[sides.within(self.sides).rows(pairs)]
        return states.to(device), head_on(self.head, device)


class CachedReading(NamedTuple):
    """What columns of a dataset say of a batch, in place of a teacher."""

    columns: Mapping[str, Tensor]  # (n, T + 1, ...) each, by what follows the side in their names
    sides: Sides  # of which responses
    vocab_size: int | None  # of the tokens that the teacher has, too; None for all
    topk_tail: str

    def compare(
        self, states: Tensor, head: Head, targets: Tensor, sides: Sides, temperature: float,
        stats: bool,
    ) -> DivergenceWithStats | Tensor:  # fmt: skip
        """The forward KL (n, T + 1) to a student on some of the responses."""
        rows = sides.within(self.sides).rows(len(states) // (sides.end - sides.first))
        found = {name: values[rows].to(states.device) for name, values in self.columns.items()}
        compare: Compare
        if TOKEN_IDS in found:
            compare = linear_topk_divergence_with_stats if stats else linear_topk_divergence
            likeliest = found[TOKEN_IDS], found[TOKEN_LOGPS]
            options: dict[str, Any] = {"tail": self.topk_tail, "temperature": temperature}
            return compare(states, head, *likeliest, targets, **options)
        compare = linear_cached_kl_with_stats if stats else linear_cached_kl
        means = TeacherMeans(found[WEIGHTS], found.get(BIASES), found[ENTROPIES])
        bias = None if head.bias is None else head.bias[: self.vocab_size]
        head = head._replace(weight=head.weight[: self.vocab_size], bias=bias)
        return compare(states, head, means, targets, temperature=temperature)


class Comparison(NamedTuple):
    """A divergence of the student from other models, by the arguments of the trainer.

    Or a preference of their likeliest tokens, which has the same place in a loss.
    """

    models: tuple[str, ...]  # one, for an advantage also the one that it is over
    kind: str
    beta: float = 0.5
    alpha: float = 0.1
    temperature: float = 1.0
    clip: tuple[float, float] | None = None


def sides_of(method: str) -> Sides:
    """The responses whose log-probabilities a loss reads."""
    return CHOSEN if "chosen" in inputs_of(method) else BOTH


def comparison_of(args: PreferenceConfig, method: str) -> tuple[Comparison, Sides] | None:
    """The divergence that a loss reads, and of which responses.

    A loss that has a reference is compared with that, any other with the teacher.
    """
    inputs = inputs_of(method)
    if "advantages" in inputs:
        models = ("teacher_model", "teacher_ref_model")
        return Comparison(models, "advantage", clip=args.advantage_clipping()), REJECTED
    if "divergences" not in inputs:
        return None
    if "ref_logps" in inputs:
        return Comparison(("ref_model",), "forward_kl"), sides_of(method)
    return Comparison(("teacher_model",), **args.divergence_options(method)), sides_of(method)


def comparisons_of(args: PreferenceConfig) -> dict[Comparison, Sides]:
    """Every divergence that the losses read, once, with all responses that they read it of."""
    found: dict[Comparison, Sides] = {}
    for method in args.methods:
        one = comparison_of(args, method)
        if one is not None:
            comparison, sides = one
            found[comparison] = sides.union(found.get(comparison, sides))
    # Those of all responses first: they leave nothing for another pass to find.
    return dict(sorted(found.items(), key=lambda one: one[1].first - one[1].end))


class StudentNumbers(NamedTuple):
    """Per-token numbers of the student, and divergences."""

    logps: Tensor  # (n, T + 1) of the responses that were asked for, differentiable
    entropy: Tensor  # (n, T + 1)
    is_top1: Tensor  # (n, T + 1) bool
    divergences: dict[Comparison, Tensor]  # of its responses: sums (m,) over each, differentiable


def student_numbers(
    states: Tensor,  # (n, T + 1, H)
    head: Head,
    targets: Tensor,  # (n, T + 1)
    pairs: int,
    sides: Sides,
    comparisons: Mapping[Comparison, Sides],
    readings: Mapping[str, Reading | CachedReading],
    scratch_bytes: int | None,
) -> StudentNumbers:
    """The student's numbers of some sides, and its divergences from other models.

    A divergence brings the student's own numbers along, so that there is a pass for these only
    where no divergence is read. A preference of tokens does not.
    """
    left = [side for side in range(*sides)]
    parts: dict[int, LogpsWithStats | DivergenceWithStats] = {}  # by the first side
    divergences = {}
    for comparison, compared in comparisons.items():
        rows = compared.rows(pairs)
        # At another temperature the student's own numbers would be another distribution's.
        stats = comparison.temperature == 1 and set(range(*compared)) <= set(left)
        given = states[rows], head, targets[rows]
        others = [readings[one] for one in comparison.models]
        found = _compare(given, others, comparison, compared, stats, scratch_bytes)
        if isinstance(found, DivergenceWithStats):
            left = [side for side in left if side not in range(*compared)]
            parts[compared.first] = found
            found = found.divergence
        divergences[comparison] = sum_responses(found, targets[rows]).logps
    if left:
        rows = Sides(left[0], left[-1] + 1).rows(pairs)
        parts[left[0]] = linear_logps_with_stats(
            states[rows], head, targets[rows], scratch_bytes=scratch_bytes
        )
    ordered = [parts[first] for first in sorted(parts)]
    return StudentNumbers(
        _joined([one.logps for one in ordered]),
        _joined([one.entropy for one in ordered]),
        _joined([one.is_top1 for one in ordered]),
        divergences,
    )


def _compare(
    given: tuple[Tensor, Head, Tensor],  # states, head and targets of the student
    readings: Sequence[Reading | CachedReading],
    comparison: Comparison,
    compared: Sides,
    stats: bool,
    scratch_bytes: int | None,
) -> DivergenceWithStats | Tensor:
    """A divergence of the student from models that read the same responses, or from columns."""
    states, head, targets = given
    if isinstance(readings[0], CachedReading):
        return readings[0].compare(*given, compared, comparison.temperature, stats)
    models = [one for one in readings if isinstance(one, Reading)]
    (teacher, teacher_head), *reference = (one.of(compared, states.device) for one in models)
    if comparison.kind == TOKEN_PREFERENCE:
        return linear_token_preference(
            states, head, teacher, teacher_head, targets, beta=comparison.beta
        )
    options = {
        **comparison._asdict(),
        "reference_hidden": reference[0][0] if reference else None,
        "reference_head": reference[0][1] if reference else None,
        "scratch_bytes": scratch_bytes,
    }
    del options["models"]
    compare: Compare = linear_divergence_with_stats if stats else linear_divergence
    return compare(states, head, teacher, teacher_head, targets, **options)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.no_grad()
def log_weights(states: Tensor, head: Head, targets: Tensor, logps: Tensor) -> Tensor:
    """(n,) the log-weights of `fastpref.losses.wpo`, from its log-probabilities (n, T + 1)."""
    (sums,) = linear_stats(states, head, targets, stats=["log_sum_squared_probs"]).values()
    responses = sum_responses(logps - sums, targets)
    return responses.per_token(responses.logps)
