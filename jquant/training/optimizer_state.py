"""An optimizer state belongs to the parameters that it was made for."""

from typing import Any

import jax
import jax.numpy as jnp

from jquant.types import JQuantError


def check_optimizer_state(tx: Any, state: Any, trainable: Any) -> None:
    """An optimizer state is one of `tx` on `trainable`: the same tree, with arrays of the same shapes.

    Raises:
      JQuantError: it was made for other parameters, usually before `prepare`; says which names differ.
    """
    wanted: Any = jax.eval_shape(tx.init, trainable)
    needed, found = _shapes(wanted), _shapes(state)
    structure: Any = jax.tree.structure(state)
    if needed == found and jax.tree.structure(wanted) == structure:
        return
    lacks = [path for path in needed if needed[path] != found.get(path)]
    extra = [path for path in found if path not in needed]
    shown = "; ".join(
        f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for what, names in (("it lacks", lacks), ("it has", extra))
        if names
    )
    raise JQuantError(
        f"this optimizer state was made for other parameters ({shown or 'another tree'}). An optimizer is built after "
        "prepare, on TrainState's trainable: use TrainState.create(model, tx=tx), or carry the moments "
        "of float training over with jq.training.migrate_optimizer_state"
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(p): jnp.shape(v) for p, v in jax.tree_util.tree_leaves_with_path(tree)}
