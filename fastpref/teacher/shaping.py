"""Potentials of a teacher's states, and the shaping that they give a response."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastpref.checks import (
    check_beside,
    check_choice,
    check_flag,
    check_number,
    check_reference,
    refuse,
)
from fastpref.derivatives import plain_autograd_only
from fastpref.ops import Head, linear_stats
from fastpref.ops.backend import statistics_dtype
from fastpref.ops.head import vocabulary_size
from fastpref.ops.linear_logps import call_head
from fastpref.ops.linear_stats import Statistic
from fastpref.sequences import (
    check_pairs,
    check_states,
    labels_of_states,
    last_position,
    sequence_sum,
)
from fastpref.teacher.implicit import implicit_rewards

Terminal = Literal["bootstrap", "zero"]
Form = Literal["difference", "next_value"]
Potential = Literal["value", "max", "margin", "expectation", "implicit_reward"]
# Those that are a statistic of one state.
POTENTIALS: dict[Potential, Statistic] = {
    "value": "logsumexp",
    "max": "max_prob",
    "margin": "margin",
    "expectation": "expected_logit",
}


@plain_autograd_only
def teacher_shaping(
    hidden: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.0,
    terminal: Terminal = "bootstrap",
    form: Form = "difference",
    potential: Potential = "value",
    reference_hidden: Tensor | None = None,
    reference_head: Head | Tensor | None = None,
    beta: float = 0.1,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    compact: bool = True,
) -> Tensor:
    r"""Sum of the teacher's potential-based shaping over every response, without the logits.

    .. math:: \Psi(y) = \sum_t \gamma \phi(s_{t+1}) - \phi(s_t), \qquad
              \phi(s) = V(s) = \tau \log \sum_a \exp(Q(s, a) / \tau)

    TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025). With ``gamma=1`` the sum
    telescopes, so the head is read at two positions per run of labels, not at all of them. Runs
    without gradients: a teacher is frozen.

    Args:
        hidden: (2B, T + 1, H) the teacher's hidden states *unshifted*, the one after the last token
            included, or packed (N, H); float64, float32, float16 or bfloat16.
        head: The teacher's `Head`, or its weight (V, H), in the dtype of ``hidden``.
        labels: (2B, T) integers, already shifted: ``labels[:, t]`` is the token that
            ``hidden[:, t]`` predicts; or packed (N,). A response with gaps telescopes run by run.
        temperature: :math:`\tau`, in the unit of the logits.
        gamma: Discount.
        terminal: The value after the last token: ``"bootstrap"`` is the teacher's own, ``"zero"``
            is the textbook's end of an episode. With ``"zero"``, ``gamma=1`` and a shared prompt
            the shaping of chosen and rejected is the same, and TVKD has no teacher signal left.
        form: ``"difference"`` is the formula above. ``"next_value"`` is what the authors' released
            code trains: :math:`\sum_t \gamma V(s_{t+1})`, the last value always zero.
        potential: :math:`\phi`, one of the paper's table 5: ``"value"``, above; ``"max"``,
            :math:`\max_a \pi`; ``"margin"``, the largest :math:`\pi` less the second; or
            ``"expectation"``, :math:`\sum_a \pi Q`, with :math:`\pi` the softmax of
            :math:`Q / \tau`. Or ``"implicit_reward"``, which is not in the paper:
            :math:`\beta \sum_{k<t} \log \pi(a_k | s_k) - \log \pi_\mathrm{ref}(a_k | s_k)`
            over the labelled tokens before :math:`s_t`, from the reward of `DPO
            <https://arxiv.org/abs/2305.18290>`_. With the defaults its shaping is the teacher's
            implicit reward of the response. Both heads are read at every label.
        reference_hidden: (2B, T + 1, H_r), or packed (N, H_r), of ``"implicit_reward"``: hidden
            states of the teacher before it was aligned, at the same positions.
        reference_head: `Head`, or its weight (V, H_r), in the dtype of ``reference_hidden``.
        beta: Of ``"implicit_reward"``: its scale, what the teacher was aligned with.
        cu_seqlens: (2B + 1,) integers, the boundaries of packed sequences, chosen ones first.
        ignore_index: The label of positions outside the response.
        compact: Read the head at needed positions only, for which the host reads one count, and
            ``cu_seqlens`` to check them. ``False`` never waits for the device, and answers NaN
            where ``cu_seqlens`` are wrong or a label is outside the vocabulary.

    Returns:
        (2B,) shaping in the unit of the potential (of the logits, of a probability, or ``beta``
        nats), float32 (float64 for float64 inputs); 0 for a sequence without labels.

    Raises:
        ValueError: ``hidden`` without the extra position, rows that are not pairs, shapes, devices
            or dtypes that do not fit, a number that is not finite or out of range; a reference
            that is missing, or that the potential has not; with ``compact``, a label outside
            ``[0, V)`` that is not ``ignore_index``.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(50, 8)
        >>> labels = torch.tensor([[-100, 7, 8, 9], [-100, 3, 4, -100]])
        >>> teacher_shaping(hidden, weight, labels).shape
        torch.Size([2])
    """
    check_flag("compact", compact)
    check_choice("potential", potential, get_args(Potential))
    beta = check_number("beta", beta, above=0)
    check_reference(
        potential == "implicit_reward", f"potential {potential!r}", reference_hidden, reference_head
    )
    labels, cu_seqlens = check_pairs(labels, cu_seqlens, ignore_index, read=compact)
    check_states("hidden", hidden, labels, cu_seqlens, vectors=True)
    coefficients = _value_coefficients(
        labels, gamma, terminal, form, ignore_index, cu_seqlens, statistics_dtype(hidden.dtype)
    )
    tokens = labels_of_states(labels, cu_seqlens, ignore_index)
    if reference_hidden is not None and reference_head is not None:
        check_beside("reference_hidden", reference_hidden, "hidden", hidden)
        potentials = implicit_rewards(
            hidden,
            head,
            reference_hidden,
            reference_head,
            tokens,
            beta=beta,
            temperature=temperature,
            cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
            compact=compact,
        )
        counts = (coefficients != 0) | potentials.isnan()
        return _weighted_sum(potentials, coefficients, counts, cu_seqlens)
    outside = (tokens != ignore_index) & ((tokens < 0) | (tokens >= vocabulary_size(head)))
    # Any token marks a state whose potential is wanted. One outside the vocabulary is handed on,
    # to be refused, or to make its response NaN.
    any_token = 1 if ignore_index == 0 else 0
    wanted = torch.where(coefficients != 0, any_token, ignore_index)
    potentials = state_potentials(
        hidden,
        head,
        torch.where(outside, tokens, wanted),
        potential=potential,
        temperature=temperature,
        ignore_index=ignore_index,
        compact=compact,
    )
    return _weighted_sum(potentials, coefficients, (coefficients != 0) | outside, cu_seqlens)


@torch.no_grad()
def state_potentials(
    hidden: Tensor,  # (..., H)
    head: Head | Tensor,
    labels: Tensor,  # (...) int64
    *,
    potential: Potential,
    temperature: float,
    ignore_index: int,
    compact: bool = True,
) -> Tensor:
    """The potential (...) of states with a label, whatever it is, 0 elsewhere."""
    check_choice("potential", potential, tuple(POTENTIALS))
    options: dict[str, Any] = {
        "temperature": temperature,
        "ignore_index": ignore_index,
        "compact": compact,
    }
    if potential == "value":  # which has kernels of its own
        return call_head(hidden, head, labels, **options).lse
    statistic = POTENTIALS[potential]
    return linear_stats(hidden, head, labels, stats=(statistic,), **options)[statistic]


def shaping_from_values(
    values: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.0,
    terminal: Terminal = "bootstrap",
    form: Form = "difference",
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Sum of potential-based shaping over every response, from values that are already there.

    .. math:: \Psi(y) = \sum_t \gamma V(s_{t+1}) - V(s_t)

    TVKD (Teacher Value-based Knowledge Distillation, NeurIPS 2025).

    Args:
        values: (2B, T + 1) the value of every state, the one after the last token included, or
            packed (N,); floating point. Positions that no label needs may hold anything.
        labels: (2B, T) integers, already shifted, or packed (N,).
        gamma: Discount.
        terminal: As in `teacher_shaping`.
        form: As in `teacher_shaping`.
        cu_seqlens: (2B + 1,) integers, the boundaries of packed sequences, chosen ones first; the
            host reads them.
        ignore_index: The label of positions outside the response.

    Returns:
        (2B,) shaping in the unit of ``values``, float32 (float64 for float64 values); 0 for a
        sequence without labels.

    Raises:
        ValueError: ``values`` without the extra position, rows that are not pairs, a number that is
            not finite or out of range.

    Example:
        >>> values = torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 9.0]])
        >>> shaping_from_values(values, torch.tensor([[5, 6], [7, -100]]))
        tensor([3., 2.])
    """
    labels, cu_seqlens = check_pairs(labels, cu_seqlens, ignore_index)
    check_states("values", values, labels, cu_seqlens, vectors=False)
    dtype = statistics_dtype(values.dtype)
    coefficients = _value_coefficients(
        labels, gamma, terminal, form, ignore_index, cu_seqlens, dtype
    )
    return _weighted_sum(values, coefficients, coefficients != 0, cu_seqlens)


