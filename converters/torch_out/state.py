"""State dicts out of trained plans, and into graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from jquant.graph.checks import check_params
from jquant.graph.float import value_shapes
from jquant.graph.passes import prune
from jquant.ops.batch_norm import BatchNorm
from jquant.ops.elementwise import Constant
from jquant.plan.fold import fold_batch_norm
from jquant.plan.scales import check_model
from jquant.types import Array, ConversionError, Graph, Model, Node, Params, Plan

from ..file_names import naming
from ..keys import is_part, view_of
from .prefixes import adapters, advice, without_prefix
from .unfold import Folded, unfold, unfold_alone

# ---------------------------------------------------------------------------------------------------------------------
# Out


def to_state_dict(
    model: Model, *, graph: Graph, original: Params, module: torch.nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """The weights of a model, float or trained, under the names and in the layout that the torch model has.

    Batch norm is unfolded again: its statistics and gamma stay, the weight before it is divided by what was folded in,
    and beta takes up the bias (`unfold` says what happens where gamma is 0). What training did not change comes back
    bit for bit. The state dict gives the float function of the model: logits differ by float rounding.

    Args:
      model: of `graph`, trained or not.
      graph: what `from_torch` returned.
      original: its parameters, as they were imported.
      module: the torch model. With it the result is its whole state dict, for `load_state_dict(..., strict=True)`:
        names that share a tensor agree, and what the graph does not read is as in the module. Without it the result
        holds what the graph reads.

    Raises:
      ConversionError: a parameter that several layers share and training moved apart, or one that has no place in the
        module's state dict.

    Example:
      >>> module.load_state_dict(to_state_dict(model, graph=graph, original=original, module=module))
      ... # doctest: +SKIP
    """
    check_params(graph, original)
    check_model(model, scales=False)
    found: dict[str, np.ndarray] = {}
    users: dict[str, str] = {}
    for user, values in _unfolded(model.plan, model.params, prune(graph), original):
        for key, value in values.items():
            if key in found and not np.array_equal(found[key], value):
                raise ConversionError(
                    f"{key!r} is one tensor in the module, read at {users[key]} and {user}, and folding or training "
                    "gave it different values there; freeze it, or give the module two"
                )
            found[key], users[key] = np.asarray(value), user
    return _in_module(found, original, module)


def _unfolded(plan: Plan, params: Params, graph: Graph, original: Params) -> list[tuple[str, Mapping[str, Any]]]:
    """(node, {key: value}) for everything that nodes of the imported graph read."""
    now, done = plan.graph.by_name, set()
    here = set(plan.graph.param_names)
    kept = {n.name for n in graph.nodes if isinstance(n.op, BatchNorm) and n.params["running_mean"] in here}
    shapes = value_shapes(graph, original)
    before_graph, before, into = fold_batch_norm(graph, original, shapes, dict.fromkeys(kept, "live"))
    norms: dict[str, list[Node]] = {}
    for norm, host in into.items():
        if norm not in kept:
            norms.setdefault(host, []).append(graph.by_name[norm])
    found: list[tuple[str, Mapping[str, Any]]] = []
    for host, folded in norms.items():
        layers = (before_graph.by_name[host], before), (now[host], params)
        pairs = [(p[n.params["weight"]], p[n.params["bias"]]) for n, p in layers]
        found.append((host, unfold(Folded(graph.by_name[host], folded, pairs[0], pairs[1]), original)))
        done |= {host, *(n.name for n in folded)}
    for node in graph.nodes:
        if node.name in done or not node.params:
            continue
        if isinstance(node.op, BatchNorm) and node.name not in kept:
            keys = now[node.name].params
            found.append((node.name, unfold_alone(node, params[keys["weight"]], params[keys["bias"]], original)))
        else:
            found.append((node.name, {k: params[k] if k in params else original[k] for k in node.params.values()}))
    return found


def _in_module(
    found: Mapping[str, np.ndarray], original: Params, module: torch.nn.Module | None
) -> dict[str, torch.Tensor]:
    if module is None:
        part = next((k for k in found if is_part(view_of(k))), None)
        if part is not None:
            raise ConversionError(f"{part!r} is a part of a parameter; pass module= to get the whole of it")
        return {key: _tensor(value) for key, value in found.items()}
    live = module.state_dict()
    state = {key: tensor.detach().clone().contiguous() for key, tensor in live.items()}
    names = _names_by_memory(live)
    for key, value in found.items():
        view = view_of(key)
        if view.source not in state:
            if np.array_equal(value, np.asarray(original[key])):
                continue  # a constant of the code, or a buffer that is not saved
            raise ConversionError(
                f"{key!r} was trained, and is no parameter in the module's state dict but a constant of its code, or a "
                f'weight that the import computed. Freeze it: jq.labels(model, freeze=["{key}"]), or take the norm out '
                "of the module before the import: torch.nn.utils.parametrize.remove_parametrizations"
            )
        for name in names.get(_memory(live[view.source]), (view.source,)):
            part = view.of(state[name])
            if part.shape != value.shape:
                raise ConversionError(f"{name!r} is {list(part.shape)} in the module, {list(value.shape)} in the graph")
            part.copy_(_tensor(value))
    return state


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _names_by_memory(state: Mapping[str, torch.Tensor]) -> dict[tuple[Any, ...], tuple[str, ...]]:
    """The names of each tensor: tied weights have several."""
    names: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for key, tensor in state.items():
        names[_memory(tensor)] = (*names.get(_memory(tensor), ()), key)
    return names


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# In


class Loaded(NamedTuple):
    """What `load_state_dict` returns, like torch's: the parameters, and the keys that did not fit."""

    params: dict[str, Array]
    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]


