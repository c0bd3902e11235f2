"""What holds of every graph: one check a property. An error of jquant that refuses a graph is no failure."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from support.any_graphs import Drawn, Step, build

import jquant as jq
from jquant.types import JQuantError

REFUSALS = (JQuantError,)


def check(steps: list[Step]) -> str:
    """All properties of a graph; "" where no step fits, else what was checked. Raises Refused or AssertionError."""
    drawn = build(steps)
    if drawn is None:
        return ""
    checked = []
    for name, property_of in PROPERTIES.items():
        property_of(drawn)
        checked.append(name)
    return ", ".join([*checked, *check_integers(drawn)])


def close(a: Any, b: Any, allowed: Any, what: str) -> None:
    """Floats that are within what is allowed of each other, where both are finite."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, what
    both = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(both, a, 0.0), np.where(both, b, 0.0)
    np.testing.assert_array_less(np.abs(a - b), np.where(both, allowed, 1.0), err_msg=what)


def tolerance(drawn: Drawn, x: tuple[Any, ...], outputs: tuple[Any, ...]) -> list[np.ndarray]:
    """For each output how far rounding may move it: thirty times what 2^-20 of the inputs moves it, and 2^-16 of it."""
    allowed = [np.zeros(np.shape(y)) for y in outputs]
    for sign in (1.0, -1.0):
        moved = tuple(a * np.float32(1 + sign * 2.0**-20) if a.dtype == np.float32 else a for a in x)
        params = {k: v * np.float32(1 + sign * 2.0**-20) for k, v in drawn.params.items()}
        for i, y in enumerate(jq.graph.evaluate_float(drawn.graph, params, *moved)):
            with np.errstate(invalid="ignore"):  # infinite ones
                difference = np.abs(np.asarray(y, np.float64) - np.asarray(outputs[i], np.float64))
            allowed[i] = np.maximum(allowed[i], np.where(np.isfinite(difference), difference, np.inf))
    largest = [np.abs(np.nan_to_num(np.asarray(y, np.float64))).max(initial=0.0) for y in outputs]
    return [30 * a + 2.0**-16 * (1 + most) for a, most in zip(allowed, largest, strict=True)]


def is_smooth(allowed: list[np.ndarray], outputs: tuple[Any, ...]) -> bool:
    """Whether a small change of the inputs changes the outputs little; not so at ties, jumps and overflows."""
    return all(
        np.asarray(y).dtype == np.float32
        and bool(np.isfinite(np.asarray(y)).all() and (a < 1e-2 * (1 + np.abs(np.asarray(y)).max(initial=0.0))).all())
        for a, y in zip(allowed, outputs, strict=True)
    )


def by_example(drawn: Drawn) -> bool:
    """Whether an example depends on no other; boxes of RoiAlign lie on the first image, or on the one they name."""
    return not any(isinstance(node.op, jq.ops.RoiAlign) for node in drawn.graph.nodes)


def check_json(drawn: Drawn) -> None:
    """A graph comes back from its JSON."""
    assert jq.graph.graph_from_json(jq.graph.graph_to_json(drawn.graph)) == drawn.graph


def check_split(drawn: Drawn) -> None:
    """An example alone is what it is in its batch."""
    x = drawn.inputs[0]
    whole = jq.graph.evaluate_float(drawn.graph, drawn.params, *x)
    allowed = tolerance(drawn, x, whole)
    if not (is_smooth(allowed, whole) and by_example(drawn)):
        return
    for i in range(2):
        alone = jq.graph.evaluate_float(drawn.graph, drawn.params, *(a[i : i + 1] for a in x))
        for a, b, most in zip(alone, whole, allowed, strict=True):
            close(a, b[i : i + 1], most[i : i + 1], "an example alone")


def read_back(reader: Callable[..., Any], *given: Any) -> Any:
    """What a reader makes of what was written; None where integers may leave 32 bits: it knows no bound of indices."""
    try:
        return reader(*given)
    except jq.ConversionError as error:
        if "and integers have 32 bits here" not in str(error):
            raise
        return None


