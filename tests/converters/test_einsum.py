"""einsum through torch and ONNX, by matrix products: against numpy, with operands of every kind."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from support.onnx_helpers import model_of
from torch import nn

import jquant as jq
from jquant_converters import from_onnx, from_torch
from jquant_converters.einsum import NoForm, Step, einsum_steps

SIZES = dict(zip("abcdhijkntvw", (2, 3, 4, 5, 2, 3, 4, 2, 3, 4, 5, 3), strict=True))
EQUATIONS = (
    "bnc,bmc->bnm", "bnm,bmc->bnc", "bhid,bhjd->bhij", "bhij,bhjd->bhid", "bhid,bhjd->hbji", "nctv,vw->nctw",
    "nctv,wv->nctw", "nctv,tw->ncwv", "nkctv,kvw->nctw", "bchw,bkhw->bck", "bchw,bkhw->bkc", "bqc,bchw->bqhw",
    "ij,j->i", "i,i->", "i,j->ij", "bi,bj->bij", "bi,bi->bi", "ab,ab->", "abc->ca", "abc->", "ab->ba", "abc,c->ab",
    "ij,jk,kd->id", "bi,bj,bk->bijk", "ab,cd->", "ab,cd->ac", "...ij,...jk->...ik", "...i,ij->...j", "b...,b->...",
    "ij,jk", "ba", "b i , i j -> b j",
)  # fmt: skip


def operands_of(equation: str) -> list[np.ndarray]:
    rng, found = np.random.default_rng(0), []
    for part in equation.replace(" ", "").partition("->")[0].split(","):
        letters = part.replace("...", "xy")
        found.append(rng.normal(size=[{**SIZES, "x": 2, "y": 3, "m": 5, "q": 3}[c] for c in letters]))
    return found


def value_of(step: Step | int, operands: list[np.ndarray]) -> np.ndarray:
    if not isinstance(step, Step):
        return operands[step]
    return np.asarray(jq.ops.eval_float(step.op, *(jnp.asarray(value_of(x, operands)) for x in step.operands)))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_steps_are_numpys_einsum(equation: str) -> None:
    operands = [x.astype(np.float32) for x in operands_of(equation)]
    found = value_of(einsum_steps(equation, [x.shape for x in operands]), operands)
    wanted = np.einsum(equation, *(x.astype(np.float64) for x in operands))
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_axis_of_one_broadcasts() -> None:
    a, b = np.ones((2, 1, 4), np.float32), np.full((2, 3, 4), 2, np.float32)
    found = value_of(einsum_steps("bic,bic->bi", [a.shape, b.shape]), [a, b])
    np.testing.assert_allclose(found, torch.einsum("bic,bic->bi", torch.from_numpy(a), torch.from_numpy(b)))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [("ii->i", [(3, 3)]), ("ij,jk->ik", [(2, 3), (4, 5)]), ("ij->k", [(2, 3)]), ("ij", [(2,)]), ("i;j", [(2,), (2,)])],
)
def test_refusals(equation: str, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(NoForm):
        einsum_steps(equation, shapes)


class Products(nn.Module):
    """Attention, a graph convolution and a head of queries, as papers write them."""

    def __init__(self) -> None:
        super().__init__()
        self.adjacency = nn.Parameter(torch.randn(3, 5, 5))
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.einsum("bhid,bhjd->bhij", x, x).softmax(-1)
        y = torch.einsum("bhij,bhjd->bhid", a, x)
        y = torch.einsum("nctv,kvw->nckw", y, self.adjacency)
        return torch.einsum("nckw,ow->nock", y, self.weight)


def test_torch_in_float_and_integers() -> None:
    torch.manual_seed(0)
    module, x = Products().eval(), torch.randn(2, 3, 4, 5)
    graph, params = from_torch(module, (x,))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 4, 5)
        (y,) = jq.graph.evaluate_float(graph, params, jnp.asarray(x.numpy()))
        np.testing.assert_allclose(y, module(x).detach().numpy(), rtol=1e-4, atol=1e-4)
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int16(), weight=jq.int8(axis="out"))})
    model = jq.calibrate(jq.prepare(graph, params, qconfig, target=jq.targets.NASH_E), [jnp.asarray(x.numpy())])
    program = jq.lower(model)
    fast = np.asarray(jq.run(program, jnp.asarray(x.numpy())))
    np.testing.assert_array_equal(fast, jq.reference.run(program, x.numpy())[0][0])
    wanted = module(x).detach().numpy()
    assert np.abs(fast - wanted).max() <= 0.03 * np.abs(wanted).max()


@pytest.mark.parametrize("equation", ["bhid,bhjd->bhij", "b...,b->...", "ij,jk,kd->id", "nctv,wv->nctw"])
def test_onnx(equation: str) -> None:
    operands = [x.astype(np.float32) for x in operands_of(equation)]
    inputs = {f"x{i}": x for i, x in enumerate(operands)}
    node = helper.make_node("Einsum", list(inputs), ["y"], "node", equation=equation)
    graph, params = from_onnx(model_of([node], inputs, {"y": TensorProto.FLOAT}, opset=17))
    (found,) = jq.graph.evaluate_float(graph, params, *map(jnp.asarray, operands))
    np.testing.assert_allclose(found, np.einsum(equation, *operands), rtol=1e-5, atol=1e-5)
    assert graph.nodes[-1].name == "node"
