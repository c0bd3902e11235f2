"""Block reconstruction: roundings and scales of a block are learned against what the block makes in float."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import inf, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.calibration.batches import bound_batches, samples_of
from jquant.graph.evaluate import evaluate_nodes
from jquant.graph.float import float_rule, value_shapes
from jquant.host.progress import track
from jquant.meanings.fake_quant import fake_quant_tap, fake_quant_weight
from jquant.meanings.meaning import Mode, meaning_of
from jquant.numerics.rounding import divide, expand
from jquant.plan.batch_norm import check_folded, raise_collapsed_scales
from jquant.plan.scales import check_model, quantizer_of, scale_of
from jquant.ptq.blocks import Names, cut_out, find_blocks, names_of
from jquant.ptq.rounding import BETAS, TINY, WARM_UP
from jquant.quantizers import adaround as soft_round
from jquant.quantizers import adaround_parameter, lsq, rectified_sigmoid, rounding_regularizer
from jquant.types import Array, Model, Plan, QConfigError, QuantSpec

Values = dict[str, Array]


@dataclass(frozen=True)
class Settings:
    """How a block learns: arguments of `reconstruct_blocks`."""

    steps: int
    batch: int
    drop: float
    learning_rate: float
    scale_learning_rate: float
    strength: float

    def check(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise QConfigError(f"{name} must be at least 1, not {getattr(self, name)!r}")
        for name in ("learning_rate", "scale_learning_rate", "strength"):
            if not 0 <= getattr(self, name) < inf:
                raise QConfigError(f"{name} must be finite and at least 0, not {getattr(self, name)!r}")
        if not 0 <= self.drop <= 1:
            raise QConfigError(f"drop must be from 0 to 1, not {self.drop!r}")

    def optimizer(self) -> Any:
        import optax

        scales = optax.adam(optax.cosine_decay_schedule(self.scale_learning_rate, self.steps))
        labels: Any = Learned._make(Learned._fields)
        return optax.multi_transform({"v": optax.adam(self.learning_rate), "scales": scales}, labels)


class Learned(NamedTuple):
    """What is learned of a block: `v` {weight: like the weight}, `scales` {value: log of the scale over the first}."""

    v: dict[str, Array]
    scales: dict[str, Array]


class State(NamedTuple):
    learned: Learned
    memory: Any  # of the optimizer


class Data(NamedTuple):
    """Samples [N, ...] of the values at a block's borders: inputs in float and in fake-quant, outputs in float."""

    plain: Values
    quantized: Values
    wanted: Values


