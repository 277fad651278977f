"""The encoders that the published package names: how each is loaded, wrapped and cut."""

from __future__ import annotations

import sys
import types
from collections import Counter

import pytest
import torch
from torch import nn

import kvb
from kvb.modules import backbones

pytestmark = pytest.mark.fallback


def resnet(channels, *, padded=False):
    """A network with a ResNet's children, of the given channels by layer."""
    network = nn.Sequential()
    if padded:
        network.add_module("padding", nn.ConstantPad2d(1, 0.0))
    network.add_module("conv1", nn.Conv2d(3, 8, 3, stride=2, padding=1))
    inputs = 8
    for number, outputs in channels.items():
        network.add_module(f"layer{number}", nn.Conv2d(inputs, outputs, 1, stride=2))
        inputs = outputs
    network.add_module("fc", nn.Flatten())
    return network


@pytest.fixture
def hub(monkeypatch):
    """torch.hub.load answers with small networks of the right widths, and keeps what it was asked for."""
    asked = []
    tables = {backbones.RESNET50[1]: backbones.RESNET50, 512: backbones.RESNET50_WIDE, 16: backbones.CIFAR_RESNET}

    def load(repository, name, **options):
        asked.append((repository, name, options))
        if name == "dino_vits8":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 384))
        first = 16 if name.startswith("cifar") else 512 if "w2" in name or "x2" in name else 256
        return resnet(tables[first], padded="swav" in repository or "vicreg" in repository)

    monkeypatch.setattr(torch.hub, "load", load)
    return asked


FACEBOOK = "facebookresearch/"
NAMED = [
    (kvb.DinoBottleneckedEncoder, "dino_resnet50", backbones.RESNET50, FACEBOOK + "dino:main", "dino_resnet50"),
    (kvb.SwavBottleneckedEncoder, "swav_resnet50", backbones.RESNET50, FACEBOOK + "swav:main", "resnet50"),
    (kvb.SwavBottleneckedEncoder, "swav_resnet50w2", backbones.RESNET50_WIDE, FACEBOOK + "swav:main", "resnet50w2"),
    (kvb.VICRegBottleneckedEncoder, "vicreg_resnet50", backbones.RESNET50, FACEBOOK + "vicreg:main", "resnet50"),
    (
        kvb.VICRegBottleneckedEncoder,
        "vicreg_resnet50w2",
        backbones.RESNET50_WIDE,
        FACEBOOK + "vicreg:main",
        "resnet50x2",
    ),
    *(
        (kvb.SLPretrainedBottleneckedEncoder, name, backbones.CIFAR_RESNET, "chenyaofo/pytorch-cifar-models", name)
        for name in ("cifar10_resnet56", "cifar10_resnet22", "cifar100_resnet56", "cifar100_resnet22")
    ),
]


@pytest.mark.parametrize(("kind", "backbone", "channels", "repository", "name"), NAMED)
def test_resnets_of_the_hub(hub, kind, backbone, channels, repository, name):
    x = torch.randn(2, 3, 64, 64)
    for layer, d in channels.items():
        pooled = kind(8, 4, backbone=backbone, extracted_layer=layer)
        assert (pooled.num_channels, pooled.bottleneck.dim_keys, pooled.bottleneck.dim_values) == (d, d // 8, d // 8)
        assert pooled(x).shape == (2, d, 1, 1)  # chunked and concatenated by default: as wide as the features
        whole = kind(8, 4, dim_values=3, backbone=backbone, extracted_layer=layer, pool_embedding=False)
        features = whole.forward_encoder(x)
        assert features.shape[-1] == d
        assert features.shape[1] == features.shape[2] >= 2
        assert whole(x).shape == (2, 24, *features.shape[1:3])
    for asked in hub:
        assert asked == (repository, name, {"pretrained": True} if "cifar" in name else {})


def test_defaults_of_the_named_ones(hub):
    for kind, backbone in [
        (kvb.DinoBottleneckedEncoder, "dino_resnet50"),
        (kvb.SwavBottleneckedEncoder, "swav_resnet50"),
        (kvb.VICRegBottleneckedEncoder, "vicreg_resnet50"),
        (kvb.SLPretrainedBottleneckedEncoder, "cifar10_resnet56"),
    ]:
        model = kind(num_codebooks=16, key_value_pairs_per_codebook=4)
        assert model.backbone == backbone
        assert model.extracted_layer == 3
        assert model.splitting_mode == "chunk"
        assert model.concat_values_from_all_codebooks
        assert not model.encoder_is_channel_last
        assert model.bottleneck.return_values_only
        assert (model.bottleneck.init_mode, model.bottleneck.decay) == ("random", 0.95)


def test_the_vision_transformer(hub):
    model = kvb.DinoBottleneckedEncoder(8, 4, backbone="dino_vits8")
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 384)


