"""Every overload of the importer's table against torch: imported at one batch, compared at two."""

import jax
import numpy as np
import pytest
import torch
from support.aten_cases import CASES, GROUPS, Values, difference, example

from jquant.graph.float import evaluate_float
from jquant_converters import aten, from_torch, reader
from jquant_converters.aten import quantized


def compare(functions, batches=(1, 3), tolerance=1e-5):
    """Imports all functions as one module; returns the mismatches."""
    module = Values(functions).eval()
    graph, params = from_torch(module, example(2))
    found = []
    for batch in batches:
        inputs = example(batch, seed=batch)
        with torch.no_grad():
            expected = module(*inputs)
        names = [name for name, value in expected.items() for _ in torch.utils._pytree.tree_leaves(value)]
        used = {i.name: x for i, x in zip(graph.inputs, inputs, strict=True)}
        arrays = [x.to(torch.int32).numpy() if x.dtype == torch.int64 else x.numpy() for x in used.values()]
        actual = jax.jit(lambda *a: evaluate_float(graph, params, *a))(*map(jax.numpy.asarray, arrays))
        leaves = torch.utils._pytree.tree_leaves(expected)
        for name, a, e in zip(names, actual, leaves, strict=True):
            wrong = difference(np.asarray(a), e.detach().numpy(), tolerance)
            if wrong:
                found.append(f"{name} at batch {batch}: {wrong}")
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_overloads(group):
    assert compare(GROUPS[group]) == []


def test_every_overload_has_a_case():
    named = {name.split("/")[0] for name in CASES}
    pairs = set(quantized.TABLE)  # of quantization: `tests/foreign` reads them
    missing = sorted(str(k) for k in aten.FUNCTIONAL if str(k) not in named and k not in pairs)
    assert missing == ["aten.lift_fresh.default", "aten.lift_fresh_copy.default"]  # torch.export makes them itself
    assert len(aten.FUNCTIONAL) >= 120


def test_a_case_tests_its_overload(monkeypatch):
    """Each name is looked up in the table while its case is imported: torch has not turned it into another one."""
    seen = set()

    class Recorder(dict):
        def __getitem__(self, key):
            seen.add(str(key))
            return super().__getitem__(key)

    monkeypatch.setattr(reader, "TABLE", Recorder(aten.TABLE))
    for functions in GROUPS.values():
        from_torch(Values(functions).eval(), example(2))
    assert {name.split("/")[0] for name in CASES} - seen == set()
