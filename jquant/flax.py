"""flax on both sides: modules as functions of params, quantized functions as modules. Imported when used."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from jquant.functions.kinds import Freeze, labels
from jquant.functions.quantized import QuantizedFunction, Variables
from jquant.types import InputError

Function = Callable[..., Any]


def from_linen(
    module: Any, variables: Mapping[str, Any], *, dropout: bool = False, **options: Any
) -> tuple[Function, Any]:
    """A linen module as `fn(params, *inputs)` and its params.

    The other collections, such as running statistics of batch norm, are constants of the function, except those that
    it is called with: `fn(params, x, batch_stats=variables["batch_stats"])`.

    Args:
      module: a `flax.linen.Module`.
      variables: what `module.init` returned, or trained ones, with a collection "params".
      dropout: every `nn.Dropout` draws, also behind `train=False`, so that `jq.quantize` finds it, and
        `qfn.train(variables, x, rngs=key)` draws another mask in each step. It is for quantize: the function itself
        draws the same one at each call. Without it, what draws is what the options say, such as
        `deterministic=False, rngs={"dropout": key}` for a module of one's own with stochastic depth.
      **options: keyword arguments of the module, such as `train=False` or `deterministic=True`; `method` as well.

    Raises:
      InputError: in a call, with `dropout`: attention with a dropout that is off, where no module can turn it on.

    Example:
      fn, params = jq.flax.from_linen(net, variables, dropout=True, train=False)
      qfn, quantized = jq.quantize(fn, params, qconfig, batches)
      loss = lambda v, key: cross_entropy(qfn.train(v, x, rngs=key)[0], y)
    """
    rest = {name: collection for name, collection in variables.items() if name != "params"}
    if dropout:
        options = {"rngs": {"dropout": jax.random.key(0)}, **options}

    def fn(params: Any, *inputs: Any, **collections: Any) -> Any:
        with _dropout_on() if dropout else nullcontext():
            return module.apply({"params": params, **rest, **collections}, *inputs, **options)

    return fn, variables["params"]


def _dropout_on() -> Any:
    """In which every `nn.Dropout` of linen draws."""
    from flax import linen

    def drawn(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, linen.MultiHeadDotProductAttention) and module.dropout_rate > 0:
            deterministic = kwargs.get("deterministic")
            if module.deterministic if deterministic is None else deterministic:
                raise InputError(
                    f"{'.'.join(module.path)}: the dropout of attention is no module that dropout=True would turn on; "
                    "pass deterministic=False to from_linen, or make its dropout_rate 0"
                )
        if not isinstance(module, linen.Dropout) or not 0 < module.rate < 1:
            return call(*args, **kwargs)
        (x, keep) = (args[0] if args else kwargs["inputs"]), 1 - module.rate
        shape = tuple(1 if axis in _positive(module.broadcast_dims, x.ndim) else n for axis, n in enumerate(x.shape))
        mask = jax.random.bernoulli(module.make_rng(module.rng_collection), keep, shape)
        return jnp.where(mask, x / keep, jnp.zeros_like(x))

    return linen.intercept_methods(drawn)


def _positive(axes: Iterable[int], rank: int) -> set[int]:
    return {axis % rank for axis in axes}


def from_nnx(model: Any, *, dropout: bool = False) -> tuple[Function, Any]:
    """An nnx module in its evaluation mode as `fn(params, *inputs)`, and its `nnx.Param` state.

    All other state (running statistics, keys of dropout) is constant in the function, except statistics that it is
    called with: `fn(params, x, batch_stats=nnx.state(model, nnx.BatchStat))`. The module is left as it was.

    Args:
      model: an nnx module.
      dropout: `deterministic` is False in every submodule that has it, such as `nnx.Dropout` and attention, so that
        `jq.quantize` finds dropout, and `qfn.train(variables, x, rngs=key)` draws another mask in each step. It is for
        quantize: the function itself draws the same mask at each call.
    """
    from flax import nnx

    evaluated = nnx.clone(model)
    evaluated.eval()
    if dropout:
        evaluated.set_attributes(deterministic=False, raise_if_not_found=False)
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
    until `module.eval()`. Dropout draws from `module(x, rngs=...)`, a key or `nnx.Rngs`, and is off behind
    `module.eval()`. `module.variables()` are its variables again, for `lower` and `fake_quantized`.

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
            self.deterministic = False

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

        def __call__(self, *inputs: Any, rngs: Any = None, **options: Any) -> Any:
            if rngs is not None and not self.deterministic:
                options["rngs"] = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs
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
