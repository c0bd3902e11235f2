"""Bad cases of a net whose errors numpy computes exactly: any batches, eight devices, two processes, a second start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilations import counted
from support.exact_net import DATA, WEIGHTS, check, cut, exact_net, rounded
from support.processes import finish, start, start_pair

import jquant as jq
from jquant import analysis
from jquant.meanings.meaning import Mode

SCRIPT = """
import sys, jax
from jquant import analysis
from support.exact_net import DATA, check, cut, errors_of, exact_net
"""

EIGHT = """
mesh, model = jax.make_mesh((8,), ("data",)), exact_net()
for size in (61, 16, 10, 3):  # the last batches hold 5, 13, 1 and 1 samples
    check(analysis.find_bad_cases(model, cut(0, 61, size), count=40, mesh=mesh), 40)
print("equal")
"""

TWO = """
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
mesh, model = jax.make_mesh((4,), ("data",)), exact_net()
mine = [cut(0, 40, 8), cut(40, 61, 8)][rank]  # five batches and three
check(analysis.find_bad_cases(model, mine, count=40, mesh=mesh), 40)
own = analysis.find_bad_cases(model, mine, count=1)  # without a mesh each process looks at its share alone
share = [DATA[:40], DATA[40:]][rank]
assert own.index.tolist() == [errors_of(share).argmax()]
print("equal")
"""


@pytest.fixture(scope="module")
def model() -> jq.Model:
    return exact_net()


@pytest.mark.parametrize("b", ["bit_true", "fake_quant"])
@pytest.mark.parametrize("size", [1, 8, 61])
def test_the_cases_are_those_of_a_sort_of_all_errors(model: jq.Model, size: int, b: Mode) -> None:
    check(analysis.find_bad_cases(model, iter(cut(0, 61, size)), "float", b, count=40), 40)


def test_fewer_samples_than_cases(model: jq.Model) -> None:
    check(analysis.find_bad_cases(model, [(DATA[:60],), (DATA[60:],)], count=99), 99)


def test_several_inputs_keep_the_order_of_the_graph() -> None:
    inputs = (jq.Input("z", (None, 6)), jq.Input("a", (None, 6)))
    graph = jq.Graph(inputs, (jq.Node("sum", jq.ops.Add(), ("z", "a")),), ("sum",))
    config = jq.QConfig({"*": jq.Policy(output=jq.int8(scale=1 / 16))})
    z, a = DATA, DATA[::-1]
    model = jq.calibrate(jq.prepare(graph, {}, config, target="nash-e"), [(z, a)])
    cases = analysis.find_bad_cases(model, [(z[:40], a[:40]), (z[40:], a[40:])], metric="max_error", count=4)
    together = rounded(z) + rounded(a)
    order = np.argsort(-np.abs(np.clip(together, -8, 127 / 16) - (z + a)).max(axis=1), kind="stable")[:4]
    assert cases.index.tolist() == order.tolist()
    assert list(cases.inputs) == ["z", "a"]
    for found, wanted in zip(cases.batch(), (z, a), strict=True):
        np.testing.assert_array_equal(found, wanted[order])


def test_ratios_are_sorted_the_other_way(model: jq.Model) -> None:
    """A signal-to-noise ratio becomes noise as a share of the signal, a cosine its distance from 1."""
    y, z = DATA @ WEIGHTS, rounded(DATA) @ WEIGHTS
    noise = ((y - z).astype(np.float64) ** 2).sum(1) / (y.astype(np.float64) ** 2).sum(1)
    found = analysis.find_bad_cases(model, cut(0, 61, 8), metric="sqnr", count=61)
    np.testing.assert_allclose(found.error, noise[found.index], rtol=1e-5)  # a logarithm of float32, about 2e-6
    assert (np.diff(found.error) <= 0).all()
    assert sorted(found.index) == list(range(61))
    a, b = y.astype(np.float64), z.astype(np.float64)
    angle = 1 - (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    found = analysis.find_bad_cases(model, cut(0, 61, 8), metric="cosine", count=3)
    np.testing.assert_allclose(found.error, np.sort(angle)[::-1][:3], atol=1e-6)  # a cosine of float32


def test_a_shorter_last_batch_compiles_nothing_more(model: jq.Model) -> None:
    metric = own_metric()
    with counted() as found:
        check(analysis.find_bad_cases(model, cut(0, 61, 16), metric=metric, count=5), 5)
    assert len(found) == 1
    with counted() as found:  # nor does a model with other scales
        analysis.find_bad_cases(model, cut(0, 61, 16), metric=metric, count=5)
    assert not found


def own_metric():
    """A function that no other test has compiled."""

    def mean_error(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.abs(a - b).mean()

    return mean_error


def test_a_search_that_was_stopped_goes_on(model: jq.Model, tmp_path) -> None:
    path, data = tmp_path / "cases.json", cut(0, 61, 8)

    def stopping():
        yield from data[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.find_bad_cases(model, stopping(), count=12, position=path, save_every=2)
    check(analysis.find_bad_cases(model, data, count=12, position=path), 12)
    with pytest.raises(jq.FormatError, match="other modes or other metrics"):
        analysis.find_bad_cases(model, data, "float", "fake_quant", count=12, position=path)


def test_errors_say_what_to_do(model: jq.Model) -> None:
    with pytest.raises(jq.InputError, match="no batches"):
        analysis.find_bad_cases(model, [])
    with pytest.raises(jq.InputError, match="count must be at least 1"):
        analysis.find_bad_cases(model, [DATA], count=0)
    with pytest.raises(jq.JQuantError, match="fake_quant"):
        analysis.find_bad_cases(model, [DATA], "float", "fakequant")


def test_the_same_cases_on_eight_devices() -> None:
    finish(start(SCRIPT + EIGHT, 8))


def test_the_same_cases_on_two_processes() -> None:
    finish(*start_pair(SCRIPT + TWO, 2))
