"""Operators in front of a finished program: every mode against the float pipeline, and what the parity test refuses."""

from functools import cache
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import images, ops
from jquant.numerics import crop
from jquant.program.insert import (
    YUV_LOSS,
    Mode,
    colour,
    insert_image_convert,
    insert_image_preprocess,
    insert_op,
    insert_roi_resize,
)
from jquant.program.insert.parity import camera_pixels, colours, pictures_of

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
MODES = (None, *get_args(Mode))
# Rows R, G, B over (Y - 16 or Y, U - 128, V - 128), written from the standard and not from the library.
TO_RGB = {
    "full": (np.array([[1, 0, 1.402], [1, -0.3441, -0.7141], [1, 1.772, 0]]), 0),
    "video": (np.array([[1.164, 0, 1.596], [1.164, -0.392, -0.812], [1.164, 2.016, 0]]), 16),
}


def pipeline(mode: str | None, pixels: np.ndarray, divisor: float = 255.0, mean=MEAN, std=STD) -> np.ndarray:
    """uint8 pixels [N, H, W, 3] to the real input of a network, [N, H, W, 3], step by step as in training."""
    x = np.asarray(pixels, np.float64)
    if mode is not None and mode.startswith("yuv"):
        matrix, black = TO_RGB["full" if "full" in mode else "video"]
        x = np.stack([sum(row[i] * (x[..., i] - (black, 128, 128)[i]) for i in range(3)) for row in matrix], axis=-1)
    if mode is not None and (mode.endswith("2bgr") or mode == "bgr2rgb"):
        x = x[..., ::-1]
    return (x / divisor - mean) / std


@cache
def program_of(
    dtype: str = "int8",
    scale: float = 1 / 48,
    channels: int = 3,
    size: tuple[int, int] = (10, 12),
    batch: int | None = None,
    high_precision: bool = False,
) -> jq.Program:
    """A convolution, relu and a classifier on [N, C, H, W], calibrated on a few inputs."""
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(4, channels, 3, 3)) * 0.2,
        "b": rng.normal(size=4) * 0.1,
        "head": rng.normal(size=(5, 4)),
    }
    nodes = (
        jq.Node(
            "conv",
            ops.Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1)),
            ("x",),
            jq.FrozenMap({"weight": "w", "bias": "b"}),
        ),
        jq.Node("relu", ops.Relu(), ("conv",)),
        jq.Node("mean", ops.Mean(axes=(2, 3)), ("relu",)),
        jq.Node("head", ops.Linear(), ("mean",), jq.FrozenMap({"weight": "head"})),
    )
    graph = jq.Graph((jq.Input("x", (batch, channels, *size)),), nodes, ("head",))
    spec = jq.int8(scale=scale) if dtype == "int8" else jq.int16(scale=scale)
    config = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8()), "x": jq.Policy(output=spec)})
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    chip = jq.targets.NASH_E.with_fields({"rescale.high_precision": high_precision})
    model = jq.prepare(graph, params, config, target=chip)
    x = jnp.asarray(rng.uniform(-2, 2.5, size=(batch or 4, channels, *size)), jnp.float32)
    return jq.lower(jq.calibrate(model, [x]))


@pytest.fixture(scope="module")
def rgb_program() -> jq.Program:
    return program_of()


def centred(pixels: np.ndarray) -> jnp.ndarray:
    return jnp.asarray((pixels.astype(np.int16) - 128).astype(np.int8))


def old_input(program: jq.Program, *raw, name: str = "x.preprocess.to_first") -> np.ndarray:
    return np.asarray(jq.run_with_taps(program, *raw, raw=True)[name]).astype(np.int64)


def quantized(real: np.ndarray, scale: float, dtype: str = "int8") -> np.ndarray:
    info = np.iinfo(dtype)
    return np.clip(np.rint(real / float(np.float32(scale))), info.min, info.max).astype(np.int64)


