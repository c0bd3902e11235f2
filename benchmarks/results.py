"""RESULTS.md: a section for each measurement, written by its command and by no other."""

from pathlib import Path

PATH = Path(__file__).parent / "RESULTS.md"
HEAD = (
    "# What takes how long\n\nMedian ratios of alternating rounds in one process; below 15 % nothing is resolved. "
    "Sections may be of different machines.\n"
)


def write_section(name: str, text: str) -> None:
    """Replaces what stands between the markers of a section, or adds the section at the end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = PATH.read_text() if PATH.exists() else HEAD
    section = f"{begin}\n{text.strip()}\n{end}\n"
    if begin in page:
        before, _, rest = page.partition(begin)
        page = before + section + rest.partition(f"{end}\n")[2]
    else:
        page += f"\n{section}"
    PATH.write_text(page)
