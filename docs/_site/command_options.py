"""The directive `command-options`: what ``fastpref COMMAND --help`` says, as part of a page."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fastpref import cli
from fastpref.integrations.trl.command_help import help_page
from fastpref.integrations.trl.command_line import OtherModels

WORDS = {str: "text", Path: "file", int: "integer", float: "number"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-options", CommandOptions)
    return {"parallel_read_safe": True}


class CommandOptions(SphinxDirective):
    """Of the command that is its argument: what it does, then every option."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes that the directive stands for."""
        (name,) = self.arguments
        if name == "train":  # most of its options are TRL's, whose parser is argparse's
            page = help_page(fields(OtherModels), [])
            return [nodes.literal_block(page, page, language="text")]
        command = getattr(cli, name.replace("-", "_"))
        about = _marked(inspect.getdoc(command) or "")
        lines = [*about.splitlines(), "", f".. program:: fastpref {name}"]
        for option in inspect.signature(command, eval_str=True).parameters.values():
            usage, text = _described(option)
            lines += ["", f".. option:: {usage}", "", f"   {text}"]
        return self.parse_text_to_nodes("\n".join(lines))


def _described(option: inspect.Parameter) -> tuple[str, str]:
    """An option as it is typed, and what it is, with its default."""
    kind, info = _parts(option.annotation)
    name, text = f"--{option.name.replace('_', '-')}", _marked(info.help)
    if kind is bool:
        return name, text
    usage = f"{name} <{_word(kind)}>"
    if option.default is inspect.Parameter.empty:
        return usage, f"{text} **Required.**"
    return usage, text if option.default is None else f"{text} Default: ``{option.default}``."


def _marked(text: str) -> str:
    """A help text with its commands and options as code: two hyphens would become a dash."""
    return re.sub(r"torchrun .+? \.\.\.|(?<!\S)--[\w-]+", r"``\g<0>``", text)


def _parts(annotation: Any) -> tuple[Any, Any]:
    """The type of ``Annotated[type, typer.Option(...)]``, and the option."""
    if get_origin(annotation) is not Annotated:
        raise TypeError(f"expected an annotated option, got {annotation}")
    kind, info = get_args(annotation)
    return kind, info


def _word(kind: Any) -> str:
    """What an option takes."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    while get_args(kind):  # `T | None` and `list[T]`
        kind = get_args(kind)[0]
    return WORDS[kind]
