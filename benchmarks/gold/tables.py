"""The comparisons that there are: which methods, in which sizes of teacher and student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from methods import DPO, DRDO, METHODS, Method, tvkd
from settings import Budget, Settings

AGAINST = "DPO"  # which every other method is compared with
SIZES: dict[str, Settings] = {  # layers × width of the teacher, and of the student
    "3×96 to 1×24": Settings(),
    "3×96 to 2×48": Settings(student_layers=2, student_width=48),
    "2×48 to 1×24": Settings(teacher_layers=2, teacher_width=48),
}
QUICK_SIZES: dict[str, Settings] = {
    size: replace(
        settings, teacher_pairs=5000, sft=Budget(100, 100, 3e-3), teacher=Budget(50, 100, 5e-4)
    )
    for size, settings in SIZES.items()
}
FIRST_SIZE = next(iter(SIZES))


@dataclass(frozen=True)
class Table:
    """One comparison: one JSON file, one plot."""

    methods: Mapping[str, Method]
    quick: tuple[str, ...]  # the methods of a first look
    kls: tuple[float, ...]  # nats: the columns
    sizes: tuple[str, ...] = (FIRST_SIZE,)


SIGNALS = (  # four potentials, the one of implicit rewards, two action-dependent rewards
    "value",
    "max",
    "margin",
    "expectation",
    "implicit reward",
    "logit",
    "logp",
    "true reward",  # nobody has it: how far a perfect signal gets
    "random",  # a control, which knows nothing
)
GAPS = (1.5, 5.0)  # about that of the labels' own logits, and more


def shaping_methods() -> dict[str, Method]:
    """TVKD with every signal, scaled to the same size; and DPO with other orders of batches."""
    groups = [f"shaping gaps of {gap:g}" for gap in GAPS]
    methods = {AGAINST: replace(DPO, group=groups[0])}
    for order in (1, 2):  # controls: how far chance alone takes a method
        methods[f"DPO, order {order + 1}"] = replace(DPO, group=groups[0], order=order)
    for gap, group in zip(GAPS, groups, strict=True):
        for signal in SIGNALS:
            methods[f"{signal}, gaps {gap:g}"] = tvkd(group, signal.replace(" ", "_"), gap)
    return methods


GAMMAS = (0.0, 1.0, 2.0, 3.5, 5.0)
LABELS_RIGHT = (1.0, 0.75, 0.5)


def drdo_methods() -> dict[str, Method]:
    """DRDO without each of its terms, with other oracles, and its gamma over worse labels."""
    terms, oracles = "its terms", "its oracle"
    methods = {
        AGAINST: replace(DPO, group=terms),
        "DRDO": replace(DRDO, group=terms),
        "DRDO, sums": replace(DRDO, group=terms, options={"length_normalize": False}),
        # The student's own rewards: their gaps are right by definition, and give no gradient.
        "DRDO, no reward distillation": _of_oracle("student_reward", terms),
        "DRDO, no preference term": replace(
            METHODS["SFT"],
            group=terms,
            loss="drdo",
            options={"alpha": 0.0},
            sides=("chosen", "rejected"),
        ),
        "DRDO, small oracle": _of_oracle("small_oracle_reward", oracles),
        "DRDO, true reward": _of_oracle("true_reward", oracles),
        "DRDO, true reward, noise 1": _of_oracle("true_reward_noise_1", oracles),
        "DRDO, true reward, noise 3": _of_oracle("true_reward_noise_3", oracles),
    }
    for right in LABELS_RIGHT:
        group = f"{right:.0%} of labels right"
        methods[f"DPO, {right:.0%} right"] = replace(DPO, group=group, labels_right=right)
        for gamma in GAMMAS:
            options = {"length_normalize": True, "gamma": gamma}
            methods[f"DRDO, gamma {gamma:g}, {right:.0%} right"] = replace(
                DRDO, group=group, options=options, strengths=(1.0, 10.0), labels_right=right
            )
    return methods


def _of_oracle(reward: str, group: str) -> Method:
    return replace(DRDO, group=group, signals={"oracle_rewards": reward})


OF_SIZES = (
    "DPO",
    "DRDO",
    "DCKD",
    "ADPA",
    "TVKD, value",
    "TVKD, implicit reward, alpha 10",
)
TableName = Literal["methods", "shaping", "sizes", "drdo"]
TABLES: dict[TableName, Table] = {
    "methods": Table(
        METHODS,
        ("DPO", "SimPO", "DCKD", "TVKD, value", "TVKD, implicit reward"),
        (1.0, 2.0, 4.0, 8.0),
    ),
    "shaping": Table(
        shaping_methods(),
        ("DPO", "value, gaps 5", "implicit reward, gaps 5", "random, gaps 5"),
        (1.0, 2.0, 4.0, 8.0),
    ),
    "sizes": Table(
        {name: METHODS[name] for name in OF_SIZES}, ("DPO", "DCKD"), (2.0, 4.0, 8.0), tuple(SIZES)
    ),
    "drdo": Table(drdo_methods(), ("DPO", "DRDO", "DRDO, true reward"), (0.5, 1.0, 4.0)),
}
