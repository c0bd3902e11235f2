"""Pages whose code runs: a block of Python, and behind it what it prints. Run as a script it fills in pages anew.

PYTHONPATH=tests .venv/bin/python tests/support/pages.py docs/tutorials/*.md

The blocks of a page share one namespace and run in an empty folder. A picture that they write there is one of
docs/pictures, if the page shows it.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", flags=re.S | re.M)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]?\d+)?")


def run_page(text: str, name: str, folder: Path) -> str:
    """The page with the output of each block behind it, run in `folder`."""
    space: dict[str, Any] = {"__name__": "__page__"}

    def run(block: re.Match[str]) -> str:
        line = text[: block.start(1)].count("\n")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[1], name, "exec"), space)
        shown = "\n".join(part.rstrip() for part in printed.getvalue().splitlines())
        return f"```python\n{block[1]}```\n" + (f"\n```text\n{shown}\n```\n" if shown else "")

    with contextlib.chdir(folder):
        return BLOCK.sub(run, text)


def pictures_of(text: str) -> list[str]:
    """Names of the pictures that a page shows from docs/pictures."""
    return re.findall(r"!\[[^\]]*\]\([./]*pictures/([\w.-]+)\)", text)


def code_lines(text: str) -> int:
    """Lines of code of a page, without empty ones."""
    return sum(1 for block in BLOCK.finditer(text) for line in block[1].splitlines() if line.strip())


def differences(page: str, run: str) -> list[str]:
    """Lines that differ in a word or an integer, or in a decimal number by more than a twentieth or two last digits.

    Sums of float32 depend on the vector units of a CPU, and training carries that into the second digit; counts of
    integers that differ do not, and are printed without a decimal point.
    """
    found = []
    for old, new in zip(page.splitlines(), run.splitlines(), strict=False):
        pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=False)
        words = [" ".join(NUMBER.sub("#", line).replace("-", " ").split()) for line in (old, new)]
        if words[0] != words[1] or not all(near(a, b) for a, b in pairs):
            found.append(f"- {old}\n+ {new}")
    if len(page.splitlines()) != len(run.splitlines()):
        found.append("another number of lines")
    return found


def near(a: str, b: str) -> bool:
    last = 10.0 ** -len(a.partition("e")[0].partition(".")[2])
    return abs(float(a) - float(b)) <= max(abs(float(a)) / 20, 2.1 * last)


def fill_in(page: Path) -> None:
    """Runs a page, and writes what it printed and its pictures."""
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        page.write_text(run_page(text, str(page), Path(folder)), encoding="utf-8")
        for name in pictures_of(text):
            if (Path(folder) / name).exists():
                shutil.copy(Path(folder) / name, PICTURES / name)
    print(f"{page}: {code_lines(text)} lines of code")


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for argument in sys.argv[1:]:
        fill_in(Path(argument).resolve())
