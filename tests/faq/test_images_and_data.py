"""Rows about images, data and files: what users hand over, in the form in which they have it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant import images

INT8 = {"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())}
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)


# -- row 33: centred YUV444


@pytest.mark.parametrize("swing", ["full", "studio"])
def test_row_33_pixels_as_to_tensor_gives_them(swing: str) -> None:
    """What torchvision's ToTensor gives is float32 pixels / 255; the right value is that of the exact integers."""
    divided = jnp.asarray(PIXELS.astype(np.float32) / np.float32(255))
    wanted = np.asarray(images.rgb_to_centred_yuv444(jnp.asarray(PIXELS), swing=swing), np.float32) / 128
    for convert, flip in ((images.rgb_to_real_yuv444, False), (images.bgr_to_real_yuv444, True)):
        given = jnp.flip(divided, -1) if flip else divided
        with pytest.raises(jq.InputError, match=r"reach 1 only, and \[0, 255\] is expected.*scale=255"):
            convert(given, swing=swing)
        np.testing.assert_array_equal(convert(given, swing=swing, scale=255), wanted)
        np.testing.assert_array_equal(
            convert(given * 255, swing=swing, rounded=True, scale=1), convert(given * 255, swing=swing)
        )


def test_row_33_a_dark_picture_and_jit_pass() -> None:
    black = jnp.zeros((2, 2, 3))
    np.testing.assert_array_equal(images.rgb_to_real_yuv444(black)[0, 0], [-1.0, 0.0, 0.0])
    assert jax.jit(images.rgb_to_real_yuv444)(black + 0.5).shape == (2, 2, 3)
    gradient = jax.grad(lambda x: images.rgb_to_real_yuv444(x, scale=255)[..., 0].sum())(black + 0.5)
    np.testing.assert_allclose(gradient[0, 0], 255 * np.array([77, 150, 29]) / 256 / 128, rtol=1e-6)
    with pytest.raises(jq.InputError, match="scale must be positive"):
        images.rgb_to_real_yuv444(black, scale=float("nan"))


def test_row_33_the_way_back_refuses_what_a_network_takes() -> None:
    centred = images.rgb_to_centred_yuv444(jnp.asarray(PIXELS)).astype(jnp.float32)
    assert images.centred_yuv444_to_rgb(centred).shape == PIXELS.shape
    with pytest.raises(jq.InputError, match="if they are centred / 128, multiply them by 128"):
        images.centred_yuv444_to_rgb(centred / 128)


# -- row 11, 17: one file, one reader


DEMO = """
[jquant]
schema = 1

[rules."*".output]
dtype = "int8"

[target]
march = "S100"

[image]
divisor = 255.0

[train]
epochs = 3
"""


def test_row_11_the_file_of_the_commands_is_a_qconfig(tmp_path: Path) -> None:
    from jquant.cli.settings import read_settings

    path = tmp_path / "q.toml"
    path.write_text(DEMO)
    wanted = jq.QConfig({"*": jq.Policy(output=jq.int8())})
    assert (
        jq.config.qconfig_from_toml(DEMO)
        == jq.config.qconfig_from_toml(path)
        == jq.config.qconfig_from_toml(str(path))
        == wanted
    )
    settings = read_settings(path)
    assert (settings.qconfig, settings.march) == (wanted, jq.targets.NASH_E)
    (tmp_path / "q.json").write_text(jq.config.qconfig_to_json(wanted))
    assert jq.config.qconfig_from_json(tmp_path / "q.json") == wanted


def test_row_11_what_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(jq.FormatError, match=r"missing\.toml: cannot be read: No such file"):
        jq.config.qconfig_from_toml(str(tmp_path / "missing.toml"))
    (tmp_path / "q.toml").write_text(DEMO.replace("[train]", "[trian]"))
    with pytest.raises(jq.FormatError, match=r"q\.toml: the file: unknown key 'trian'; did you mean 'train'"):
        jq.config.qconfig_from_toml(tmp_path / "q.toml")
    with pytest.raises(jq.FormatError, match="there are no rules"):
        jq.config.qconfig_from_toml("[jquant]\nschema = 1\n")


# -- rows 18, 27: what is in which state


def _net(rules: dict) -> tuple[jq.Model, jnp.ndarray]:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    graph, params = jq.trace(
        lambda p, x: jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"],
        {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.eye(4, 2)}},
        x,
    )
    return jq.prepare(graph, params, jq.QConfig(rules), target="nash-e"), x


def test_row_18_a_plan_without_scales_cannot_be_described() -> None:
    model, x = _net(INT8)
    with pytest.raises(jq.CalibrationError, match=r"no scale for 'x', .*call jq.calibrate"):
        jq.describe(model)
    assert "high precision" in jq.describe(jq.calibrate(model, [x]))


def test_row_27_a_float_plan_is_in_no_quantized_state() -> None:
    model, _ = _net({"*": None})
    assert jq.training.check_states(model, "float").of("float")
    for mode in ("fake_quant", "bit_true", "tables"):
        with pytest.raises(jq.CalibrationError, match=f"mode '{mode}' of a plan that quantizes nothing"):
            jq.training.check_states(model, mode)


def test_row_27_calibrated_is_not_trained() -> None:
    for quantizer, word in (("lsq", "trainable"), ("fake_quant", "frozen")):
        spec = jq.int8(quantizer=quantizer)
        model, x = _net({"*": jq.Policy(weight=jq.int8(axis="out", quantizer=quantizer), output=spec)})
        model = jq.calibrate(model, [x])
        lines = jq.describe(model).splitlines()[2:]
        assert [line.split()[-1] for line in lines if line.startswith("x ")] == [word]
        assert set(jq.training.check_states(model, "fake_quant", calibrated=model).counts()) == {
            "calibrated",
            "high precision",
        }


def test_row_27_a_scale_that_nothing_can_move_is_not_the_fault_of_labels() -> None:
    model, x = _net(INT8)
    model = jq.calibrate(model, [x])
    with pytest.raises(jq.CalibrationError, match=r"fake_quant gives scales no gradient: take jq.lsq"):
        jq.training.check_states(model, "fake_quant", calibrated=model, trained=["*"])
    model, x = _net({"*": jq.Policy(weight=jq.int8(), output=jq.int8(quantizer="lsq"))})
    model = jq.calibrate(model, [x])
    with pytest.raises(jq.CalibrationError, match=r"'x' .*no step moved them: check the optimizer's labels"):
        jq.training.check_states(model, "fake_quant", calibrated=model, trained=["x"])
