"""How far the conversions of OpenCV, Pillow and PyAV are from those of `jquant.images`: docs/images.md.

The libraries are no requirement of jquant. Their figures are made once, in an environment of their own:

    python -m venv /tmp/pictures
    /tmp/pictures/bin/pip install numpy==2.4.6 opencv-python-headless==5.0.0.93 pillow==13.0.0 av==18.1.0
    /tmp/pictures/bin/python benchmarks/image_libraries.py convert figures.npz table.json
    python benchmarks/image_libraries.py compare figures.npz

`convert` writes what the libraries make of every fifth value of each channel, of noise, and of a picture of 8 x 4
pixels (`table.json`, kept as tests/faults/image_libraries.json). `compare` prints the table of the page.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

LEGAL = ((16, 235), (16, 240), (16, 240))  # of studio video


def pictures() -> dict[str, np.ndarray]:
    """RGB pictures, and YUV ones in the range of studio video: all colours in steps, noise, and a few pixels."""
    steps = np.arange(0, 256, 5)
    lattice = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)[:140_608].astype(np.uint8)
    rng = np.random.default_rng(0)
    few = rng.integers(0, 256, (8, 4, 3), np.uint8)  # fewer rows, and swscale filters chroma otherwise
    few[0, :2] = [[255, 255, 255], [255, 0, 0]]
    found = {"lattice": lattice[: 374 * 374].reshape(374, 374, 3), "noise": rng.integers(0, 256, (64, 96, 3), np.uint8)}
    found["few"] = few
    for name, (height, width) in {"lattice": (64, 96), "noise": (64, 96), "few": (8, 4)}.items():
        found[f"{name}:yuv"] = np.stack([rng.integers(a, b + 1, (height, width), np.uint8) for a, b in LEGAL], -1)
    found["few:yuv"][0, 0] = (235, 128, 128)  # white
    return found


def convert_all(rgb: np.ndarray, yuv: np.ndarray) -> dict[str, np.ndarray]:
    """What each library makes of a picture; channels last, in the order Y, U, V or R, G, B."""
    import av
    import cv2
    from PIL import Image

    def with_av(x: np.ndarray, source: str, goal: str) -> np.ndarray:
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(x), format=source).reformat(format=goal).to_ndarray()

    height, width = yuv.shape[:2]
    wide = np.repeat(np.repeat(yuv, 2, 0), 2, 1)  # chroma alike in each block of 2x2
    nv12 = np.concatenate([wide[..., 0], yuv[..., 1:].reshape(height, 2 * width)])
    planes = yuv.transpose(2, 0, 1)
    pair = [0, 2, 1]  # OpenCV's YCrCb has the order Y, V, U
    return {
        "pillow YCbCr": np.asarray(Image.fromarray(rgb).convert("YCbCr")),
        "opencv YCrCb": cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., pair],
        "opencv YUV": cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV),
        "opencv I420": cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420) if rgb.shape[0] % 4 == 0 else np.zeros(0, np.uint8),
        "pyav yuvj444p": _last(with_av(rgb, "rgb24", "yuvj444p")),
        "pyav yuv444p": _last(with_av(rgb, "rgb24", "yuv444p")),
        "pyav nv12": with_av(rgb, "rgb24", "nv12"),
        "pillow YCbCr, decoded": np.asarray(Image.frombytes("YCbCr", (width, height), yuv.tobytes()).convert("RGB")),
        "opencv YCrCb, decoded": cv2.cvtColor(yuv[..., pair], cv2.COLOR_YCrCb2RGB),
        "opencv NV12, decoded": cv2.cvtColor(nv12, cv2.COLOR_YUV2RGB_NV12)[::2, ::2],
        "pyav yuvj444p, decoded": with_av(planes, "yuvj444p", "rgb24"),
        "pyav yuv444p, decoded": with_av(planes, "yuv444p", "rgb24"),
        "pyav nv12, decoded": with_av(nv12, "nv12", "rgb24")[::2, ::2],
    }


def _last(x: np.ndarray) -> np.ndarray:
    return x.transpose(1, 2, 0) if x.shape[0] == 3 else x


def versions() -> dict[str, str]:
    import av
    import cv2
    import PIL
    from av import library_versions

    swscale = ".".join(map(str, library_versions["libswscale"]))
    return {"opencv": cv2.__version__, "pillow": PIL.__version__, "pyav": av.__version__, "swscale": swscale}


def convert(figures: Path, table: Path) -> None:
    """Writes the figures of all pictures, and those of the few pixels as JSON."""
    given, found = pictures(), {}
    for name in ("lattice", "noise", "few"):
        found[name] = convert_all(given[name], given[f"{name}:yuv"])
    arrays = {f"{name}:{way}": x for name, ways in found.items() for way, x in ways.items()}
    np.savez(figures, **given, **arrays)
    made = {"versions": versions(), "source": "benchmarks/image_libraries.py"}
    made |= {"rgb": given["few"].tolist(), "yuv": given["few:yuv"].tolist()}
    table.write_text(rows_of(made | {way: x.tolist() for way, x in found["few"].items()}))


def ours(rgb: np.ndarray, yuv: np.ndarray) -> dict[str, np.ndarray]:
    """What jquant.images makes of the same, under the names of the libraries' ways."""
    from jquant import images

    def decoded(swing: Any) -> np.ndarray:
        centred = (yuv.astype(np.int16) - 128).astype(np.int8)
        back = images.centred_yuv444_to_rgb(centred, swing=swing, mean=0, std=1, q_scale=None)
        return np.clip(np.round(np.asarray(back)), 0, 255)

    full, studio = (np.asarray(images.rgb_to_yuv444(rgb, swing=swing)) for swing in ("full", "studio"))
    y, uv = (np.asarray(x) for x in images.rgb_to_nv12(rgb, swing="studio"))
    found = dict.fromkeys(("pillow YCbCr", "opencv YCrCb", "opencv YUV", "pyav yuvj444p"), full)
    found["pyav yuv444p"] = studio
    found["pyav nv12"] = np.concatenate([y[..., 0], uv.reshape(uv.shape[0], -1)])
    found["opencv I420"] = np.concatenate([y.ravel(), uv[..., 0].ravel(), uv[..., 1].ravel()])
    full_range = ("pillow YCbCr, decoded", "opencv YCrCb, decoded", "pyav yuvj444p, decoded")
    video = ("opencv NV12, decoded", "pyav yuv444p, decoded", "pyav nv12, decoded")
    return found | dict.fromkeys(full_range, decoded("full")) | dict.fromkeys(video, decoded("studio"))


