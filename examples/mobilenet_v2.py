"""MobileNetV2 with torchvision's ImageNet weights, calibrated under each observer and run as integers.

With `--images DIR` (files NNNN.jpg, the number being the class index): those at even listing positions calibrate, the
others measure top-1 of float, int8 fake-quant and integers. Without, scikit-image's pictures show how far they agree.
"""

import argparse
import json
import math
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from nets import load_mobilenet_v2
from PIL import Image
from rich.console import Console
from rich.table import Table

import jquant as jq
from jquant.host.progress import track
from jquant_converters import from_torch

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
SIDE = 224
OBSERVERS = {
    "min_max": jq.observers.min_max(),
    "moving_average": jq.observers.moving_average(0.1),
    "mse": jq.observers.mse(),
}


def to_input(image: Image.Image) -> np.ndarray:
    """A picture as [3, 224, 224] float32: the short side resized, the centre cropped, normalised."""
    scale = SIDE / min(image.size)
    size = [max(SIDE, round(n * scale)) for n in image.size]
    image = (
        image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        if image.size != (SIDE, SIDE)
        else image.convert("RGB")
    )
    left, top = ((n - SIDE) // 2 for n in image.size)
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    return ((pixels - MEAN) / STD).transpose(2, 0, 1)


def load_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from files NNNN.jpg."""
    paths = sorted(folder.glob("*.jpg"))
    if len(paths) < 2 or not all(p.stem.isdigit() for p in paths):
        raise SystemExit(f"{folder}: expected at least two files named NNNN.jpg by class index")
    images = np.stack([to_input(Image.open(p)) for p in track(paths, "reading images")])
    return images, np.array([int(p.stem) for p in paths], np.int32)


def sample_pictures() -> tuple[np.ndarray, None]:
    """Colour pictures that scikit-image ships, and their mirror images."""
    from skimage import data

    found = [getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    images = [to_input(Image.fromarray(picture)) for picture in found]
    return np.stack([v for image in images for v in (image, image[:, :, ::-1])]), None


def in_batches(images: np.ndarray, size: int) -> list:
    return [jnp.asarray(images[i : i + size]) for i in range(0, len(images), size)]


def evaluate(run, images: np.ndarray, size: int, what: str) -> np.ndarray:
    return np.concatenate([np.asarray(run(batch)) for batch in track(in_batches(images, size), what)])


def percent(logits: np.ndarray, labels: np.ndarray | None, baseline: np.ndarray) -> float:
    """Top-1 against labels, or where there are none the agreement with the float network."""
    return float(100 * (logits.argmax(-1) == (baseline.argmax(-1) if labels is None else labels)).mean())


def quantize(observer: str, graph, float_params, calibration, images, labels, baseline, size: int) -> dict:
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8(observer=OBSERVERS[observer]))})
    model = jq.prepare(graph, float_params, config, target=jq.targets.NASH_E)
    model = jq.calibrate(model, in_batches(calibration, size))
    program = jq.lower(model)
    fake = evaluate(lambda x: jq.apply(model, x), images, size, f"{observer}: fake-quant")
    bit_true = evaluate(lambda x: jq.apply(model, x, mode="bit_true"), images, size, f"{observer}: bit-true")
    integer = evaluate(lambda x: jq.run(program, x), images, size, f"{observer}: integers")
    return {
        "observer": observer,
        "float": percent(baseline, labels, baseline),
        "fake-quant": percent(fake, labels, baseline),
        "integer": percent(integer, labels, baseline),
        "bit-true logits that differ": int((bit_true != integer).sum()),
        "largest |acc|": f"2^{math.log2(max(float(a.worst_case) for a in program.accumulators.values())):.1f}",
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of NNNN.jpg by class index")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--observers", nargs="+", default=list(OBSERVERS), choices=list(OBSERVERS))
    parser.add_argument("--batch", type=int, default=25)
    options = parser.parse_args(argv)
    start = time.perf_counter()
    images, labels = load_folder(options.images) if options.images else sample_pictures()
    calibration, images = images[::2], images[1::2]
    labels = None if labels is None else labels[1::2]
    graph, params = from_torch(load_mobilenet_v2(), (torch.zeros(1, 3, SIDE, SIDE),))
    model = jq.prepare(graph, params, jq.QConfig({"*": jq.Policy(output=jq.int8())}), target=jq.targets.NASH_E)
    baseline = evaluate(lambda x: jq.apply(model, x, mode="float"), images, options.batch, "float")
    rows = [quantize(o, graph, params, calibration, images, labels, baseline, options.batch) for o in options.observers]
    measure = "agreement with float, %" if labels is None else "top-1, %"
    table = Table(title=f"MobileNetV2, {len(calibration)} images to calibrate, {len(images)} to measure: {measure}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)
    result = {"measure": measure, "images": len(images), "seconds": time.perf_counter() - start, "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    main()
