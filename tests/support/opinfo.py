"""torch's own samples of operators, imported and compared in float32: pass, refused or mismatch."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from support.aten_cases import difference
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from jquant.graph.float import evaluate_float
from jquant.types import ConversionError, InputError
from jquant_converters import aten, from_torch

ALSO = {
    "nn.functional.interpolate",
    "nn.functional.normalize",
    "nn.functional.upsample_bilinear",
    "nn.functional.upsample_nearest",
}
RANDOM = {"nn.functional.dropout", "nn.functional.alpha_dropout", "nn.functional.feature_alpha_dropout"}
LAYERS = {
    "nn.functional.batch_norm", "nn.functional.conv1d", "nn.functional.conv2d", "nn.functional.conv3d",
    "nn.functional.conv_transpose1d", "nn.functional.conv_transpose2d", "nn.functional.conv_transpose3d",
    "nn.functional.embedding", "nn.functional.group_norm", "nn.functional.instance_norm", "nn.functional.layer_norm",
    "nn.functional.linear", "nn.functional.prelu", "nn.functional.rms_norm", "native_layer_norm",
}  # fmt: skip
UNDEFINED = {"empty", "new_empty", "empty_like"}


def operators() -> list[Any]:
    """The entries of torch's database that reach an overload of the table."""
    packets = {str(overload).split(".")[1] for overload in aten.FUNCTIONAL}
    found = []
    for op in op_db:
        if op.name.startswith(("sparse.", "masked.", "_refs")):
            continue
        short = op.name.split(".")[-1]
        known = short in packets or op.aten_name in packets or op.name in ALSO
        if known and torch.float32 in op.supported_dtypes("cpu") and op.name not in RANDOM | UNDEFINED:
            found.append(op)
    return found


class Calls(nn.Module):
    """Calls of one operator: the tensors among their arguments are inputs, or parameters where `is_input` says no."""

    def __init__(self, function: Any, trees: list[tuple[list[Any], Any]], is_input: list[bool]) -> None:
        super().__init__()
        self.function, self.trees, self.is_input = function, trees, is_input
        tensors = [leaf for leaves, _ in trees for leaf in leaves if isinstance(leaf, torch.Tensor)]
        held = [x for x, given in zip(tensors, is_input, strict=True) if not given]
        self.held = nn.ParameterList(nn.Parameter(x, requires_grad=False) for x in held)

    def forward(self, *tensors):
        given, held, results = iter(tensors), iter(self.held), []
        sources = iter(self.is_input)
        for leaves, spec in self.trees:
            filled = [
                (next(given) if next(sources) else next(held)) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in leaves
            ]
            arguments, options = pytree.tree_unflatten(filled, spec)
            result = self.function(*arguments, **options)
            results.append([y for y in pytree.tree_leaves(result) if isinstance(y, torch.Tensor)])
        return results


def inputs_of(op: Any, trees: list[tuple[list[Any], Any]]) -> list[bool]:
    """Which tensors are inputs: all, but the weights and statistics of layers."""
    found = []
    for leaves, _ in trees:
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if op.name == "nn.functional.embedding":
            found += [not x.is_floating_point() for x in tensors]
        else:
            found += [i == 0 or op.name not in LAYERS for i in range(len(tensors))]
    return found


def samples(op: Any, limit: int) -> Iterator[tuple[list[Any], Any]]:
    torch.manual_seed(0)
    for sample in islice(op.sample_inputs("cpu", torch.float32, requires_grad=False), limit):
        yield pytree.tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))


def outcome(op: Any, trees: list[tuple[list[Any], Any]]) -> tuple[str, str]:
    """(pass, refused, skipped or mismatch; the reason) of calls imported together."""
    tensors = [leaf for leaves, _ in trees for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(x.is_complex() or x.dtype == torch.float64 for x in tensors) or not tensors:
        return "skipped", "no float32 tensor"
    is_input = inputs_of(op, trees)
    module = Calls(op.op, trees, is_input)
    tensors = [x for x, given in zip(tensors, is_input, strict=True) if given]
    try:
        with torch.no_grad():
            expected = pytree.tree_leaves(module(*(x.clone() for x in tensors)))
    except Exception as error:
        return "skipped", f"torch itself: {error}"
    try:
        graph, params = from_torch(module, tuple(tensors), dynamic_batch=False)
        arrays = [jnp.asarray(x.to(torch.int32).numpy() if x.dtype in WHOLE else x.numpy()) for x in tensors]
        actual = evaluate_float(graph, params, *arrays)
    except ConversionError as error:
        return "refused", str(error)
    except InputError as error:
        return "skipped", str(error)
    for a, e in zip(actual, expected, strict=True):
        if not bool(torch.isfinite(e).all()) and e.dtype.is_floating_point:
            continue  # outside its domain: the functions of the chip are defined on finite numbers only
        wrong = difference(np.asarray(a), e.numpy(), 1e-4)
        if wrong:
            return "mismatch", wrong
    return "pass", ""


WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64)


def sweep(op: Any, limit: int) -> tuple[Counter[str], list[str]]:
    """Counts for one operator, and what is wrong or refused. Samples are imported together, and apart if that fails."""
    trees = list(samples(op, limit))
    together = outcome(op, trees) if trees else ("pass", "")
    if together[0] == "pass":
        return Counter({"pass": len(trees)}), []
    counts: Counter[str] = Counter()
    notes = []
    for tree in trees:
        kind, reason = outcome(op, [tree])
        counts[kind] += 1
        if kind != "pass":
            shown = [list(x.shape) if isinstance(x, torch.Tensor) else x for x in tree[0]]
            notes.append(f"{kind} {op.name} {op.variant_test_name} {shown}: {' '.join(reason.split())[:200]}")
    return counts, notes
