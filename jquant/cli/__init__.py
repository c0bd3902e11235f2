"""The command line, `jquant` or `python -m jquant`: one family of commands a file.

Exit codes: 0 done; 1 an error of the model, the data or a file, in one line on stderr; 2 wrong arguments; 3 a check
that did not pass; 130 interrupted. What a command prints goes to stdout, or with --json one JSON value; everything else
goes to stderr. Files appear whole or not at all.
"""

from jquant.cli.app import app, main

__all__ = ["app", "main"]