def reconstruct_blocks(
    model: Model,
    batches: Iterable[Any],
    *,
    steps: int = 500,
    batch: int = 32,
    layers: int = 3,
    drop: float = 0.5,
    learning_rate: float = 3e-2,
    scale_learning_rate: float = 1e-3,
    strength: float = 10.0,
    seed: int = 0,
) -> Model:
    """Learns, block by block, which weights round up and the scales of the values, and puts the weights on the grid.

    Blocks are those of `find_blocks`. The goal of a block is what it makes in float from the values of the float model;
    its inputs come from the blocks before as they are quantized by then, so that it makes up for them. All of its
    layers learn together. At each step every entry of every value, at random, is quantized or left as it is (with the
    probability `drop`), and so are the entries of the inputs: the roundings suit more than the one quantization that
    calibration data shows. A block whose output came no closer to float stays as it was.

    Nearest rounding then gives what was learned, so `apply`, `lower` and training go on as ever; but keep the scales.
    `correct_bias` behind it helps where weights lose more than values (W4A8), and harms where blocks have made up for
    values of few bits (W4A4). Blocks of one form and shape are compiled once. All samples of the values between two
    blocks are in memory, twice.

    Args:
      model: calibrated. The scales of weights stay as they are: search them before.
      batches: calibration data, as for `jq.calibrate`.
      steps: of Adam for each block, at least 1.
      batch: samples of a step.
      layers: as for `find_blocks`.
      drop: from 0 (every value is quantized: BRECQ) to 1; 0.5 is QDrop's.
      learning_rate: of the roundings, in units of v, which runs from -2.4 to 2.4.
      scale_learning_rate: of the logarithms of scales; 0 leaves them as they are.
      strength: of the regularizer that drives roundings up or down, relative to the error of the block as it was.
      seed: of samples and drops.

    Returns:
      The model with other weights and scales of values.

    Raises:
      CalibrationError: no batches, or scales that are missing. InputError: inputs without a batch axis.
      QConfigError: a setting out of range, or a weight with a learned offset.

    References:
      Li et al. 2021, BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (blocks; without
      the weights of its Fisher information). Wei et al. 2022, QDrop: Randomly Dropping Quantization for Extremely
      Low-bit Post-Training Quantization. Nagel et al. 2020 (roundings), Esser et al. 2020 (scales).

    Example:
      model = jq.ptq.search_weight_scales(jq.calibrate(model, batches))
      model = jq.ptq.reconstruct_blocks(model, batches)
    """
    settings = Settings(steps, batch, drop, learning_rate, scale_learning_rate, strength)
    settings.check()
    plan = model.plan
    check_folded(plan, "reconstruct_blocks")
    check_model(model)
    _check_offsets(plan)
    blocks, shapes = find_blocks(model, layers=layers).all, value_shapes(plan.graph, model.params)
    ticks = track(range(len(blocks) * steps), "reconstructing blocks")
    plain = _joined(plan, batches)
    settings = replace(settings, batch=min(batch, len(next(iter(plain.values())))))
    tap = fake_quant_tap(plan, model.qparams)
    quantized = {name: tap(name, x) for name, x in plain.items()}
    new, done = model, set[str]()
    for i, block in enumerate(blocks):
        names = names_of(block)
        ours = [(own, name) for own, name in names.values.items() if name in block.inputs]
        inputs, seen = ({own: values[name] for own, name in ours} for values in (plain, quantized))
        data = Data(inputs, seen, _outputs(cut_out(model, block, shapes), "float", inputs, settings.batch))
        free = tuple(own for own, key in names.params.items() if key in plan.weights and key not in done)
        before = cut_out(new, block, shapes)
        after, made = _learned(before, data, free, settings, jax.random.fold_in(jax.random.key(seed), i), ticks)
        new = _put_back(new, after, names)
        done |= set(block.params)
        later = {name for rest in blocks[i + 1 :] for name in rest.inputs}
        plain, quantized = (
            {name: x for name, x in (values | _named(outputs, names)).items() if name in later}
            for values, outputs in ((plain, data.wanted), (quantized, made))
        )
    return raise_collapsed_scales(new)


def _check_offsets(plan: Plan) -> None:
    for key, spec in plan.weights.items():
        if quantizer_of(spec).has_offset:
            raise QConfigError(
                f"weight {key!r} has an offset to learn (lsq_plus); reconstruct_blocks rounds on a grid without one"
            )


def _joined(plan: Plan, batches: Iterable[Any]) -> Values:
    """All samples of every graph input."""
    found = list(bound_batches(plan, batches))
    samples_of(plan, found[0])
    return {name: jnp.concatenate([inputs[name] for inputs in found]) for name in found[0]}


def _named(values: Values, names: Names) -> Values:
    return {names.values[own]: value for own, value in values.items()}


def _put_back(model: Model, block: Model, names: Names) -> Model:
    params = {name: block.params[own] for own, name in names.params.items()}
    named = {**names.values, **names.params}
    qparams = {named[own]: parameter for own, parameter in block.qparams.items()}
    return model.replace(params={**model.params, **params}, qparams={**model.qparams, **qparams})


# ---------------------------------------------------------------------------------------------------------------------
# What a block makes


