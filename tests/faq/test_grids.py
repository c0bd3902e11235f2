"""Rows 23 and 24: grids in pixels, as the vendor's grid_sample takes them, and normalized ones, as torch's does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jquant as jq
from jquant import templates
from jquant_converters import from_torch, to_onnx, to_torch
from jquant_converters.torch_functions import grid_sample_absolute

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(2, 3, 6, 5)).astype(np.float32)
PIXELS = RNG.uniform(-1.5, 6.5, (2, 4, 3, 2)).astype(np.float32)  # some lie outside


def by_hand(x: np.ndarray, grid: np.ndarray, mode: str, padding: str) -> np.ndarray:
    """The definition in float64, pixel by pixel: weights of the four neighbours, or the nearest, ties to even."""
    n, c, h, w = x.shape
    y = np.zeros((n, c, *grid.shape[1:3]))
    for b, i, j in np.ndindex(n, *grid.shape[1:3]):
        px, py = grid[b, i, j].astype(np.float64)
        met = [(np.round(px), np.round(py), 1.0)]
        if mode == "bilinear":
            fx, fy = np.floor(px), np.floor(py)
            met = [(fx + k, fy + m, (1 - abs(px - fx - k)) * (1 - abs(py - fy - m))) for k in (0, 1) for m in (0, 1)]
        for column, row, weight in met:
            inside = 0 <= column < w and 0 <= row < h
            if inside or padding == "border":
                y[b, :, i, j] += weight * x[b, :, int(np.clip(row, 0, h - 1)), int(np.clip(column, 0, w - 1))]
    return y


CASES = [(mode, padding) for mode in ("bilinear", "nearest") for padding in ("zeros", "border")]


@pytest.mark.parametrize(("mode", "padding"), CASES)
def test_row_23_pixels_in_torch_and_in_jax(mode: str, padding: str) -> None:
    wanted = by_hand(IMAGES, PIXELS, mode, padding)
    got = grid_sample_absolute(torch.tensor(IMAGES), torch.tensor(PIXELS), mode, padding)
    np.testing.assert_allclose(got.numpy(), wanted, atol=2e-5)  # coordinates lose bits on their way through [-1, 1]
    for last in (True, False):
        x = jnp.moveaxis(jnp.asarray(IMAGES), 1, -1) if last else jnp.asarray(IMAGES)
        y = jq.functions.grid_sample(
            x, jnp.asarray(PIXELS), mode=mode, padding=padding, coordinates="absolute", channels_last=last
        )
        np.testing.assert_allclose(jnp.moveaxis(y, -1, 1) if last else y, wanted, atol=2e-6)


def test_row_23_the_gradient_is_that_of_torch() -> None:
    x, grid = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (IMAGES[:1], PIXELS[:1] + 0.01))
    assert torch.autograd.gradcheck(grid_sample_absolute, (x, grid), atol=1e-6)


class Sampled(torch.nn.Module):
    """A convolution makes displacements, which are added to whole pixels."""

    def __init__(self, absolute: bool) -> None:
        super().__init__()
        self.offsets, self.absolute = torch.nn.Conv2d(3, 2, 1), absolute
        rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
        self.register_buffer("base", torch.stack([columns, rows], -1)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.offsets(x).permute(0, 2, 3, 1) + self.base
        if self.absolute:
            return grid_sample_absolute(x, grid)
        return torch.nn.functional.grid_sample(x, (2 * grid + 1) / torch.tensor([5.0, 6.0]) - 1, align_corners=False)


def test_row_23_an_import_is_the_operator_and_its_integers_take_int16() -> None:
    torch.manual_seed(1)
    model = Sampled(absolute=True).eval()
    x = torch.tensor(IMAGES)
    graph, params = from_torch(model, x)
    (sample,) = [n for n in graph.nodes if isinstance(n.op, jq.ops.GridSample)]
    assert sample.op.coordinates == "absolute"
    np.testing.assert_allclose(jq.graph.evaluate_float(graph, params, x)[0], model(x).detach().numpy(), atol=2e-5)
    rules = templates.int8_default()
    with pytest.raises(jq.QConfigError, match="int16"):  # a grid of 8 bits has too few of them
        jq.prepare(graph, params, jq.QConfig(rules), target="S100")
    model = jq.prepare(graph, params, jq.QConfig(rules | templates.grid_int16(graph)), target="S100")
    assert model.plan.spec(model.plan.graph.by_name[sample.name].inputs[1]).dtype == "int16"
    model = jq.calibrate(model, [x])
    program = jq.lower(model)
    raw = jq.run_with_taps(program, x)
    _, slow = jq.reference.run(program, IMAGES)
    for name in program.graph.values:
        np.testing.assert_array_equal(np.asarray(raw[name]), slow[name], err_msg=name)
    back = to_torch(model).eval()
    with torch.no_grad():
        scale = float(model.qparams[next(n for n in model.plan.owned if n == "x")])
        np.testing.assert_allclose(back(x).numpy(), jq.apply(model, x), atol=2 * scale)
    assert "GridSample" in [n.op_type for n in to_onnx(model).graph.node]


def test_row_24_normalized_grids_and_the_way_between() -> None:
    pixels = jnp.asarray(PIXELS)
    for corners in (True, False):
        grid = jq.ops.normalize_grid(pixels, (6, 5), align_corners=corners)
        np.testing.assert_allclose(jq.ops.denormalize_grid(grid, (6, 5), align_corners=corners), pixels, atol=1e-5)
        want = torch.nn.functional.grid_sample(
            torch.tensor(IMAGES), torch.tensor(np.asarray(grid)), align_corners=corners
        )
        got = jq.functions.grid_sample(jnp.asarray(IMAGES), grid, align_corners=corners, channels_last=False)
        np.testing.assert_allclose(got, want.numpy(), atol=2e-5)
        same = jq.functions.grid_sample(jnp.asarray(IMAGES), pixels, coordinates="absolute", channels_last=False)
        np.testing.assert_allclose(got, same, atol=2e-5)


def test_row_23_a_function_of_jax_is_traced_to_the_operator() -> None:
    def model(params: dict, x: jax.Array, grid: jax.Array) -> jax.Array:
        return jq.functions.grid_sample(x * params["gain"], grid, coordinates="absolute")

    graph, _ = jq.trace(model, {"gain": jnp.ones(3)}, jnp.ones((2, 6, 5, 3)), jnp.ones((2, 4, 3, 2)))
    assert [n.op.coordinates for n in graph.nodes if isinstance(n.op, jq.ops.GridSample)] == ["absolute"]


def test_row_23_what_is_no_grid() -> None:
    with pytest.raises(ValueError, match=r"grid \[N, Ho, Wo, 2\], not \[2, 3, 6, 5\] and \[2, 4, 3\]"):
        grid_sample_absolute(torch.tensor(IMAGES), torch.tensor(PIXELS[..., 0]))
    with pytest.raises(ValueError, match="mode 'bicubic'"):
        grid_sample_absolute(torch.tensor(IMAGES), torch.tensor(PIXELS), "bicubic")
    with pytest.raises(jq.InputError, match="coordinates 'pixels'; known: normalized, absolute"):
        jq.functions.grid_sample(jnp.asarray(IMAGES), jnp.asarray(PIXELS), coordinates="pixels")
    whole = torch.tensor(np.rint(PIXELS).astype(np.int32))
    np.testing.assert_allclose(
        grid_sample_absolute(torch.tensor(IMAGES), whole).numpy(),
        by_hand(IMAGES, np.rint(PIXELS), "bilinear", "zeros"),
        atol=2e-5,
    )
