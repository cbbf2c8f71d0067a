"""SFT, and SeqKD, which is SFT on a teacher's own responses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastpref.losses.pairs import unpaired_loss
from fastpref.responses import Responses, token_mean


class SFTOutput(NamedTuple):
    """What `sft` and `seqkd` return; everything but ``loss`` is detached."""

    loss: Tensor  #: () mean over tokens, differentiable
    chosen_logps: Tensor  #: (B,) summed log-probabilities, nats
    nll_loss: Tensor  #: () mean negative log-probability of the tokens, whatever they weigh, nats


@unpaired_loss
def sft(chosen: Responses) -> SFTOutput:
    r"""Supervised fine-tuning: the negative log-likelihood of the chosen responses.

    .. math:: L = -\frac{\sum_{y} \log \pi(y)}{\sum_{y} |y|}

    The mean is over all tokens of the batch, as in TRL's ``SFTTrainer``; the repositories of DPO
    and TDPO take sums over a response instead, and the mean of these.

    Args:
        chosen: Sums over B responses, from `fastpref.sum_responses`; token weights count.

    Returns:
        `SFTOutput`.

    Raises:
        ValueError: No responses.

    Example:
        >>> chosen = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([1, 3]))
        >>> sft(chosen).loss.item()
        2.0
    """
    nll_loss = -token_mean(chosen.likelihoods(), chosen.lengths)
    return SFTOutput(
        -token_mean(chosen.logps, chosen.lengths),
        chosen.likelihoods().detach(),
        nll_loss=nll_loss.detach(),
    )


@unpaired_loss
def seqkd(chosen: Responses) -> SFTOutput:
    r"""Sequence-level distillation: `sft` on responses that the teacher wrote.

    .. math:: L = -\frac{\sum_{y} \log \pi(y)}{\sum_{y} |y|}, \qquad y \sim \pi_{teacher}

    `SeqKD <https://arxiv.org/abs/1606.07947>`_; what makes it one is the data. Several codes give
    the name to something else. DistiLLM's scripts of that name train the forward KL of every token
    on the teacher's text, and so does ``seq_kd=True`` of TRL's GKD with its divergence: both are
    `gkd` here. The code of the TVKD paper clamps an advantage in its branch of that name.

    Args:
        chosen: Sums over B responses of the teacher, from `fastpref.sum_responses`; token weights
            count.

    Returns:
        `SFTOutput`.

    Raises:
        ValueError: No responses.

    Example:
        >>> teachers = fastpref.Responses(torch.tensor([-3.0, -5.0]), torch.tensor([1, 3]))
        >>> seqkd(teachers).loss.item()
        2.0
    """
    return sft(chosen)
