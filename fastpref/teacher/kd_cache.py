"""What a distilled student needs of its teacher at every token, as columns of a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpref.checks import check_number, refuse
from fastpref.data.rows import RESPONSES
from fastpref.data.tokens import IGNORE_INDEX, check_same_vocabulary
from fastpref.extras import require_extra
from fastpref.models.lm_head import lm_head_of
from fastpref.ops import Head, teacher_means
from fastpref.ops.head import head_on
from fastpref.ops.top_logps import top_logps
from fastpref.sequences import labels_of_states
from fastpref.teacher.model import head_digest
from fastpref.teacher.precompute import COUNTS, MODULES, Job, check_run, precompute
from fastpref.teacher.store import noted

if TYPE_CHECKING:
    import datasets

# What follows "chosen_" and "rejected_" in the names of columns.
WEIGHTS, BIASES, ENTROPIES = "teacher_weights", "teacher_biases", "teacher_entropies"
TOKEN_IDS, TOKEN_LOGPS = "teacher_token_ids", "teacher_token_logps"


def add_kd_cache(
    dataset: datasets.Dataset | Iterable[Mapping[str, Any]] | str | Path,
    teacher: Any,
    tokenizer: Any,
    output: str | Path,
    *,
    student: Any = None,
    top_k: int | None = None,
    teacher_tokenizer: Any = None,
    chosen_only: bool = False,
    temperature: float = 1.0,
    max_length: int | None = None,
    batch_size: int = 8,
    skip_bad_rows: bool = False,
) -> datasets.Dataset:
    r"""Add to every row what the forward KL from a teacher takes, so that training needs none.

    .. math:: \mathrm{KL}(p \| q) = \log \sum_j e^{z_j} - h \cdot E_p[W] - E_p[b] - H(p)

    Forward KL as in `distillation <https://arxiv.org/abs/1503.02531>`_. Of the teacher's
    distribution :math:`p` over the *whole* vocabulary a student with logits :math:`z = hW^\top + b`
    needs only means of the rows of its head, as long as that does not train: as many numbers per
    token as the student's hidden states have. With ``top_k`` the columns are the likeliest tokens
    instead: an approximation, for any student.

    Both models read the student's tokens. A precompute that was killed goes on where it stopped,
    and under ``torchrun`` or ``accelerate launch`` the processes share the batches, as in
    `fastpref.teacher.add_shaping`.

    Args:
        dataset: Preference pairs, as `fastpref.teacher.add_shaping` takes them.
        teacher: A causal language model of transformers, on its device; left in evaluation mode.
        tokenizer: The student's tokenizer, whose chat template is applied as TRL's ``DPOTrainer``
            does.
        output: The Parquet file to write. ``<output>.partial`` beside it keeps what is done.
        student: The student, of which the head is read. Its numbers have to be those that the head
            has in training; it may have another dtype there. None with ``top_k``.
        top_k: Keep so many of the likeliest tokens; None keeps the means.
        teacher_tokenizer: The teacher's tokenizer, whose vocabulary has to be the student's; None
            where it is ``tokenizer``.
        chosen_only: Leave the rejected responses out, for methods that read the others alone.
        temperature: Divides the logits of both models, in the divergence.
        max_length: Cut sequences after so many tokens, as TRL's ``max_length``.
        batch_size: Pairs per batch. Another batch size may round other last digits.
        skip_bad_rows: Leave rows out that cannot be used, instead of refusing them all.

    Returns:
        The dataset with columns ``chosen_teacher_weights``, (T, H) :math:`E_p[W]` for T tokens and
        hidden size H, ``chosen_teacher_entropies``, (T,) :math:`H(p)` in nats, and
        ``chosen_teacher_biases``, (T,) :math:`E_p[b]` where the head has a bias, float32 lists;
        with ``top_k`` ``chosen_teacher_token_ids`` (T, K) int32, the likeliest first, and
        ``chosen_teacher_token_logps`` (T, K) float32 in nats. The same of ``rejected``.

    Raises:
        ValueError: Rows that cannot be used, by their index; tokenizers of different vocabularies;
            neither a student nor ``top_k``, or both; a student whose head has a soft cap; an output
            that was made with other settings; a setting out of range.
        ImportError: Without the extra "teacher".

    Example:
        >>> from fastpref.teacher import add_kd_cache, load_teacher
        >>> def precompute(teacher_name, student_name, pairs):
        ...     teacher, theirs = load_teacher(teacher_name)
        ...     student, tokenizer = load_teacher(student_name, dtype="float32")
        ...     return add_kd_cache(pairs, teacher, tokenizer, "pairs-with-kd.parquet",
        ...                         student=student, teacher_tokenizer=theirs)
    """
    output = Path(output)
    check_run(output, max_length, batch_size)
    check_kd_options(top_k, temperature)
    if (student is None) == (top_k is None):
        expected = "the model that is trained, or None with top_k, which reads none of it"
        refuse("student", expected, "both" if top_k else "neither")
    require_extra("teacher", "fastpref.teacher.add_kd_cache", *MODULES)
    if teacher_tokenizer is not None:
        check_same_vocabulary("teacher_tokenizer", teacher_tokenizer, tokenizer)
    options = {"temperature": temperature}
    job = (
        _job_of_top_k(top_k, len(tokenizer), **options)
        if top_k is not None
        else _job_of_means(_frozen_head(student), lm_head_of(teacher), **options)
    )
    sides = RESPONSES[:1] if chosen_only else RESPONSES
    settings = {**job.settings, **options, "top_k": top_k, "chosen_only": chosen_only}
    return precompute(
        job._replace(sides=sides, settings=settings), dataset, teacher, tokenizer, output,
        max_length=max_length, batch_size=batch_size, skip_bad_rows=skip_bad_rows,
    )  # fmt: skip


def check_kd_options(top_k: int | None, temperature: float) -> None:
    """Refuse what would fail only after the models have been loaded."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        refuse("top_k", "a number of tokens, at least 1, or None", repr(top_k))
    check_number("temperature", temperature, above=0)


