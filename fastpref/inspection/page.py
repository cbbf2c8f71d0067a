"""An inspection as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpref.checks import refuse
from fastpref.extras import require_extra
from fastpref.inspection.plots import HEIGHT, WIDTH, histogram, two_histograms
from fastpref.inspection.signals import Signal
from fastpref.inspection.verdicts import kind_of

if TYPE_CHECKING:
    from fastpref.inspection.inspecting import Inspection

TEMPLATES = Path(__file__).with_name("template")
WITHIN = 0.95  # of the tokens have a shaping within the scale of colours


def write_page(inspection: Inspection, output: str | Path) -> None:
    """Write an inspection as one HTML page: verdicts, numbers, plots, and each pair by token.

    The page needs no network and no other file. It has the text of all pairs in it: whoever gets
    the page can read them.

    Args:
        inspection: What `inspect_teacher` or `inspect_values` returned.
        output: The .html file to write.

    Raises:
        ValueError: A file name that does not end in .html.
        ImportError: Without the extra "teacher".

    Example:
        >>> def show(pairs, model, tokenizer):
        ...     write_page(inspect_teacher(pairs, model, tokenizer), "report.html")
    """
    output = Path(output)
    check_page(output)
    require_extra("teacher", "fastpref.inspection.write_page", "jinja2")
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["brief"] = brief
    page = environment.get_template("page.html").render(
        facts=inspection.facts,
        rows=[_row(index, inspection) for index in range(len(inspection.signals))],
        has_student=inspection.student_gaps is not None,
        width=WIDTH,
        height=HEIGHT,
        data=_data(inspection),
    )
    # A name of a file may have bytes that are no text.
    output.write_bytes(page.encode("utf-8", "replace"))


def brief(number: float | None, digits: int = 3) -> str:
    """A number with so many digits that count; a dash for none."""
    if number is None:
        return "–"
    text = f"{number:.{digits}g}"
    if 1 <= abs(number) < 1e6:  # which would be in powers of ten
        text = f"{float(text):.{digits}f}".rstrip("0").rstrip(".")
    return text.replace("-", "−")


def check_page(output: Path) -> None:
    """Refuse what would fail only after the models have been read."""
    if output.suffix != ".html":
        refuse("output", "a file name that ends in .html", repr(str(output)))
    if not output.parent.is_dir():
        refuse("output", "a file in a folder that exists", repr(str(output)))


def _row(index: int, inspection: Inspection) -> dict[str, Any]:
    """What the page says of one signal, outside of its pairs."""
    signal, measures = inspection.signals[index], inspection.measures[index]
    chosen, rejected = signal.sums().unbind(1)
    gaps, students = chosen - rejected, inspection.student_gaps
    return {
        "name": signal.name,
        "meaning": signal.meaning,
        "kind": kind_of(measures),
        "verdict": inspection.verdicts[index],
        "measures": measures,
        "histogram": histogram(gaps, signal.name),
        "beside_student": None if students is None else two_histograms(gaps, students, signal.name),
    }


def _data(inspection: Inspection) -> dict[str, Any]:
    """What the page's script reads."""
    students = inspection.student_gaps
    return {
        "signals": [
            {
                "name": signal.name,
                "gamma": signal.gamma,
                "leaving": signal.leaving,
                "scale": _scale(signal),
            }
            for signal in inspection.signals
        ],
        "pairs": [
            {
                "row": pair.row,
                "prompt": pair.prompt,
                "tokens": [pair.chosen, pair.rejected],
                "curves": [
                    [_packed(curve) for curve in signal.curves[index]]
                    for signal in inspection.signals
                ],
                "student": None if students is None else float(students[index]),
            }
            for index, pair in enumerate(inspection.pairs)
        ],
    }


def _scale(signal: Signal) -> float:
    """The shaping of a token that has the full colour."""
    steps = torch.cat([signal.steps(curve) for curves in signal.curves for curve in curves]).abs()
    return float(steps.sort().values[int(WITHIN * (len(steps) - 1))]) or float(steps.max()) or 1.0


def _packed(curve: Tensor) -> str:
    """Little-endian float32, shorter than digits and exact."""
    numbers = curve.float().numpy()
    if sys.byteorder == "big":
        numbers = numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
