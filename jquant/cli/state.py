"""The state file of the command line: a float graph, and what has been decided and learned about it so far.

Safetensors for the arrays; in its header, as versioned JSON, the graph, the qconfig and the march. A plan is not
stored: `prepare` makes it again from these. No pickle, and no code is run by reading a file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.cli.console import UsageError, replacing
from jquant.cli.settings import Settings, march_of
from jquant.ir.graph import validate
from jquant.ir.serialize import VERSION, decode, encode, read_versioned
from jquant.prepare import prepare
from jquant.qconfig import QConfig
from jquant.qconfig_file import qconfig_from_dict, qconfig_to_dict
from jquant.types import Array, FormatError, Graph, Plan, Target


@dataclass(frozen=True)
class State:
    """A model on its way to integers.

    `params`    of the float graph; `trained` of the plan's graph, if training changed them; `qparams` if calibrated
    """

    graph: Graph
    params: Mapping[str, Array]
    qconfig: QConfig | None = None
    target: Target | None = None
    qparams: Mapping[str, Array] | None = None
    trained: Mapping[str, Array] | None = None

    def prepared(self) -> tuple[Plan, dict[str, Array]]:
        """The plan, and the parameters of its graph.

        Raises:
          UsageError: no qconfig.
        """
        if self.qconfig is None or self.target is None:
            raise UsageError("the model has no qconfig yet: give one with --config FILE.toml")
        plan, params = prepare(self.graph, dict(self.params), self.qconfig, target=self.target)
        return plan, dict(self.trained) if self.trained is not None else params

    def calibrated(self) -> tuple[Plan, dict[str, Array], dict[str, Array]]:
        """The plan, its parameters and its scales.

        Raises:
          UsageError: no scales.
        """
        plan, params = self.prepared()
        if self.qparams is None:
            raise UsageError(
                "the model is not calibrated: run `jquant calibrate MODEL --config ... --data ... -o FILE`"
            )
        return plan, params, dict(self.qparams)

    def under(self, settings: Settings) -> "State":
        """The state under the qconfig of a file, if it has one: scales of another qconfig are dropped."""
        if settings.qconfig is None:
            return self
        same = self.qconfig == settings.qconfig and self.target == settings.march
        kept = self if same else replace(self, qparams=None, trained=None)
        return replace(kept, qconfig=settings.qconfig, target=settings.march)


def save_state(path: Path, state: State) -> None:
    """Writes a state, whole or not at all."""
    from safetensors.numpy import save_file

    groups = {"param": state.params, "scale": state.qparams or {}, "trained": state.trained or {}}
    arrays = {f"{kind}:{name}": np.asarray(v) for kind, found in groups.items() for name, v in found.items()}
    header = {
        "jquant": VERSION,
        "graph": encode(state.graph),
        "qconfig": None if state.qconfig is None else qconfig_to_dict(state.qconfig),
        "march": None if state.target is None else state.target.name,
        "calibrated": state.qparams is not None,
        "trained": state.trained is not None,
    }
    with replacing(path) as partial:
        # ascontiguousarray makes a scalar a vector; reshape brings its rank back
        contiguous = {k: np.ascontiguousarray(v).reshape(np.shape(v)) for k, v in arrays.items()}
        save_file(contiguous, partial, {"state": json.dumps(header)})


def read_header(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file: it has the key "program" or "state".

    Raises:
      FormatError: another kind of file. FileNotFoundError: none.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path}: neither a program nor a state: {error}") from error


def load_state(path: Path) -> State:
    """Reads what `save_state` wrote.

    Raises:
      FormatError: truncated, damaged, of another version, or no state. FileNotFoundError: no file.
    """
    from safetensors.numpy import load_file

    text = read_header(path).get("state", "")
    try:
        header = read_versioned(text)
        found: dict[str, dict[str, Any]] = {"param": {}, "scale": {}, "trained": {}}
        for key, array in load_file(path).items():
            kind, _, name = key.partition(":")
            if kind not in found or array.dtype != np.float32:
                raise FormatError(f"unexpected array {key!r} of dtype {array.dtype}")
            found[kind][name] = jnp.asarray(array)
        graph = validate(decode(Graph, header.get("graph"), "graph"), found["param"])
        qconfig, march = header.get("qconfig"), header.get("march")
        return State(
            graph,
            found["param"],
            None if qconfig is None else qconfig_from_dict(qconfig),
            None if march is None else march_of(str(march)),
            found["scale"] if header.get("calibrated") else None,
            found["trained"] if header.get("trained") else None,
        )
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