def assert_equals_reference(program: jq.Program, *raw) -> None:
    fast = jq.run_with_taps(program, *raw, raw=True)
    _, slow = jq.reference.run(program, *map(np.asarray, raw), raw=True)
    for name in program.graph.values:
        np.testing.assert_array_equal(np.asarray(fast[name]), slow[name], err_msg=name)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (40, 10, 12, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Colours


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_its_float_pipeline_within_one_lsb(
    rgb_program: jq.Program, pixels: np.ndarray, mode: str
) -> None:
    program = insert_image_preprocess(rgb_program, "x", mode=mode, divisor=255, mean=MEAN, std=STD)
    wanted = quantized(pipeline(mode, pixels).transpose(0, 3, 1, 2), 1 / 48)
    made = old_input(program, centred(pixels))
    assert np.abs(made - wanted).max() <= 1  # the derived bound: less than an LSB before the last rounding
    assert (made != wanted).mean() < 0.01  # int16 weights: only values beside a tie differ
    assert_equals_reference(program, centred(pixels[:3]))


@pytest.mark.parametrize("mode", ["yuvbt601full2rgb", "yuvbt601video2bgr", None])
@pytest.mark.parametrize("high_precision", [False, True])
def test_an_int16_input_keeps_to_the_derived_bound(pixels: np.ndarray, mode: str | None, high_precision: bool) -> None:
    before = program_of("int16", 1 / 12000, high_precision=high_precision)
    program = insert_image_preprocess(before, "x", mode=mode, divisor=255, mean=MEAN, std=STD)
    wanted = quantized(pipeline(mode, pixels).transpose(0, 3, 1, 2), 1 / 12000, "int16")
    worst = np.abs(old_input(program, centred(pixels)) - wanted).max()
    # 1 of the weights, 1 of the mantissa, 1/2 of each rounding, and without high precision 2 of the shift before it
    assert worst <= (3 if high_precision else 5)
    assert program.formats["x.preprocess.to_first"].output == "int16"
    assert_equals_reference(program, centred(pixels[:2]))


def test_real_inputs_are_centred_pixels(rgb_program: jq.Program, pixels: np.ndarray) -> None:
    program = insert_image_preprocess(rgb_program, "x", mode="bgr2rgb", divisor=255, mean=MEAN, std=STD)
    real = jnp.asarray(pixels.astype(np.float32) - 128)
    integers = jq.run(program, centred(pixels), raw=True)
    np.testing.assert_array_equal(jq.run(program, real), integers.astype(jnp.float32) * program.scales["head"])
    entry = program.graph.inputs[0]
    assert (entry.name, entry.shape, program.inputs["x"]) == ("x", (None, 10, 12, 3), "int8")


def test_the_rest_of_the_program_is_untouched(rgb_program: jq.Program, pixels: np.ndarray) -> None:
    program = insert_image_preprocess(rgb_program, "x", mode="yuvbt601full2rgb", divisor=255, mean=MEAN, std=STD)
    values = jq.run_with_taps(program, centred(pixels), raw=True)
    alone = jq.run(rgb_program, values["x.preprocess.to_first"], raw=True)
    np.testing.assert_array_equal(values["head"], alone)
    assert next(iter(rgb_program.graph.values)) == "x"  # the old program is as it was
    assert "x.preprocess" not in rgb_program.constants


def test_a_network_on_centred_yuv_gets_no_convolution(pixels: np.ndarray) -> None:
    before = program_of(scale=1 / 128)
    program = insert_image_preprocess(before, "x", mode=None, divisor=1, mean=128, std=128)
    assert [type(n.op).__name__ for n in program.graph.nodes].count("Conv") == 1
    np.testing.assert_array_equal(
        old_input(program, centred(pixels), name="x.preprocess"), centred(pixels).transpose(0, 3, 1, 2)
    )
    swapped = insert_image_preprocess(before, "x", mode="rgb2bgr", divisor=1, mean=128, std=128)
    assert [type(n.op).__name__ for n in swapped.graph.nodes][:2] == ["SwapChannels", "Permute"]
    np.testing.assert_array_equal(old_input(swapped, centred(pixels)), centred(pixels)[..., ::-1].transpose(0, 3, 1, 2))
    assert_equals_reference(swapped, centred(pixels[:2]))


@pytest.mark.parametrize(("scale", "mean", "std"), [(1 / 64, 128, 128), (1 / 128, 127, 128), (1 / 128, 128, 129)])
def test_an_identity_but_for_scale_mean_or_std_is_none(scale: float, mean: float, std: float) -> None:
    program = insert_image_preprocess(program_of(scale=scale), "x", mode=None, divisor=1, mean=mean, std=std)
    assert isinstance(program.graph.nodes[0].op, ops.Conv)


def test_channels_last_programs_get_no_permutation(pixels: np.ndarray) -> None:
    values = jq.Graph((jq.Input("x", (None, 10, 12, 3)),), (jq.Node("y", ops.Relu(), ("x",)),), ("y",))
    config = jq.QConfig({"*": jq.Policy(output=jq.int8(scale=1 / 48))})
    model = jq.prepare(values, {}, config, target=jq.targets.NASH_E)
    before = jq.lower(model)
    program = insert_image_preprocess(
        before, "x", mode="yuvbt601full2bgr", divisor=255, mean=MEAN, std=STD, layout="NHWC"
    )
    assert [n.name for n in program.graph.nodes] == ["x.preprocess", "y"]
    made = np.asarray(jq.run(program, centred(pixels), raw=True)).astype(np.int64)
    wanted = np.maximum(quantized(pipeline("yuvbt601full2bgr", pixels), 1 / 48), 0)
    assert np.abs(made - wanted).max() <= 1
    config = jq.QConfig({"*": jq.Policy(output=jq.int8(scale=1 / 128))})
    model = jq.prepare(values, {}, config, target=jq.targets.NASH_E)
    bare = insert_image_preprocess(jq.lower(model), "x", mode=None, divisor=1, mean=128, std=128, layout="NHWC")
    assert [n.name for n in bare.graph.nodes] == ["y"]
    assert bare.scales["x"] == 1
    gray = insert_image_convert(bare, "x", "yuv444")
    np.testing.assert_array_equal(jq.run(gray, jnp.asarray(pixels), raw=True), np.maximum(pixels.astype(int) - 128, 0))


# ---------------------------------------------------------------------------------------------------------------------
# The parity test


def rgb_pipeline(rgb: np.ndarray) -> np.ndarray:
    """Training on RGB pictures: [N, H, W, 3] uint8 -> [N, 3, H, W]."""
    return ((rgb / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("swing", ["full", "studio"])
def test_the_right_camera_is_accepted(rgb_program: jq.Program, swing: str) -> None:
    mode = f"yuvbt601{'full' if swing == 'full' else 'video'}2rgb"
    options = {"divisor": 255, "mean": MEAN, "std": STD, "expected": rgb_pipeline, "camera_swing": swing}
    insert_image_preprocess(rgb_program, "x", mode=mode, **options)


@pytest.mark.parametrize(
    ("mode", "camera", "agrees"),
    [
        ("yuvbt601video2rgb", "full", "yuvbt601full2rgb"),
        ("yuvbt601full2rgb", "studio", "yuvbt601video2rgb"),
        ("yuvbt601full2bgr", "full", "yuvbt601full2rgb"),
        ("yuvbt601video2bgr", "studio", "yuvbt601video2rgb"),
        (None, "full", "yuvbt601full2rgb"),
    ],
)
def test_a_wrong_swing_or_order_is_refused_and_the_right_one_named(
    rgb_program: jq.Program, mode: str | None, camera: str, agrees: str
) -> None:
    options = {"divisor": 255, "mean": MEAN, "std": STD, "expected": rgb_pipeline, "camera_swing": camera}
    with pytest.raises(jq.LoweringError, match=f"LSB apart.*agrees with mode='{agrees}'"):
        insert_image_preprocess(rgb_program, "x", mode=mode, **options)


@pytest.mark.parametrize(
    "change", [{"mean": MEAN[::-1]}, {"std": STD * 1.1}, {"divisor": 256.0, "std": STD * 1.05}, {"mean": MEAN + 0.03}]
)
def test_wrong_mean_std_or_divisor_are_refused(rgb_program: jq.Program, change: dict) -> None:
    options = {"divisor": 255.0, "mean": MEAN, "std": STD, "expected": rgb_pipeline} | change
    with pytest.raises(jq.LoweringError, match=r"the float pipeline says .*No other mode agrees"):
        insert_image_preprocess(rgb_program, "x", mode="skip", **options)


def test_expected_sees_the_pixels_of_the_input_without_a_camera(rgb_program: jq.Program) -> None:
    def decode(pixels: np.ndarray, mode: str) -> np.ndarray:
        return np.clip(pipeline(mode, pixels), -MEAN / STD, (1 - MEAN) / STD).transpose(0, 3, 1, 2)  # RGB in [0, 255]

    options = {"mode": "yuvbt601video2rgb", "divisor": 255, "mean": MEAN, "std": STD}
    insert_image_preprocess(rgb_program, "x", expected=lambda p: decode(p, "yuvbt601video2rgb"), **options)
    with pytest.raises(jq.LoweringError, match="LSB apart"):
        insert_image_preprocess(rgb_program, "x", expected=lambda p: decode(p, "yuvbt601full2rgb"), **options)


@pytest.mark.parametrize("change", [{"mean": 123.0}, {"divisor": 1.0}, {"std": 58.0, "mean": 0.5}])
def test_units_that_leave_no_colour_are_refused(rgb_program: jq.Program, change: dict) -> None:
    with pytest.raises(jq.LoweringError, match=r"all colours together become .* divisor, mean and std|leaves int32"):
        insert_image_preprocess(rgb_program, "x", **{"mode": None, "divisor": 255.0, "mean": MEAN, "std": STD} | change)


def test_a_front_that_is_wrong_is_refused(rgb_program: jq.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are not those of the formula, as a mistake in this module would make them."""
    right = colour._quantized_conv

    def wrong(weight, bias, output, target):
        return right(weight * 1.02, bias, output, target)

    monkeypatch.setattr(colour, "_quantized_conv", wrong)
    with pytest.raises(jq.LoweringError, match=r"the pixel \(\d+, \d+, \d+\) becomes -?\d+ in channel \d"):
        insert_image_preprocess(rgb_program, "x", mode="yuvbt601full2rgb", divisor=255, mean=MEAN, std=STD)


def test_pictures_of_the_user_are_compared_too(rgb_program: jq.Program) -> None:
    options = {"mode": None, "divisor": 255, "mean": MEAN, "std": STD}
    seen: list[int] = []

    def watch(pictures: np.ndarray) -> np.ndarray:
        seen.append(len(pictures))
        return rgb_pipeline(pictures)

    insert_image_preprocess(rgb_program, "x", expected=watch, **options)
    check = np.zeros((3, 10, 12, 3), np.uint8)
    insert_image_preprocess(rgb_program, "x", expected=watch, check=check, **options)
    assert seen[1] == seen[0] + 3
    with pytest.raises(jq.InputError, match="uint8 pictures"):
        insert_image_preprocess(rgb_program, "x", check=check.astype(np.float32), **options)
    with pytest.raises(jq.InputError, match="the network takes"):
        insert_image_preprocess(rgb_program, "x", expected=lambda p: p / 255.0, **options)
    with pytest.raises(jq.InputError, match="NaN"):
        insert_image_preprocess(rgb_program, "x", expected=lambda p: rgb_pipeline(p) * np.nan, **options)


def test_the_pictures_hold_every_colour_once() -> None:
    found = colours(3)
    pictures = pictures_of(found, 7, 9)
    assert pictures.shape[1:] == (7, 9, 3)
    np.testing.assert_array_equal(pictures.reshape(-1, 3)[: len(found)], found)
    assert {(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)} <= set(map(tuple, found.tolist()))
    assert len(colours(1)) == 256


@pytest.mark.parametrize("swing", ["full", "studio"])
def test_the_stated_loss_of_yuv_holds_and_is_tight_on_a_lattice(swing: str) -> None:
    grid = np.arange(0, 256, 5)
    rgb = np.stack(np.meshgrid(grid, grid, grid), axis=-1).reshape(1, -1, 1, 3).astype(np.uint8)
    mode = f"yuvbt601{'full' if swing == 'full' else 'video'}2rgb"
    back = pipeline(mode, camera_pixels(rgb, swing), 1.0, np.zeros(3), np.ones(3))
    worst = np.abs(back - rgb).max()
    assert YUV_LOSS[swing] - 0.6 < worst <= YUV_LOSS[swing]  # conformance has all colours


# ---------------------------------------------------------------------------------------------------------------------
# Pyramid and resizer


@cache
def nv12_program(**options) -> jq.Program:
    program = insert_image_preprocess(
        program_of(**options), "x", mode="yuvbt601full2rgb", divisor=255, mean=MEAN, std=STD
    )
    return insert_image_convert(program, "x", "nv12")


def test_an_rgb_network_fed_by_nv12(pixels: np.ndarray) -> None:
    """End to end: at the old input within an LSB of the float pipeline on the round-tripped picture."""
    before, program = program_of(), nv12_program()
    assert [(i.name, i.shape, i.dtype) for i in program.graph.inputs] == [
        ("x_y", (None, 10, 12, 1), "uint8"),
        ("x_uv", (None, 5, 6, 2), "uint8"),
    ]
    planes = images.rgb_to_nv12(jnp.asarray(pixels))
    yuv = np.asarray(images.rgb_to_nv12_to_yuv444(jnp.asarray(pixels)))
    real = pipeline("yuvbt601full2rgb", yuv).transpose(0, 3, 1, 2)
    made = old_input(program, *planes)
    assert np.abs(made - quantized(real, 1 / 48)).max() <= 1
    outputs, floats = jq.run(program, *planes), jq.run(before, jnp.asarray(real, jnp.float32))
    # An output is a mean over pixels of sums of 27 inputs: an LSB here and there moves it by a small part of its range.
    assert np.abs(outputs - floats).max() <= 0.02 * np.ptp(floats)
    np.testing.assert_array_equal(
        outputs, jq.run(program, *planes, raw=True).astype(jnp.float32) * program.scales["head"]
    )
    assert_equals_reference(program, *(p[:3] for p in planes))


def test_a_program_of_a_fixed_batch_is_compared_on_many_pictures(pixels: np.ndarray) -> None:
    program = nv12_program(batch=1)
    planes = images.rgb_to_nv12(jnp.asarray(pixels[:1]))
    assert [i.shape[0] for i in program.graph.inputs] == [1, 1]
    np.testing.assert_array_equal(jq.run(program, *planes, raw=True), jq.run(nv12_program(), *planes, raw=True))
    resized = insert_image_preprocess(program_of(batch=1, scale=1 / 128), "x", mode=None, divisor=1, mean=128, std=128)
    insert_roi_resize(resized, "x", size=(30, 44))


def test_a_flat_picture_through_nv12_is_the_picture(rgb_program: jq.Program) -> None:
    """No chroma is lost on flat colours: the whole way is within the rounding of YUV of the RGB pipeline."""
    rgb = np.repeat(colours(3)[::40, None, None, :], 10, 1).repeat(12, 2)
    made = old_input(nv12_program(), *images.rgb_to_nv12(jnp.asarray(rgb)))
    bound = int(YUV_LOSS["full"] / (255 * STD.min()) * 48) + 2
    assert np.abs(made - quantized(rgb_pipeline(rgb), 1 / 48)).max() <= bound


def test_a_saved_program_is_the_same(tmp_path: Path, pixels: np.ndarray) -> None:
    program = nv12_program()
    jq.save(tmp_path / "program.safetensors", program)
    loaded = jq.load(tmp_path / "program.safetensors")
    assert loaded.graph == program.graph
    planes = images.rgb_to_nv12(jnp.asarray(pixels[:4]))
    np.testing.assert_array_equal(jq.run(loaded, *planes), jq.run(program, *planes))
    assert "Nv12ToCentredYuv444" in str(loaded)
    assert "uint8, uint8 -> int8" in str(loaded)


def test_the_pixels_must_be_uint8(pixels: np.ndarray) -> None:
    y, uv = images.rgb_to_nv12(jnp.asarray(pixels[:2]))
    with pytest.raises(jq.InputError, match="'x_y' is int32, expected uint8"):
        jq.run(nv12_program(), y.astype(jnp.int32), uv)


def test_gray(pixels: np.ndarray) -> None:
    before = program_of(channels=1, size=(9, 7))
    program = insert_image_preprocess(before, "x", mode=None, divisor=255, mean=0.45, std=0.22)
    program = insert_image_convert(program, "x", "gray", check=[np.zeros((1, 9, 7, 1), np.uint8)])
    y = pixels[:, :9, :7, :1]
    wanted = quantized(((y / 255 - 0.45) / 0.22).transpose(0, 3, 1, 2), 1 / 48)
    assert np.abs(old_input(program, jnp.asarray(y)) - wanted).max() <= 1
    assert_equals_reference(program, jnp.asarray(y[:4]))


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("pad_mode", ["constant", "border"])
def test_the_resizer(interpolation: str, pad_mode: str, tmp_path: Path) -> None:
    program = insert_image_preprocess(program_of(scale=1 / 128), "x", mode=None, divisor=1, mean=128, std=128)
    program = insert_roi_resize(program, "x", size=(30, 44), interpolation=interpolation, pad_mode=pad_mode)
    assert [i.name for i in program.graph.inputs] == ["x_y", "x_uv", "x_roi"]
    rng = np.random.default_rng(1)
    y = jnp.asarray(rng.integers(0, 256, (3, 30, 44, 1), dtype=np.uint8))
    uv = jnp.asarray(rng.integers(0, 256, (3, 15, 22, 2), dtype=np.uint8))
    roi = jnp.asarray([[4, 6, 15, 15], [-6, -4, 50, 40], [40, 20, 43, 29]], jnp.int32)
    assert_equals_reference(program, y, uv, roi)
    made = np.asarray(jq.run_with_taps(program, y, uv, roi)["x.resize"])
    # the first region has the size of the network's input: it is a crop
    part = images.nv12_to_centred_yuv444(y[:1, 6:16, 4:16], uv[:1, 3:8, 2:8])
    np.testing.assert_array_equal(made[:1], part)
    if pad_mode == "constant":  # the second one begins outside of the picture: black, without colour
        assert made[1, 0, 0].tolist() == [-128, 0, 0]
    jq.save(tmp_path / "p", program)
    np.testing.assert_array_equal(jq.run(jq.load(tmp_path / "p"), y, uv, roi), jq.run(program, y, uv, roi))


def test_the_parity_test_of_a_resizer_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    program = insert_image_preprocess(program_of(scale=1 / 128), "x", mode=None, divisor=1, mean=128, std=128)
    right = crop.taps_of

    def wrong(region: crop.Region, *args, **options) -> crop.Taps:
        return right(crop.Region(region.first + 2, region.pixels), *args, **options)

    monkeypatch.setattr("jquant.ops.image.taps_of", wrong)
    with pytest.raises(jq.LoweringError, match=r"parity test of 'x.resize'"):
        insert_roi_resize(program, "x", size=(32, 46))


# ---------------------------------------------------------------------------------------------------------------------
# Any operator


def test_a_transposition_and_a_factor_go_before_an_input(rgb_program: jq.Program) -> None:
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.integers(-128, 128, (2, 10, 12, 3)), jnp.int8)
    before = jq.ops.Operand("int8", rgb_program.scales["x"], (None, 10, 12, 3))
    program = insert_op(rgb_program, "x", ops.Permute(axes=(0, 3, 1, 2)), operands={"x": before})
    np.testing.assert_array_equal(jq.run(program, x, raw=True), jq.run(rgb_program, x.transpose(0, 3, 1, 2), raw=True))
    halved = insert_op(rgb_program, "x", ops.Scale(factor=-0.5))
    np.testing.assert_allclose(halved.scales["x"], 2 * rgb_program.scales["x"], rtol=1e-6)
    real = jnp.asarray(rng.integers(-100, 100, (2, 3, 10, 12)), jnp.float32) / 48
    np.testing.assert_array_equal(jq.run(halved, -2 * real), jq.run(rgb_program, real))
    assert_equals_reference(halved, jnp.asarray(rng.integers(-128, 128, (2, 3, 10, 12)), jnp.int8))


def test_names_stay_unique(rgb_program: jq.Program) -> None:
    once = insert_op(rgb_program, "x", ops.SwapChannels(axis=1))
    twice = insert_op(once, "x", ops.SwapChannels(axis=1))
    assert [n.name for n in twice.graph.nodes][:2] == ["x.swapchannels.2", "x.swapchannels"]
    x = jnp.asarray(np.random.default_rng(0).integers(-128, 128, (2, 3, 10, 12)), jnp.int8)
    np.testing.assert_array_equal(jq.run(twice, x, raw=True), jq.run(rgb_program, x, raw=True))


@pytest.mark.parametrize("op", [ops.Cat(axis=1), ops.Add(), ops.Requantize(), ops.Linear()])
def test_operators_that_need_statistics_are_refused(rgb_program: jq.Program, op: jq.ops.Op) -> None:
    with pytest.raises(jq.LoweringError, match=r"cannot be inserted after calibration.*prepare and calibrate with it"):
        insert_op(rgb_program, "x", op)


def test_an_integer_rule_that_differs_from_its_float_rule_is_refused(rgb_program: jq.Program) -> None:
    operands = {"x": jq.ops.Operand("uint8", jnp.float32(1), (None, 3, 10, 12))}
    with pytest.raises(jq.LoweringError, match=r"parity test of 'x.broken': 7 in channel"):
        insert_op(rgb_program, "x", Broken(), operands=operands)


class Broken(ops.CentrePixels):
    """An operator whose integers are not its floats."""


@ops.eval_integer.register
def _(op: Broken, node_format, target, x, **by):
    return jnp.full(x.shape, 7, jnp.int8)


@ops.lower_op.register
def _(op: Broken, inputs, output, params, target):
    return ops.Lowered({})


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


PLAIN = {"mode": None, "divisor": 255, "mean": MEAN, "std": STD}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "yuv2rgb"}, "unknown mode 'yuv2rgb'"),
        ({"mode": "yuvbt601ful2rgb"}, "did you mean 'yuvbt601full2rgb'"),
        ({"divisor": 0}, "divisor must be positive"),
        ({"std": 0}, "std not zero"),
        ({"mean": [0.1, 0.2]}, "mean is one number or 3"),
        ({"layout": "HWC"}, "layout must be"),
        ({"layout": "NHWC"}, "12|three channels|one number"),
        ({"camera_swing": "full"}, "needs expected="),
    ],
)
def test_arguments_that_do_not_fit(rgb_program: jq.Program, options: dict, message: str) -> None:
    with pytest.raises(jq.InputError, match=message):
        insert_image_preprocess(rgb_program, "x", **PLAIN | options)


def test_inputs_that_do_not_fit(rgb_program: jq.Program) -> None:
    with pytest.raises(jq.InputError, match=r"no input 'image'.*inputs: x"):
        insert_image_preprocess(rgb_program, "image", **PLAIN)
    with pytest.raises(jq.InputError, match=r"call jq.lower first"):
        insert_image_preprocess(rgb_program.graph, "x", **PLAIN)
    with pytest.raises(jq.InputError, match="call insert_image_preprocess first"):
        insert_image_convert(rgb_program, "x")
    with pytest.raises(jq.LoweringError, match="input 'x_y' is uint8"):
        insert_image_preprocess(nv12_program(), "x_y", **PLAIN)
    with pytest.raises(jq.InputError, match="is for three channels"):
        insert_image_preprocess(program_of(channels=1), "x", mode="bgr2rgb")
    ready = insert_image_preprocess(rgb_program, "x", **PLAIN)
    with pytest.raises(jq.InputError, match="gives 1 channels, the input has 3"):
        insert_image_convert(ready, "x", "gray")
    with pytest.raises(jq.InputError, match="unknown mode 'nv21'"):
        insert_image_convert(ready, "x", "nv21")
    odd = insert_image_preprocess(program_of(size=(9, 12)), "x", **PLAIN)
    with pytest.raises(jq.InputError, match="even height and width, not 9 x 12"):
        insert_image_convert(odd, "x")
    with pytest.raises(jq.InputError, match="even height and width, not 31 x 44"):
        insert_roi_resize(ready, "x", size=(31, 44))
    with pytest.raises(jq.InputError, match="say what comes before it with operands="):
        insert_op(rgb_program, "x", ops.CentrePixels())
