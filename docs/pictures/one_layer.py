"""Draws one-layer.png: one convolution of a photograph in float, fake-quant and integers.

.venv/bin/python docs/pictures/one_layer.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from skimage import data, transform

import jquant as jq

mpl.use("Agg")
import matplotlib.pyplot as plt  # the backend is chosen before


def edges(params, x):
    """A Sobel filter: [N, H, W, 1] to [N, H, W, 1]."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=layout)


def main() -> None:
    photo = transform.resize(data.camera()[40:296, 90:346], (128, 128), anti_aliasing=True)
    x = jnp.asarray(np.round(255 * photo)[None, ..., None] - 128, jnp.float32) / 128
    kernel = jnp.asarray([[-0.9, 0.1, 1.1], [-2.1, 0.0, 1.9], [-1.0, -0.1, 1.0]], jnp.float32)[..., None, None] / 4
    coarse = jq.Policy(weight=jq.int8(), output=jq.int8(scale=0.1))  # steps that can be seen
    rules = {"*": coarse, "type:Input": jq.Policy(output=jq.int8(scale=1 / 128))}
    graph, params = jq.trace(edges, {"kernel": kernel}, x)
    model = jq.prepare(graph, params, jq.QConfig(rules), target=jq.targets.NASH_E, high_precision_outputs=False)
    model = jq.calibrate(model, [x])
    program = jq.lower(model)
    meanings = {
        "float": jq.apply(model, x, mode="float"),
        "fake-quant: float, rounded to the grid": jq.apply(model, x),
        "integers": jq.run(program, jnp.round(x * 128).astype(jnp.int8), raw=True),
    }
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.6), layout="constrained", height_ratios=(3, 1.3))
    for (title, values), (top, bottom) in zip(meanings.items(), axes.T, strict=True):
        top.imshow(values[0, ..., 0], cmap="gray")
        top.set_title(title, fontsize=10)
        top.axis("off")
        bottom.plot(values[0, 64, 20:80, 0], drawstyle="steps-mid", linewidth=1.2)
        bottom.set_xticks([])
    axes[1, 0].set_ylabel("row 64", fontsize=9)
    figure.savefig(Path(__file__).with_name("one-layer.png"), dpi=90)


if __name__ == "__main__":
    main()
