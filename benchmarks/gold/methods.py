"""The methods: which loss of fastpref, on whose responses, with what signals, swept over what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Group = Literal["pairs alone", "other models too", "TVKD by its shaping"]
Side = Literal["chosen", "rejected", "teacher", "student"]  # the last two: who wrote it

# Every method has as many strengths. What compares means per token has the betas of sums times 10,
# the number of tokens.
BETAS = (0.01, 0.1, 0.3, 1.0)
BETAS_PER_TOKEN = (0.1, 1.0, 3.0, 10.0)
WEIGHTS = (0.3, 1.0, 3.0, 10.0)
SHARES_OF_STEPS = (0.1, 0.3, 0.6, 1.0)


@dataclass(frozen=True)
class Method:
    """One curve of the comparison."""

    group: Group
    loss: str  # in `fastpref.losses.METHODS`
    swept: tuple[str, ...]  # the loss's options that take the strength; none: it is how long
    strengths: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the loss, beside these
    sides: tuple[Side, ...] = ("chosen", "rejected")
    signals: Mapping[str, str] = field(default_factory=dict)  # by the loss's argument
    divergence: Mapping[str, Any] = field(default_factory=dict)  # options of `linear_divergence`
    compared: Literal["teacher", "reference"] = "teacher"  # with whom, by the divergence
    on_policy: float = 0.0  # the share of steps on what the student writes at the time


def _tvkd(shaping: str, **options: Any) -> Method:
    signals = {"shaping": shaping}
    return Method("TVKD by its shaping", "tvkd", ("beta",), BETAS, options, signals=signals)


def _ddpo(reward: str) -> Method:
    signals = {"oracle_rewards": reward}
    return Method("other models too", "edpo", ("beta",), BETAS, signals=signals)


FORWARD_KL = {"kind": "forward_kl"}
METHODS: dict[str, Method] = {
    "SFT": Method("pairs alone", "sft", (), SHARES_OF_STEPS, sides=("chosen",)),
    "DPO": Method("pairs alone", "dpo", ("beta",), BETAS),
    "IPO": Method("pairs alone", "ipo", ("beta",), BETAS_PER_TOKEN),
    "SimPO": Method("pairs alone", "simpo", ("beta",), BETAS_PER_TOKEN),
    "CPO": Method("pairs alone", "cpo", ("beta",), BETAS),
    "ORPO": Method("pairs alone", "orpo", ("beta",), WEIGHTS),
    "KTO": Method("pairs alone", "kto", ("beta",), BETAS),
    "WPO": Method("pairs alone", "wpo", ("beta",), BETAS),
    "TDPO": Method(
        "pairs alone", "tdpo", ("beta",), BETAS, divergence=FORWARD_KL, compared="reference"
    ),
    "d-DPO": _ddpo("oracle_reward"),
    "d-DPO, implicit reward": _ddpo("implicit_reward"),
    "d-DPO, true reward": _ddpo("true_reward"),
    "DRDO": Method("other models too", "drdo", ("alpha",), WEIGHTS, {"length_normalize": True}),
    "SeqKD": Method("other models too", "seqkd", (), SHARES_OF_STEPS, sides=("teacher",)),
    "VanillaKD": Method(
        "other models too",
        "vanilla_kd",
        (),
        SHARES_OF_STEPS,
        sides=("chosen",),
        divergence=FORWARD_KL,
    ),
    "GKD": Method(
        "other models too",
        "gkd",
        (),
        SHARES_OF_STEPS,
        sides=("chosen",),
        divergence={"kind": "jsd"},
        on_policy=0.5,
    ),
    "DPKD": Method(
        "other models too", "dpkd", ("beta",), BETAS_PER_TOKEN, sides=("teacher", "student")
    ),
    "DCKD": Method(
        "other models too",
        "dckd",
        ("chosen_weight", "rejected_weight"),
        WEIGHTS,
        divergence=FORWARD_KL,
    ),
    "ADPA": Method(
        "other models too",
        "adpa",
        ("weight",),
        WEIGHTS,
        sides=("chosen", "student"),
        divergence={"kind": "advantage"},
    ),
    "TVKD, value": _tvkd("value"),
    "TVKD, value, no reference": _tvkd("value", ref_logps=None),
    "TVKD, max": _tvkd("max"),
    "TVKD, margin": _tvkd("margin"),
    "TVKD, expectation": _tvkd("expectation"),
    "TVKD, logit": _tvkd("logit"),
    "TVKD, logp": _tvkd("logp"),
    "TVKD, implicit reward": _tvkd("implicit_reward"),
    "TVKD, true reward": _tvkd("true_reward"),
    "TVKD, random": _tvkd("random"),  # a control: it knows nothing
    "TVKD, value, alpha 10": _tvkd("value", alpha=10.0),
    "TVKD, implicit reward, alpha 10": _tvkd("implicit_reward", alpha=10.0),
}
