"""Training on a folder of pictures against training on arrays in memory: steps a second.

python benchmarks/loading.py [--rounds 6] [--no-write]

256 JPEG files of 160 x 120, shortest edge to 36, cut to 32 x 32; QAT of ResNet-20 in batches of 32, as `jquant train`
reads them. Goal: at least 0.9 of the steps a second of arrays, since the files are decoded while a step runs.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from PIL import Image

import jquant as jq
from jquant.cli.data import Data, load_data
from jquant.cli.settings import ImageSettings
from jquant_converters import from_torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from nets import CifarResNet
from results import write_section
from timing import THREADS, Contender, measure, report

COUNT, BATCH = 256, 32


def make_pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        place = folder / f"class_{i % 8}"
        place.mkdir(exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (15, 20, 3), dtype=np.uint8))
        coarse.resize((160, 120)).save(place / f"{i}.jpg", quality=90)


def training(model: jq.Model) -> Callable[[Data], None]:
    """An epoch over data."""

    def loss(logits: Any, batch: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    step = jq.training.make_step(loss, donate=False)
    start = jq.TrainState.create(model, tx=optax.sgd(1e-3))

    def epoch(data: Data) -> None:
        assert data.take is not None
        state = start
        for (x,), labels in data.take(np.random.default_rng(0).permutation(COUNT), BATCH):
            state, _ = step(state, (jnp.asarray(x), jnp.asarray(labels)))
        jax.block_until_ready(state)

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder)
        x = torch.zeros(1, 3, 32, 32)
        graph, params = from_torch(CifarResNet(20).eval(), (x,))
        model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target=jq.targets.NASH_E)
        pictures = load_data(name, graph, ImageSettings(resize=36, crop=32))
        (every,), labels = next(iter(pictures.read(COUNT)))
        np.savez(folder / "arrays.npz", x=every, y=labels)
        arrays = load_data(str(folder / "arrays.npz"), graph, ImageSettings())
        epoch = training(jq.calibrate(model, [jnp.asarray(every[:BATCH])]))
        contenders = [
            Contender("arrays in memory", lambda: epoch(arrays), "arrays in memory"),
            Contender("a folder of pictures", lambda: epoch(pictures), "arrays in memory", 1 / 0.9),
        ]
        table = report(contenders, measure(contenders, options.rounds))
    if not options.no_write:
        head = (
            f"## Loading\n\nAn epoch of {COUNT} pictures in batches of {BATCH}, QAT of ResNet-20. {THREADS} threads, "
        )
        write_section("loading", f"{head} jax {jax.__version__}.\n`benchmarks/loading.py`.\n\n{table}")


if __name__ == "__main__":
    main()