def check_signal(terminal: Terminal, form: Form, gamma: float) -> None:
    """Refuse what gives both responses to a prompt the same shaping: it teaches nothing."""
    if (terminal, form, gamma) == ("zero", "difference", 1.0):
        refuse(
            "terminal",
            "'bootstrap', or a gamma below 1, since 'zero' with gamma=1 gives both responses of a "
            "pair the same shaping",
            repr(terminal),
        )


def _value_coefficients(
    labels: Tensor,
    gamma: float,
    terminal: Terminal,
    form: Form,
    ignore_index: int,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """How often each state's value counts in the shaping: (2B, T + 1), or packed (N,).

    Where ``gamma`` is 1 the two terms of a state inside a response cancel to exactly 0.
    """
    gamma = check_number("gamma", gamma, at_least=0)
    check_choice("terminal", terminal, ("bootstrap", "zero"))
    check_choice("form", form, ("difference", "next_value"))
    mask = labels_of_states(labels, cu_seqlens, ignore_index) != ignore_index
    bootstrapped = mask
    if terminal == "zero" or form == "next_value":
        positions = torch.arange(mask.shape[-1], device=mask.device)
        last = last_position(mask, cu_seqlens)
        is_last = (
            positions == last.unsqueeze(1) if cu_seqlens is None else torch.isin(positions, last)
        )
        bootstrapped = mask & ~is_last
    arrived_at = pad(bootstrapped[..., :-1].to(dtype), (1, 0))
    if form == "next_value":
        return gamma * arrived_at
    left = mask.to(dtype)
    both = arrived_at * left
    # Rounding gamma - 1 keeps more digits than rounding gamma and subtracting 1. Each state has one
    # of these three terms. (No torch.where: compiled code would keep the first gamma for good.)
    return (gamma - 1) * both + gamma * (arrived_at - both) - (left - both)


def _weighted_sum(
    values: Tensor, coefficients: Tensor, mask: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    return sequence_sum(torch.where(mask, coefficients * values, 0), cu_seqlens)
