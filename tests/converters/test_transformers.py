"""The models of `transformers` as they are, small and with random weights, where the package is installed."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import architectures, vision_packages
from torch import nn

from jquant.graph.float import evaluate_float
from jquant_converters import from_torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the package
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
]

TOKENS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PATCHES = {**TOKENS, "image_size": 32, "patch_size": 8}
WORDS = {**TOKENS, "vocab_size": 99}
STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
ALL = ["stage1", "stage2", "stage3", "stage4"]

# {model: (its config without "Config", options of it, shape of the input, or the number of tokens)}
IMAGES = (3, 64, 64)
MODELS = {
    "ViTModel": ("ViT", PATCHES, (3, 32, 32)),
    "DeiTModel": ("DeiT", PATCHES, (3, 32, 32)),
    "Dinov2Model": ("Dinov2", {**TOKENS, "image_size": 28, "patch_size": 7}, (3, 28, 28)),
    "SwinModel": (
        "Swin", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4],
                 "window_size": 4}, (3, 32, 32)),
    "SegformerForSemanticSegmentation": (
        "Segformer", {"hidden_sizes": [16, 32, 48, 64], "depths": [1] * 4, "num_attention_heads": [1, 2, 3, 4],
                      "decoder_hidden_size": 32}, IMAGES),
    "ConvNextModel": ("ConvNext", STAGES, IMAGES),
    "ConvNextV2Model": ("ConvNextV2", STAGES, IMAGES),
    "ResNetModel": ("ResNet", {**STAGES, "embedding_size": 16}, IMAGES),
    "RegNetModel": (
        "RegNet", {"embedding_size": 8, "hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 2, 1], "groups_width": 8},
        IMAGES),
    "PoolFormerModel": ("PoolFormer", {"hidden_sizes": [16, 32, 48, 64], "depths": [1] * 4}, IMAGES),
    "MobileNetV2Model": ("MobileNetV2", {"depth_multiplier": 0.35}, IMAGES),
    "MobileViTModel": (
        "MobileViT", {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 16, 24, 32, 48, 64]},
        IMAGES),
    "BertModel": ("Bert", WORDS, 12),
    "DistilBertModel": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}, 12),
    "GPT2Model": (
        "GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2,
                 "use_cache": False}, 12),
    "LlamaModel": ("Llama", {**WORDS, "use_cache": False}, 12),
    "T5EncoderModel": (
        "T5", {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8, "vocab_size": 99}, 12),
}  # fmt: skip
COMPOSED = {
    "DetrForObjectDetection": lambda t: t.DetrConfig(
        use_timm_backbone=False, backbone_config=t.ResNetConfig(**STAGES, embedding_size=16, out_features=ALL[3:]),
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=7),
    "UperNetForSemanticSegmentation": lambda t: t.UperNetConfig(
        backbone_config=t.ConvNextConfig(**STAGES, out_features=ALL), hidden_size=32, pool_scales=[1, 2],
        use_auxiliary_head=False),
}  # fmt: skip


class Plain(nn.Module):
    """A model that returns its first tensor, instead of a dictionary of many."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        found = self.model(x)
        return found["logits"] if "logits" in found else found["last_hidden_state"]


def check(model, shape):
    module = architectures.made(lambda: Plain(model))
    generator = torch.Generator().manual_seed(0)
    if isinstance(shape, int):
        x = torch.randint(0, 99, (3, shape), generator=generator, dtype=torch.int32)
    else:
        x = torch.randn(3, *shape, generator=generator)
    graph, params = from_torch(module, (x[:1],))
    with torch.no_grad():
        expected = module(x).numpy()
    (actual,) = jax.jit(lambda x: evaluate_float(graph, params, x))(jnp.asarray(x.numpy()))
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert graph.inputs[0].shape[0] is None


def load():
    """transformers, which imports torchvision for pictures where it is there."""
    vision_packages.load("torchvision")
    return vision_packages.load("transformers")


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    transformers = load()
    config, options, shape = MODELS[name]
    check(getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options)), shape)


@pytest.mark.parametrize("name", COMPOSED)
def test_model_with_a_backbone(name):
    transformers = load()
    check(getattr(transformers, name)(COMPOSED[name](transformers)), IMAGES)
