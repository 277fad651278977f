"""The pretrained encoders that the published classes name: how each is loaded, and how many channels it has.

Loading asks the network for code and weights, as the packages named here do it; nothing is imported before that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

RESNET50 = {1: 256, 2: 512, 3: 1024, 4: 2048}
RESNET50_WIDE = {layer: 2 * channels for layer, channels in RESNET50.items()}
CIFAR_RESNET = {1: 16, 2: 32, 3: 64}


class Loaded(NamedTuple):
    """A network, and what makes its input of an image, if that is known."""

    network: nn.Module
    transforms: Callable[[Any], Any] | None = None


class Backbone(NamedTuple):
    """One pretrained network.

    channels: by layer for a ResNet, of which a layer is extracted; one number for a network that gives embeddings.
    """

    channels: dict[int, int] | int
    load: Callable[[], Loaded]


def _package(name: str, how: str) -> ModuleType:
    """A package that is needed for one encoder only.

    Raises:
        ModuleNotFoundError: it is not installed, with the way to get it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise
        raise ModuleNotFoundError(
            f"this encoder needs the package {error.name}, which is not installed. Install it with: {how}; or give "
            "embeddings, with input_is_embedding=True, or BottleneckedEncoder an encoder of your own",
            name=error.name,
        ) from error


def _hub(repository: str, name: str, **options: Any) -> Callable[[], Loaded]:
    return lambda: Loaded(torch.hub.load(repository, name, **options))


def _imagenet_v2() -> Loaded:
    models = _package("torchvision.models", "pip install torchvision")
    weights = models.ResNet50_Weights.IMAGENET1K_V2
    return Loaded(models.resnet50(weights=weights), weights.transforms())


def _clip() -> Loaded:
    package = _package("clip", "pip install git+https://github.com/openai/CLIP.git")
    return Loaded(*package.load("ViT-B/32", device="cpu"))


def _convmixer() -> Loaded:
    raise NotImplementedError("the weights of convmixer were not published: give embeddings, input_is_embedding=True")


DINO = {
    "dino_resnet50": Backbone(RESNET50, _hub("facebookresearch/dino:main", "dino_resnet50")),
    "dino_vits8": Backbone(384, _hub("facebookresearch/dino:main", "dino_vits8")),
}
SWAV = {
    "swav_resnet50": Backbone(RESNET50, _hub("facebookresearch/swav:main", "resnet50")),
    "swav_resnet50w2": Backbone(RESNET50_WIDE, _hub("facebookresearch/swav:main", "resnet50w2")),
}
VICREG = {
    "vicreg_resnet50": Backbone(RESNET50, _hub("facebookresearch/vicreg:main", "resnet50")),
    "vicreg_resnet50w2": Backbone(RESNET50_WIDE, _hub("facebookresearch/vicreg:main", "resnet50x2")),
}
SUPERVISED = {
    **{
        name: Backbone(CIFAR_RESNET, _hub("chenyaofo/pytorch-cifar-models", name, pretrained=True))
        for name in ("cifar10_resnet56", "cifar10_resnet22", "cifar100_resnet56", "cifar100_resnet22")
    },
    "resnet50_imagenet_v2": Backbone(RESNET50, _imagenet_v2),
}
CLIP = {"clip_vit_b32": Backbone(512, _clip)}
CONVMIXER = {"convmixer": Backbone(256, _convmixer)}


def truncated(network: nn.Module, layer: int, *, pool: bool) -> nn.Sequential:
    """The children of a ResNet up to ``layer1`` … ``layer4``, then a global average if asked.

    Children are found by name: some of these networks begin with a padding of their own.

    Raises:
        ValueError: there is no such child.
    """
    last = f"layer{layer}"
    children = dict(network.named_children())
    if last not in children:
        raise ValueError(f"expected a network with a child {last}, got children {', '.join(children)}")
    names = list(children)
    kept = [children[name] for name in names[: names.index(last) + 1]]
    return nn.Sequential(*kept, *([nn.AdaptiveAvgPool2d(1)] if pool else []))


class HalfOnGPU(nn.Module):
    """Runs under CUDA's autocast and returns float32, as the published SwAV encoder does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=x.is_cuda):
            features: Tensor = self.model(x)
        return features.float()


class ImageTower(nn.Module):
    """The image half of CLIP; returns float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(x)  # type: ignore[operator]
        return features.float()
