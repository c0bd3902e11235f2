"""A small network with a table, two convolutions and a linear layer, prepared and calibrated."""

import jax
from support import graphs

import jquant as jq

Net = tuple[jq.Model, jax.Array]

QCONFIG = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})


def small_graph(seed: int = 9) -> tuple[jq.Graph, dict]:
    build = graphs.Builder(seed)
    build.shapes["x"] = (3, 8, 8)
    x = build.add(jq.ops.Relu(), (build.batch_norm(build.conv("x", 6, 3)),), (6, 8, 8))
    x = build.add(jq.ops.Sigmoid(), (build.conv(x, 6, 3),), (6, 8, 8))
    x = build.add(jq.ops.Mean(axes=(2, 3)), (build.conv(x, 4, 3),), (4,))
    x = build.add(
        jq.ops.Linear(), (x,), (5,), weight=build.array("head.weight", 5, 4), bias=build.array("head.bias", 5)
    )
    return build.graph(x, size=8), build.params


def small_net(qconfig: jq.QConfig = QCONFIG, batch: int = 4) -> Net:
    graph, params = small_graph()
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E)
    images = graphs.images(1, graph, batch=batch)
    return jq.calibrate(model, [images]), images
