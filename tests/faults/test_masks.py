"""Masks of attention, however they are written: an operand of the softmax, and float equal to the source.

Seen: an additive mask of -1e9 left 2.1 dB of the integers; a row that is masked everywhere gave 0 where torch gives the
mean of a finite fill.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jquant as jq
from jquant import ops
from jquant_converters import from_onnx, from_torch, to_onnx

SHAPE = (2, 5, 6)
LEAST = float(np.finfo(np.float32).min)
NUMBERS = (-1e4, -1e9, LEAST, float("-inf"))


def keep(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(SHAPE[-1]) < lengths[:, None, None]


WRITTEN: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "filled": lambda x, allowed, v: x.masked_fill(~allowed, v),
    "chosen": lambda x, allowed, v: torch.where(allowed, x, torch.tensor(v)),
    "added, by a product": lambda x, allowed, v: x + (1.0 - allowed.float()) * v,
    "added, the inverse of a mask": lambda x, allowed, v: x + (~allowed).float() * v,
    "added, filled into zeros": lambda x, allowed, v: x + torch.zeros(1, 1, SHAPE[-1]).masked_fill(~allowed, v),
    "a bias, filled": lambda x, allowed, v: x + torch.linspace(-2, 1, SHAPE[-1]).masked_fill(~allowed, v),
    "a bias, chosen": lambda x, allowed, v: x + torch.where(allowed, x.flip(-1) / 4, torch.tensor(v)),
    "a bias, chosen and moved": lambda x, allowed, v: (
        x + torch.where(allowed.expand_as(x), x.flip(-1) / 4, torch.tensor(v)).transpose(1, 2).transpose(1, 2)
    ),
    "added, chosen": lambda x, allowed, v: x + torch.where(allowed, torch.tensor(0.0), torch.tensor(v)),
}


class Scores(torch.nn.Module):
    """A softmax of scores behind a linear layer, of which a mask leaves out keys."""

    def __init__(self, written: str, value: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(6, 6)
        self.written, self.value = WRITTEN[written], value

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.written(self.linear(x), keep(lengths), self.value), -1)


def batch(examples: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(examples, 5, 6) * 2, torch.arange(examples, dtype=torch.int32) % 6 + 1


def quantized(model: torch.nn.Module, x: tuple[torch.Tensor, ...], dtype: str = "int16") -> tuple:
    graph, params = from_torch(model.eval(), x)
    config = jq.QConfig({"*": jq.Policy(output=getattr(jq, dtype)(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    given = tuple(jnp.asarray(v.numpy()) for v in x)
    return jq.calibrate(model, [given]), given


def decibels(found: object, wanted: np.ndarray) -> float:
    return float(-10 * np.log10(np.sum((np.asarray(found) - wanted) ** 2) / np.sum(wanted**2)))


CASES = [
    (written, v)
    for written in WRITTEN
    for v in NUMBERS
    if not ("product" in written or "inverse" in written) or v > LEAST
]


@pytest.mark.parametrize(("written", "value"), CASES)
def test_a_mask_costs_no_range_from_torch(written: str, value: float) -> None:
    """int8 weights give 40 dB and more; -1e9 in the scale of the scores left 2 dB."""
    model, x = Scores(written, value), batch()
    with torch.no_grad():
        wanted = model(*x).numpy()
    model, given = quantized(model, x)
    program = jq.lower(model)
    for found in (jq.run(program, *given), jq.apply(model, *given)):
        assert decibels(found, wanted) > 38
        assert (np.asarray(found)[wanted == 0] == 0).all()
    (slow,), _ = jq.reference.run(program, *given)
    np.testing.assert_array_equal(jq.run(program, *given), slow)


def test_a_mask_costs_no_range_from_onnx() -> None:
    model, x = Scores("added, by a product", -1e9), batch()
    graph, params = from_torch(model.eval(), x)
    with torch.no_grad():
        wanted = model(*x).numpy()
    again, params = from_onnx(to_onnx(graph, params))
    config = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(again, params, config, target=jq.targets.NASH_E)
    given = tuple(jnp.asarray(v.numpy()) for v in x)
    model = jq.calibrate(model, [given])
    assert decibels(jq.run(jq.lower(model), *given), wanted) > 38


@pytest.mark.parametrize("value", [-1e9, LEAST])
@pytest.mark.parametrize("biased", [False, True])
def test_a_mask_costs_no_range_from_jax(biased: bool, value: float) -> None:
    def attend(params: dict, x: jax.Array, lengths: jax.Array) -> jax.Array:
        allowed = jnp.arange(6) < lengths[:, None, None]
        return jax.nn.softmax(x @ params["w"] + jnp.where(allowed, params["b"] if biased else 0.0, value), axis=-1)

    x, lengths = (jnp.asarray(v.numpy()) for v in batch())
    given = {"w": jax.random.normal(jax.random.key(0), (6, 6)) / 2, "b": jnp.linspace(-2.0, 1.0, 6)}
    graph, params = jq.trace(attend, given, x, lengths)
    config = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    model = jq.calibrate(model, [(x, lengths)])
    assert decibels(jq.run(jq.lower(model), x, lengths), np.asarray(attend(given, x, lengths))) > 38


def test_a_mask_that_is_not_recognised_is_refused_with_the_remedy() -> None:
    """A constant of a mask and other numbers in one; and a mask in front of a logarithm."""

    class Mixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x + torch.tensor([0.5, -1e9, 0.25, 0.0, 0.0, -1e9]), -1)

    class Logarithm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log_softmax(x.masked_fill(x > 0, -1e9), -1)

    for model, message in ((Mixed(), "holds -1e.09, which takes the scale"), (Logarithm(), "-1e.09 has no place")):
        graph, params = from_torch(model, batch()[0])
        with pytest.raises(jq.QConfigError, match=f"{message}.*right in front of the softmax"):
            jq.prepare(graph, params, jq.QConfig({"*": jq.Policy(output=jq.int16())}), target=jq.targets.NASH_E)


class Added(torch.nn.Module):
    """A float mask as an input, added to scores: by hand, moved before, and by torch's attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.kind == "attention":
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        if self.kind == "moved":
            return torch.softmax(x + mask[:, :1].expand(-1, x.shape[1], -1), -1)
        return torch.softmax(x + mask, -1)


