"""fastpref in the place of TRL's log-probabilities and divergences: github.com/huggingface/trl.

Where theirs takes logits, these are our hidden states, and the head is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from standing_in import not_applicable, stand_in
from torch import Tensor

from fastpref import Head, linear_divergence, linear_logps, linear_logps_with_stats, sum_responses

TESTS = (
    "tests/test_utils.py",
    "tests/test_sft_trainer.py",
    "tests/test_dpo_trainer.py",
    "tests/test_kto_trainer.py",
    "tests/experimental/test_cpo_trainer.py",
    "tests/experimental/test_distillation_trainer.py",
    "tests/experimental/test_gkd_trainer.py",
    "tests/experimental/test_gold_trainer.py",
    "tests/experimental/test_iw_opd_trainer.py",
    "tests/experimental/test_orpo_trainer.py",
)
REACHES = (
    r"LogProb|ChunkedLMHead|SelectiveLogSoftmax|ChunkedCrossEntropy|ChunkedCE|JSD|jsd|"
    r"(?:dpo|kto|cpo|orpo)_trainer\.py::.*loss"
)
WITHOUT = {
    r"(?:dpo|kto|cpo|orpo)_trainer": "trains a model and compares no number: any loss passes",
}
EXPLAINED = {
    r"test_backward_bfloat16": (
        "theirs: the test compares with a reference whose logits are rounded to bfloat16; its "
        "error against float64 is above the test's tolerance, and 3 to 7 times fastpref's"
    ),
    r"SelectiveLogSoftmax.*dtype[23]": (
        "theirs: the test wants the bits of a log-softmax that rounds twice; fastpref returns the "
        "float64 result, rounded once"
    ),
    r"JSD.*test_symmetry": (
        "the test wants the same bits with both sides exchanged; fastpref's differ by up to 1e-6, "
        "and are nearer to float64 than theirs"
    ),
}
ON_CPU = r"ChunkedLMHead::test_dummy"


LARGEST_IDENTITY = 4096


def _identity(logits: Tensor) -> Tensor:
    size = logits.shape[-1]
    if size > LARGEST_IDENTITY:
        not_applicable("takes logits of a vocabulary too large for an identity as the head")
    return torch.eye(size, dtype=logits.dtype, device=logits.device)


class ChunkedLogProb:
    """Their autograd function, of which callers know `apply` alone."""

    @staticmethod
    @stand_in
    def apply(
        hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`linear_logps_with_stats`."""
        head = Head(weight, None, logit_scale, final_logit_softcapping)
        found = linear_logps_with_stats(hidden, head, targets, temperature=temperature)
        return found.logps, found.entropy


@stand_in
def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, chunk_size: int, labels: Any = None, shift_labels: Any = None,
    num_items_in_batch: Any = None, logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None, lm_head_bias: Any = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Minus the mean of `linear_logps_with_stats`, and its statistics, summed."""
    if labels is None and shift_labels is None:
        raise ValueError("At least one of `labels` or `shift_labels` must be provided.")
    if shift_labels is None:
        hidden, shift_labels = hidden[..., :-1, :], labels[..., 1:]
    head = Head(weight, lm_head_bias, logit_scale, final_logit_softcapping)
    found = linear_logps_with_stats(hidden, head, shift_labels)
    count = (shift_labels != -100).sum()
    mean_over = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
    loss = -found.logps.sum() / mean_over
    return loss, found.is_top1.sum().float(), found.entropy.sum(), count


@stand_in
def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """`linear_logps`, rounded to the logits' dtype as theirs is; a row for each token."""
    head = _identity(logits)
    several = index.dim() == logits.dim()
    rows = logits[..., None, :].expand(*index.shape, -1) if several else logits
    return linear_logps(rows, head, index).to(logits.dtype)


@stand_in
def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Any = None, beta: float = 0.5,
    temperature: float = 1.0, reduction: str = "batchmean", logits_are_probs: bool = False,
    top_k: int = 0, num_items_in_batch: Any = None, **_: Any,
) -> Tensor:  # fmt: skip
    """`linear_divergence`, summed by `sum_responses` and divided by what they divide by."""
    if reduction == "none":
        not_applicable("asks for every token of the vocabulary, which fastpref never holds")
    if top_k:
        not_applicable("top-k on either side, which fastpref does not have")
    if logits_are_probs:
        student_logits, teacher_logits = student_logits.log(), teacher_logits.log()
    head = _identity(student_logits)
    kinds = {0.0: "forward_kl", 1.0: "reverse_kl"}
    mixed = {} if beta in kinds else {"beta": beta}
    rows = student_logits[..., 0].new_zeros((), dtype=torch.int64).expand(student_logits.shape[:-1])
    rows = rows if labels is None else labels
    found = linear_divergence(
        student_logits, head, teacher_logits, head, rows.clamp_max(head.shape[0] - 1),
        kind=kinds.get(float(beta), "jsd"), temperature=temperature, **mixed,
    )  # fmt: skip
    total = sum_responses(found, rows).logps.sum()
    count = (rows != -100).sum()
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    if reduction == "batchmean":
        return total / (max(len(rows), 1) if labels is None else count.clamp_min(1))
    return total / (count * head.shape[0]) if reduction == "mean" else total


JSD = "generalized_jsd_loss"
EXPERIMENTAL = "trl.experimental"
PLACES = {
    "trl.trainer.utils:_ChunkedLogProbFunction": ChunkedLogProb,
    "trl.trainer.utils:selective_log_softmax": selective_log_softmax,
    "trl.trainer.sft_trainer:_chunked_cross_entropy_loss": chunked_cross_entropy,
    f"{EXPERIMENTAL}.gkd.gkd_trainer:GKDTrainer.{JSD}": generalized_jsd,
    f"{EXPERIMENTAL}.gold.gold_trainer:GOLDTrainer.{JSD}": generalized_jsd,
    f"{EXPERIMENTAL}.distillation.distillation_trainer:DistillationTrainer.{JSD}": generalized_jsd,
    f"{EXPERIMENTAL}.iw_opd.iw_opd_trainer:IWOPDTrainer.{JSD}": generalized_jsd,
}
