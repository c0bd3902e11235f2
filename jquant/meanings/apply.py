"""Evaluating a model: one call, the meaning is an argument."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax

from jquant.config.qconfig import matches
from jquant.graph.axes import with_automatic_axes
from jquant.graph.evaluate import bind_inputs
from jquant.graph.loops import LEAST_BLOCKS
from jquant.graph.memory import fitting
from jquant.graph.structure import nested_outputs
from jquant.meanings.bit_true import bit_true_values, select_nodes
from jquant.meanings.meaning import Mode, check_mode, meaning_of
from jquant.meanings.rolled import output_values
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import check_model
from jquant.program.lower import lower_traced
from jquant.types import Array, Graph, Model

Outputs = Any  # arrays, nested as the model nests its result


def mode_values(
    model: Model,
    mode: Mode,
    inputs: dict[str, Array],
    rng: Array | None = None,
    selected: tuple[str, ...] | None = None,
    outputs_alone: bool = False,
    blocks: int = LEAST_BLOCKS,
) -> dict[str, Array]:
    """All values of the model's graph by name. `rng` activates stochastic operators.

    `selected` are the nodes that mode "bit_true" takes from the integer program; None for all. `outputs_alone` leaves
    other values out, as far as that saves time: then so many equal `blocks` run as a loop.
    """
    if mode == "bit_true" and selected is None:
        values = meaning_of(model, "fake_quant", rng=rng).values(inputs)
        return bit_true_values(lower_traced(fold_kept(model)), inputs, values)
    if outputs_alone and mode in ("float", "fake_quant"):
        return output_values(model, mode, inputs, rng, blocks)
    return meaning_of(model, mode, rng=rng, selected=selected or ()).values(inputs)


evaluate_mode = jax.jit(mode_values, static_argnames=("mode", "selected", "outputs_alone", "blocks"))


def _evaluated(
    mode: Mode, selected: tuple[str, ...] | None, outputs_alone: bool, model: Model, inputs: dict[str, Array]
) -> dict[str, Array]:
    return evaluate_mode(model, mode, inputs, None, selected, outputs_alone=outputs_alone)


def apply(model: Model, *inputs: Array, mode: Mode = "fake_quant", bit_true: str | Sequence[str] = "*") -> Outputs:
    """Evaluates a model. A batch norm that `prepare` kept is folded, with its running statistics, into what ships.

    A call looks whether inputs, params and scales are finite; `jax.jit(jq.apply)` does not, and is for loops.

    Args:
      model: what `calibrate` returned, or a trained one (`state.model`); in mode "float", what `prepare` returned.
      *inputs: real float32, one for each graph input, or nested as the arguments of the model.
      mode: "float" (nothing quantized), "fake_quant", "tables" (fake-quant with lookup tables in the place of
        functions, to find those that cost accuracy), "bit_true" (the value of the integer program, the gradient of
        fake-quant).
      bit_true: in mode "bit_true", which nodes are those of the integer program, by patterns as in a qconfig; the
        others are fake-quant. `bit_true="type:GridSample"` shows what the integers of grid_sample cost.

    Returns:
      The outputs, real, nested as those of the model: one alone, or a tuple of several, of a graph made by hand.

    Raises:
      CalibrationError: scales missing or broken. InputError: inputs that do not fit the graph, or the memory.
      GraphError: missing params.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> jq.apply(model, x, mode="float").tolist()
      [[0.0, 1.125], [-0.875, -0.0625]]
      >>> abs(jq.apply(model, x) - jq.apply(model, x, mode="float")).max() < 0.01
      Array(True, dtype=bool)
    """
    return apply_with_taps(model, *inputs, mode=mode, bit_true=bit_true, taps=None)[0]


def apply_with_taps(
    model: Model,
    *inputs: Array,
    mode: Mode = "fake_quant",
    bit_true: str | Sequence[str] = "*",
    taps: str | None = "*",
) -> tuple[Outputs, dict[str, Array]]:
    """Like `apply`, and returns {name: value} for the values that the pattern `taps` selects (None: outputs only).

    Args:
      model, *inputs, mode, bit_true: as for `apply`.
      taps: a pattern as in a qconfig, or None.

    Returns:
      The outputs, nested as those of the model, and real float32 values of any shape; exact values as they are.

    Raises:
      JQuantError: as `apply`.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> output, values = jq.apply_with_taps(model, x)
      >>> {name: value.shape for name, value in values.items()}
      {'linear': (2, 2), 'x': (2, 2)}
    """
    check_mode(mode)
    check_model(model, scales=mode != "float")
    plan = model.plan
    selected = select_nodes(plan, mode, bit_true)
    bound = bind_inputs(plan.graph, inputs)
    with fitting(plan.graph, model.params, bound, "Give {batch} samples a call"):
        values = with_automatic_axes(partial(_evaluated, mode, selected, taps is None), model, bound)
    outputs = nested_outputs(plan.graph, [values[name] for name in plan.graph.outputs])
    return outputs, selected_values(plan.graph, values, taps)


def selected_values(graph: Graph, values: Mapping[str, Array], taps: str | None) -> dict[str, Array]:
    """The values that a pattern selects; None: the outputs."""
    if taps is None:
        return {name: values[name] for name in graph.outputs}
    kinds = {node.name: (type(node.op).__name__, node.call_of) for node in graph.nodes}
    return {name: value for name, value in values.items() if matches(taps, name, *kinds.get(name, ("Input", "")))}
