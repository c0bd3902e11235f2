"""Names of nodes and parameters: the paths of the framework, as the params and the named scopes have them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import jax

from jquant.drafts.names import leaves_of, source_of
from jquant.drafts.values import Draft
from jquant.types import ConversionError

COLLECTIONS = ("params", "batch_stats")  # of flax.linen, which are no part of a module's path


def leaf_names(params: Any) -> list[str]:
    """A name for every leaf of a pytree: its path joined with ".", without linen's collections and nnx's `value`."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    full = [jax.tree_util.keystr(path, simple=True, separator=".") or "params" for path in paths]
    names = [name.removesuffix(".value") if name != "value" else name for name in full]
    if isinstance(params, Mapping) and "params" in params:
        names = [rest if first in COLLECTIONS and rest else n for n in names for first, _, rest in [n.partition(".")]]
    names = names if len(set(names)) == len(names) else full
    if len(set(names)) != len(names):
        raise ConversionError("two leaves of params have one path; rename a key that contains a dot")
    return names


def input_names(trees: Sequence[Any], given: Sequence[str]) -> list[str]:
    """A name for every array of the inputs: the argument's, with the path inside it."""
    found = []
    for name, tree in zip(given, trees, strict=True):
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
            inner = jax.tree_util.keystr(path, simple=True, separator=".")
            found.append(f"{name}.{inner}" if inner else name)
    return found


class Scopes:
    """Named scopes as dotted paths. A scope around everything that is no key of params, as linen adds, is left out."""

    def __init__(self, drafts: Iterable[Draft], leaves: Iterable[str]) -> None:
        first = {parts[0] for draft in drafts if (parts := _plain(draft.scope))}
        first -= {name.partition(".")[0] for name in leaves} if len(first) == 1 else set()
        self.root = first.pop() if len(first) == 1 else None

    def dotted(self, scope: str) -> str:
        parts = _plain(scope)
        return ".".join(parts[1:] if parts and parts[0] == self.root else parts)


def _plain(scope: str) -> list[str]:
    """The parts of a scope that are names, and no marks of a transformation such as `vmap(...)`."""
    return [part for part in scope.split("/") if re.fullmatch(r"[\w.\-]+", part)]


def module_of(draft: Draft) -> str:
    """The module that a node's parameters belong to; "" where they tell nothing."""
    for role in ("weight", "running_mean", "bias"):
        known = draft.params.get(role)
        if known is None:
            continue
        source = source_of(known)
        if source is not None:
            path, index = source
            parent = path.rpartition(".")[0]
            return ".".join([*([parent] if parent else []), *map(str, index)]) if parent else ""
        parents = [tuple(path.split(".")[:-1]) for path in leaves_of(known)]
        if parents:
            common = takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
            return ".".join(names[0] for names in common)
    return ""