def distances(mine: np.ndarray, other: np.ndarray, luma: int | None) -> tuple[int, int, float]:
    """The largest distance of the first channel (or first `luma` entries) and of the rest; the share that differs."""
    error = np.abs(mine.astype(int) - other.astype(int).reshape(mine.shape))
    first, rest = (error[..., 0], error[..., 1:]) if luma is None else (error.ravel()[:luma], error.ravel()[luma:])
    return int(first.max()), int(rest.max()), float((error > 0).mean())


def compare(figures: Path) -> None:
    """Prints a row a way: the largest distances over the lattice and noise."""
    with np.load(figures) as file:
        found = {name: file[name] for name in file.files}
    print("| way | Y or R | U, V or G, B | entries that differ |\n|---|---|---|---|")
    made = {name: ours(found[name], found[f"{name}:yuv"]) for name in ("lattice", "noise")}
    for way in made["noise"]:
        rows = []
        for name, mine in made.items():
            if found[f"{name}:{way}"].size:
                is_flat = way in ("pyav nv12", "opencv I420")
                rows.append(distances(mine[way], found[f"{name}:{way}"], found[name][..., 0].size if is_flat else None))
        first, rest, share = (max(column) for column in zip(*rows, strict=True))
        print(f"| {way} | {first} | {rest} | {100 * share:.0f} % |")


def rows_of(table: dict[str, Any]) -> str:
    """JSON with a line an entry of a table."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()]
    return "{\n  " + ",\n  ".join(lines) + "\n}\n"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["convert", figures, table]:
            convert(Path(figures), Path(table))
        case ["compare", figures]:
            compare(Path(figures))
        case _:
            sys.exit(__doc__)
