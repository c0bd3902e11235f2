"""Values of the integer program with the gradient of fake-quant: of all nodes, or of some."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jquant.config.qconfig import matches
from jquant.graph.evaluate import Rule, Tap
from jquant.meanings.fake_quant import fake_quant_tap
from jquant.numerics.rounding import dequantize, quantize, to_float16
from jquant.plan.scales import value_scales
from jquant.program.integers import dequantize_values, quantize_inputs, run_integers, run_node
from jquant.program.lower import dtype_of, lower_nodes
from jquant.quantizers.surrogate import straight_through
from jquant.text import near_or_known
from jquant.types import Array, JQuantError, Node, Params, Plan, Program, QParams


def select_nodes(plan: Plan, mode: str, patterns: str | Sequence[str]) -> tuple[str, ...] | None:
    """The nodes that patterns name, as in a qconfig: names, "re:" or "type:"; None for all.

    Raises:
      JQuantError: a pattern that matches nothing, or a choice in another mode than "bit_true".
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if patterns == ("*",):
        return None
    if mode != "bit_true":
        raise JQuantError(f"bit_true={patterns!r} chooses nodes of mode 'bit_true', and the mode is {mode!r}")
    nodes = plan.graph.nodes
    for pattern in patterns:
        if not any(matches(pattern, node.name, type(node.op).__name__) for node in nodes):
            known = (
                {f"type:{type(n.op).__name__}" for n in nodes}
                if pattern.startswith("type:")
                else {n.name for n in nodes}
            )
            raise JQuantError(f"bit_true pattern {pattern!r} matches no node{near_or_known(pattern, known)}")
    return tuple(n.name for n in nodes if any(matches(p, n.name, type(n.op).__name__) for p in patterns))


def bit_true_values(program: Program, inputs: Mapping[str, Array], values: Mapping[str, Array]) -> dict[str, Array]:
    """Fake-quant values replaced by those of the integer program, with the gradient left as it was."""
    program = replace(program, constants=_computed_first(program.constants, program.scales))
    integers = run_integers(program, quantize_inputs(program, inputs))
    exact = dequantize_values(program, integers)
    return {name: replaced(value, exact[name]) if name in exact else value for name, value in values.items()}


def _computed_first(constants: Any, scales: Mapping[str, Array | None]) -> Any:
    """The integers of a program, computed before anything reads them: by a loop of one round, which XLA cannot know.

    It would merge the making of weights and tables with their use: four times slower convolutions, which miss the fast
    library, and minutes and gigabytes to compile some dozens of tables. It drops an optimization barrier.
    """
    leaves, structure = jax.tree.flatten(constants)
    exact = [jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in leaves]
    made = tuple(leaf for leaf, chosen in zip(leaves, exact, strict=True) if chosen)
    once = 1 + sum(
        (jax.lax.stop_gradient(scale).ravel()[0] <= 0).astype(jnp.int32)
        for scale in scales.values()
        if scale is not None
    )
    first = iter(jax.lax.fori_loop(0, once, lambda _, __: made, jax.tree.map(jnp.zeros_like, made)))
    return jax.tree.unflatten(
        structure, [next(first) if chosen else leaf for leaf, chosen in zip(leaves, exact, strict=True)]
    )


def replaced(value: Array, replacement: Array) -> Array:
    return straight_through(value, replacement) if value.dtype == jnp.float32 else replacement


def partly_bit_true(
    plan: Plan, params: Params, qparams: QParams, rule: Rule, selected: Sequence[str]
) -> tuple[Rule, Tap]:
    """A rule and tap of fake-quant in which some nodes compute on integers, from what fake-quant gives them.

    Fake-quantized operands lie on their integer grid, so nothing is lost at the border: with all nodes selected the
    values are those of the program. The plan keeps no batch norm; nodes that are not selected need no integer form.
    """
    scales = value_scales(plan, qparams)
    chosen = [node for node in plan.graph.nodes if node.name in set(selected)]
    constants, formats, _ = lower_nodes(plan, params, qparams, chosen, scales)
    constants = _computed_first(constants, scales)
    base, exact = fake_quant_tap(plan, qparams), dict[str, Array]()

    def stored(name: str, value: Array) -> Array:
        dtype, scale = dtype_of(name, plan), scales[name]
        if name in plan.exact:
            return value
        return to_float16(value) if scale is None else quantize(value, scale, dtype)

    def with_integers(node: Node, *operands: Array) -> Array:
        if node.name in formats:
            integers = [stored(name, value) for name, value in zip(node.inputs, operands, strict=True)]
            found = run_node(node, formats[node.name], plan.target, integers, constants[node.name])
            scale = scales[node.name]
            if node.name not in plan.exact:
                found = found.astype(jnp.float32) if scale is None else dequantize(found, scale)
            exact[node.name] = found
        return rule(node, *operands)

    def tap(name: str, value: Array) -> Array:  # after fake-quant, so that the gradient is that of fake-quant
        value = base(name, value)
        return replaced(value, exact[name]) if name in exact else value

    return with_integers, tap
