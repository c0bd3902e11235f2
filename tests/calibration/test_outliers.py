"""Values with a few entries far beyond the others are named, with what can be done."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import ops

OBSERVERS = {"nmse": None, "mse": jq.observers.mse(), "min_max": jq.observers.min_max()}


def prepared(observer=None, dtype=jq.int8):
    graph = jq.Graph(
        (jq.Input("x", (None, 1, 100, 100)),),
        (jq.Node("relu", ops.Relu(), ("x",)), jq.Node("y", ops.Sigmoid(), ("relu",))),
        ("y",),
    )
    return jq.prepare(
        graph, {}, jq.QConfig({"*": jq.Policy(output=dtype(observer=observer))}), target=jq.targets.NASH_E
    )


def batches(outlier, count=4):
    x = np.random.default_rng(0).uniform(0.5, 1.0, (count, 1, 100, 100)).astype(np.float32)
    x[1, 0, 3, 5] = outlier
    return [jnp.asarray(x[:2]), jnp.asarray(x[2:])]


@pytest.mark.parametrize("observer", ["nmse", "mse"])
def test_a_rare_large_entry_is_named(observer):
    model = prepared(OBSERVERS[observer])
    with pytest.warns(jq.calibration.OutlierWarning, match=r"x \(1\d times\).*int16.*split"):
        jq.calibrate(model, batches(10.0))
    found = jq.calibration.find_outliers(model, jq.calibration.collect(model, batches(10.0)))
    first = found.all[0]
    assert (first.name, first.largest, first.dtype) == ("x", 10.0, "int8")
    np.testing.assert_allclose(first.percentile, 1.0, rtol=2**-6)  # the upper edge of a bin
    assert "99.99 percentile" in str(found)


@pytest.mark.parametrize(
    ("observer", "dtype", "outlier"), [("nmse", jq.int8, 7.5), ("nmse", jq.int16, 100.0), ("min_max", jq.int8, 100.0)]
)
def test_no_warning_without_a_reason(observer, dtype, outlier):
    model = prepared(OBSERVERS[observer], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jq.calibrate(model, batches(outlier))


def test_zeros_are_entries_too():
    model = prepared()
    x = np.zeros((4, 1, 100, 100), np.float32)
    x[:, 0, 0, :2] = 1.0  # 8 of 40,000: two in ten thousand
    x[0, 0, 0, 0] = 50.0
    found = jq.calibration.find_outliers(model, jq.calibration.collect(model, [jnp.asarray(x)])).all
    assert [o.name for o in found][:1] == ["x"]
    x[:, 0, 0, 1] = 0.0  # four of 40,000, so that the percentile is 0
    assert jq.calibration.find_outliers(model, jq.calibration.collect(model, [jnp.asarray(x)])).all == ()