def _frozen_head(student: Any) -> Head:
    """The student's head as a constant."""
    head = lm_head_of(student)
    if head.softcap is not None:
        expected = "a head without a soft cap, whose logits are no sums over its rows (try top_k)"
        refuse("student", expected, f"one with softcap={head.softcap:g}")
    bias = None if head.bias is None else head.bias.detach()
    return head._replace(weight=head.weight.detach(), bias=bias)


def _job_of_means(student: Head, teacher: Head, *, temperature: float) -> Job:
    """Means of the rows of the student's head."""
    import datasets

    vocab_size = min(len(student.weight), len(teacher.weight))
    made_with = {
        "student_head_digest": head_digest(student),
        "temperature": temperature,
        "vocab_size": vocab_size,  # tokens that both have: none of the others count
    }
    number = datasets.Value("float32")
    features = {
        WEIGHTS: datasets.List(datasets.List(number)),
        ENTROPIES: datasets.List(noted("float32", **made_with)),
    }
    if student.bias is not None:
        features[BIASES] = datasets.List(number)
    student = head_on(student, teacher.weight.device)

    def of_tokens(states: Tensor, head: Head, labels: Tensor) -> dict[str, Tensor]:
        means = teacher_means(states, head, student, labels, temperature=temperature)
        found = {WEIGHTS: means.weight, ENTROPIES: means.entropy}
        return found if means.bias is None else {**found, BIASES: means.bias}

    return Job("teacher means", _of_tokens(of_tokens), features, made_with, finite=ENTROPIES)


def _job_of_top_k(top_k: int, vocab_size: int, *, temperature: float) -> Job:
    """Likeliest tokens; columns of the teacher's head that are no tokens are left out."""
    import datasets

    features = {
        TOKEN_IDS: datasets.List(datasets.List(datasets.Value("int32"))),
        TOKEN_LOGPS: datasets.List(datasets.List(noted("float32", temperature=temperature))),
    }

    def of_tokens(states: Tensor, head: Head, _: Tensor) -> dict[str, Tensor]:
        bias = None if head.bias is None else head.bias[:vocab_size]
        head = head._replace(weight=head.weight[:vocab_size], bias=bias)
        tokens, logps = top_logps(states, head, top_k, temperature=temperature)
        return {TOKEN_IDS: tokens, TOKEN_LOGPS: logps}

    return Job("teacher tokens", _of_tokens(of_tokens), features, {}, finite=TOKEN_LOGPS)


OfStates = Callable[[Tensor, Head, Tensor], dict[str, Tensor]]


def _of_tokens(function: OfStates) -> OfStates:
    """``function`` of (n, H) states that predict a token, from those of a batch (S, T + 1, H)."""

    @torch.no_grad()
    def of_batch(states: Tensor, head: Head, labels: Tensor) -> dict[str, Tensor]:
        targets = labels_of_states(labels, None, IGNORE_INDEX)
        predicts = targets != IGNORE_INDEX
        return {**function(states[predicts], head, targets[predicts]), COUNTS: predicts.sum(1)}

    return of_batch
