"""Products in parts: the integers of the reference for every geometry, and the memory that they save."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jquant as jq
from jquant.numerics import convolution, parts
from jquant.numerics.parts import Parts, are_parts_of_use, in_parts, parts_of_examples, parts_of_rows
from jquant.numerics.platform import tracing_for
from jquant_converters import from_torch


class Net(torch.nn.Module):
    """Windows of all kinds, a residual behind a convolution, a transposition, and linear layers over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 20, 7, 2, 3)
        self.tall = torch.nn.Conv2d(20, 20, (5, 3), (1, 1), (4, 1), (2, 1))
        self.back = torch.nn.Conv2d(20, 20, 1)
        self.depth = torch.nn.Conv2d(20, 20, 3, 1, 1, groups=20)
        self.group = torch.nn.Conv2d(20, 20, 3, 2, 1, groups=5)
        self.up = torch.nn.ConvTranspose2d(20, 8, 3, 2)
        self.line = torch.nn.Conv1d(8, 8, 3, 1, 1)
        self.inner, self.outer = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.back(torch.relu(self.tall(x))))
        x = torch.relu(self.group(self.depth(x)))
        x = self.line(self.up(x).flatten(2)).transpose(1, 2)
        return x + self.outer(torch.relu(self.inner(x)))


def program_of(dtype: str, size: tuple[int, int]) -> jq.Program:
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    graph, params = from_torch(Net().eval(), (torch.from_numpy(x),))
    output = {"int8": jq.int8(), "int16": jq.int16()}[dtype]
    config = jq.QConfig({"*": jq.Policy(output=output, weight=jq.int8(axis="out"))})
    return jq.lower(jq.calibrate(jq.prepare(graph, params, config, target="nash-e"), [jnp.asarray(x)]))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Parts]:
    """Limits that every layer is beyond; the parts that were made."""
    monkeypatch.setattr(parts, "OF_EXAMPLES", 6000)
    monkeypatch.setattr(parts, "OF_ROWS", 5000)
    made: list[Parts] = []
    run = in_parts
    monkeypatch.setattr("jquant.ops.conv.in_parts", lambda f, p, *rest: (made.append(p), run(f, p, *rest))[1])
    jax.clear_caches()
    return made


@pytest.mark.parametrize(("dtype", "batch"), [("int8", 1), ("int8", 5), ("int16", 3)])
def test_a_net_in_parts_gives_the_integers_of_the_reference(small: list, dtype: str, batch: int) -> None:
    program = program_of(dtype, (21, 17))
    info = np.iinfo(dtype)
    x = np.random.default_rng(1).integers(info.min, info.max + 1, (batch, 3, 21, 17)).astype(dtype)
    found = jq.run_with_taps(program, x, raw=True)
    _, expected = jq.reference.run(program, x, raw=True)
    for name in program.graph.values:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert {p.axis for p in small} == ({0, 1} if dtype == "int8" else {1, 0})
    assert {(p.stride, p.extent) for p in small if p.axis == 1} >= {(2, 7), (1, 9)}
    assert any(p.total % p.size for p in small)  # a last part that overlaps


def test_which_parts() -> None:
    """Bytes: 8 MB for several examples, 4 MB for rows."""
    assert parts_of_examples((8, 112, 112, 96), 4) == Parts(0, 1, 8)  # 4.8 MB each
    assert parts_of_examples((8, 112, 112, 64), 4) == Parts(0, 2, 8)
    assert parts_of_examples((7, 100, 100, 64), 4) == Parts(0, 3, 7)  # 2.56 MB: three fit, three parts
    assert parts_of_examples((8, 56, 56, 64), 4) is None
    assert parts_of_examples((1, 112, 112, 96), 4) is None
    assert parts_of_examples((4, 512, 512, 64), 4) is None  # one alone is too large
    assert parts_of_examples((100_000, 512), 4) == Parts(0, 4000, 100_000)
    assert parts_of_rows((4, 512, 512, 64), 4, 2, 3) == Parts(1, 8, 512, 2, 3)
    assert parts_of_rows((1, 112, 112, 96), 4, 1, 1) == Parts(1, 56, 112)
    assert parts_of_rows((1, 112, 112, 64), 4, 1, 3) is None
    assert parts_of_rows((8, 112, 112, 96), 4, 1, 3) is None  # examples are parts
    assert parts_of_rows((1, 1, 10_000, 512), 4, 1, 1) is None  # one row cannot be divided
    (batch,) = jax.export.symbolic_shape("batch")
    assert parts_of_examples((batch, 112, 112, 96), 4) is None
    assert parts_of_rows((batch, 512, 512, 96), 4, 1, 1) is None


