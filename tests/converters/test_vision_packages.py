"""The networks of torchvision and timm as they are, with random weights, where the packages are installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import architectures, vision_packages

from jquant.graph.float import evaluate_float
from jquant_converters import from_torch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the packages

TORCHVISION = {
    "resnet18": 64, "resnet50": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64,
    "convnext_tiny": 64, "vgg11_bn": 64, "densenet121": 64, "shufflenet_v2_x1_0": 64, "squeezenet1_1": 64,
    "mnasnet0_5": 64, "regnet_y_400mf": 64, "googlenet": 64, "swin_t": 64, "vit_b_32": 224,
    "segmentation.deeplabv3_mobilenet_v3_large": 64, "segmentation.lraspp_mobilenet_v3_large": 64,
}  # fmt: skip
TIMM = (
    "resnet10t", "mobilevit_xxs", "ghostnet_050", "convnextv2_atto", "repvgg_a0", "lcnet_050", "hardcorenas_a",
    "efficientnet_lite0", "mobilenetv4_conv_small", "tinynet_e", "regnetx_002", "dla46_c", "ese_vovnet19b_dw",
    "edgenext_xx_small", "poolformer_s12", "legacy_seresnet18", "skresnet18", "mobileone_s0", "repghostnet_050",
    "starnet_s1", "rexnet_100", "nf_regnet_b0", "fbnetc_100", "cs3darknet_s",
)  # fmt: skip


def check(factory, side):
    """Two images, imported at one, equal to torch within 1e-4 of the largest output."""
    module = architectures.made(factory)
    graph, params = from_torch(module, (torch.zeros(1, 3, side, side),))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(x))
    actual = jax.jit(lambda x: evaluate_float(graph, params, x))(jnp.asarray(x.numpy()))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), e.numpy(), rtol=0, atol=1e-4 * float(e.abs().max()))
    assert graph.inputs[0].shape[0] is None


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    torchvision = vision_packages.load("torchvision")
    if torchvision is None:
        pytest.skip("torchvision is not installed")
    folder, _, last = name.rpartition(".")
    maker = getattr(getattr(torchvision.models, folder) if folder else torchvision.models, last)
    options = {"weights_backbone": None} if folder else {}
    options |= {"init_weights": False, "aux_logits": False} if last == "googlenet" else {}
    check(lambda: maker(weights=None, **options), TORCHVISION[name])


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = vision_packages.load("torchvision") and vision_packages.load("timm")
    if timm is None:
        pytest.skip("timm is not installed")
    check(lambda: timm.create_model(name, pretrained=False), 64)
