"""The way each node of a program takes on a kind of device, read from the trace that JAX makes for it.

No device is needed. `jax.export` lowers the same trace, so that a platform without a rule for some step shows here.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.export
import jax.extend.core

from jquant.graph.evaluate import evaluate
from jquant.numerics.platform import tracing_for
from jquant.program.integers import run_integers, run_node
from jquant.text import format_table
from jquant.types import Array, LoweringError, Node, Program, storage_dtype

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_SHORT = {"int8": "s8", "int16": "s16", "int32": "s32", "uint8": "u8", "uint32": "u32", "float32": "f32", "bool": "b1"}
_PRODUCTS = {"dot_general": "product", "conv_general_dilated": "convolution"}


@dataclass(frozen=True)
class NodePath:
    """How one node computes on a platform.

    `kernel`    the implementation that the program records for a convolution or matrix product
    `products`  {"product s8 x s8 -> s32": how many}, of matrix units: products of matrices and convolutions
    `gathered`  the elements of the largest gather over those of the node's largest operand or result; 0.0 without one
    `largest`   bytes of the largest array inside the node, for the batch of the trace: an upper bound for what a
                compiler that fuses nothing holds
    """

    node: str
    operator: str
    kernel: str
    products: dict[str, int]
    gathered: float
    largest: int

    @property
    def text(self) -> str:
        found = [f"{count} {name}" if count > 1 else name for name, count in self.products.items()]
        if self.kernel and not found:
            found.append("sum of shifted products")
        if self.gathered:
            found.append(f"gather, {self.gathered:.2g} x the larger of operand and result")
        return ", ".join(found) or "element by element"


def node_paths(program: Program, platform: str, batch: int = 1) -> list[NodePath]:
    """How each node of a program computes on a platform.

    Args:
      program: what `lower` or `load` returned.
      platform: "cpu", "cuda", "rocm" or "tpu"; it need not be here.
      batch: the size of axis 0, where it is open.

    Raises:
      LoweringError: an unknown platform, or a program that does not lower for it.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, jnp.ones((2, 3)))
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> program = jq.lower(jq.calibrate(model, [jnp.ones((2, 3))]))
      >>> [path.text for path in jq.program.node_paths(program, "tpu")]
      ['product s8 x s8 -> s32']
      >>> [path.text for path in jq.program.node_paths(program, "cuda")]  # bytes as float32, in exact sums
      ['product f32 x f32 -> f32']
    """
    inputs = _inputs(program, platform, batch)
    found: list[NodePath] = []

    def rule(node: Node, *operands: Array) -> Array:
        own = program.formats[node.name]
        traced = jax.make_jaxpr(partial(run_node, node, own, program.target))(operands, program.constants[node.name])
        value = run_node(node, own, program.target, operands, program.constants[node.name])
        found.append(_path(node, own.kernel, traced.jaxpr, value, max(v.size for v in (value, *operands))))
        return value

    with tracing_for([platform]):
        jax.eval_shape(lambda values: evaluate(program.graph, values, rule), inputs)
        try:
            jax.export.export(jax.jit(partial(run_integers, program)), platforms=[platform])(inputs)
        except NotImplementedError as error:
            raise LoweringError(f"the program does not lower for {platform}: {error}") from error
    return found


def path_table(paths: list[NodePath]) -> str:
    """The paths as text, one line a node."""
    rows = [(path.node, path.operator, path.kernel or "-", path.text, f"{path.largest:,}") for path in paths]
    return format_table(("node", "operator", "kernel", "computed as", "largest array, bytes"), rows)


def _inputs(program: Program, platform: str, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    if platform not in PLATFORMS:
        raise LoweringError(f"platform {platform!r} is none of {', '.join(PLATFORMS)}")
    program.check_target()
    program.check_single()
    return {
        entry.name: jax.ShapeDtypeStruct(
            tuple(batch if n is None else n for n in entry.shape),
            storage_dtype(program.inputs[entry.name]) if entry.name in program.inputs else entry.dtype,
        )
        for entry in program.graph.inputs
    }


def _path(node: Node, kernel: str, jaxpr: Any, value: Array, size: int) -> NodePath:
    products: Counter[str] = Counter()
    gathered, largest = 0.0, value.size * value.dtype.itemsize
    for equation in _equations(jaxpr):
        read, written = ([v.aval for v in group if hasattr(v.aval, "shape")] for group in _ends(equation))
        largest = max([largest, *(prod(v.shape) * v.dtype.itemsize for v in written)])
        if (name := _PRODUCTS.get(equation.primitive.name)) is not None:
            a, b, out = (_SHORT.get(str(v.dtype), str(v.dtype)) for v in (*read[:2], written[0]))
            products[f"{name} {a} x {b} -> {out}"] += 1
        elif equation.primitive.name == "gather":
            gathered = max(gathered, prod(written[0].shape) / size)
    return NodePath(node.name, type(node.op).__name__, kernel, dict(products), gathered, largest)


def _ends(equation: Any) -> tuple[Any, Any]:
    return equation.invars, equation.outvars


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner jaxprs in the place of the call."""
    for equation in jaxpr.eqns:
        inner = [v for v in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(v)]
        if not inner:
            yield equation
        for part in inner:
            yield from _equations(getattr(part, "jaxpr", part))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)
