"""The pages of help as one JSON object, {command or "": page}; `python -m jquant.cli.help` writes help.json."""

import json
import sys
from typing import Any

import typer

from jquant.cli.application import app


def pages() -> dict[str, str]:
    """The pages at 80 columns, as `--help` of the application prints them."""
    group: Any = typer.main.get_command(app)
    options: dict[str, Any] = {"terminal_width": 78}  # click leaves two columns free
    root = group.make_context("jquant", [], resilient_parsing=True, **options)
    found = {"": group.get_help(root) + "\n"}
    for name in group.list_commands(root):
        command = group.get_command(root, name)
        context = command.make_context(name, [], parent=root, resilient_parsing=True, **options)
        found[name] = command.get_help(context) + "\n"
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(pages(), indent=1) + "\n")