def check_onnx(drawn: Drawn) -> None:
    """What ONNX can say comes back from it with the same meaning."""
    from jquant_converters import from_onnx, to_onnx

    try:
        content = to_onnx(drawn.graph, drawn.params).SerializeToString()
    except JQuantError:
        return
    found = read_back(from_onnx, content)
    if found is None:
        return
    (graph, params), x = found, drawn.inputs[0]
    whole = jq.graph.evaluate_float(drawn.graph, drawn.params, *x)
    allowed = tolerance(drawn, x, whole)
    if is_smooth(allowed, whole):
        for a, b, most in zip(jq.graph.evaluate_float(graph, params, *x), whole, allowed, strict=True):
            close(a, b, most, "through ONNX")


def check_torch(drawn: Drawn) -> None:
    """What torch can say comes back from it with the same meaning."""
    import torch

    from jquant_converters import from_torch, to_torch

    try:
        module = to_torch(drawn.graph, drawn.params)
    except JQuantError:
        return
    x = drawn.inputs[0]
    found = read_back(from_torch, module, tuple(torch.from_numpy(np.array(a)) for a in x))
    if found is None:
        return
    graph, params = found
    whole = jq.graph.evaluate_float(drawn.graph, drawn.params, *x)
    allowed = tolerance(drawn, x, whole)
    if is_smooth(allowed, whole):
        for a, b, most in zip(jq.graph.evaluate_float(graph, params, *x), whole, allowed, strict=True):
            close(a, b, most, "through torch")


PROPERTIES: dict[str, Callable[[Drawn], None]] = {
    "JSON": check_json, "split": check_split, "ONNX": check_onnx, "torch": check_torch,
}  # fmt: skip


def check_integers(drawn: Drawn) -> list[str]:
    """Float of the plan, and every meaning of the integers: jit, reference, batch, vmap, a file."""
    try:
        options = {"target": drawn.target, "batch_norm": drawn.batch_norm, "strict": False}
        model = jq.prepare(drawn.graph, drawn.params, drawn.qconfig, **options)
        model = jq.calibrate(model, list(drawn.inputs[:2])) if model.plan.trained else model
    except REFUSALS as error:
        return [f"refused: {error}"]
    x = drawn.inputs[2]
    check_plan_in_float(drawn, model, x)
    try:
        program = jq.lower(model)
    except REFUSALS as error:
        return ["plan", f"refused: {error}"]
    check_reference(program, x)
    check_run(model, program, x, alone=by_example(drawn))
    return ["plan", "integers"]


def check_plan_in_float(drawn: Drawn, model: jq.Model, x: tuple[Any, ...]) -> None:
    """Fake-quant off is the float model."""
    whole = jq.graph.evaluate_float(drawn.graph, drawn.params, *x)
    allowed = tolerance(drawn, x, whole)
    if is_smooth(allowed, whole):
        found = jq.apply(model, *x, mode="float")
        found = found if isinstance(found, tuple) else (found,)
        for a, b, most in zip(found, whole, allowed, strict=True):
            close(a, b, most, "fake-quant off")


def check_reference(program: jq.Program, x: tuple[Any, ...]) -> None:
    """Every integer is that of the numpy reference."""
    fast = jq.run_with_taps(program, *x)
    _, slow = jq.reference.run(program, *map(np.asarray, x))
    for name in program.graph.values:
        np.testing.assert_array_equal(np.asarray(fast[name]), slow[name], err_msg=f"{name}: run and reference")


def check_run(model: jq.Model, program: jq.Program, x: tuple[Any, ...], alone: bool) -> None:
    """Outputs are the same in bit_true, in jit, from a file, and for an example `alone` or under vmap."""
    whole = _tuple(jq.run(program, *x))
    others = {"bit_true": _tuple(jq.apply(model, *x, mode="bit_true"))}
    if alone and len(program.graph.nodes) % 2:  # one of the two, for each compiles a program of its own
        mapped = jax.vmap(lambda *one: jq.run(program, *(a[None] for a in one)))(*x)
        others["vmap"] = tuple(a[:, 0] for a in _tuple(mapped))
    elif alone:
        single = [_tuple(jq.run(program, *(a[i : i + 1] for a in x))) for i in range(len(x[0]))]
        others["split"] = tuple(np.concatenate(parts) for parts in zip(*single, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        jq.save(Path(folder) / "program.jq", program)
        again = jq.load(Path(folder) / "program.jq")
    assert str(again) == str(program)
    others["file"] = _tuple(jq.run(again, *x))
    for what, found in others.items():
        for a, b in zip(found, whole, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=what)


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
