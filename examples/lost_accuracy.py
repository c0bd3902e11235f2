"""MobileNetV2 with three faults put in, found and mended with jq.analysis: the story of docs/finding-lost-accuracy.md.

The float network computes what it did before. Its int8 twin does not:
one channel between two convolutions is 64 times as large as the others (and divided again behind), one scale was never
calibrated, and one lookup table has too few segments for its function.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from nets import load_mobilenet_v2
from PIL import Image

import jquant as jq
from jquant import analysis, ops
from jquant.analysis.metrics import sqnr
from jquant.analysis.pictures import depth_picture
from jquant.cli.state import State, save_state
from jquant_converters import from_torch

CHANNEL, TABLE, UNCALIBRATED = "features.1.conv.2", "log", "features.6.conv.2"
RULES = {
    **jq.templates.int8_default(observer=jq.observers.mse()),
    "exp": jq.Policy(output=jq.int16()),
    "log": jq.Policy(output=jq.int16()),
    "features.18.2": jq.Policy(output=jq.int16()),
}


def pictures(count: int, side: int) -> jax.Array:
    """Crops of the colour pictures that scikit-image ships, normalised: [count, 3, side, side]."""
    from skimage import data

    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        picture = getattr(data, ("astronaut", "coffee", "chelsea", "rocket")[i % 4])()
        size = int(rng.integers(min(picture.shape[:2]) // 2, min(picture.shape[:2])))
        top, left = (int(rng.integers(0, n - size + 1)) for n in picture.shape[:2])
        crop = Image.fromarray(picture[top : top + size, left : left + size]).resize((side, side), 2)
        pixels = np.asarray(crop, np.float32)[:, :: (-1) ** i] / 255
        found.append(((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1))
    return jnp.asarray(np.stack(found), jnp.float32)


def with_faults(graph: jq.Graph, params: dict) -> tuple[jq.Graph, dict]:
    """The same function of float: a channel scaled up and down again, and log(exp(x)) before the pooling."""
    params = dict(params)
    for role in ("weight", "bias"):
        params[f"{CHANNEL}.{role}"] = params[f"{CHANNEL}.{role}"].at[3].multiply(64.0)
    after = "features.2.conv.0.0.weight"
    params[after] = params[after].at[:, 3].divide(64.0)
    nodes = []
    for node in graph.nodes:
        if node.name == "mean":
            nodes += [jq.Node("exp", ops.Exp(), node.inputs)]
            nodes += [jq.Node("log", ops.Log(table=ops.TableOptions(num_tables=6, placement="evenly")), ("exp",))]
            node = replace(node, inputs=("log",))
        nodes.append(node)
    return jq.graph.validate(replace(graph, nodes=tuple(nodes)), params), params


def measure(name: str, model: jq.Model, x: jax.Array) -> dict:
    """How near the integers are to float: dB at the logits, and how often the answers agree."""
    wanted = jq.apply(model, x, mode="float")
    got = jq.run(jq.lower(model), x)
    agree = 100 * float((wanted.argmax(-1) == got.argmax(-1)).mean())
    row = {"step": name, "logits dB": float(sqnr(wanted, got)), "agreement %": agree}
    print(f"{name:<44}{row['logits dB']:>8.2f} dB{agree:>8.1f} % agree")
    return row


def uncalibrated(model: jq.Model) -> jq.Model:
    """The model with one scale that no calibration gave."""
    return model.replace(qparams={**model.qparams, UNCALIBRATED: jnp.float32(1 / 128)})


def with_tables(graph: jq.Graph, change: str) -> jq.Graph:
    """The graph with the table that `table_costs` found best."""
    count, placement = change.removeprefix("num_tables=").split(", placement=")
    options = ops.TableOptions(num_tables=int(count), placement=placement.strip("'"))
    nodes = [replace(n, op=ops.Log(table=options)) if n.name == TABLE else n for n in graph.nodes]
    return replace(graph, nodes=tuple(nodes))


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/lost_accuracy"))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--picture", type=Path, help="also write the errors along depth as PNG here")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    x = pictures(options.samples, options.side)
    calibration, x, few = x[::2], x[1::2], x[1:9:2]
    np.savez(options.out / "data.npz", x=np.asarray(x))
    graph, params = from_torch(load_mobilenet_v2(), (torch.zeros(1, 3, options.side, options.side),))
    graph, params = with_faults(graph, params)

    def quantize(graph: jq.Graph, rules: dict) -> jq.Model:
        model = jq.prepare(graph, params, jq.QConfig(rules), target=jq.targets.NASH_E)
        return jq.calibrate(model, [calibration])

    model = quantize(graph, RULES)
    faulty = uncalibrated(model)
    start = analysis.compare(faulty, few, "float", "bit_true")
    state = State(graph, params, jq.QConfig(RULES), model.plan.target, faulty.qparams)
    save_state(options.out / "faulty.jqs", state)
    rows = [measure("with three faults", faulty, x)]

    # 1. One quantizer at a time: which one costs most.
    ranking = analysis.sensitivity(faulty, [few], kinds=["activation"])
    print(f"\n{ranking.table(4)}\n")
    rules = {**RULES, **jq.templates.sensitive(ranking.names(), topk=1, spec=jq.int16())}
    model = quantize(graph, rules)
    faulty = uncalibrated(model)
    rows.append(measure(f"{ranking.rows[0].name} int16", faulty, x))

    # 2. Layer by layer: what is clamped, what is rounded.
    before = analysis.compare(faulty, few, "float", "fake_quant")
    advice = analysis.layer_advice(before)
    print(f"\n{advice[0]}\n")
    rows.append(measure(f"{advice[0].where} calibrated", model, x))

    # 3. The tables.
    cost = analysis.table_costs(model, few)[0]
    change, level = next(tried for tried in cost.tried)
    print(f"\n{cost.name} ({cost.operator}): {cost.own_sqnr:.1f} dB, with {change}: {level:.1f} dB\n")
    model = quantize(with_tables(graph, change), rules)
    rows.append(measure(f"{cost.name}: {change}", model, x))

    after = analysis.compare(model, few, "float", "bit_true")
    if options.picture:
        options.picture.write_bytes(depth_picture({"with three faults": start, "mended": after}))
    report = analysis.write_report(
        options.out / "report",
        "MobileNetV2 with faults",
        rows,
        {"With three faults": start, "Mended": after},
        [f"{len(x)} crops of scikit-image's pictures, {options.side}x{options.side}; other crops calibrated."],
        plan=model.plan,
        ranking=ranking,
        findings=advice,
    )
    print(f"report: {report.html}")
    result = {
        "rows": rows,
        "clamped": advice[0].where,
        "most sensitive": ranking.rows[0].name,
        "table": cost.name,
        "table dB": [cost.own_sqnr, level],
    }
    (options.out / "numbers.json").write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
