"""The table of a norm's reciprocal root costs little whatever the range of the variances, and calibration says if not.

Seen: with the default table layer norm was 100 to 800 LSB off its function, and no word of it.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jquant as jq
from jquant import ops

EPSILON = 1e-5


def table_of(spread: float, options: ops.TableOptions) -> tuple[np.ndarray, np.ndarray]:
    """(what the table gives, the function in float64), in LSB, of variances in [3 / spread, 3] and scales to match."""
    op = ops.Rsqrt(epsilon=EPSILON, table=options)
    x_scale = np.float32(3.0 / 32767.5)
    y_scale = np.float32(1 / np.sqrt(3.0 / spread + EPSILON) / 32767.5)
    drawn = np.exp(np.random.default_rng(0).uniform(np.log(3.0 / spread), np.log(3.0), 4000))
    x = np.round(drawn / x_scale).astype(np.float32) * x_scale
    found = ops.table_float(
        op, jnp.asarray(x), jnp.asarray(x_scale), "int16", jnp.asarray(y_scale), "int16", target=jq.targets.NASH_E
    )
    exact = 1 / np.sqrt(x.astype(np.float64) + EPSILON) / y_scale
    return np.asarray(found) / y_scale, np.clip(exact, -32768, 32767)


@pytest.mark.parametrize(("spread", "most"), [(4, 1), (20, 1), (100, 2), (1000, 4), (10_000, 8)])
def test_the_table_is_its_function_to_a_few_steps(spread: float, most: float) -> None:
    """Half an LSB of rounding is added. `curvature`, the default before, was 794 LSB off at a spread of 1000."""
    found, exact = table_of(spread, ops.TableOptions(placement="geometric"))
    assert np.abs(found - exact).max() <= most + 0.51
    found, exact = table_of(spread, ops.TableOptions(placement="geometric", num_tables=24))
    assert np.abs(found - exact).max() <= 1.6


@pytest.mark.parametrize("norm", ["layer", "rms", "group"])
def test_a_norm_of_rows_of_unlike_variance_keeps_its_accuracy(norm: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 8, 24) * torch.logspace(-0.6, 0.6, 16).reshape(16, 1, 1)
    made: dict[str, tuple[jq.ops.Op, torch.Tensor]] = {
        "layer": (ops.LayerNorm(), F.layer_norm(x, (24,))),
        "rms": (ops.RmsNorm(), F.rms_norm(x, (24,), eps=1e-6)),
        "group": (ops.GroupNorm(groups=2), F.group_norm(x, 2)),
    }
    op, wanted = made[norm]
    graph = jq.Graph((jq.Input("x", (None, 8, 24)),), (jq.Node("y", op, ("x",)),), ("y",))
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int16())}), target=jq.targets.NASH_E)
    given = jnp.asarray(x.numpy())
    model = jq.calibrate(model, [given])
    (cost,) = jq.analysis.table_costs(model, given)
    assert cost.own_max_lsb <= 20  # of 32767; it was 794 at a spread of 1000
    assert cost.own_sqnr > 70
    whole = np.asarray(jq.run(jq.lower(model), given))
    noise = np.sum((whole - wanted.numpy()) ** 2) / np.sum(wanted.numpy() ** 2)
    assert -10 * np.log10(noise) > 35  # the variance of the smallest rows has few steps


def test_calibrate_names_a_table_that_cannot_follow_its_function() -> None:
    """With the figure, and with the options that would do."""
    op = ops.Rsqrt(epsilon=EPSILON, table=ops.TableOptions(placement="evenly"))
    graph = jq.Graph((jq.Input("x", (None, 64)),), (jq.Node("root", op, ("x",)),), ("root",))
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int16())}), target=jq.targets.NASH_E)
    x = jnp.asarray(np.exp(np.random.default_rng(0).uniform(np.log(3e-3), np.log(3.0), (8, 64))), jnp.float32)
    with pytest.warns(
        jq.calibration.TableWarning, match=r"'root' \(Rsqrt\).*LSB.*TableOptions\(num_tables=6, placement='least_error'"
    ):
        jq.calibrate(model, [x])
