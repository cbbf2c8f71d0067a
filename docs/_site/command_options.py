"""The directive `command-options`: what ``fastpref COMMAND --help`` says, as part of a page."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fastpref.cli import app as commands
from fastpref.integrations.trl.command import OtherModels
from fastpref.integrations.trl.command_help import help_page


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
        group: Any = typer.main.get_command(commands)
        command = group.commands[name]
        lines = [*command.help.splitlines(), "", f".. program:: fastpref {name}", ""]
        for option in command.params:
            lines += [f".. option:: {_usage(option)}", "", f"   {_text(option)}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def _usage(option: Any) -> str:
    """The option as it is typed, with a word for its value."""
    (name,) = option.opts
    if option.is_flag:
        return str(name)
    choices = getattr(option.type, "choices", None)
    word = "|".join(map(str, choices)) if choices else option.type.name.upper()
    return f"{name} <{word}>"


def _text(option: Any) -> str:
    """What it is, whether it has to be given, and its default."""
    text = str(option.help)
    if option.required:
        return f"{text} **Required.**"
    if option.is_flag or option.default is None:
        return text
    return f"{text} Default: ``{getattr(option.default, 'value', option.default)}``."
