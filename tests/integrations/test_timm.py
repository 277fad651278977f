"""Models of timm around a bottleneck: transformers and convolutional networks, pooled and not."""

import pytest
import torch

import kvb

pytestmark = pytest.mark.integrations
timm = pytest.importorskip("timm", reason="pip install timm")
SIZES = {"num_codebooks": 2, "key_value_pairs_per_codebook": 8, "dim_keys": 4, "dim_values": 3}


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("resnet18", (7, 7)),
        ("convnext_atto", (7, 7)),
        ("mobilenetv3_small_100", (7, 7)),
        ("swin_tiny_patch4_window7_224", (7, 7)),
        ("vit_tiny_patch16_224", (197,)),
        ("mixer_s32_224", (49,)),
    ],
)
def test_models(name, positions):
    model, images = timm.create_model(name).eval(), torch.randn(2, 3, 224, 224)
    pooled = kvb.BottleneckedEncoder.from_timm(model, **SIZES).eval()
    want = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(pooled.forward_encoder(images), want)
    assert pooled(images).shape == (2, 2, 3)
    every = kvb.BottleneckedEncoder.from_timm(model, pooling="none", **SIZES).eval()
    assert every(images).shape == (2, 2, *positions, 3)
