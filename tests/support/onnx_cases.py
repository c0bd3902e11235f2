"""The node cases of the onnx package, imported and evaluated: pass, refused or mismatch."""

import warnings
from collections import Counter
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx

import jquant as jq
from jquant.graph.float import evaluate_float
from jquant_converters import from_onnx
from jquant_converters.onnx_in import FOLDS, TABLE

QUANTIZED = ("QuantizeLinear", "DequantizeLinear")
INTEGERS = ("int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
# float32 functions that differ in their last bits, sums in another order; `Resize` and the samplers compute coordinates
# in another order too. 1e-4: some expected values are written with four digits.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@lru_cache(maxsize=1)
def node_cases() -> tuple[Any, ...]:
    """Every case of one node whose operator is in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns while the cases of other operators are made
        from onnx.backend.test.case.node import collect_testcases

        found = [case for case in collect_testcases("") if len(case.model.graph.node) == 1]
    return tuple(c for c in found if (c.model.graph.node[0].op_type in TABLE or folded(c)) and of_tensors(c))


def of_tensors(case: Any) -> bool:
    """Sequences and optional values are no tensors."""
    values = [*case.model.graph.input, *case.model.graph.output]
    return all(v.type.HasField("tensor_type") for v in values)


def folded(case: Any) -> bool:
    return case.model.graph.node[0].op_type in {*FOLDS, "Shape", "Size"}


def arrays(values: Any) -> list[np.ndarray]:
    to_array = onnx.numpy_helper.to_array
    found = [to_array(v) if isinstance(v, onnx.TensorProto) else np.asarray(v) for v in values]
    return [a.astype(np.float32) if a.dtype == np.float64 else a for a in found]


def at_opset_21(model: onnx.ModelProto) -> onnx.ModelProto:
    """The case with an opset that is read. Newer ones add types to these operators, and no other meaning; the oldest
    cases are of operators that have not changed since. float64 becomes float32."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for entry in copy.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(10, min(entry.version, 21))
    for value in [*copy.graph.input, *copy.graph.output]:
        if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return copy


def with_constants(model: onnx.ModelProto, inputs: list[np.ndarray], fixed: set[int]) -> onnx.ModelProto:
    """The model with some inputs as initializers: shapes, axes, bounds and weights are constants in real models."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    entries = list(copy.graph.input)
    del copy.graph.input[:]
    for i, entry in enumerate(entries):
        if i in fixed:
            copy.graph.initializer.append(onnx.numpy_helper.from_array(inputs[i], entry.name))
        else:
            copy.graph.input.append(entry)
    return copy


def given(array: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(array.astype(np.int32) if str(array.dtype) in INTEGERS else array)


def attempts(count: int) -> list[set[int]]:
    """Which of the inputs to fix: none, all but the first, all but another one, all."""
    tries = [set(), *({*range(count)} - {i} for i in range(count)), {*range(2, count)}, {*range(count)}]
    return list({tuple(sorted(t)): t for t in tries}.values())


def outcome(case: Any) -> tuple[str, str]:
    """(pass, refused or mismatch; why) of a case. Results that no operator makes (masks, positions) are left out."""
    given_inputs, expected = (arrays(s) for s in case.data_sets[0])
    model = at_opset_21(case.model)
    reason = ""
    for results in (len(expected), 1):
        del model.graph.output[results:]
        for fixed in attempts(len(given_inputs)):
            try:
                graph, params = from_onnx(with_constants(model, given_inputs, fixed))
            except jq.ConversionError as error:
                first = not reason or fixed == {*range(1, len(given_inputs))}
                reason = " ".join(str(error).split())[:300] if first else reason
                continue
            left = [given(x) for i, x in enumerate(given_inputs) if i not in fixed]
            try:
                actual = evaluate_float(graph, params, *left)
            except jq.InputError as error:  # values that are not finite
                return "refused", str(error)
            pairs = zip(actual, expected[:results], strict=True)
            wrong = next((w for a, e in pairs if (w := difference(np.asarray(a), e))), "")
            return ("mismatch", wrong) if wrong else ("pass", "")
    return "refused", reason


def difference(actual: np.ndarray, expected: np.ndarray) -> str:
    if actual.shape != expected.shape:
        return f"shape {actual.shape}, expected {expected.shape}"
    if expected.dtype == np.float32:
        if not np.isfinite(expected).all():
            return ""  # outside its domain: the functions of the chip are defined on finite numbers only
        close = np.allclose(actual, expected, **TOLERANCE)
        return "" if close else f"{np.abs(actual - expected).max()} apart"
    same = str(actual.dtype) == ("int32" if str(expected.dtype) in INTEGERS else str(expected.dtype))
    equal = same and np.array_equal(actual.astype(np.int64), expected.astype(np.int64))
    return "" if equal else f"{actual.dtype} and {expected.dtype} differ"


def sweep() -> tuple[Counter[str], dict[str, list[str]], dict[str, Counter[str]]]:
    """Counts, the names with reasons by outcome, and the counts of each operator."""
    counts: Counter[str] = Counter()
    notes: dict[str, list[str]] = {"mismatch": [], "refused": []}
    by_operator: dict[str, Counter[str]] = {}
    for case in node_cases():
        kind = case.model.graph.node[0].op_type
        if kind in QUANTIZED:
            continue
        found, why = outcome(case)
        counts[found] += 1
        by_operator.setdefault(kind, Counter())[found] += 1
        if found in notes:
            notes[found].append(f"{case.name}: {why}")
    return counts, notes, by_operator


if __name__ == "__main__":
    totals, listed, operators = sweep()
    print(dict(totals), "of", len(operators), "operators")
    for kind in sorted(operators):
        print(f"  {kind}: {dict(operators[kind])}")
    for outcome_name, lines in listed.items():
        print(f"\n{outcome_name}:", *lines, sep="\n  ")
