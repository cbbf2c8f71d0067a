"""KTO: single responses, each of them desirable or not."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.checks import NonNegative, Positive
from fastpref.losses.pairs import Shape, unpaired_loss
from fastpref.responses import Responses

Flags = Annotated[
    Tensor, Shape("(S,), a flag per response", lambda sizes, count: sizes == (count,), flags=True)
]
Sample = Annotated[
    Tensor,
    Shape("() or (K,), K above 0", lambda sizes, _: len(sizes) < 2 and sizes != (0,)),
]


class KTOOutput(NamedTuple):
    """What `kto` returns; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over responses, differentiable
    logps: Tensor  #: (S,) summed log-probabilities, nats
    rewards: Tensor  #: (S,) ``beta * (logps - ref_logps)``
    desirable: Tensor  #: (S,) bool, as it was given
    kl: Tensor  #: () the reference point, nats


@unpaired_loss
def kto(
    responses: Responses,
    ref_logps: Tensor,
    desirable: Flags,
    kl_log_ratios: Sample,
    *,
    beta: Positive = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> KTOOutput:
    r"""Kahneman-Tversky Optimization: utilities of single responses around a reference point.

    .. math:: L = \begin{cases}
              \lambda_D \, (1 - \sigma(\beta (r - z_0))) & y \text{ desirable} \\
              \lambda_U \, (1 - \sigma(\beta (z_0 - r))) & \text{otherwise}
              \end{cases}, \qquad r = \log \frac{\pi(y)}{\pi_{ref}(y)}, \quad
              z_0 = \max(0, \text{mean of } r \text{ over mismatched pairs})

    `KTO <https://arxiv.org/abs/2402.01306>`_. A mismatched pair is a prompt with the response of
    another, for instance the batch's responses rotated by one. :math:`z_0` gets no gradient. With
    several processes the paper's :math:`z_0` is a mean over all: give that mean, in place of the
    log-ratios of one process. The defaults are those of TRL and HALOs; HALOs leaves log-ratios of
    0 out of the mean, and may clamp those of single tokens.

    Args:
        responses: Sums over S responses, in any order, from `fastpref.sum_responses`.
        ref_logps: (S,) summed log-probabilities under the reference model.
        desirable: (S,) bool, which responses are good ones.
        kl_log_ratios: (K,) summed log-ratios of policy and reference for mismatched pairs, or their
            mean () over all processes. Zeros leave the reference point out.
        beta: Strength of the pull towards the reference.
        desirable_weight: Weight of desirable responses.
        undesirable_weight: Weight of undesirable responses.

    Returns:
        `KTOOutput`.

    Raises:
        ValueError: Tensors of other shapes or dtypes, a number that is not finite or out of range.

    Example:
        >>> responses = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([2, 2]))
        >>> good, mismatched = torch.tensor([True, False]), torch.tensor([0.5, -0.3])
        >>> round(kto(responses, torch.tensor([-4.0, -4.0]), good, mismatched).loss.item(), 4)
        0.475
    """
    kl = kl_log_ratios.detach().mean().clamp_min(0)
    gains = beta * (responses.logps - ref_logps - kl)
    # 1 - sigmoid(x) as written loses the digits of responses that are good, and sigmoid(-x) those
    # of the gradients of bad ones.
    misses = logsigmoid(torch.where(desirable, -gains, gains)).exp()
    losses = torch.where(desirable, desirable_weight * misses, undesirable_weight * misses)
    return KTOOutput(
        losses.mean(),
        responses.likelihoods().detach(),
        (beta * (responses.likelihoods() - ref_logps)).detach(),
        desirable=desirable,
        kl=kl,
    )
