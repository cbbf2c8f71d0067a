"""What the numbers mean, in sentences."""

from __future__ import annotations

from typing import Literal

from fastpref.inspection.measures import Share, SignalMeasures

Kind = Literal["tells", "does not tell", "worse than chance", "too few pairs"]
# An interval wider than this, of less than about 90 pairs, would hide a useful signal.
WIDEST = 0.2


def kind_of(measures: SignalMeasures) -> Kind:
    """The verdict in two or three words."""
    found = measures.ranked_first
    if found.side > 0:
        return "tells"
    if found.side < 0:
        return "worse than chance"
    return "too few pairs" if found.high - found.low > WIDEST else "does not tell"


def is_length(measures: SignalMeasures) -> bool:
    """Whether a signal says something of the labels that the difference of lengths says, too."""
    side = measures.ranked_first.side
    return side != 0 and measures.without_length.side != side


def verdict(measures: SignalMeasures) -> str:
    """The verdict on a signal in a sentence or two."""
    name = f"this teacher's `{measures.name}`"
    sentence = {
        "tells": f"{name} tells your pairs apart",
        "does not tell": f"{name} does not tell your pairs apart",
        "worse than chance": f"{name} is worse than chance on your pairs",
        "too few pairs": f"too few pairs to judge {name}",
    }[kind_of(measures)]
    found = measures.ranked_first
    sentence = (
        f"{sentence[0].upper()}{sentence[1:]}: it ranks the chosen response first in "
        f"{_percent(found.share)} of {measures.pairs} pairs (95 % interval {_interval(found)})."
    )
    if kind_of(measures) == "too few pairs":
        sentence += " About 90 pairs are needed, and 800 for small effects."
    if is_length(measures):
        left = measures.without_length
        rest = shortly(left)
        sentence += f" Length may be all that it sees: with length regressed out it is {rest}."
    return sentence


def shortly(found: Share) -> str:
    """A share with its interval."""
    return f"{_percent(found.share)} ({_interval(found)})"


def _interval(found: Share) -> str:
    return f"{100 * found.low:.0f} to {_percent(found.high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
