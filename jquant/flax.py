"""flax on both sides: modules as functions of params, quantized functions as modules. Imported when used."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jquant.quantize import QuantizedFunction, Variables

Function = Callable[..., Any]


def from_linen(module: Any, variables: Mapping[str, Any], **options: Any) -> tuple[Function, Any]:
    """A linen module as `fn(params, *inputs)` and its params.

    The other collections, such as running statistics of batch norm, are constants of the function.

    Args:
      module: a `flax.linen.Module`.
      variables: what `module.init` returned, or trained ones, with a collection "params".
      **options: keyword arguments of the module, such as `train=False` or `deterministic=True`; `method` as well.
    """
    rest = {name: collection for name, collection in variables.items() if name != "params"}

    def fn(params: Any, *inputs: Any) -> Any:
        return module.apply({"params": params, **rest}, *inputs, **options)

    return fn, variables["params"]


def from_nnx(model: Any) -> tuple[Function, Any]:
    """An nnx module in its evaluation mode as `fn(params, *inputs)`, and its `nnx.Param` state.

    All other state (running statistics, keys of dropout) is constant in the function. The module is left as it was.
    """
    from flax import nnx

    evaluated = nnx.clone(model)
    evaluated.eval()
    definition, params, rest = nnx.split(evaluated, nnx.Param, ...)

    def fn(params: Any, *inputs: Any) -> Any:
        return nnx.merge(definition, params, rest)(*inputs)

    return fn, params


def to_nnx(model: Any, params: Any) -> Any:
    """A copy of an nnx module with other params, such as those of `QuantizedFunction.fake_quantized`."""
    from flax import nnx

    copy = nnx.clone(model)
    nnx.update(copy, params)
    return copy


def module(function: QuantizedFunction, variables: Variables) -> Any:
    """A quantized function as an nnx module, whose leaves are `nnx.Param`, so that `nnx.Optimizer` trains it.

    `module.variables()` are its variables again, for `lower` and `fake_quantized`.
    """
    from flax import nnx

    leaves, structure = jax.tree.flatten(dict(variables))

    class Quantized(nnx.Module):
        def __init__(self) -> None:
            self.leaves = nnx.List([nnx.Param(leaf) for leaf in leaves])

        def variables(self) -> Any:
            return jax.tree.unflatten(structure, [leaf[...] for leaf in self.leaves])

        def __call__(self, *inputs: Any, **options: Any) -> Any:
            return function(self.variables(), *inputs, **options)

    return Quantized()
