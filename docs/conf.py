"""How `make docs` builds the site: Sphinx, from the Markdown pages and the docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_site"))

import fastpref

project = "fastpref"
version = release = fastpref.__version__
html_title = f"fastpref {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_options",
    "mathml",
    "offline",
]
# The source folder is the repository, so that links between its files are links on the site.
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "docs/**.rst",
    "examples/README.md",
    "benchmarks/**.md",
    "CHANGELOG.md",
]
exclude_patterns = [
    ".*",
    "build",
    "dist",
    "fastpref",
    "kernels",
    "tests",
    "docs/README.md",  # a part of docs/index.rst
]

nitpicky = True  # an unknown name in a docstring is a warning, and -W makes it an error
default_role = "any"  # `name` in a docstring

autodoc_typehints = "none"  # docstrings say shapes and dtypes, which annotations cannot
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["_site/static"]
html_css_files = ["fastpref.css"]
html_extra_path = ["_site/root"]  # index.html, which leads to docs/index.html
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