@pytest.mark.parametrize(
    ("kind", "channels"),
    [
        (kvb.DinoBottleneckedEncoder, 1024),
        (kvb.SwavBottleneckedEncoder, 1024),
        (kvb.VICRegBottleneckedEncoder, 1024),
        (kvb.SLPretrainedBottleneckedEncoder, 64),
        (kvb.CLIPBottleneckedEncoder, 512),
        (kvb.ConvMixerBottleneckedEncoder, 256),
    ],
)
def test_embeddings_load_nothing(hub, kind, channels):
    model = kind(16, 4, input_is_embedding=True, concat_values_from_all_codebooks=False)
    assert hub == []
    assert model(torch.randn(2, channels)).shape == (2, 16, channels // 16)
    assert model(torch.randn(2, channels, 3, 5)).shape == (2, 16, channels // 16, 3, 5)
    model.prepare(torch.randn(300, channels), progress=False)
    assert model.key_report.rows == 300


def test_clip(monkeypatch):
    class Model(nn.Module):
        def encode_image(self, x):
            return x.mean((2, 3)).repeat(1, 171)[:, :512].half()

    def preprocess(image):
        return image

    clip = types.ModuleType("clip")
    clip.load = lambda name, device: (Model(), preprocess) if (name, device) == ("ViT-B/32", "cpu") else None
    monkeypatch.setitem(sys.modules, "clip", clip)
    model = kvb.CLIPBottleneckedEncoder(8, 4)
    assert model.transforms is preprocess
    x = torch.randn(2, 3, 8, 8)
    assert model.forward_encoder(x).dtype == torch.float32
    assert model(x).shape == (2, 512)


def test_supervised_imagenet(monkeypatch):
    weights = types.SimpleNamespace(transforms=lambda: "transforms")
    models = types.ModuleType("torchvision.models")
    models.ResNet50_Weights = types.SimpleNamespace(IMAGENET1K_V2=weights)
    models.resnet50 = lambda weights: resnet(backbones.RESNET50)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    model = kvb.SLPretrainedBottleneckedEncoder(8, 4, backbone="resnet50_imagenet_v2", extracted_layer=4)
    assert model.transforms == "transforms"
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 2048, 1, 1)


@pytest.mark.parametrize(
    ("package", "build_it", "how"),
    [
        ("clip", lambda: kvb.CLIPBottleneckedEncoder(8, 4), r"openai/CLIP\.git"),
        (
            "torchvision",
            lambda: kvb.SLPretrainedBottleneckedEncoder(8, 4, backbone="resnet50_imagenet_v2"),
            "pip install torchvision",
        ),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, build_it, how):
    class Absent:
        """Finds no module of that name, as if it were not installed."""

        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=rf"needs the package {package}, which is not installed.*{how}"):
        build_it()


def test_bad_choices_are_named(hub):
    with pytest.raises(ValueError, match=r"backbone must be one of 'dino_resnet50', 'dino_vits8'; got 'resnet18'"):
        kvb.DinoBottleneckedEncoder(8, 4, backbone="resnet18")
    with pytest.raises(ValueError, match=r"extracted_layer must be one of \[1, 2, 3, 4\], got 5"):
        kvb.DinoBottleneckedEncoder(8, 4, extracted_layer=5)
    with pytest.raises(ValueError, match=r"1024 channels of dino_resnet50 must be divisible by num_codebooks \(7\)"):
        kvb.DinoBottleneckedEncoder(7, 4)
    with pytest.raises(NotImplementedError, match="input_is_embedding=True"):
        kvb.ConvMixerBottleneckedEncoder(8, 4)
    with pytest.raises(ValueError, match="expected a network with a child layer3, got children 0, 1"):
        backbones.truncated(nn.Sequential(nn.ReLU(), nn.ReLU()), 3, pool=True)
    assert hub == []
    model = kvb.DinoBottleneckedEncoder(7, 4, dim_keys=5, splitting_mode="random_projection", input_is_embedding=True)
    assert model(torch.randn(2, 1024)).shape == (2, 35)


def test_half_precision_on_the_gpu_is_swavs_alone(hub):
    kinds = Counter()
    for kind in (kvb.SwavBottleneckedEncoder, kvb.DinoBottleneckedEncoder, kvb.VICRegBottleneckedEncoder):
        kinds[kind.__name__] += isinstance(kind(8, 4).encoder, backbones.HalfOnGPU)
    assert kinds == {"SwavBottleneckedEncoder": 1, "DinoBottleneckedEncoder": 0, "VICRegBottleneckedEncoder": 0}
