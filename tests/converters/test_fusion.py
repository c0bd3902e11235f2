"""What `prepare` fuses against what torch.ao fuses, on the models that torch tests its own fusion with."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import vision_packages
from torch import nn

import jquant as jq
from jquant_converters import from_torch

pytest.importorskip("expecttest")  # torch.testing._internal needs it

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.ao, which moves elsewhere


def models():
    vision_packages.load("torchvision")  # which the module below imports where it is there
    from torch.testing._internal import common_quantization as cq

    everything = [
        ["conv1", "bn1", "relu1"],
        ["sub1.conv", "sub1.bn"],
        ["sub2.conv", "sub2.relu"],
        ["conv3", "bn3", "relu4"],
    ]
    rows = [[f"features.{i}.{j}" for j in range(3)] for i in range(3)]
    sequential = [["conv1", "relu1"], *rows, ["classifier.0", "classifier.1"]]
    return {
        "for_fusion": (cq.ModelForFusion(None), (2, 3, 1, 19), everything),
        "sequential": (cq.ModelWithSequentialFusion(), (2, 3, 10, 10), sequential),
        "with_bias": (cq.ModelForFusionWithBias(), (2, 3, 9, 9), [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]),
        "linear_bn": (cq.ModelForLinearBNFusion(), (2, 20), [["fc", "bn"]]),
        "transposed_bn": (cq.ModelForConvTransposeBNFusion(), (2, 3, 4), [[f"conv{i}", f"bn{i}"] for i in (1, 2, 3)]),
        "conv_bn": (cq.ConvBnModel(), (2, 3, 8, 8), [["conv", "bn"]]),
        "conv_bn_relu": (cq.ConvBnReLUModel(), (2, 3, 8, 8), [["conv", "bn", "relu"]]),
        "conv_relu": (cq.ConvReluModel(), (2, 3, 8, 8), [["fc", "relu"]]),
        "linear_relu": (cq.LinearReluModel(), (2, 5), [["fc", "relu"]]),
    }


NAMES = (
    "for_fusion", "sequential", "with_bias", "linear_bn", "transposed_bn", "conv_bn", "conv_bn_relu", "conv_relu",
    "linear_relu",
)  # fmt: skip


def moved(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_var.uniform_(0.5, 1.5, generator=generator)
                m.running_mean.normal_(0, 0.3, generator=generator)
    return module.eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_modules_are_fused_into_the_same_weights(name):
    module, shape, groups = models()[name]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    module = moved(module)
    qconfig = jq.QConfig({"*": jq.Policy(output=jq.int8(), weight=jq.int8(axis="out"))})
    graph, params = from_torch(module, (x,))
    model = jq.prepare(graph, params, qconfig, target=jq.targets.NASH_P)
    fused = torch.ao.quantization.fuse_modules(module, groups)
    inside = {n.name for n in model.plan.graph.nodes}
    for host, *others in groups:
        whole = host in model.plan.weights or f"{host}.weight" in model.plan.weights  # sub2 lies outside of the stubs
        for other in others:
            kept = other in inside
            assert model.plan.renamed.get(other) == host or (kept and not whole), (host, other)
        layer = fused.get_submodule(host)
        layer = layer[0] if isinstance(layer, nn.Sequential) else layer
        np.testing.assert_allclose(
            np.asarray(model.params[model.plan.graph.by_name[host].params["weight"]]),
            layer.weight.detach().numpy(),
            rtol=1e-5,
        )
        if layer.bias is not None:
            bias = np.asarray(model.params[model.plan.graph.by_name[host].params["bias"]])
            np.testing.assert_allclose(bias, layer.bias.detach().numpy(), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        expected = fused(x).numpy()
    actual = np.asarray(jq.apply(model, jnp.asarray(x.numpy()), mode="float"))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))
