"""What mkdocs needs of the repository: pages outside docs/, those of the reference, and links between them.

Pages are written for readers of the repository. A link from a page to a file that is no page of the site, such as
a test, becomes the path of that file.
"""

import ast
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    *("ARCHITECTURE.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("benchmarks/ACCURACY.md", "benchmarks/PTQ.md", "benchmarks/RESULTS.md"),
)
PICTURES = ("benchmarks/accuracy.png", "benchmarks/goals.png")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s:]+)(#[^)]*)?\)")
REMOTE = "https://unpkg.com/iframe-worker/shim"
START = "README.md"  # of the repository: the first page, index.md


class Doctests(griffe.Extension):
    """A section "Example:" of a docstring is read as "Examples:", whose doctests are code."""

    def on_object(self, *, obj: Any, **options: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def on_config(config: Any) -> Any:
    """Names the version on each page: the tests ran the code of the pages with it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    config["copyright"] = f"jquant {version}, with whose tests the code of these pages runs"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside docs/ with their pictures, the start page and the reference."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    for name in PICTURES:
        files.append(File.generated(config, name, content=(ROOT / name).read_bytes()))
    files.append(File.generated(config, "index.md", content=(ROOT / START).read_text(encoding="utf-8")))
    for name, content in reference().items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links by the place of the file in the repository, made links between pages of the site."""
    uri = page.file.src_uri
    source = START if uri == "index.md" else uri if uri in OUTSIDE else f"docs/{uri}"
    if source == START:
        markdown = markdown.replace("](docs/pictures/", "](pictures/")

    def linked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        at = "index.md" if target == START else target.removeprefix("docs/")
        if not at.endswith(".md") or files.get_file_from_path(at) is None:
            name = match[1].strip("`")
            return f"`{target}`" if name in target else f"{match[1]} (`{target}`)"
        return f"[{match[1]}]({posixpath.relpath(at, posixpath.dirname(uri) or '.')}{match[3] or ''})"

    outside_code = re.split(r"(^```.*?^```$)", markdown, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else LINK.sub(linked, part) for part in outside_code)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """The script with which the theme searches in local files comes from the site, not from the network."""
    return output.replace(REMOTE, posixpath.relpath("assets/frame-worker.js", posixpath.dirname(page.url) or "."))


# ---------------------------------------------------------------------------------------------------------------------
# The reference: every public name, read from the source without importing it


def reference() -> dict[str, str]:
    """{page: Markdown}: the names of jquant.api, a page for each of its packages, and jquant_converters."""
    imports = imports_of("jquant/api.py")
    names = {name: where for name, where in imports.items() if name[0].isupper() or not is_package(where)}
    rooms = {name: where for name, where in imports.items() if name not in names}
    pages = {f"reference/{room}.md": room_page(f"jq.{room}", where) for room, where in rooms.items()}
    pages["reference/converters.md"] = converters_page()
    lines = [f"- [`jq.{room}`]({room}.md): {summary_of(where)}" for room, where in sorted(rooms.items())]
    lines.append(f"- [`jquant_converters`](converters.md): {summary_of('converters')}")
    head = "# Reference\n\n`import jquant as jq` gives the names on this page, and the packages:\n\n"
    pages["reference/index.md"] = head + "\n".join(lines) + "\n\n" + entries(names)
    return pages


def imports_of(path: str) -> dict[str, str]:
    """{name: dotted place} of the imports of a module."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {a.asname or a.name: f"{n.module}.{a.name}" for n in nodes for a in n.names if n.module != "typing"}


def file_of(module: str) -> Path | None:
    """The file of a module of the repository, None for a name inside of one."""
    folder = ROOT.joinpath(*module.split("."))
    return next((p for p in (folder / "__init__.py", folder.with_suffix(".py")) if p.is_file()), None)


def is_package(place: str) -> bool:
    return file_of(place) is not None


def summary_of(module: str) -> str:
    path = file_of(module)
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path else None
    return (text or "").partition("\n")[0]


def room_page(title: str, module: str) -> str:
    path = file_of(module)
    assert path is not None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = imports_of(str(path.relative_to(ROOT)))
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    public = listed(tree) or sorted(name for name in defined if not name.startswith("_"))
    places = {name: imported.get(name, f"{module}.{name}") for name in public}
    return f"# {title}\n\n{ast.get_docstring(tree) or ''}\n\n" + entries(places)


def converters_page() -> str:
    path = ROOT / "converters" / "__init__.py"
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    relative = {a.name: f"converters.{n.module}.{a.name}" for n in ast.walk(tree)
                if isinstance(n, ast.ImportFrom) and n.level for a in n.names}  # fmt: skip
    return f"# jquant_converters\n\n{ast.get_docstring(tree)}\n\n" + entries(relative)


def listed(tree: ast.Module) -> list[str]:
    """The strings of `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [e.value for e in ast.walk(node.value) if isinstance(e, ast.Constant)]
    return []


def entries(places: dict[str, str]) -> str:
    return "\n".join(entry(name, place) for name, place in sorted(places.items(), key=lambda item: item[0].lower()))


def entry(name: str, place: str) -> str:
    """A heading and a docstring; of a value that is made by a call, the docstring of its `apply`, or its source."""
    module, _, attribute = place.rpartition(".")
    path = file_of(module)
    if path is None or is_package(place):
        return f"## {name}\n\n{summary_of(place)}\n"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if any(isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == attribute for n in tree.body):
        return f"::: {place}\n"
    imported = imports_of(str(path.relative_to(ROOT)))
    if attribute in imported:
        return entry(name, imported[attribute])
    node = next((n for n in tree.body if isinstance(n, ast.Assign) and assigns(n, attribute)), None)
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    used = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)] if node else []
    found = next((functions[n] for n in used if n in functions and ast.get_docstring(functions[n])), None)
    text = ast.get_docstring(found) if found else None
    source = ast.unparse(node) if node else attribute
    return f"## {name}\n\n" + (code(text) if text else f"```python\n{source}\n```\n")


def assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for target in node.targets for n in ast.walk(target))


def code(docstring: str) -> str:
    """The first paragraph as text, the rest as it is written."""
    first, _, rest = docstring.partition("\n\n")
    return f"{first}\n" + (f"\n```text\n{rest}\n```\n" if rest.strip() else "")
