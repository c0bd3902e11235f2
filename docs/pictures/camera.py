"""Draws camera.png: a photograph in RGB, in centred YUV444, with the chroma of NV12, and back, with their distance.

.venv/bin/python docs/pictures/camera.py
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from skimage import data

import jquant as jq

mpl.use("Agg")
import matplotlib.pyplot as plt  # the backend is chosen before


def main() -> None:
    rgb = data.coffee()[40:360:4, 130:450:4]  # [80, 80, 3], a red cup
    full = np.asarray(jq.images.rgb_to_centred_yuv444(rgb, axis=-1))
    nv12 = np.asarray(jq.images.rgb_to_nv12_to_centred_yuv444(rgb, axis=-1))
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.4), layout="constrained")
    for row, (label, yuv) in zip(axes, {"YUV444": full, "NV12": nv12}.items(), strict=True):
        back = np.asarray(jq.images.centred_yuv444_to_rgb(yuv, axis=-1, mean=0, std=1, q_scale=None))
        back = np.clip(np.round(back), 0, 255).astype(np.uint8)
        off = np.abs(back.astype(int) - rgb)
        print(f"{label}: back in RGB at most {off.max()} of 255 off, {off.mean():.2f} on average")
        shown = {
            f"RGB, to {label}": (rgb, None),
            "Y": (yuv[..., 0], "gray"), "U": (yuv[..., 1], "PuOr"), "V": (yuv[..., 2], "PuOr"),
            f"back in RGB, {off.mean():.1f} off": (back, None),
        }  # fmt: skip
        for axis, (title, (image, colours)) in zip(row, shown.items(), strict=True):
            reach = 128 if colours == "gray" else 64
            limits = {"vmin": -reach, "vmax": reach - 1} if colours else {}
            axis.imshow(image, cmap=colours, **limits)
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    figure.savefig(Path(__file__).with_name("camera.png"), dpi=80)


if __name__ == "__main__":
    main()
