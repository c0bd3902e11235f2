"""flax on both sides: modules as functions of params, quantized functions as modules. Imported when used."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

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

    Running statistics are `nnx.BatchStat`. As in `nnx.BatchNorm`, a call normalizes with the batch and moves them,
    until `module.eval()`. `module.variables()` are its variables again, for `lower` and `fake_quantized`.

    Raises:
      InputError: in a call, `switches`: what is observed becomes the scale behind the optimizer's step, which a module
        does not see. `QuantizedFunction.train` and `update` do it.
    """
    from flax import nnx

    trained = {name: tree for name, tree in variables.items() if name != "batch_stats"}
    leaves, structure = jax.tree.flatten(trained)
    own_stats, stats_structure = jax.tree.flatten(variables.get("batch_stats"))

    class Quantized(nnx.Module):
        def __init__(self) -> None:
            self.leaves = nnx.List([nnx.Param(leaf) for leaf in leaves])
            self.batch_stats = nnx.List([nnx.BatchStat(leaf) for leaf in own_stats])
            self.use_running_average = False

        def variables(self) -> Any:
            found = jax.tree.unflatten(structure, [leaf[...] for leaf in self.leaves])
            stats = jax.tree.unflatten(stats_structure, [leaf[...] for leaf in self.batch_stats])
            return found if stats is None else {**found, "batch_stats": stats}

        def __call__(self, *inputs: Any, **options: Any) -> Any:
            if self.use_running_average:
                return function(self.variables(), *inputs, **options)
            if options.get("switches") is not None:
                raise InputError(
                    "switches need qfn.train(variables, ..., switches=, step=) and qfn.update: an nnx module does not "
                    "see the optimizer's step, behind which observed scales are put in place"
                )
            outputs, batch_stats = function.train(self.variables(), *inputs, **options)
            for leaf, moved in zip(self.batch_stats, jax.tree.leaves(batch_stats), strict=True):
                leaf[...] = moved
            return outputs

    return Quantized()
