"""fastpref in the place of Liger's chunked losses: github.com/linkedin/Liger-Kernel.

Their functions take what ours do in another order and return metrics beside the loss. `compiled`
and `chunk_size` say how to compute, not what.
"""

from __future__ import annotations

from typing import Any

import torch
from standing_in import Function, not_applicable, stand_in
from torch import Tensor

from fastpref import Head, Responses, linear_divergence, linear_logps, losses, sum_responses

TESTS = ("test/chunked_loss",)
REACHES = r"chunked_loss/test_"
NO_SUCH_LOSS = "fastpref has no such loss: {}"
WITHOUT = {
    r"test_grpo_loss": NO_SUCH_LOSS.format("GRPO"),
    r"_loss_types\[|dpo_loss\.py::test_(invalid_loss_type|label_smoothing_validation)": (
        NO_SUCH_LOSS.format("types of DPO's but the sigmoid")
    ),
    r"test_cosine_loss": NO_SUCH_LOSS.format("cosine similarity of hidden states"),
}


def _responses(
    hidden: Tensor, head: Head, labels: Tensor, ignore_index: int, average: bool = False
) -> Responses:
    logps = linear_logps(hidden, head, labels, ignore_index=ignore_index)
    found = sum_responses(logps, labels, ignore_index=ignore_index)
    return Responses(found.per_token(found.logps), found.lengths) if average else found


@torch.no_grad()
def _sum_logits(hidden: Tensor, head: Head) -> Tensor:
    """The sum over positions and the vocabulary, without the logits: of a metric of theirs."""
    rows = hidden.float().flatten(0, -2)
    found = rows.sum(0) @ head.weight.float().sum(0)
    return found if head.bias is None else found + len(rows) * head.bias.float().sum()


def _pair_metrics(
    hidden: Tensor, head: Head, logps: Tensor, nll: Tensor | None, *metrics: Tensor
) -> tuple[Tensor, ...]:
    nothing = logps.new_zeros(())
    halves, tokens = hidden.chunk(2), len(head.weight)
    means = (_sum_logits(one, head) / (one[..., 0].numel() * tokens) for one in halves)
    return (*logps.detach().chunk(2), *means, nothing if nll is None else nll, *metrics)


def _reference(
    hidden: Tensor, given: tuple[Any, ...], labels: Tensor, ignore_index: int, average: bool
) -> Tensor:
    ref_hidden, ref_weight, ref_bias = given
    with torch.no_grad():
        head = Head(ref_weight, ref_bias)
        return _responses(ref_hidden, head, labels, ignore_index, average).logps


