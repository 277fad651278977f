"""``key_value_bottleneck.core``: the published names, those of the pretrained encoders among them."""

from __future__ import annotations

from typing import ClassVar

from kvb.compat.key_value_bottleneck.bottleneck import BUGS, KeyValueBottleneck
from kvb.compat.key_value_bottleneck.encoder import BottleneckedEncoder
from kvb.compat.key_value_bottleneck.splitters import Chunker, LearnedDownProjection, RandomDownProjection
from kvb.compat.key_value_bottleneck.utils import ema_inplace, gumbel_sample, kmeans, laplace_smoothing, sample_vectors
from kvb.modules import backbones, pretrained

CLIPModelWrapper = backbones.ImageTower
SwavModelWrapper = backbones.HalfOnGPU
_BY_LAYER = backbones.RESNET50
_BY_LAYER_OF_WIDE = backbones.RESNET50_WIDE


class DinoBottleneckedEncoder(BottleneckedEncoder, pretrained.DinoBottleneckedEncoder):
    """``BottleneckedEncoder`` over DINO; arguments as for ``kvb.DinoBottleneckedEncoder``."""

    VALID_BACKBONES: ClassVar[list[str]] = list(backbones.DINO)
    RESNET_LAYER_TO_CHANNELS = _BY_LAYER
    DINO_VITS8_DIM_EMBEDDING = backbones.DINO["dino_vits8"].channels


class SwavBottleneckedEncoder(BottleneckedEncoder, pretrained.SwavBottleneckedEncoder):
    """``BottleneckedEncoder`` over SwAV; arguments as for ``kvb.SwavBottleneckedEncoder``."""

    VALID_BACKBONES: ClassVar[list[str]] = list(backbones.SWAV)
    RESNET_LAYER_TO_CHANNELS = _BY_LAYER
    RESNETw2_LAYER_TO_CHANNELS = _BY_LAYER_OF_WIDE


class VICRegBottleneckedEncoder(BottleneckedEncoder, pretrained.VICRegBottleneckedEncoder):
    """``BottleneckedEncoder`` over VICReg; arguments as for ``kvb.VICRegBottleneckedEncoder``."""

    VALID_BACKBONES: ClassVar[list[str]] = list(backbones.VICREG)
    RESNET_LAYER_TO_CHANNELS = _BY_LAYER
    RESNETw2_LAYER_TO_CHANNELS = _BY_LAYER_OF_WIDE


class SLPretrainedBottleneckedEncoder(BottleneckedEncoder, pretrained.SLPretrainedBottleneckedEncoder):
    """``BottleneckedEncoder`` over supervised ResNets; arguments as in kvb."""

    VALID_BACKBONES: ClassVar[list[str]] = list(backbones.SUPERVISED)
    CIFAR_RESNET_LAYER_TO_CHANNELS = backbones.CIFAR_RESNET
    IMAGENET_RESNET_LAYER_TO_CHANNELS = _BY_LAYER


class CLIPBottleneckedEncoder(BottleneckedEncoder, pretrained.CLIPBottleneckedEncoder):
    """``BottleneckedEncoder`` over CLIP; arguments as for ``kvb.CLIPBottleneckedEncoder``."""

    VALID_BACKBONES: ClassVar[list[str]] = list(backbones.CLIP)
    CLIP_VIT_B32_DIM_EMBEDDING = backbones.CLIP["clip_vit_b32"].channels


class ConvMixerBottleneckedEncoder(BottleneckedEncoder, pretrained.ConvMixerBottleneckedEncoder):
    """``BottleneckedEncoder`` over embeddings of a ConvMixer; arguments as in kvb."""

    VALID_BACKBONES: ClassVar[list[str]] = list(backbones.CONVMIXER)
    CONVMIXER_DIM_EMBEDDING = backbones.CONVMIXER["convmixer"].channels


__all__ = [
    "BUGS",
    "BottleneckedEncoder",
    "CLIPBottleneckedEncoder",
    "CLIPModelWrapper",
    "Chunker",
    "ConvMixerBottleneckedEncoder",
    "DinoBottleneckedEncoder",
    "KeyValueBottleneck",
    "LearnedDownProjection",
    "RandomDownProjection",
    "SLPretrainedBottleneckedEncoder",
    "SwavBottleneckedEncoder",
    "SwavModelWrapper",
    "VICRegBottleneckedEncoder",
    "ema_inplace",
    "gumbel_sample",
    "kmeans",
    "laplace_smoothing",
    "sample_vectors",
]
