"""The same linen and nnx nets quantized by jquant and by qwix, W8A8: accuracy, steps, compile time. Writes RESULTS.md.

python benchmarks/peers_in_jax.py [--nets resnet lstm] [--rounds 30] [--no-write]

qwix is measured where it is installed, by `pip install --no-deps -r benchmarks/requirements.txt`. It is used as its
documentation says, `QtProvider` for training and `PtqProvider` for inference: values get a scale for each row, from the
row itself. jquant has one calibrated scale for a tensor, which is what the chip has; so it has fewer decibels.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

import jquant as jq
from jquant.host.progress import track

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from keeping import markdown_table  # noqa: E402
from results import write_section  # noqa: E402
from support import jax_nets  # noqa: E402
from timing import THREADS, Contender, measure  # noqa: E402

BATCH = 32
WIDE = (256, 4, 1024)  # features, heads, hidden: as wide as the layers of a small model in use
EVERYTHING = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())})
_NUDGED = 20  # entries of a kernel
_OPERANDS = {"Conv": ("x",), "Linear": ("x",), "MatMul": ("a", "b")}


class Subject(NamedTuple):
    """A module, its example inputs, and its params as `filled` draws them."""

    framework: str
    module: Any
    inputs: tuple[jax.Array, ...]


class Candidate(NamedTuple):
    """What a library made of a subject.

    `answer`  the quantized outputs on the held-out inputs
    `step`    a jitted gradient on the held-out inputs with respect to the first of `leaves`, what is trained
    `leaves`  what is trained, and what is not: scales, which get no gradient from `fake_quant`
    `int8`    matrix products and convolutions with int8 operands, of all
    """

    answer: jax.Array
    step: Callable[..., Any]
    leaves: tuple[Any, Any]
    int8: str


def _images(size: int) -> jax.Array:
    return jax_nets.images(BATCH, size, size, 3)


def _ids(length: int, limit: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, limit, (BATCH, length)), jnp.int32)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "resnet": lambda: Subject("linen", jax_nets.ResNet(), (_images(32),)),
    "mobilenet": lambda: Subject("linen", jax_nets.MobileNet(), (_images(32),)),
    "convnext": lambda: Subject("nnx", jax_nets.ConvNext(nnx.Rngs(0)), (_images(32),)),
    "vision_transformer": lambda: Subject("linen", jax_nets.VisionTransformer(), (_images(12),)),
    "mixer": lambda: Subject("nnx", jax_nets.Mixer(nnx.Rngs(0)), (_images(12),)),
    "lstm": lambda: Subject("linen", jax_nets.LstmClassifier(), (_ids(5, 13),)),
    "decoder": lambda: Subject("nnx", jax_nets.Decoder(nnx.Rngs(0)), (_ids(7, 17),)),
    "wide_transformer": lambda: Subject("linen", jax_nets.VisionTransformer(*WIDE), (_images(32),)),
    "wide_mixer": lambda: Subject("nnx", jax_nets.Mixer(nnx.Rngs(0), 64, 256, (128, 1024)), (_images(32),)),
    "wide_lstm": lambda: Subject("linen", jax_nets.LstmClassifier(256, 256), (_ids(16, 13),)),
    "wide_decoder": lambda: Subject("nnx", jax_nets.Decoder(nnx.Rngs(0), *WIDE), (_ids(32, 17),)),
}


def held_out(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Others of the same distribution."""
    rng = np.random.default_rng(1)
    return tuple(
        jax_nets.images(*x.shape, seed=1)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else jnp.asarray(rng.integers(0, int(x.max()) + 1, x.shape), x.dtype)
        for x in inputs
    )


def net_of(subject: Subject) -> jax_nets.Net:
    make = jax_nets.linen if subject.framework == "linen" else jax_nets.nnx_net
    return make(subject.module, *subject.inputs)


def _gradient(run: Callable[..., jax.Array], inputs: tuple[jax.Array, ...]) -> Callable[..., Any]:
    """Of `run(trained, *inputs)`, or `run({"params": trained, "qparams": scales}, *inputs)`."""

    def loss(trained: Any, scales: Any) -> jax.Array:
        return jnp.mean(run({"params": trained, "qparams": scales} if scales else trained, *inputs) ** 2)

    return jax.jit(jax.value_and_grad(loss, allow_int=True))


