"""The reference plays a board: it runs probes under a hidden march, and its values are the dumps."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import jquant as jq
from jquant.board.dumps import Declared, Dump, Dumps

DECLARED = Declared()


def hidden(seed: int) -> jq.Target:
    """A march with every field that a fit decides on at random, among the values that it knows of."""
    rng = random.Random(seed)
    while True:
        values = {field: rng.choice(list(known)) for field, known in jq.board.domains().items()}
        try:
            return jq.targets.NASH_E.with_fields({"name": f"hidden-{seed}", **values})
        except jq.QConfigError:  # two values that do not go together
            continue


def played(probe: jq.board.Probe, march: jq.Target) -> dict[str, np.ndarray]:
    """All values as the reference makes them; none where the march has no form for the probe."""
    model = probe.model.replace(plan=replace(probe.model.plan, target=march))
    try:
        program = jq.lower(model)
    except jq.LoweringError:
        return {}
    return jq.reference.run(program, *(probe.inputs[entry.name] for entry in probe.graph.inputs))[1]


def dumps_of(values: Mapping[str, np.ndarray]) -> Dumps:
    return Dumps({name: Dump(value, Path(f"{name}.npy"), DECLARED) for name, value in values.items()})


def board_of(march: jq.Target, probes: Sequence[jq.board.Probe]) -> dict[str, Dumps]:
    """What a board of the march dumps for the probes."""
    found = {probe.name: played(probe, march) for probe in probes}
    return {name: dumps_of(values) for name, values in found.items() if values}


def write(folder: Path, march: jq.Target, probes: Sequence[jq.board.Probe]) -> None:
    """The same as files, a folder for each probe."""
    for probe in probes:
        if values := played(probe, march):
            (folder / probe.name).mkdir(parents=True)
            for name, value in values.items():
                np.save(folder / probe.name / f"{name}.npy", value.astype(np.int32))