def _outputs(block: Model, mode: Mode, inputs: Values, batch: int) -> Values:
    """The outputs of a block for all samples, `batch` of them at a time."""
    count = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, count, batch):
        found = _outputs_of(block, mode, inputs, jnp.arange(start, start + batch) % count)  # one shape, one compilation
        parts.append({name: value[: count - start] for name, value in found.items()})
    return {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}


@partial(jax.jit, static_argnames=("mode",))
def _outputs_of(block: Model, mode: Mode, inputs: Values, samples: Array) -> Values:
    values = meaning_of(block, mode).values({name: x[samples] for name, x in inputs.items()})
    return {name: values[name] for name in block.plan.graph.outputs}


def _noise(made: Values, wanted: Values) -> Values:
    """The mean squared error of each output that is a number."""
    numbers = (name for name in made if jnp.issubdtype(made[name].dtype, jnp.floating))
    return {name: jnp.mean(jnp.square(made[name] - wanted[name])) for name in numbers}


def _relative(noise: Values, before: Values) -> Array:
    """The mean over outputs of noise relative to that before."""
    return jnp.mean(jnp.stack([noise[name] / jnp.maximum(before[name], TINY) for name in noise]))


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def _learned(
    block: Model, data: Data, free: tuple[str, ...], settings: Settings, key: Array, ticks: Iterator[int]
) -> tuple[Model, Values]:
    """The block with what it learned if its outputs came closer to float, and its outputs in fake-quant."""
    made = _outputs(block, "fake_quant", data.quantized, settings.batch)
    before = _noise(made, data.wanted)
    if not before:
        return block, made
    state = _start(block, free, settings)
    for step in range(settings.steps):
        state = _update(state, jnp.float32(step), key, block, data, before, settings)
        next(ticks)
    after = _decided(block, state.learned)
    better = _outputs(after, "fake_quant", data.quantized, settings.batch)
    return (after, better) if _relative(_noise(better, data.wanted), before) < 1 else (block, made)


def _start(block: Model, free: tuple[str, ...], settings: Settings) -> State:
    """Every weight comes out as it went in, every scale is that of calibration."""
    rounded = [key for key in free if not block.plan.weights[key].is_float]
    v = {key: adaround_parameter(block.params[key], _scale(block, key), _plain(block.plan, key))[1] for key in rounded}
    scales = {name: jnp.float32(0.0) for name in _learned_scales(block.plan)} if settings.scale_learning_rate else {}
    learned = Learned(v, scales)
    return State(learned, settings.optimizer().init(learned))


def _learned_scales(plan: Plan) -> list[str]:
    """Values that the block makes and whose scale is a free real number."""
    made = {node.name for node in plan.graph.nodes}
    return [
        name
        for name in plan.owned
        if name in made
        and name in plan.trained
        and plan.spec(name).scale_form == "real"
        and not quantizer_of(plan.spec(name)).has_offset
    ]


@partial(jax.jit, static_argnames=("settings",), donate_argnums=0)
def _update(
    state: State, step: Array, key: Array, block: Model, data: Data, before: Values, settings: Settings
) -> State:
    """A step of Adam on a few of the samples."""
    key = jax.random.fold_in(key, step.astype(jnp.int32))
    count = len(next(iter(data.plain.values())))
    samples = jax.random.choice(jax.random.fold_in(key, 0), count, (settings.batch,), replace=False)
    few = jax.tree.map(lambda x: x[samples], data)

    def loss(learned: Learned) -> Array:
        made = _soft_outputs(block, learned, few, jax.random.fold_in(key, 1), settings.drop)
        error = _relative(_noise(made, few.wanted), before)
        return error + settings.strength * _undecided(block, learned, step / settings.steps)

    gradients = jax.grad(loss)(state.learned)
    # Optimizers mix integer counts with floats: a user's strict dtype promotion is not for their code.
    with jax.numpy_dtype_promotion("standard"):
        by, memory = settings.optimizer().update(gradients, state.memory)
    return State(jax.tree.map(jnp.add, state.learned, by), memory)