def in_float(subject: Subject) -> Candidate:
    net, inputs = net_of(subject), held_out(subject.inputs)
    return Candidate(net.fn(net.params, *inputs), _gradient(net.fn, inputs), (net.params, {}), "")


def by_jquant(subject: Subject) -> Candidate:
    """Every value quantized, as an integer program needs it."""
    net, inputs = net_of(subject), held_out(subject.inputs)
    qfn, variables = jq.quantize(net.fn, net.params, EVERYTHING, [subject.inputs])
    serve = partial(jq.run, qfn.lower(variables))
    return Candidate(serve(*inputs), _gradient(qfn, inputs), _leaves(variables), _int8_share(serve, inputs))


def _leaves(variables: Mapping[str, Any]) -> tuple[Any, Any]:
    return variables["params"], variables["qparams"]


def products_by_jquant(subject: Subject) -> Candidate:
    """Only the operands of products quantized, as qwix does it."""
    net, inputs = net_of(subject), held_out(subject.inputs)
    graph, _ = jq.trace(net.fn, net.params, *subject.inputs)
    kinds = {type(node.op).__name__ for node in graph.nodes} & set(_OPERANDS)
    rules = {
        f"type:{kind}": jq.Policy(weight=jq.int8(axis="out"), input={port: jq.int8() for port in _OPERANDS[kind]})
        for kind in kinds
    }
    qfn, variables = jq.quantize(net.fn, net.params, jq.QConfig({"*": None, **rules}), [subject.inputs])
    return Candidate(qfn(variables, *inputs), _gradient(qfn, inputs), _leaves(variables), "in float")


def by_qwix(subject: Subject) -> Candidate:
    import qwix

    rule: dict[str, Any] = {"module_path": ".*", "weight_qtype": jnp.int8, "act_qtype": jnp.int8}
    trained, served = qwix.QtProvider([qwix.QtRule(**rule)]), qwix.PtqProvider([qwix.QuantizationRule(**rule)])
    net, inputs = net_of(subject), held_out(subject.inputs)
    if subject.framework == "linen":
        train = qwix.quantize_model(subject.module, trained).apply
        answers = qwix.quantize_model(subject.module, served)
        abstract = jax.eval_shape(answers.init, jax.random.key(0), *inputs)["params"]
        own = {**net.params, "params": qwix.quantize_params(net.params["params"], abstract)}
        serve = partial(answers.apply, own)
        return Candidate(serve(*inputs), _gradient(train, inputs), (net.params, {}), _int8_share(serve, inputs))
    nnx.update(subject.module, net.params)
    definition, state = nnx.split(qwix.quantize_model(subject.module, trained, *subject.inputs))
    serve = partial(_merged, *nnx.split(qwix.quantize_model(subject.module, served, *subject.inputs)))
    step = _gradient(partial(_merged, definition), inputs)
    return Candidate(serve(*inputs), step, (state, {}), _int8_share(serve, inputs))


def _merged(definition: Any, state: Any, *inputs: jax.Array) -> jax.Array:
    return nnx.merge(definition, state)(*inputs)


LIBRARIES: dict[str, tuple[str, Callable[[Subject], Candidate]]] = {
    "jquant, all values": ("jquant", by_jquant),
    "jquant, products alone": ("jquant", products_by_jquant),
    "qwix, products alone": ("qwix", by_qwix),
}


