"""flax on both sides: modules as functions of params, quantized functions as modules. Imported when used."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jquant.functions.kinds import Freeze, labels
from jquant.functions.quantized import QuantizedFunction, Variables
from jquant.types import InputError

Function = Callable[..., Any]


def from_linen(module: Any, variables: Mapping[str, Any], **options: Any) -> tuple[Function, Any]:
    """A linen module as `fn(params, *inputs)` and its params.

    The other collections, such as running statistics of batch norm, are constants of the function, except those that
    it is called with: `fn(params, x, batch_stats=variables["batch_stats"])`.

    Args:
      module: a `flax.linen.Module`.
      variables: what `module.init` returned, or trained ones, with a collection "params".
      **options: keyword arguments of the module, such as `train=False` or `deterministic=True`; `method` as well.
    """
    rest = {name: collection for name, collection in variables.items() if name != "params"}

    def fn(params: Any, *inputs: Any, **collections: Any) -> Any:
        return module.apply({"params": params, **rest, **collections}, *inputs, **options)

    return fn, variables["params"]


def from_nnx(model: Any) -> tuple[Function, Any]:
    """An nnx module in its evaluation mode as `fn(params, *inputs)`, and its `nnx.Param` state.

    All other state (running statistics, keys of dropout) is constant in the function, except statistics that it is
    called with: `fn(params, x, batch_stats=nnx.state(model, nnx.BatchStat))`. The module is left as it was.
    """
    from flax import nnx

    evaluated = nnx.clone(model)
    evaluated.eval()
    definition, params, own_stats, rest = nnx.split(evaluated, nnx.Param, nnx.BatchStat, ...)

    def fn(params: Any, *inputs: Any, batch_stats: Any = own_stats) -> Any:
        return nnx.merge(definition, params, batch_stats, rest, copy=True)(*inputs)

    return fn, params


def to_nnx(model: Any, params: Any, batch_stats: Any = None) -> Any:
    """A copy of an nnx module with other params, such as those of `QuantizedFunction.fake_quantized`.

    Args:
      model: an nnx module.
      params: its `nnx.Param` state.
      batch_stats: its `nnx.BatchStat` state, such as `variables["batch_stats"]` after training; None leaves it.
    """
    from flax import nnx

    copy = nnx.clone(model)
    nnx.update(copy, params, *([] if batch_stats is None else [batch_stats]))
    return copy


def module(function: QuantizedFunction, variables: Variables) -> Any:
    """A quantized function as an nnx module, whose leaves are `nnx.Param`, so that `nnx.Optimizer` trains it.

    Its state has the paths of the params, ("params", "conv", "kernel"), and the scales at ("qparams", "conv.kernel",
    "scale"): no mask by the last key takes one for a kernel. `module.labels(freeze=...)` are those of
    `jq.functions.labels` in the form of `nnx.state(module, nnx.Param)`, for `optax.multi_transform` and masks.

    Running statistics are `nnx.BatchStat`. As in `nnx.BatchNorm`, a call normalizes with the batch and moves them,
    until `module.eval()`. `module.variables()` are its variables again, for `lower` and `fake_quantized`.

    Raises:
      InputError: in a call, `switches`: what is observed becomes the scale behind the optimizer's step, which a module
        does not see. `QuantizedFunction.train` and `update` do it.
    """
    from flax import nnx

    stats, has_stats = variables.get("batch_stats"), "batch_stats" in variables
    scales = {name: {"scale": value} for name, value in variables["qparams"].items()}
    structures = {name: jax.tree.structure(variables[name]) for name in ("params", "batch_stats") if name in variables}
    paths = {name: _key_paths(variables[name]) for name in structures}

    class Quantized(nnx.Module):
        def __init__(self) -> None:
            self.params = nnx.data(_nested(paths["params"], map(nnx.Param, jax.tree.leaves(variables["params"]))))
            self.qparams = nnx.data(jax.tree.map(nnx.Param, scales))
            if has_stats:
                self.batch_stats = nnx.data(_nested(paths["batch_stats"], map(nnx.BatchStat, jax.tree.leaves(stats))))
            self.use_running_average = False

        def variables(self) -> Any:
            found: dict[str, Any] = {
                name: jax.tree.unflatten(structure, [leaf[...] for leaf in self._leaves(name)])
                for name, structure in structures.items()
            }
            return {**found, "qparams": {name: leaf["scale"][...] for name, leaf in self.qparams.items()}}

        def labels(self, *, freeze: Freeze = ()) -> Any:
            found = labels(function, self.variables(), freeze=freeze)
            own = zip(paths["params"], jax.tree.leaves(found["params"]), strict=True)
            flat = [(("params", *path), kind) for path, kind in own]
            return nnx.from_flat_state([*flat, *((("qparams", n, "scale"), k) for n, k in found["qparams"].items())])

        def __call__(self, *inputs: Any, **options: Any) -> Any:
            if self.use_running_average:
                return function(self.variables(), *inputs, **options)
            if options.get("switches") is not None:
                raise InputError(
                    "switches need qfn.train(variables, ..., switches=, step=) and qfn.update: an nnx module does not "
                    "see the optimizer's step, behind which observed scales are put in place"
                )
            outputs, batch_stats = function.train(self.variables(), *inputs, **options)
            if has_stats:
                for leaf, moved in zip(self._leaves("batch_stats"), jax.tree.leaves(batch_stats), strict=True):
                    leaf[...] = moved
            return outputs

        def _leaves(self, name: str) -> list[Any]:
            return [_at(getattr(self, name), path) for path in paths[name]]

    return Quantized()


_Path = tuple[str | int, ...]


def _key_paths(tree: Any) -> list[_Path]:
    """The path of every leaf, without the `value` of a Variable of nnx."""
    from flax import nnx

    found = []
    for path, _ in jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        keys = [getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path]
        found.append(tuple(key if isinstance(key, int) else str(key) for key in keys) or ("params",))
    return found


def _nested(paths: Iterable[_Path], leaves: Iterable[Any]) -> dict[str | int, Any]:
    """Dictionaries with a leaf at every path."""
    found: dict[str | int, Any] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        inner = found
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return found


def _at(tree: Any, path: _Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree
