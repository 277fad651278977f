"""``BottleneckedEncoder`` over the pretrained encoders that the published package names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from kvb import splitters, validation
from kvb.modules import backbones, key_learning
from kvb.modules.encoders import BottleneckedEncoder
from kvb.modules.wrapping import KvbOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _channels(backbone: backbones.Backbone, layer: int | str | None) -> int:
    """How many channels the output has, of a layer where there are several to choose from."""
    channels = backbone.channels
    if not isinstance(channels, dict):
        return channels
    if layer not in channels:
        raise ValueError(f"extracted_layer must be one of {list(channels)}, got {layer!r}")
    return channels[layer]


class PretrainedEncoder(BottleneckedEncoder):
    """What the named encoders share; channel-first, and by default chunked and concatenated.

    Args:
        num_codebooks: C.
        key_value_pairs_per_codebook: K.
        dim_keys: D; channels / C by default.
        dim_values: V; ``dim_keys`` by default.
        init_mode, kmeans_iters: as for ``KeyValueBottleneck``.
        backbone: one of ``BACKBONES``; the first by default.
        extracted_layer: of a ResNet, 1 to 4.
        pool_embedding: average a ResNet's map over its positions, [B, d, 1, 1].
        splitting_mode, concat_values_from_all_codebooks: as for ``BottleneckedEncoder``, with other defaults.
        input_is_embedding: inputs are features already, [B, d] or [B, d, *spatial]: nothing is loaded.
    Raises:
        ValueError: an unknown backbone or layer; a number of channels that C does not divide. ModuleNotFoundError: a
        package is missing that loads the backbone. NotImplementedError: there is nothing to load.
    """

    transforms: Callable[[Any], Any] | None
    BACKBONES: ClassVar[Mapping[str, backbones.Backbone]]
    _more_options = KvbOptions.__optional_keys__

    def __init__(
        self,
        num_codebooks: int,
        key_value_pairs_per_codebook: int,
        dim_keys: int | None = None,
        dim_values: int | None = None,
        init_mode: key_learning.Method = "random",
        kmeans_iters: int = 10,
        backbone: str | None = None,
        extracted_layer: int = 3,
        pool_embedding: bool = True,
        splitting_mode: splitters.Mode | nn.Module = "chunk",
        decay: float = 0.95,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0.0,
        concat_values_from_all_codebooks: bool = True,
        sample_codebook_temperature: float = 0.0,
        return_values_only: bool = True,
        topk: int = 1,
        input_is_embedding: bool = False,
        **more: Unpack[KvbOptions],
    ) -> None:
        validation.positive_int("num_codebooks", num_codebooks)
        backbone = validation.choice("backbone", backbone or next(iter(self.BACKBONES)), tuple(self.BACKBONES))
        chosen = self.BACKBONES[backbone]
        channels = _channels(chosen, extracted_layer)
        if dim_keys is None and channels % num_codebooks:
            raise ValueError(
                f"the {channels} channels of {backbone} must be divisible by num_codebooks ({num_codebooks}); or pass "
                "dim_keys and another splitting_mode than 'chunk'"
            )
        dim_keys = channels // num_codebooks if dim_keys is None else dim_keys
        loaded = backbones.Loaded(nn.Identity()) if input_is_embedding else chosen.load()
        network = loaded.network
        if not input_is_embedding and isinstance(chosen.channels, dict):
            network = backbones.truncated(network, extracted_layer, pool=pool_embedding)
        super().__init__(
            network if input_is_embedding else self._wrapped(network),
            channels,
            num_codebooks,
            key_value_pairs_per_codebook,
            dim_keys,
            dim_keys if dim_values is None else dim_values,
            init_mode=init_mode,
            kmeans_iters=kmeans_iters,
            splitting_mode=splitting_mode,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            encoder_is_channel_last=False,
            concat_values_from_all_codebooks=concat_values_from_all_codebooks,
            sample_codebook_temperature=sample_codebook_temperature,
            return_values_only=return_values_only,
            topk=topk,
            **more,
        )
        self.backbone = backbone
        self.extracted_layer = extracted_layer
        self.transforms = loaded.transforms

    @staticmethod
    def _wrapped(network: nn.Module) -> nn.Module:
        return network


class DinoBottleneckedEncoder(PretrainedEncoder):
    """DINO (Caron et al., ICCV 2021): "dino_resnet50" or "dino_vits8" of torch.hub; arguments: ``PretrainedEncoder``.

    Channels: 256, 512, 1024 or 2048 by layer; 384.

    Examples:
        >>> model = kvb.DinoBottleneckedEncoder(4, 16, backbone="dino_vits8", input_is_embedding=True)
        >>> model(torch.randn(5, 384)).shape
        torch.Size([5, 384])
    """

    BACKBONES: ClassVar[dict[str, backbones.Backbone]] = backbones.DINO


class SwavBottleneckedEncoder(PretrainedEncoder):
    """SwAV (Caron et al., NeurIPS 2020): "swav_resnet50" or "swav_resnet50w2"; arguments: ``PretrainedEncoder``.

    Channels: 256, 512, 1024 or 2048 by layer; twice as many for "w2". On a GPU under autocast, as published.

    Examples:
        >>> model = kvb.SwavBottleneckedEncoder(4, 16, input_is_embedding=True)
        >>> model(torch.randn(5, 1024)).shape
        torch.Size([5, 1024])
    """

    BACKBONES: ClassVar[dict[str, backbones.Backbone]] = backbones.SWAV

    @staticmethod
    def _wrapped(network: nn.Module) -> nn.Module:
        return backbones.HalfOnGPU(network)


class VICRegBottleneckedEncoder(PretrainedEncoder):
    """VICReg (Bardes et al., ICLR 2022): "vicreg_resnet50" or "vicreg_resnet50w2"; arguments: ``PretrainedEncoder``.

    Channels: 256, 512, 1024 or 2048 by layer; twice as many for "w2".

    Examples:
        >>> model = kvb.VICRegBottleneckedEncoder(4, 16, input_is_embedding=True)
        >>> model(torch.randn(5, 1024)).shape
        torch.Size([5, 1024])
    """

    BACKBONES: ClassVar[dict[str, backbones.Backbone]] = backbones.VICREG


class SLPretrainedBottleneckedEncoder(PretrainedEncoder):
    """Supervised ResNets, of CIFAR-10, CIFAR-100 or ImageNet; arguments: ``PretrainedEncoder``.

    "cifar10_resnet56", "cifar10_resnet22", "cifar100_resnet56", "cifar100_resnet22": 16, 32 or 64 channels by layer.
    "resnet50_imagenet_v2", of torchvision: 256, 512, 1024 or 2048, and ``transforms`` for images.

    Examples:
        >>> model = kvb.SLPretrainedBottleneckedEncoder(4, 16, input_is_embedding=True)
        >>> model(torch.randn(5, 64)).shape
        torch.Size([5, 64])
    """

    BACKBONES: ClassVar[dict[str, backbones.Backbone]] = backbones.SUPERVISED


class CLIPBottleneckedEncoder(PretrainedEncoder):
    """CLIP (Radford et al., ICML 2021): "clip_vit_b32", 512 channels; arguments: ``PretrainedEncoder``.

    ``transforms`` makes its input of a PIL image. Loaded in float32 on the CPU: move the whole module with ``to``.

    Examples:
        >>> model = kvb.CLIPBottleneckedEncoder(4, 16, input_is_embedding=True)
        >>> model(torch.randn(5, 512)).shape
        torch.Size([5, 512])
    """

    BACKBONES: ClassVar[dict[str, backbones.Backbone]] = backbones.CLIP

    @staticmethod
    def _wrapped(network: nn.Module) -> nn.Module:
        return backbones.ImageTower(network)


class ConvMixerBottleneckedEncoder(PretrainedEncoder):
    """Embeddings of 256 numbers of a ConvMixer (Bricken et al., ICLR 2023); arguments: ``PretrainedEncoder``.

    Its weights are nowhere to be loaded from: ``input_is_embedding`` must be True.

    Examples:
        >>> model = kvb.ConvMixerBottleneckedEncoder(4, 16, input_is_embedding=True)
        >>> model(torch.randn(5, 256)).shape
        torch.Size([5, 256])
    """

    BACKBONES: ClassVar[dict[str, backbones.Backbone]] = backbones.CONVMIXER
