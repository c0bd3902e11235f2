"""The state file of the command line: a float graph, and what has been decided and learned about it so far.

Safetensors for the arrays; in its header, as versioned JSON, the graph, the qconfig and the march; and a digest of all
that. A plan is not stored: `prepare` makes it again from these. No pickle, and no code is run by reading a file.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant import targets
from jquant.cli.console import UsageError, replacing
from jquant.cli.settings import ImageSettings, Settings, image_from, joined_image, march_of
from jquant.config.files import qconfig_from_dict, qconfig_to_dict
from jquant.config.qconfig import QConfig
from jquant.graph.checks import validate
from jquant.graph.sealed import VERSION, read_sealed_arrays, read_versioned, refusing, sealed_arrays, short
from jquant.graph.serialize import decode, encode
from jquant.plan.files import load as load_model
from jquant.plan.files import save as save_model
from jquant.plan.prepare import prepare
from jquant.types import Array, FormatError, Graph, Model, Target

NO_QCONFIG = (
    "the model has no qconfig yet: give one with --config FILE.toml; `jquant init -o FILE.toml` writes one with int8 "
    "everywhere, to begin with"
)

_HEADER = {"jquant", "graph", "qconfig", "march", "calibrated", "trained", "image"}


@dataclass(frozen=True)
class State:
    """A model on its way to integers.

    `params`    of the float graph; `trained` of the plan's graph, if training changed them; `qparams` if calibrated
    `image`     how pictures become its inputs, where that was said or used
    `model`     prepared in Python and written by `jq.plan.save`: graph, params and qparams are those of it then
    """

    graph: Graph
    params: Mapping[str, Array]
    qconfig: QConfig | None = None
    target: Target | None = None
    qparams: Mapping[str, Array] | None = None
    trained: Mapping[str, Array] | None = None
    image: ImageSettings | None = None
    model: Model | None = None

    @classmethod
    def of_model(cls, model: Model, image: ImageSettings | None = None) -> "State":
        """A model that was prepared in Python."""
        plan = model.plan
        return cls(
            plan.graph, model.params, target=plan.target, qparams=model.qparams or None, image=image, model=model
        )

    @property
    def is_planned(self) -> bool:
        """Whether it is known what is quantized."""
        return self.qconfig is not None or self.model is not None

    def prepared(self) -> Model:
        """The model, with the scales that there are.

        Raises:
          UsageError: no qconfig. FormatError: parameters or scales that do not belong to the model.
        """
        if self.model is not None:
            return self.model
        if self.qconfig is None or self.target is None:
            raise UsageError(NO_QCONFIG)
        model = prepare(self.graph, dict(self.params), self.qconfig, target=self.target)
        _check_names("trained", self.trained, model.params)
        _check_names("scale", self.qparams, model.plan.trained)
        params = model.params if self.trained is None else dict(self.trained)
        return model.replace(params=params, qparams=dict(self.qparams or {}))

    def calibrated(self) -> Model:
        """The model with its scales.

        Raises:
          UsageError: no scales.
        """
        model = self.prepared()
        if self.qparams is None:
            config = "" if self.model is not None else "--config ... "
            raise UsageError(f"the model is not calibrated: run `jquant calibrate MODEL {config}--data ... -o FILE`")
        return model

    def with_model(self, model: Model, *, trained: bool) -> "State":
        """The state with the scales of a model and, where it was trained, its parameters."""
        if self.model is not None:
            return State.of_model(model, self.image)
        return replace(self, qparams=model.qparams, trained=model.params if trained else self.trained)

    def under(self, settings: Settings, source: str = "the model") -> "State":
        """The state under the qconfig of a file, if it has one: scales of another qconfig are dropped.

        Raises:
          FormatError: another preprocessing of pictures than the state was made with. UsageError: a qconfig for a model
          that was prepared in Python.
        """
        kept = replace(self, image=joined_image(self.image, settings, source))
        if settings.qconfig is None:
            return kept
        if self.model is not None:
            raise UsageError(
                f"{source} was prepared in Python and saved by jq.plan.save: what is quantized is decided there. Leave "
                "the qconfig out of the settings, or prepare the float model with another one"
            )
        same = self.qconfig == settings.qconfig and self.target == settings.march
        kept = kept if same else replace(kept, qparams=None, trained=None)
        return replace(kept, qconfig=settings.qconfig, target=settings.march)


def _check_names(kind: str, found: Mapping[str, Array] | None, wanted: Collection[str]) -> None:
    """Raises FormatError where a state has other arrays of a kind than its model."""
    if found is None or found.keys() == set(wanted):
        return
    name = min(found.keys() ^ set(wanted))
    what = "is not there" if name in wanted else "does not belong to the model"
    raise FormatError(f"the state does not fit its own graph and qconfig: array {short(f'{kind}:{name}')} {what}")


def save_state(path: Path, state: State) -> None:
    """Writes a state, whole or not at all. Parameters of no node are left out."""
    if state.model is not None:
        save_model(path, state.model, metadata=image_metadata(state))
        return
    names = set(state.graph.param_names)
    params = {name: value for name, value in state.params.items() if name in names}
    groups = {"param": params, "scale": state.qparams or {}, "trained": state.trained or {}}
    arrays = {f"{kind}:{name}": np.asarray(v) for kind, found in groups.items() for name, v in found.items()}
    header = {
        "jquant": VERSION,
        "graph": encode(state.graph),
        "qconfig": None if state.qconfig is None else qconfig_to_dict(state.qconfig),
        "march": None if state.target is None else _march_data(state.target),
        "calibrated": state.qparams is not None,
        "trained": state.trained is not None,
        "image": None if state.image is None else encode(state.image),
    }
    content = sealed_arrays(arrays, {"state": json.dumps(header)})
    with replacing(path) as partial:
        partial.write_bytes(content)


def _march_data(target: Target) -> str | dict[str, Any]:
    """The name of a march of jquant, or all the fields of another."""
    return target.name if targets.MARCHES.get(target.name) == target else targets.to_dict(target)


def _march_from(data: Any) -> Target | None:
    if data is None:
        return None
    return targets.from_dict(data) if isinstance(data, dict) else march_of(str(data))


def read_header(path: Path) -> Mapping[str, str]:
    """The metadata of a file of this tool: it has the key "program", "state" or "model".

    Raises:
      FormatError: another kind of file, or a damaged one. FileNotFoundError: none.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        metadata, arrays = read_sealed_arrays(path)
    except FormatError as error:
        raise FormatError(
            f"{path}: not a program (.jq) nor a state (.jqs) of jquant, or a damaged one: {error}; a model may be "
            ".pt2, .onnx or module:function as well"
        ) from error
    return metadata, arrays


