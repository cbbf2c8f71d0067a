"""Formulas as MathML, which browsers show without scripts and without a network."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

FUNCTION = r"\\(?:log|exp|min|max|tanh)(?![a-zA-Z])"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer `mathml`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(_spaced(node.astext())))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    formula = tex2mathml(_spaced(node.astext()), as_block=True)
    translator.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def _spaced(formula: str) -> str:
    """The formula with TeX's spaces around the names of functions, which docutils leaves out."""
    formula = re.sub(rf"({FUNCTION})\s*(?=[\\\w])(?!\\[,;!|])", r"\1\\,", formula)
    return re.sub(rf"(?<=[\w}})])\s*(?={FUNCTION})", r"\\,", formula)
