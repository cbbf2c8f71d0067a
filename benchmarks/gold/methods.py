"""The methods: which loss of fastpref, on whose responses, with what signals, swept over what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Side = Literal["chosen", "rejected", "teacher", "student"]  # the last two: who wrote it

# Every method has as many strengths. What compares means per token has the betas of sums times 10,
# the number of tokens.
BETAS = (0.01, 0.1, 0.3, 1.0)
BETAS_PER_TOKEN = (0.1, 1.0, 3.0, 10.0)
WEIGHTS = (0.3, 1.0, 3.0, 10.0)
DRDO_WEIGHTS = (0.1, 1.0, 10.0, 100.0)  # 0.1 is the paper's, and 100 leaves little but that term
SHARES_OF_STEPS = (0.1, 0.3, 0.6, 1.0)
FORWARD_KL = {"kind": "forward_kl"}


@dataclass(frozen=True)
class Method:
    """One curve of a comparison."""

    group: str  # the panel of the plot that it is in
    loss: str  # in `fastpref.losses.METHODS`
    swept: tuple[str, ...]  # the loss's options that take the strength; none: it is how long
    strengths: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the loss, beside these
    sides: tuple[Side, ...] = ("chosen", "rejected")
    # By the loss's argument; several names are the rewards of several models.
    signals: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    divergence: Mapping[str, Any] = field(default_factory=dict)  # options of `linear_divergence`
    compared: Literal["teacher", "reference"] = "teacher"  # with whom, by the divergence
    on_policy: float = 0.0  # the share of steps on what the student writes at the time
    # The standard deviation of the pairs' alpha * (chosen - rejected shaping): alpha is set to it.
    shaping_gap: float | None = None
    labels_right: float | None = None  # labels anew: with this probability the true reward's
    order: int = 0  # another number: another order of the batches


ALONE, COPIED, JUDGED = "pairs alone", "a teacher is copied", "a scalar for each response"


def ddpo(reward: str) -> Method:
    """Log-ratios regressed onto one model's rewards."""
    return Method(JUDGED, "edpo", ("beta",), BETAS, signals={"oracle_rewards": reward})


def tvkd(group: str, shaping: str, gap: float | None = None, **options: Any) -> Method:
    """TVKD with a signal as its shaping."""
    signals = {"shaping": shaping}
    return Method(group, "tvkd", ("beta",), BETAS, options, signals=signals, shaping_gap=gap)


DPO = Method(ALONE, "dpo", ("beta",), BETAS)
DRDO = Method(JUDGED, "drdo", ("alpha",), DRDO_WEIGHTS, {"length_normalize": True})

METHODS: dict[str, Method] = {
    "SFT": Method(ALONE, "sft", (), SHARES_OF_STEPS, sides=("chosen",)),
    "DPO": DPO,
    "IPO": Method(ALONE, "ipo", ("beta",), BETAS_PER_TOKEN),
    "SimPO": Method(ALONE, "simpo", ("beta",), BETAS_PER_TOKEN),
    "CPO": Method(ALONE, "cpo", ("beta",), BETAS),
    "ORPO": Method(ALONE, "orpo", ("beta",), WEIGHTS),
    "KTO": Method(ALONE, "kto", ("beta",), BETAS),
    "WPO": Method(ALONE, "wpo", ("beta",), BETAS),
    "TDPO": Method(ALONE, "tdpo", ("beta",), BETAS, divergence=FORWARD_KL, compared="reference"),
    "d-DPO": ddpo("oracle_reward"),
    "d-DPO, implicit reward": ddpo("implicit_reward"),
    "e-DPO": Method(
        JUDGED,
        "edpo",
        ("beta",),
        BETAS,
        signals={"oracle_rewards": ("oracle_reward", "small_oracle_reward", "implicit_reward")},
    ),
    "DRDO": DRDO,
    "SeqKD": Method(COPIED, "seqkd", (), SHARES_OF_STEPS, sides=("teacher",)),
    "VanillaKD": Method(
        COPIED, "vanilla_kd", (), SHARES_OF_STEPS, sides=("chosen",), divergence=FORWARD_KL
    ),
    "GKD": Method(
        COPIED,
        "gkd",
        (),
        SHARES_OF_STEPS,
        sides=("chosen",),
        divergence={"kind": "jsd"},
        on_policy=0.5,
    ),
    "DPKD": Method(COPIED, "dpkd", ("beta",), BETAS_PER_TOKEN, sides=("teacher", "student")),
    "DPKD, by token": Method(
        COPIED,
        "dpkd_token",
        ("weight",),
        WEIGHTS,
        sides=("chosen",),
        divergence={"kind": "token_preference"},
    ),
    "DCKD": Method(
        COPIED, "dckd", ("chosen_weight", "rejected_weight"), WEIGHTS, divergence=FORWARD_KL
    ),
    "ADPA": Method(
        COPIED,
        "adpa",
        ("weight",),
        WEIGHTS,
        sides=("chosen", "student"),
        divergence={"kind": "advantage"},
    ),
    "TVKD, value": tvkd(JUDGED, "value"),
    "TVKD, value, no reference": tvkd(JUDGED, "value", ref_logps=None),
    "TVKD, implicit reward": tvkd(JUDGED, "implicit_reward"),
    "TVKD, implicit reward, alpha 10": tvkd(JUDGED, "implicit_reward", alpha=10.0),
}