def load_state(path: Path) -> State:
    """Reads what `save_state` wrote, or a model that `jq.plan.save` wrote.

    Raises:
      FormatError: truncated, damaged, of another version, or no state. FileNotFoundError: no file.
    """
    metadata, arrays = _read(path)
    if "model" in metadata:
        return State.of_model(load_model(path), program_image(path))
    with refusing(path):
        if "state" not in metadata:
            raise FormatError(f"no state: the file holds {', '.join(map(short, metadata)) or 'arrays alone'}")
        return _assemble(read_versioned(metadata["state"]), _by_kind(arrays))


def _by_kind(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Array]]:
    """Parameters, scales and trained parameters by their names in the file."""
    found: dict[str, dict[str, Array]] = {"param": {}, "scale": {}, "trained": {}}
    for key, array in arrays.items():
        kind, _, name = key.partition(":")
        if kind not in found or array.dtype != np.float32:
            raise FormatError(f"unexpected array {short(key)} of dtype {array.dtype}")
        if not np.isfinite(array).all():
            raise FormatError(f"array {short(key)} contains NaN or infinite values")
        found[kind][name] = jnp.asarray(array)
    return found


def _assemble(header: Mapping[str, Any], found: Mapping[str, Mapping[str, Array]]) -> State:
    if odd := (header.keys() ^ _HEADER) - {"calibrated", "trained"}:
        raise FormatError(f"the header {'lacks' if min(odd) in _HEADER else 'has an unknown'} {short(min(odd))}")
    graph = decode(Graph, header.get("graph"), "graph")
    validate(graph, found["param"])
    if unknown := found["param"].keys() - set(graph.param_names):
        raise FormatError(f"array {short(f'param:{min(unknown)}')} is a parameter of no node")
    for kind, flag in (("scale", "calibrated"), ("trained", "trained")):
        if not isinstance(header.get(flag), bool):
            raise FormatError(f"{flag}: expected true or false, found {short(header.get(flag))}")
        if found[kind] and not header[flag]:
            raise FormatError(f"unexpected array {short(f'{kind}:{min(found[kind])}')}: the state is not {flag}")
    qconfig, march, image = (header.get(key) for key in ("qconfig", "march", "image"))
    return State(
        graph,
        found["param"],
        None if qconfig is None else qconfig_from_dict(qconfig),
        _march_from(march),
        found["scale"] if header["calibrated"] else None,
        found["trained"] if header["trained"] else None,
        None if image is None else image_from(image),
    )


def image_metadata(state: State) -> dict[str, str]:
    """The preprocessing of a state for the header of a program file."""
    return {} if state.image is None else {"image": json.dumps(encode(state.image))}


def program_image(path: Path) -> ImageSettings | None:
    """The preprocessing that a program file was written with.

    Raises:
      FormatError: a damaged entry.
    """
    text = read_header(path).get("image")
    with refusing(path):
        return None if text is None else image_from(json.loads(text))