@pytest.mark.parametrize(("total", "size"), [(12, 4), (13, 4), (5, 4), (4, 4), (9, 1)])
def test_windows_of_rows_by_hand(total: int, size: int) -> None:
    x = np.arange(2 * (2 * total + 3), dtype=np.int32).reshape(2, -1)
    addend = np.arange(2 * total, dtype=np.int32).reshape(2, -1)
    sums = np.stack([x[:, 2 * i : 2 * i + 3].sum(1) for i in range(total)], 1) + addend

    def compute(x: jax.Array, addend: jax.Array | None) -> jax.Array:
        assert x.shape == (2, 2 * size + 1)
        return jnp.stack([x[:, 2 * i : 2 * i + 3].sum(1) for i in range(size)], 1) + addend

    found = jax.jit(lambda x, a: in_parts(compute, Parts(1, size, total, 2, 3), x, a))(x, addend)
    np.testing.assert_array_equal(found, sums)


def test_parts_are_for_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert are_parts_of_use() == (jax.device_count() == 1 and jax.default_backend() == "cpu")
    with tracing_for(["cpu"]):
        assert not are_parts_of_use()
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not are_parts_of_use()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="parts are for a CPU")
def test_the_accumulators_of_a_batch_are_not_all_in_memory() -> None:
    """Two convolutions of 8 examples with 4.8 MB of accumulators each: below 1.5 times the bytes of both results."""
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(96, 16, 1, 1)), "b": rng.normal(size=(96, 96, 3, 3))}
    params = {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}
    names = ("NCHW", "OIHW", "NCHW")

    def net(p, x):
        y = jax.nn.relu(jax.lax.conv_general_dilated(x, p["a"], (1, 1), "SAME", dimension_numbers=names))
        return jax.nn.relu(jax.lax.conv_general_dilated(y, p["b"], (1, 1), "SAME", dimension_numbers=names))

    x = jnp.asarray(rng.normal(size=(1, 16, 112, 112)), jnp.float32)
    graph, params = jq.trace(net, params, x)
    config = jq.QConfig(jq.templates.int8_default())
    model = jq.prepare(graph, params, config, target="nash-e", high_precision_outputs=False)
    program = jq.lower(jq.calibrate(model, [x]))
    integers = jnp.zeros((8, 16, 112, 112), jnp.int8)
    compiled = jax.jit(lambda p, x: jq.run(p, x, raw=True)).lower(program, integers).compile()
    activations = 2 * 8 * 96 * 112 * 112
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * activations


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's library of integers is on the CPU")
@pytest.mark.parametrize("stack", [(), (3,)])
def test_one_row_makes_no_copy_of_the_other_operand(stack: tuple[int, ...]) -> None:
    """XLA would hold it in int32, four times its bytes."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, (*stack, *shape)).astype(np.int8) for shape in ((1, 300), (300, 200)))
    expected = np.matmul(a.astype(np.int64), b.astype(np.int64))
    product = jax.jit(lambda a, b: convolution.batch_matmul(a, b) if stack else convolution.matmul(a, b))
    compiled = product.lower(a, b).compile()
    np.testing.assert_array_equal(compiled(a, b), expected)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * b.nbytes