@pytest.mark.parametrize("value", [-1e4, -1e9, LEAST])
@pytest.mark.parametrize("kind", ["by hand", "moved", "attention"])
def test_a_float_mask_that_is_an_input_is_refused_when_its_numbers_are_seen(kind: str, value: float) -> None:
    """int16 left 3.5 and -1.7 dB. The same mask as bool has 40 dB and more."""
    x = batch()[0][:, :, :5]
    mask = torch.where(torch.arange(5).expand(8, 5, 5) > 2, value, 0.0)
    graph, params = from_torch(Added(kind), (x, mask))
    config = jq.QConfig({"*": jq.Policy(output=jq.int16())})
    model = jq.prepare(graph, params, config, target=jq.targets.NASH_E)
    data = (jnp.asarray(x.numpy()), jnp.asarray(mask.numpy()))
    with pytest.raises(
        jq.CalibrationError, match=r"input 'mask' holds -.* added in front of a softmax.*Pass it as bool"
    ):
        jq.calibrate(model, [data])
    with pytest.raises(jq.CalibrationError, match="added in front of a softmax"):  # nor by the parts of `calibrate`
        jq.calibration.finalize_stats(model, jq.calibration.collect(model, [data]))
    jq.calibrate(model, [(data[0], jnp.maximum(data[1], -20.0))])  # a bias


def test_a_mask_of_bool_that_is_an_input_costs_no_range() -> None:
    x = batch()[0][:, :, :5]
    mask = torch.arange(5).expand(8, 5, 5) <= 2
    model, given = quantized(Added("attention"), (x, mask))
    assert decibels(jq.run(jq.lower(model), *given), Added("attention")(x, mask).numpy()) > 38