def _equations(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: isinstance(v, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from _equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def _int8_share(run: Callable[..., Any], inputs: tuple[jax.Array, ...]) -> str:
    """Of the matrix products and convolutions that a function traces to, how many have integer operands."""
    found = [
        all(jnp.issubdtype(operand.aval.dtype, jnp.integer) for operand in equation.invars)
        for equation in _equations(jax.make_jaxpr(run)(*inputs).jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    return f"{sum(found)} of {len(found)}"


def sqnr(float_answer: jax.Array, answer: jax.Array) -> float:
    wanted, got = (np.asarray(v, np.float64) for v in (float_answer, answer))
    return float(10 * np.log10((wanted**2).sum() / max(((wanted - got) ** 2).sum(), 1e-30)))


def compiled(candidate: Candidate) -> float:
    """Seconds from tracing to a program that runs."""
    start = time.perf_counter()
    candidate.step.lower(*candidate.leaves).compile()  # type: ignore[attr-defined]
    return time.perf_counter() - start


EXPLAINED = """SQNR is that of the quantized outputs on inputs that calibrated nothing; with all values quantized, that
of the integers. qwix takes a scale for each row of values from the row itself, jquant one for the whole tensor from
calibration, as the chip has it. qwix multiplies integers in the forward pass and takes the gradient of the unquantized
operands; jquant that of the quantized ones, 0 beyond their range. A kernel counts as quantized where training has it on
a grid; with few of them, a step is a float step. Nets called wide have layers of up to 1024 features. The transformer,
mixer, lstm and decoder beside them are so small that the call is a large part of a step."""
COLUMNS = ("net", "library", "SQNR, dB", "int8 products", "kernels quantized", "step / float step", "compile / float")


def rounds_for(contenders: list[Contender], least: int) -> int:
    """More of them where steps are short and vary, up to 300: as many as take about five seconds."""
    for contender in contenders:
        contender.step()  # compiles
    start = time.perf_counter()
    for contender in contenders:
        contender.step()
    return max(least, min(300, int(5 / (time.perf_counter() - start))))


def quantized_kernels(candidate: Candidate) -> str:
    """How many kernels a step trains on a grid: entries moved by a tenth of an LSB mostly move no bit of the loss.

    Raises:
      ValueError: a kernel without a gradient.
    """
    trained, scales = candidate.leaves
    loss, gradient = candidate.step(trained, scales)
    leaves, tree = jax.tree.flatten(trained)
    found = []
    for i, (path, slope) in enumerate(jax.tree.leaves_with_path(gradient)):
        name = jax.tree_util.keystr(path)
        if "kernel" not in name:
            continue
        if not jnp.any(slope != 0):
            raise ValueError(f"no gradient reaches {name}")
        kernel, slope = np.asarray(leaves[i]), np.abs(np.asarray(slope))
        size = np.abs(kernel)
        inner = np.all([size < 0.8 * size.max(axis, keepdims=True) for axis in range(kernel.ndim)], axis=0)
        still = 0
        for entry in np.argsort(np.where(inner, slope, -1.0), axis=None)[-_NUDGED:]:
            nudged = kernel.copy()
            nudged.flat[entry] += 0.1 * size.max() / 127
            moved, _ = candidate.step(tree.unflatten([*leaves[:i], nudged, *leaves[i + 1 :]]), scales)
            still += bool(moved == loss)
        found.append(still > _NUDGED // 2)
    return f"{sum(found)} of {len(found)}"


def compare(name: str, rounds: int) -> list[list[str]]:
    """The rows of a net: a row for each library that is here."""
    base = in_float(SUBJECTS[name]())
    seconds = compiled(base)
    rows, contenders = {}, [Contender("float", lambda: jax.block_until_ready(base.step(*base.leaves)), "float")]
    for library, (package, quantize) in LIBRARIES.items():
        title = [f"{name}, {SUBJECTS[name]().framework}", library]
        if find_spec(package) is None:
            continue
        try:
            found = quantize(SUBJECTS[name]())
            ratio = f"{compiled(found) / seconds:.1f}"
            made = [f"{sqnr(base.answer, found.answer):.1f}", found.int8, quantized_kernels(found)]
            rows[library] = [*title, *made, "", ratio]
        except Exception as error:  # whatever a library raises is its answer
            words = str(error).strip().splitlines() or [""]
            rows[library] = [*title, f"{type(error).__name__}: {words[0][:80]}", *["-"] * 4]
            continue
        step = partial(lambda c: jax.block_until_ready(c.step(*c.leaves)), found)
        contenders.append(Contender(library, step, "float"))
    times = measure(contenders, rounds_for(contenders, rounds))
    for contender in contenders[1:]:
        low, middle, high = np.quantile(np.divide(times[contender.name], times["float"]), (0.25, 0.5, 0.75))
        rows[contender.name][5] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return list(rows.values())


def main(argv: list[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-write", action="store_true", help="do not write RESULTS.md")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    rows = []
    for name in track(options.nets, "nets"):
        rows += compare(name, options.rounds)
        jax.clear_caches()
    table = markdown_table(COLUMNS, rows, left=2)
    print(table)
    if not options.no_write:
        where = f"{THREADS} threads of an {platform.machine()} CPU; jax {jax.__version__}"
        how = f"`python benchmarks/peers_in_jax.py`: W8A8, batches of {BATCH}, {options.rounds} to 300 rounds, {where}."
        text = f"## Beside qwix\n\n{how} {EXPLAINED}\n\n{table}"
        write_section("peers_in_jax", text)
    return rows


if __name__ == "__main__":
    main()