def load_state_dict(
    graph: Graph,
    params: Params,
    state: Mapping[str, Any] | str | os.PathLike[str],
    *,
    strict: bool = True,
    prefix: str = "",
    entry: str | Sequence[str] = (),
) -> Loaded:
    """The parameters of an imported graph with the values of another state dict of the same model.

    A graph holds what it reads of a model, and no more: parts of packed parameters (`in_proj_weight`) are read from the
    whole; `num_batches_tracked` belongs to none; constants of the model's code keep their values, and so does what the
    import computed from integer buffers.

    Args:
      graph: what `from_torch` returned, before `prepare`.
      params: its parameters; they say shapes, and stay where `strict=False` lets a key be missing.
      state: {key: tensor}, or the path of a file of such, read with `weights_only`.
      strict: missing and unexpected keys are an error; otherwise they are returned. A wrong shape always is one.
      prefix: what the checkpoint has in front of every key, such as "module." of DataParallel, "_orig_mod." of
        torch.compile or "model." of a trainer. Entries without it belong to another model, and are not read.
      entry: the key of the state dict in a checkpoint that holds more, such as "state_dict" of Lightning, mmengine and
        timm, or the keys on the way to it, such as ("ema", "module").

    Raises:
      ConversionError: what is missing, unexpected or of another shape, all at once, in torch's words; and the prefix or
        the entry of the checkpoint with which more keys fit. Adapters (LoRA) that are not merged into their weights.
      FormatError: a file that is not a state dict; of a class that stops the reading, two lines that take the weights
        out of it.
    """
    from ..files import inside, read_state_dict

    way = (entry,) if isinstance(entry, str) else tuple(entry)
    if not isinstance(state, Mapping):
        with naming(state):
            return load_state_dict(graph, params, read_state_dict(state, way), strict=strict, prefix=prefix)
    given: Mapping[str, Any] = inside(state, way, "the checkpoint")
    entries = without_prefix(given, prefix) if prefix else given
    loaded, missing, problems = dict(params), [], []
    for key in graph.param_names:
        view = view_of(key)
        if view.source not in entries:
            if not _is_of_the_code(graph, key):
                missing.append(view.source)
            continue
        try:
            loaded[key] = _read(entries[view.source], key, params[key].shape)
        except ConversionError as error:
            problems.append(str(error))
    known = {view_of(key).source for key in graph.param_names}
    _check_merged([key for key in adapters(entries) if key not in known])
    unexpected = [k for k in entries if k not in known and not str(k).endswith("num_batches_tracked")]
    missing = list(dict.fromkeys(missing))
    if strict and unexpected:
        problems.insert(0, f"Unexpected key(s) in state_dict: {', '.join(map(repr, unexpected))}.")
    if strict and missing:
        problems.insert(0, f"Missing key(s) in state_dict: {', '.join(map(repr, missing))}.")
    if strict and missing and (step := advice(_wanted(graph), given, prefix)):
        problems.append(step)
    if problems:
        raise ConversionError("Error(s) in loading state_dict for the graph:\n\t" + "\n\t".join(problems))
    return Loaded(loaded, tuple(missing), tuple(unexpected))


def _check_merged(keys: list[str]) -> None:
    """Low-rank adapters are a part of the weights: without them it would be another model."""
    if not keys:
        return
    named = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    raise ConversionError(
        f"the checkpoint holds adapters that are not merged into the weights ({named}). A weight with one is "
        "W + alpha / r * B @ A, and alpha is in adapter_config.json; merge them where PEFT is installed:\n"
        "  model = PeftModel.from_pretrained(base_model, folder).merge_and_unload()\n"
        "  torch.save(model.state_dict(), 'weights.pth')"
    )


def _wanted(graph: Graph) -> list[str]:
    """The keys that a checkpoint must have."""
    return list(dict.fromkeys(view_of(key).source for key in graph.param_names if not _is_of_the_code(graph, key)))


def _is_of_the_code(graph: Graph, key: str) -> bool:
    """A constant of the model's code has the name of its reader and a role; a parameter has the path of a module.

    A product by a vector is a batch norm without statistics: mean and variance stand for none.
    """
    owner = graph.by_name.get(key.rpartition(".")[0])
    if owner is not None and isinstance(owner.op, BatchNorm) and not owner.op.running:
        return key in (owner.params["running_mean"], owner.params["running_var"])
    node = graph.by_name.get(key)
    if node is None or not isinstance(node.op, Constant):
        return False
    return any(key.startswith(f"{reader.name}.") for reader in graph.consumers[node.name])


def _read(tensor: Any, key: str, shape: tuple[int, ...]) -> Array:
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex() or tensor.layout != torch.strided:
        raise ConversionError(f"{key!r} is no dense real tensor in the checkpoint.")
    part = view_of(key).of(tensor.detach().cpu().contiguous())
    if tuple(part.shape) != tuple(shape):
        raise ConversionError(
            f"size mismatch for {key}: copying a param with shape torch.Size({list(part.shape)}) from checkpoint, the "
            f"shape in current model is torch.Size({list(shape)})."
        )
    values = part.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ConversionError(f"{key!r} contains NaN or infinite values in the checkpoint.")
    return jax.device_put(values.numpy().copy())