class Biased(torch.nn.Module):
    """torch's attention with a bias of relative positions into which a mask is filled, as T5 has it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.bias, self.value = torch.nn.Parameter(torch.randn(1, 5, 5)), value

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        allowed = torch.arange(5) < lengths[:, None, None]
        mask = torch.where(allowed, self.bias, torch.tensor(self.value))
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("value", [-1e4, LEAST, float("-inf")])
@pytest.mark.parametrize("door", ["torch", "onnx"])
def test_a_mask_in_a_bias_costs_no_range(value: float, door: str) -> None:
    x, lengths = batch()[0][:, :, :5], batch()[1].clamp(max=5)
    module = Biased(value).eval()
    with torch.no_grad():
        wanted = module(x, lengths).numpy()
    graph, params = from_torch(module, (x, lengths))
    graph, params = (graph, params) if door == "torch" else from_onnx(to_onnx(graph, params))
    config = jq.QConfig({"*": jq.Policy(output=jq.int16())})
    given = (jnp.asarray(x.numpy()), jnp.asarray(lengths.numpy()))
    model = jq.calibrate(jq.prepare(graph, params, config, target=jq.targets.NASH_E), [given])
    program = jq.lower(model)
    (slow,), _ = jq.reference.run(program, *given)
    np.testing.assert_array_equal(jq.run(program, *given), slow)
    assert decibels(slow, wanted) > 40
    assert decibels(jq.apply(model, *given), wanted) > 40


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are masked everywhere


@pytest.mark.parametrize("written", ["filled", "added, by a product"])
@pytest.mark.parametrize("value", [-1e4, -1e9, LEAST / 2, float("-inf")])
def test_float_of_an_empty_row_is_that_of_torch(written: str, value: float) -> None:
    if value == float("-inf") and written != "filled":
        return  # 0 * inf is NaN everywhere, in torch as well
    model, (x, lengths) = Scores(written, value), batch()
    lengths[0] = 0
    with torch.no_grad():
        wanted = model(x, lengths).numpy()
    graph, params = from_torch(model.eval(), (x, lengths))
    (found,) = jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()), jnp.asarray(lengths.numpy()))
    np.testing.assert_allclose(found, wanted, atol=2e-3 if value == -1e4 else 1e-6)
    assert np.isnan(wanted[0]).all() == (value == float("-inf"))


@pytest.mark.parametrize("value", [-1e4, -1e9, LEAST])
def test_an_empty_row_of_a_finite_fill_is_the_mean_in_every_meaning(value: float) -> None:
    model, (x, lengths) = Scores("filled", value), batch()
    model, given = quantized(model, (x, lengths))
    lengths = given[1].at[0].set(0)
    program = jq.lower(model)
    for mode in ("float", "fake_quant"):
        row = np.asarray(jq.apply(model, given[0], lengths, mode=mode))[0]
        np.testing.assert_allclose(row, 1 / 6, atol=2e-4)
    np.testing.assert_allclose(np.asarray(jq.run(program, given[0], lengths))[0], 1 / 6, atol=2e-4)


def test_an_empty_row_keeps_its_scores_where_a_small_number_was_added() -> None:
    """In float32 -1e4 leaves the scores to a thousandth; -1e9 leaves nothing of them."""
    module, (x, lengths) = Scores("added, by a product", -1e4), batch()
    lengths[0] = 0
    model, given = quantized(module, (x, lengths))
    with torch.no_grad():
        wanted = module(x, lengths).numpy()
    found = np.asarray(jq.run(jq.lower(model), given[0], jnp.asarray(lengths.numpy())))
    np.testing.assert_allclose(found[0], wanted[0], atol=2e-2)  # int8 weights
    assert wanted[0].max() > 0.4


def test_an_empty_row_of_minus_infinity_is_zero_in_integers() -> None:
    """Which have no NaN; torch's scaled_dot_product_attention gives zeros as well."""
    model, (x, lengths) = Scores("filled", float("-inf")), batch()
    model, given = quantized(model, (x, lengths))
    empty = given[1].at[0].set(0)
    assert (np.asarray(jq.run(jq.lower(model), given[0], empty))[0] == 0).all()


@pytest.mark.parametrize("empty", ["zero", "mean", "scores", "nan"])
def test_exports_keep_what_an_empty_row_gives(empty: str) -> None:
    from support.onnx_helpers import run_onnxruntime

    from jquant_converters import to_torch

    graph = jq.Graph(
        (jq.Input("x", (None, 6)), jq.Input("m", (None, 6), "bool")),
        (jq.Node("y", ops.Softmax(empty=empty), ("x", "m")),),
        ("y",),
    )
    rng = np.random.default_rng(0)
    x, masked = rng.normal(size=(4, 6)).astype(np.float32), rng.random((4, 6)) < 0.4
    masked[0] = True
    (wanted,) = jq.graph.evaluate_float(graph, {}, jnp.asarray(x), jnp.asarray(masked))
    (found,) = run_onnxruntime(to_onnx(graph, {}), x, masked)
    np.testing.assert_allclose(found, wanted, atol=2e-3 if empty == "scores" else 1e-6)
    module = to_torch(graph, {})
    np.testing.assert_allclose(module(torch.from_numpy(x), torch.from_numpy(masked)), wanted, atol=1e-6)


@pytest.mark.parametrize("written", ["filled", "added, chosen"])
def test_reports_count_what_a_mask_leaves(written: str) -> None:
    """Seen: NaN dB of the filled scores, and the advice to give them a scale of 3e25."""
    model, x = quantized(Scores(written, float("-inf")), batch(), "int8")
    found = jq.analysis.compare(model, x, "float", "bit_true")
    scores = Scores(written, 0.0).linear(batch()[0]).detach().numpy()
    left = scores[np.broadcast_to(keep(batch()[1]).numpy(), scores.shape)]
    filled = next(row for row in found.rows if row.name.endswith(".filled"))
    assert filled.size == left.size < scores.size
    np.testing.assert_allclose([filled.minimum, filled.maximum], [left.min(), left.max()], rtol=1e-6)
    assert all(np.isfinite(row.sqnr) and row.sqnr > 20 for row in found.rows)
    assert all(row.max_error < 0.5 and abs(row.minimum) < 100 for row in found.rows)
    assert not [advice for advice in jq.analysis.layer_advice(found) if "e+" in advice.fix]
