"""What would make the keys of a checkpoint fit: a prefix that all of them have, or a container around them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

State = Mapping[str, Any]
_COUNTER = "num_batches_tracked"
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")


def without_prefix(state: State, prefix: str) -> dict[str, Any]:
    """The entries behind a prefix. What has another name belongs to another model, and is left."""
    return {key.removeprefix(prefix): value for key, value in state.items() if str(key).startswith(prefix)}


def containers(state: State, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], State]]:
    """(keys on the way, mapping) of the mappings inside that hold tensors by name, two levels deep."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            way = (*before, str(key))
            if any(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items()):
                yield way, value
            elif len(way) < 2:
                yield from containers(value, way)


def parts_with_keys(wanted: Mapping[str, Any], state: State) -> dict[tuple[str, ...], dict[str, Any]]:
    """{keys on the way: tensors} of the parts that have just the wanted keys behind one prefix, or behind none.

    Where the prefix is not empty, entries without it are left out. Counters of batches may be missing.
    """
    keys = {key for key in wanted if not key.endswith(_COUNTER)}
    found = {}
    for way, inner in (((), state), *containers(state)):
        for prefix in sorted(_prefixes(list(keys), inner)):
            part = without_prefix(inner, prefix)
            if keys == {key for key in part if not key.endswith(_COUNTER)}:
                found[way] = part
    return found


def indexed(way: Sequence[str]) -> str:
    """`['ema']['module']`"""
    return "".join(f"[{key!r}]" for key in way)


def as_entry(way: Sequence[str]) -> str:
    """`entry=('ema', 'module')`"""
    return f"entry={way[0]!r}" if len(way) == 1 else f"entry={tuple(way)!r}"


def adapters(state: State) -> list[str]:
    """Keys of low-rank adapters that are not merged into their weights: LoRA, as PEFT and loralib name it."""
    return [k for k in map(str, state) if _ADAPTER.search(k)]


def advice(wanted: Sequence[str], state: State, prefix: str) -> str:
    """The step after which more of the wanted keys are found, where there is one; else an empty string.

    Args:
      wanted: the keys of the graph.
      state: the checkpoint as it was given, with its prefixes.
      prefix: what was taken from its keys.
    """
    found: list[tuple[int, tuple[str, ...], str]] = [(_fitting(wanted, state, prefix), (), prefix)]
    for way, inner in (((), state), *containers(state)):
        found += [(_fitting(wanted, inner, p), way, p) for p in sorted(_prefixes(wanted, inner))]
    most = max(count for count, _, _ in found)
    if most == found[0][0]:
        return _of_the_graph(wanted, state)
    best = list(dict.fromkeys((way, p) for count, way, p in found if count == most))
    steps = " or ".join(_step(way, p) for way, p in best[:3])
    return f"{most} of {len(wanted)} keys fit with {steps}."


def _step(way: tuple[str, ...], prefix: str) -> str:
    steps = [as_entry(way)] if way else []
    return " and ".join([*steps, *([f"prefix={prefix!r}"] if prefix or not way else [])])


def _fitting(wanted: Sequence[str], state: State, prefix: str) -> int:
    return sum(isinstance(state.get(prefix + key), torch.Tensor) for key in wanted)


def _prefixes(wanted: Sequence[str], state: State) -> set[str]:
    """What stands in front of wanted keys. The longest of them has the fewest keys that end like it by chance."""
    longest = sorted(wanted, key=len)[-3:]
    return {"", *(str(k).removesuffix(key) for k in state for key in longest if str(k).endswith(f".{key}"))}


def _of_the_graph(wanted: Sequence[str], state: State) -> str:
    """Keys of the graph that have a prefix which the checkpoint lacks: a wrapped module was imported."""
    heads = {key.removesuffix(str(k)) for k in state for key in wanted if key.endswith(f".{k}")}
    for head in sorted(heads, key=len):
        if all(key.startswith(head) and key.removeprefix(head) in state for key in wanted):
            return (
                f"All keys fit with {head!r} in front of those of the checkpoint: import the module inside "
                f"({head.rstrip('.')}), or pass {{{head!r} + key: tensor for key, tensor in state.items()}}."
            )
    return ""
