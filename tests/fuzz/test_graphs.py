"""Random graphs over every operator; `make fuzz` draws thousands, and a hundred of them are drawn each time."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support import any_graphs
from support.properties import check, check_json, check_split

import jquant as jq
from jquant.graph.checks import validate
from jquant.graph.loops import LEAST_STEPS, find_loops


def test_every_operator_is_drawn() -> None:
    """A new operator has a case of conformance, and with it a place here."""
    assert not any_graphs.missing()


def test_each_operator_makes_a_graph() -> None:
    """Each stands in a graph of its own that is valid, by the first of its cases that fits."""
    for i, name in enumerate(any_graphs.cases()):
        made: set[str] = set()
        for chosen in range(3):
            draft = any_graphs.Draft()
            if name not in made and any_graphs.add_step(draft, (i, chosen, 1)):
                made |= {type(node.op).__name__ for node in draft.nodes}
                validate(jq.Graph(tuple(draft.inputs), tuple(draft.nodes), (draft.nodes[-1].name,)), draft.params)
        assert name in made


@pytest.mark.parametrize("seed", [0, 2])
def test_a_loop_is_evaluated_as_one(seed: int) -> None:
    """Seven steps and more; its values are those of the steps one after the other, and so are its integers."""
    steps = [(len(any_graphs.cases()), 0, seed)]
    drawn = any_graphs.build(steps)
    assert drawn is not None
    count = sum(isinstance(node.op, jq.ops.IndexSelect) for node in drawn.graph.nodes)
    loops = find_loops(drawn.graph, lambda node: (node.op, node.params))
    assert (len(loops) == 1) == (count > LEAST_STEPS)
    assert check(steps).endswith("integers")


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
@given(any_graphs.any_networks())
def test_floats(steps: list[any_graphs.Step]) -> None:
    drawn = any_graphs.build(steps)
    if drawn is not None:
        check_json(drawn)
        check_split(drawn)


@pytest.mark.parametrize("seed", range(100))
@pytest.mark.filterwarnings("ignore::jquant.types.OutlierWarning", "ignore::jquant.calibration.tables.TableWarning")
def test_every_property(seed: int) -> None:
    """Of the graphs of `make fuzz` the first hundred."""
    found = check(any_graphs.steps_of(seed))
    assert found.startswith("JSON, split, ONNX, torch, ")
    assert found.endswith("integers") or "refused: " in found


def test_a_failure_is_made_smaller_and_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("fuzz_graphs", Path(__file__).parent / "graphs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def outcome(steps: list) -> tuple[str, str]:
        return ("failed" if (2, 2, 2) in steps and (4, 4, 4) in steps else "checked"), ""

    monkeypatch.setattr(module, "outcome", outcome)
    assert module.smaller([(i, i, i) for i in range(5)]) == [(2, 2, 2), (4, 4, 4)]
    assert compile(module.SCRIPT.format(name="x.py", steps=[(1, 2, 3)]), "x.py", "exec")
