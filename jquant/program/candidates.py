"""Many programs of one plan as one, for `jax.vmap`: a sweep over scales or weights in one compilation."""

from collections.abc import Sequence
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np

from jquant.types import FrozenMap, LoweringError, NodeFormat, Program

WIDTHS = ("int32", "pair", "limbs")


def stack_programs(programs: Sequence[Program]) -> Program:
    """Programs of one graph, stacked: each leaf gets a first axis with an entry a program.

    A program with narrower accumulators takes the widest of its node; all of them are exact, so no integer changes.

    Args:
      programs: what `lower` returned for the same plan and outputs, with other params or qparams.

    Returns:
      A Program for `jax.vmap(jq.run, in_axes=(0, None))`. Its outputs have the new axis in front.

    Raises:
      LoweringError: no programs, or two that differ in more than their numbers; with the field or the node.

    Example:
      >>> import jax, jax.numpy as jnp, jquant as jq
      >>> x = jnp.ones((2, 3))
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, x)
      >>> config = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8())})
      >>> model = jq.calibrate(jq.prepare(graph, params, config, target="nash-e"), [x])
      >>> scales = [jax.tree.map(lambda s: s * factor, model.qparams) for factor in (1.0, 1.5, 2.0)]
      >>> programs = jq.stack_programs([jq.lower(model.replace(qparams=q)) for q in scales])
      >>> jax.vmap(jq.run, in_axes=(0, None))(programs, x).shape
      (3, 2, 3)
    """
    if not programs:
        raise LoweringError("no program to stack; give at least one")
    for index, program in enumerate(programs):
        _check_same(programs[0], program, f"program {index}")
    formats = FrozenMap({name: _widest([p.formats[name] for p in programs]) for name in programs[0].formats})
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(replace(p, formats=formats) for p in programs))


def _widest(formats: Sequence[NodeFormat]) -> NodeFormat:
    return max(formats, key=lambda entry: WIDTHS.index(entry.accumulator))


def _check_same(first: Program, program: Program, where: str) -> None:
    if not isinstance(program, Program):
        raise LoweringError(f"{where} is not a jq.Program but {type(program).__name__}; make one with jq.lower")
    program.check_target()
    static = [field.name for field in fields(Program) if field.metadata.get("static") and field.name != "formats"]
    for name in static:
        if getattr(first, name) != getattr(program, name):
            raise LoweringError(f"{where} has another {name} than program 0; stack programs of one plan and outputs")
    for node, entry in first.formats.items():
        if replace(program.formats[node], accumulator=entry.accumulator) != entry:
            raise LoweringError(f"{where}: node {node!r} has the format {program.formats[node]}, in program 0 {entry}")
    ours, theirs = _shapes(first), _shapes(program)
    for key in ours.keys() ^ theirs.keys():
        raise LoweringError(f"{where} and program 0 differ in {key}: one of them lacks it")
    for key, shape in ours.items():
        if theirs[key] != shape:
            raise LoweringError(f"{where}: {key} is {theirs[key]}, in program 0 {shape}")


def _shapes(program: Program) -> dict[str, str]:
    """{path of a leaf: its dtype and shape}"""
    leaves = jax.tree_util.tree_leaves_with_path((program.constants, program.scales, program.accumulators))
    return {jax.tree_util.keystr(path): f"{np.asarray(leaf).dtype}{list(np.shape(leaf))}" for path, leaf in leaves}
