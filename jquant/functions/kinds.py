"""Labels for the leaves of a quantized function's variables: which are weights, and which are scales."""

from typing import Any

import jax
import jax.numpy as jnp

from jquant.drafts.names import leaves_of
from jquant.functions.quantized import QuantizedFunction, Variables
from jquant.functions.trace.function import Traced
from jquant.ops.batch_norm import BatchNorm
from jquant.ops.elementwise import Constant
from jquant.ops.matmul import Embedding, MatMul
from jquant.training.state import Freeze as Freeze
from jquant.training.state import frozen_labels
from jquant.types import Graph, InputError, Node

KINDS = ("weight", "bias", "batch_norm", "scale")


def labels(function: QuantizedFunction, variables: Variables, *, freeze: Freeze = ()) -> dict[str, Any]:
    """Labels for `optax.multi_transform`, and for the masks of optax, of everything that is trained.

    "weight" for what convolutions, linear layers, products and embeddings multiply by, "batch_norm" for weight and bias
    of batch norms, "scale" for qparams, and "bias" for all other leaves: biases, gains of other norms, slopes. "frozen"
    for running statistics, leaves that are no floating-point numbers, and what `freeze` names.

    A label follows from what the graph does with a leaf, not from its name: a mask by names can take a scale for a
    weight. The name of a scale is that of its weight or value, such as "conv.kernel", in one key. A mask of the key
    "kernel" takes the scale of a leaf "kernel" at the top of the params; one of all but "bias" takes every scale.

    Args:
      function, variables: what `quantize` returned; variables without "batch_stats" too, where these are kept apart.
      freeze: patterns, as in a qconfig, on the paths of leaves, joined with ".", and on the names of scales. Or a
        mapping from "weight", "bias", "batch_norm" and "scale" to patterns, to freeze that kind only.

    Returns:
      A pytree of the form of `variables`, with labels in the place of arrays.

    Raises:
      InputError: variables of another function. QConfigError: an unknown kind, or a pattern that matches nothing of its
      kind.

    Example:
      >>> import jax, jax.numpy as jnp, jquant as jq
      >>> def model(params, x):
      ...     return x @ params["dense"]["kernel"] + params["dense"]["bias"]
      >>> params = {"dense": {"kernel": jnp.array([[0.5, -1.0], [0.25, 2.0]]), "bias": jnp.array([0.5, 0.25])}}
      >>> x = jnp.array([[1.0, 0.5], [-0.5, 1.0]])
      >>> qfn, variables = jq.quantize(model, params, jq.QConfig(jq.templates.int8_default()), [x])
      >>> labels = jq.functions.labels(qfn, variables)
      >>> labels["params"], labels["qparams"]
      ({'dense': {'bias': 'bias', 'kernel': 'weight'}}, {'dense.kernel': 'scale', 'x': 'scale'})
      >>> decayed = jax.tree.map(lambda label: label == "weight", labels)  # optax.adamw(1e-3, mask=decayed)
    """
    trained = {name: tree for name, tree in variables.items() if name in ("params", "qparams")}
    stats = variables.get("batch_stats")
    if set(trained) != {"params", "qparams"} or set(variables) - {*trained, "batch_stats"}:
        raise InputError("variables must be those that jq.quantize returned: {'params': ..., 'qparams': ...}")
    statistics = function.params_of.statistics
    own = function.traced.leaves[len(statistics) :]
    count, found = len(own), len(jax.tree.leaves(trained["params"]))
    if found != count or set(trained["qparams"]) != set(function.plan.trained):
        raise InputError(
            f"variables of another function: {found} leaves of params and {len(trained['qparams'])} scales, where this "
            f"one has {count} and {len(function.plan.trained)}"
        )
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trained["params"])]
    known = leaf_kinds(function.traced)
    kinds = [known.get(name, "bias") if real else "frozen" for name, real in zip(own, floating, strict=True)]
    params = [(name, kind) for name, kind in zip(own, kinds, strict=True)]
    scales = [(name, "scale") for name in trained["qparams"]]
    labelled = frozen_labels([*params, *scales], freeze, KINDS)
    made = {
        "params": jax.tree.unflatten(jax.tree.structure(trained["params"]), [labelled[key] for key in params]),
        "qparams": {name: labelled[name, kind] for name, kind in scales},
    }
    return made if stats is None else {**made, "batch_stats": jax.tree.map(lambda _: "frozen", stats)}


def leaf_kinds(traced: Traced) -> dict[str, str]:
    """{path of a leaf: kind} of the leaves that are no "bias"; one that is several is a weight first."""
    by_kind: dict[str, set[str]] = {"weight": set(), "frozen": set(), "batch_norm": set()}
    for node in traced.graph.nodes:
        for role, key in node.params.items():
            kind = _kind(node, role, traced.graph)
            if kind is not None:
                by_kind[kind].update(leaves_of(traced.params[key]))
    found: dict[str, str] = {}
    for kind, paths in by_kind.items():
        found = dict.fromkeys(paths, kind) | found
    return found


def _kind(node: Node, role: str, graph: Graph) -> str | None:
    if isinstance(node.op, BatchNorm):
        return "frozen" if role.startswith("running_") else "batch_norm"
    is_weight = role in node.op.weight_roles or isinstance(node.op, Embedding)
    return "weight" if is_weight or (isinstance(node.op, Constant) and _is_multiplied(node.name, graph)) else None


def _is_multiplied(name: str, graph: Graph) -> bool:
    """Whether a product of matrices reads a value, perhaps in another shape."""
    pending = [name]
    while pending:
        value = pending.pop()
        for reader in (node for node in graph.nodes if value in node.inputs):
            if isinstance(reader.op, MatMul):
                return True
            if len(reader.inputs) == 1 and reader.op.scale_rule == "same_as_input":
                pending.append(reader.name)
    return False