@stand_in
def dpo(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ref_input: Any = None,
    ref_weight: Any = None, ref_bias: Any = None, ignore_index: int = -100, beta: float = 0.1,
    compute_nll_loss: bool = False, compiled: bool = True, use_ref_model: bool = True,
    average_log_prob: bool = False, chunk_size: int = 1, loss_type: str = "sigmoid",
    label_smoothing: float = 0.0, discopop_tau: float = 0.05, alpha: float = 1.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`losses.dpo`, of means where they take means; their "sigmoid" leaves out the smoothing."""
    if loss_type != "sigmoid":
        not_applicable(NO_SUCH_LOSS.format(f"loss_type={loss_type!r}"))
    head = Head(weight, bias)
    sums = _responses(hidden, head, target, ignore_index)
    means = Responses(sums.per_token(sums.logps), sums.lengths)
    policy = means if average_log_prob else sums
    reference = torch.zeros_like(sums.logps)
    if use_ref_model:
        given = (ref_input, ref_weight, ref_bias)
        reference = _reference(hidden, given, target, ignore_index, average_log_prob)
    found = losses.dpo(policy, reference, beta=beta)
    nll = sums.chosen_nll() if compute_nll_loss else None
    loss = found.loss if nll is None else found.loss + alpha * nll
    rewards = (found.chosen_rewards, found.rejected_rewards)
    return loss, _pair_metrics(hidden, head, policy.logps, nll, *rewards)


@stand_in
def cpo(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ignore_index: int = -100,
    beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
    compute_nll_loss: bool = True, compiled: bool = True, average_log_prob: bool = False,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`losses.cpo`, whose sums are the paper's."""
    if average_log_prob:
        not_applicable(NO_SUCH_LOSS.format("CPO of means"))
    head = Head(weight, bias)
    sums = _responses(hidden, head, target, ignore_index)
    options = {"beta": beta, "sft_weight": alpha * compute_nll_loss}
    found = losses.cpo(sums, label_smoothing=label_smoothing, **options)
    nll = sums.chosen_nll() if compute_nll_loss else None
    rewards = (found.chosen_rewards, found.rejected_rewards)
    return found.loss, _pair_metrics(hidden, head, sums.logps, nll, *rewards)


@stand_in
def simpo(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ignore_index: int = -100,
    beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
    compute_nll_loss: bool = False, compiled: bool = True, gamma: float = 0.5, chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`losses.simpo`."""
    head = Head(weight, bias)
    sums = _responses(hidden, head, target, ignore_index)
    options = {"beta": beta, "gamma": gamma, "sft_weight": alpha * compute_nll_loss}
    found = losses.simpo(sums, label_smoothing=label_smoothing, **options)
    nll = sums.chosen_nll() if compute_nll_loss else None
    rewards = (found.chosen_rewards, found.rejected_rewards)
    return found.loss, _pair_metrics(hidden, head, sums.per_token(sums.logps), nll, *rewards)


@stand_in
def orpo(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ignore_index: int = -100,
    beta: float = 0.1, compute_nll_loss: bool = True, nll_target: Any = None,
    compiled: bool = True, chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`losses.orpo`, and `losses.sft` where the likelihood is of other labels."""
    head = Head(weight, bias)
    sums = _responses(hidden, head, target, ignore_index)
    found = losses.orpo(sums, beta=beta, sft_weight=0.0)
    nll = None
    if compute_nll_loss:
        labels = target if nll_target is None else nll_target
        chosen = _responses(hidden.chunk(2)[0], head, labels.chunk(2)[0], ignore_index)
        nll = losses.sft(chosen).loss
    metrics = (
        found.chosen_rewards, found.rejected_rewards, -found.odds_loss, found.log_odds.mean(),
    )  # fmt: skip
    loss = found.loss if nll is None else found.loss + nll
    return loss, _pair_metrics(hidden, head, sums.per_token(sums.logps), nll, *metrics)


@stand_in
def kto(
    hidden: Tensor, weight: Tensor, target: Tensor, preference_labels: Tensor, bias: Any = None,
    ref_input: Any = None, ref_weight: Any = None, ref_bias: Any = None, kl: Any = None,
    ignore_index: int = -100, beta: float = 0.1, compiled: bool = True,
    use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """`losses.kto`. A reference point below 0, which that clamps, goes into the reference."""
    head = Head(weight, bias)
    policy = _responses(hidden, head, target, ignore_index, average_log_prob)
    reference = torch.zeros_like(policy.logps)
    if use_ref_model:
        given = (ref_input, ref_weight, ref_bias)
        reference = _reference(hidden, given, target, ignore_index, average_log_prob)
    point = policy.logps.new_zeros(1) if kl is None else kl.to(policy.logps.dtype)
    moved = reference + point.clamp_max(0)
    good = preference_labels.bool()
    found = losses.kto(policy, moved, good, point.clamp_min(0), beta=beta)
    logps = policy.logps.detach()
    rewards = beta * (logps - reference)
    halves = (good, ~good)
    logits = (_sum_logits(hidden[one], head) for one in halves)
    sums = [values[one].sum() for values in (logps, rewards) for one in halves]
    return found.loss, (*sums[:2], *logits, *sums[2:])


@stand_in
def jsd(
    hidden: Tensor, weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, labels: Tensor,
    bias: Any = None, teacher_bias: Any = None, weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5, beta: float = 0.5, ignore_index: int = -100,
    temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Any:  # fmt: skip
    """`losses.gkd` of `linear_divergence`, and the likelihood, at temperature 1, beside."""
    student, teacher = Head(weight, bias), Head(teacher_weight, teacher_bias)
    kinds = {0.0: "forward_kl", 1.0: "reverse_kl"}
    mixed = {} if beta in kinds else {"beta": beta}
    divergences = linear_divergence(
        hidden, student, teacher_input, teacher, labels, kind=kinds.get(beta, "jsd"),
        temperature=temperature, ignore_index=ignore_index, **mixed,
    )  # fmt: skip
    rows = labels[None]
    chosen = _responses(hidden[None], student, rows, ignore_index)
    sums = sum_responses(divergences[None], rows, ignore_index=ignore_index).logps
    weights = {"weight": weight_soft_loss, "sft_weight": weight_hard_loss}
    found = losses.gkd(chosen, sums, **weights)
    if not return_soft_hard_loss:
        return found.loss
    soft, hard = weight_soft_loss * found.chosen_divergence, weight_hard_loss * found.nll_loss
    return found.loss, soft, hard


def _module(function: Function, order: tuple[str, ...], **defaults: Any) -> type:
    """A class such as theirs: options first, tensors later, in an order of their own."""

    class Loss(torch.nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.options = defaults | options
            if function is dpo and self.options.get("loss_type", "sigmoid") != "sigmoid":
                not_applicable(NO_SUCH_LOSS.format(f"loss_type={self.options['loss_type']!r}"))

        def forward(self, *tensors: Any, **named: Any) -> Any:
            given = dict(zip(order, tensors, strict=False)) | named
            renamed = {NAMES.get(name, name): one for name, one in given.items()}
            return function(**renamed, **self.options)

    return Loss


NAMES = {
    "lin_weight": "weight", "_input": "hidden", "student_input": "hidden",
    "student_weight": "weight", "true_labels": "labels", "student_bias": "bias",
}  # fmt: skip
PAIRS = ("weight", "hidden", "target", "bias")
REFERENCE = ("ref_input", "ref_weight", "ref_bias")
UNPAIRED = ("hidden", "weight", "target", "bias", "preference_labels", *REFERENCE, "kl")
JSD = ("hidden", "weight", "teacher_input", "teacher_weight", "labels", "bias", "teacher_bias")
CHUNKED = "liger_kernel.chunked_loss:LigerFusedLinear"
FUNCTIONAL = "liger_kernel.chunked_loss.functional:liger_fused_linear_"
PLACES = {
    CHUNKED + "DPOLoss": _module(dpo, (*PAIRS, *REFERENCE)),
    CHUNKED + "CPOLoss": _module(cpo, PAIRS),
    CHUNKED + "SimPOLoss": _module(simpo, PAIRS, compute_nll_loss=True),
    CHUNKED + "ORPOLoss": _module(orpo, (*PAIRS, "nll_target")),
    CHUNKED + "KTOLoss": _module(kto, UNPAIRED, use_ref_model=False),
    CHUNKED + "JSDLoss": _module(jsd, JSD),
    **{FUNCTIONAL + one.__name__: one for one in (dpo, cpo, simpo, orpo, kto, jsd)},
}