def _soft_outputs(block: Model, learned: Learned, data: Data, key: Array, drop: float) -> Values:
    """The outputs with soft roundings, the values quantized in some places and in float elsewhere."""
    plan, places = block.plan, {name: i for i, name in enumerate(block.plan.graph.values)}
    own, params = fake_quant_tap(plan, block.qparams), {**block.params, **_soft_weights(block, learned)}

    def mixed(name: str, plain: Array, quantized: Array) -> Array:
        return jnp.where(_chance(jax.random.fold_in(key, places[name]), plain.shape, drop), plain, quantized)

    def tap(name: str, value: Array) -> Array:
        if name not in plan.owned:
            return value
        if name not in learned.scales:
            return mixed(name, value, own(name, value))
        return mixed(name, value, lsq(value, _scale(block, name) * jnp.exp(learned.scales[name]), plan.spec(name)))

    values = {name: mixed(name, x, data.quantized[name]) for name, x in data.plain.items()}
    evaluate_nodes(plan.graph.nodes, values, float_rule(plan.graph, params), tap)
    return {name: values[name] for name in plan.graph.outputs}


def _chance(key: Array, shape: tuple[int, ...], share: float) -> Array:
    """True for a share of the entries, at random; to 1 / 256, since a byte an entry is all that is drawn."""
    words = jax.random.bits(key, (-(-prod(shape) // 4),), jnp.uint32)
    drawn = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: prod(shape)].reshape(shape)
    return drawn.astype(jnp.int32) < round(256 * share)


def _soft_weights(block: Model, learned: Learned) -> Values:
    plan, found = block.plan, dict[str, Array]()
    for key in plan.weights:
        if key in learned.v:
            found[key] = soft_round(block.params[key], _parameter(block, key, learned.v[key]), _plain(plan, key))
        else:
            found[key] = fake_quant_weight(key, plan, block.params, block.qparams)
    return {key: w.transpose(plan.turned[key]) if key in plan.turned else w for key, w in found.items()}


def _undecided(block: Model, learned: Learned, progress: Array) -> Array:
    """The mean over weights of 1 - |2 h - 1|^beta; 0 in the first steps."""
    progress = (progress - WARM_UP) / (1.0 - WARM_UP)
    beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1.0 - jnp.maximum(progress, 0.0))
    sums = [rounding_regularizer(_parameter(block, key, v), beta) for key, v in learned.v.items()]
    count = sum(v.size for v in learned.v.values())
    return jnp.where(progress > 0, sum(sums, jnp.float32(0.0)) / max(count, 1), 0.0)


def _decided(block: Model, learned: Learned) -> Model:
    """The block with its weights up or down, on the grid, and its scales."""
    plan, params, qparams = block.plan, dict(block.params), dict(block.qparams)
    for key, v in learned.v.items():
        scale, (low, high) = _scale(block, key), map(float, plan.weights[key].range)
        up = jnp.where(rectified_sigmoid(v) >= 0.5, 1.0, 0.0)
        params[key] = jnp.clip(jnp.floor(divide(params[key], scale)) + up, low, high) * scale
    for name, log in learned.scales.items():
        spec = plan.spec(name)
        qparams[name] = quantizer_of(spec).init(_scale(block, name) * jnp.exp(log), spec)
    return block.replace(params=params, qparams=qparams)


def _plain(plan: Plan, key: str) -> QuantSpec:
    return QuantSpec(dtype=plan.weights[key].dtype, rounding=plan.weights[key].rounding)


def _scale(block: Model, name: str) -> Array:
    """The scale of a value, or that of every entry of a weight."""
    scale = scale_of(name, block.plan, block.qparams)
    if name not in block.params:
        return scale
    weight = block.params[name]
    return jnp.broadcast_to(expand(scale, block.plan.weight_axis.get(name), weight.ndim), weight.shape)


def _parameter(block: Model, key: str, v: Array) -> Array:
    return jnp.stack([_scale(block, key), v])
