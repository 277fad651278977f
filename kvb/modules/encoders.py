"""``BottleneckedEncoder``: a frozen encoder, a splitter and a bottleneck in one module; and the named ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from kvb import checkpoints, splitters, validation
from kvb.data import CodeDataset, encode
from kvb.modules import backbones, key_learning
from kvb.modules.bottleneck import BottleneckOutput, KeyValueBottleneck

_OF_THE_BOTTLENECK = (  # arguments that go to it unchanged
    "num_codebooks",
    "key_value_pairs_per_codebook",
    "dim_keys",
    "dim_values",
    "init_mode",
    "kmeans_iters",
    "decay",
    "eps",
    "threshold_ema_dead_code",
    "sample_codebook_temperature",
    "return_values_only",
    "topk",
)
BATCH = 256  # samples of one batch cut from a tensor
_Self = TypeVar("_Self", bound="BottleneckedEncoder")


class BottleneckedEncoder(nn.Module):
    """An encoder whose features are split over C codebooks and replaced by the values of their nearest keys.

    Equivalent to ``bottleneck(splitter(encoder(x)))``, with the channels of the encoder's output moved last before it,
    and back after it.

    The encoder is put into eval mode here and by every ``train()``, so that its features depend on nothing but its
    input. With ``return_values_only`` no gradient could reach it or the splitter, and none is recorded.

    Args:
        encoder: any ``nn.Module`` that returns a tensor, or an object with ``last_hidden_state`` (Hugging Face).
        num_channels: d, the channels of its output.
        num_codebooks: C.
        key_value_pairs_per_codebook: K.
        dim_keys: D; d / C for "chunk".
        dim_values: V.
        init_mode, kmeans_iters: as for ``KeyValueBottleneck``.
        splitting_mode: "chunk", "random_projection", "sparse_projection" or "learned_projection".
        decay, eps, threshold_ema_dead_code: as for ``KeyValueBottleneck``.
        encoder_is_channel_last: its output is [B, *spatial, d]; or else [B, d, *spatial]. Embeddings [B, d] are both.
        concat_values_from_all_codebooks: join the codebooks' values in one axis of C·V.
        sample_codebook_temperature: as for ``KeyValueBottleneck``.
        return_values_only: return a tensor, or else a ``BottleneckOutput``.
        topk: fetch so many nearest pairs; > 1 adds an axis after C, or after B with concatenated values.
        outputs_extractor: takes the features out of what the encoder returns, where it is neither of the two.
    Shape:
        | encoder output                | values          | concatenated    |
        | channel-first [B, d, *spatial] | [B, C, V, *spatial] | [B, C·V, *spatial] |
        | channel-last [B, *spatial, d]  | [B, C, *spatial, V] | [B, *spatial, C·V] |
        | embedding [B, d]               | [B, C, V]           | [B, C·V]           |
        Keys of a ``BottleneckOutput`` are like values that are not concatenated; its indices and distances are
        [B, C, *spatial].
    Attributes:
        every argument under its name, as it was given.
    State:
        encoder.*, splitter.*, bottleneck.*. Whether encoder and splitter are frozen is not part of a state_dict, as
        ``requires_grad`` never is.

    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_channels: int,
        num_codebooks: int,
        key_value_pairs_per_codebook: int,
        dim_keys: int,
        dim_values: int,
        init_mode: str = "random",
        kmeans_iters: int = 10,
        splitting_mode: str = "random_projection",
        decay: float = 0.95,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0.0,
        encoder_is_channel_last: bool = True,
        concat_values_from_all_codebooks: bool = False,
        sample_codebook_temperature: float = 0.0,
        return_values_only: bool = True,
        topk: int = 1,
        *,
        outputs_extractor: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        self.num_channels = validation.positive_int("num_channels", num_channels)
        self.num_codebooks = num_codebooks
        self.key_value_pairs_per_codebook = key_value_pairs_per_codebook
        self.dim_keys = dim_keys
        self.dim_values = dim_values
        self.init_mode = init_mode
        self.kmeans_iters = kmeans_iters
        self.splitting_mode = splitting_mode
        self.decay = decay
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.encoder_is_channel_last = encoder_is_channel_last
        self.concat_values_from_all_codebooks = concat_values_from_all_codebooks
        self.sample_codebook_temperature = sample_codebook_temperature
        self.return_values_only = return_values_only
        self.topk = topk
        self.outputs_extractor = outputs_extractor
        self.transforms: Callable[[Any], Any] | None = None  # what makes the encoder's input of an image
        self.activate_pre_transform = False  # whether forward applies it
        self.frozen_encoder = self.frozen_splitter = False
        self.key_report: key_learning.KeyReport | None = None  # of the last ``initialize_keys``
        self.encoder = encoder.eval()
        self.splitter = self._init_splitter()
        self.bottleneck = self._init_bottleneck()

    def _init_splitter(self) -> nn.Module:
        """The splitter of a new module, from the attributes of the constructor; subclasses may return another."""
        return splitters.make(self.splitting_mode, self.num_channels, self.num_codebooks, self.dim_keys)

    def _init_bottleneck(self) -> KeyValueBottleneck:
        """The bottleneck of a new module, built after the splitter; subclasses may return another."""
        return KeyValueBottleneck(**self._bottleneck_options())

    def _bottleneck_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OF_THE_BOTTLENECK}

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Any, **encoder_options: Any) -> Tensor | BottleneckOutput:
        """x, as the encoder wants it, -> values, or a ``BottleneckOutput``; shapes as above, contiguous.

        Args:
            x: the encoder's first argument; a mapping (of a tokenizer, say) is given as its keyword arguments.
            encoder_options: more keyword arguments of the encoder.
        Raises:
            TypeError: the encoder returned something without features, or not floating-point ones. ValueError: their
            shape does not fit. RuntimeError: keys that still wait for data in eval mode.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.bottleneck.return_values_only):
            heads = self.forward_splitter(x, **encoder_options)
        output = self.bottleneck(heads)
        if isinstance(output, Tensor):
            return self._arranged(output, self.concat_values_from_all_codebooks)
        values = self._arranged(output.values, self.concat_values_from_all_codebooks)
        return output._replace(values=values, keys=self._arranged(output.keys, False))

    def encode(self, x: Any, *, dtype: torch.dtype | str = torch.int64, **encoder_options: Any) -> Tensor:
        """The indices [B, C, *spatial] that ``forward`` would fetch; see ``KeyValueBottleneck.encode``."""
        with torch.no_grad():
            return self.bottleneck.encode(self.forward_splitter(x, **encoder_options), dtype=dtype)

    def encode_dataset(
        self,
        data: Tensor | Iterable[Any],
        *,
        dtype: torch.dtype | str = "auto",
        out: str | os.PathLike[str] | None = None,
        inputs_extractor: Callable[[Any], Any] | None = None,
        progress: bool = True,
    ) -> CodeDataset:
        """The codes of a whole data set of raw inputs: the encoder and the search run once for every sample.

        Equivalent to ``CodeDataset(torch.cat([encode(x, dtype=dtype) for x, y in data]), torch.cat([y ...]))``.
        Train on the result with ``decode``.

        Args:
            data: an iterable (a DataLoader, say) of inputs or of (inputs, labels, ...) items, read once; or a tensor
                of inputs.
            dtype, out, inputs_extractor, progress: as for ``KeyValueBottleneck.encode_dataset``.
        Returns:
            a ``CodeDataset``: codes [N, C, *spatial] (topk axis after C), labels [N, ...] or None.
        Raises:
            as ``forward`` and ``KeyValueBottleneck.encode_dataset``.
        """
        storage = validation.code_dtype(dtype, self.bottleneck.key_value_pairs_per_codebook)

        def search(x: Any) -> Tensor:
            return self.encode(self._moved(x), dtype=storage)

        def cut(inputs: Tensor) -> tuple[Tensor, ...]:
            return inputs.split(BATCH)

        return encode(data, search, cut=cut, out=out, inputs_extractor=inputs_extractor, progress=progress)

    def decode(self, codes: Tensor, pool: str = "none") -> Tensor:
        """The values of codes [B, C, *spatial], in the layout of ``forward``; pooled over codebooks, without C.

        Equivalent to ``forward`` on the inputs that the codes were made from, without encoder and search;
        differentiable for the values.

        Args:
            codes: of ``encode`` or ``encode_dataset``.
            pool: "none", or "mean" or "sum" over codebooks: [B, *spatial, V], channel-first [B, V, *spatial].
        Raises:
            as ``KeyValueBottleneck.decode``.
        """
        fetched = self.bottleneck.decode(codes, pool)
        if pool == "none":
            return self._arranged(fetched, self.concat_values_from_all_codebooks)
        return (fetched if self.encoder_is_channel_last else fetched.movedim(-1, 1)).contiguous()

    def forward_encoder(self, x: Any, **encoder_options: Any) -> Tensor:
        """x -> features [B, *spatial, d], channels last; without gradients from a frozen encoder."""
        if self.activate_pre_transform:
            if self.transforms is None:
                raise RuntimeError("activate_pre_transform is set, but there are no transforms: set them first")
            x = self._moved(self.transforms(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_encoder):
            if isinstance(x, Mapping):
                output = self.encoder(**x, **encoder_options)
            else:
                output = self.encoder(x, **encoder_options)
        features = self._features(output)
        if not torch.compiler.is_compiling() and features.is_inference() and torch.is_grad_enabled():
            features = features.clone()  # autograd refuses what an encoder made in inference mode
        first = not self.encoder_is_channel_last
        if features.dim() < 2 or features.shape[1 if first else -1] != self.num_channels:
            letters, sizes = (
                f"(B, {d}, *spatial)" if first else f"(B, *spatial, {d})" for d in ("num_channels", self.num_channels)
            )
            raise ValueError(
                f"expected the encoder to return {letters} = {sizes}, got {tuple(features.shape)}; check num_channels "
                f"and encoder_is_channel_last={self.encoder_is_channel_last}"
            )
        return features.movedim(1, -1) if first else features

    def forward_splitter(self, x: Any, **encoder_options: Any) -> Tensor:
        """x -> heads [B, C, *spatial, D], what the keys are compared with."""
        return self._split(self.forward_encoder(x, **encoder_options))

    def _features(self, output: Any) -> Tensor:
        if self.outputs_extractor is not None:
            output = self.outputs_extractor(output)
        elif not isinstance(output, Tensor):
            output = getattr(output, "last_hidden_state", output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"expected the encoder to return a Tensor or an object with last_hidden_state, got "
                f"{type(output).__name__}; pass outputs_extractor=lambda output: ... to pick the features"
            )
        return validation.floating("encoder", "output", output)

    def _split(self, features: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_splitter):
            heads: Tensor = self.splitter(features)
        return heads

    def _arranged(self, fetched: Tensor, concat: bool) -> Tensor:
        """[B, C, (T), *spatial, V] in the layout of the encoder's output."""
        ranks = int(self.bottleneck.topk > 1)
        first = not self.encoder_is_channel_last
        if not concat:
            return (fetched.movedim(-1, 2 + ranks) if first else fetched).contiguous()
        books = 1 + ranks
        fetched = fetched.movedim(1, books)  # [B, (T), C, *spatial, V]
        if first:
            return fetched.movedim(-1, books + 1).flatten(books, books + 1).contiguous()
        return fetched.movedim(books, -2).flatten(-2).contiguous()

    def _moved(self, x: Any) -> Any:
        """Tensors, also in a mapping, on the device of the keys."""
        if isinstance(x, Mapping):
            return {name: self._moved(value) for name, value in x.items()}
        return x.to(self.bottleneck.keys.device) if isinstance(x, Tensor) else x

    def train(self: _Self, mode: bool = True) -> _Self:
        """As ``nn.Module.train``, but the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    # --- preparation; each returns self -------------------------------------------------------------------------------

    def prepare(
        self: _Self,
        loader: Tensor | Iterable[Any],
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        *,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> _Self:
        """Freeze the encoder and the splitter, initialise the keys, and freeze them: afterwards only values learn.

        Equivalent to ``freeze_encoder().freeze_splitter().initialize_keys(loader, epochs).freeze_keys()``.
        """
        self.freeze_encoder().freeze_splitter()
        self.initialize_keys(loader, epochs, inputs_extractor, generator=generator, progress=progress)
        return self.freeze_keys()

    def initialize_keys(
        self: _Self,
        loader: Tensor | Iterable[Any],
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        *,
        generator: torch.Generator | None = None,
        progress: bool = True,
    ) -> _Self:
        """Initialise the keys from unlabelled data, then let them learn for ``epochs`` passes of moving averages.

        The first step is that of ``init_mode``: nothing for "random"; "sample" reads all data; "kmeans" and "kmeans++"
        encode the first 64·K rows once, and keep the features in the host's memory meanwhile. ``key_report`` then
        tells inertia and dead codes.

        Args:
            loader: an iterable (a DataLoader, say) of inputs or of (inputs, ...) items; or a tensor of inputs.
            epochs: passes of moving averages with dead-code replacement; 0 for none.
            inputs_extractor: takes the inputs out of an item; its first element by default.
            generator: makes "sample" and "kmeans" reproducible.
            progress: show a progress bar.
        Raises:
            RuntimeError: the keys are frozen. ValueError: no rows, none finite, or a one-shot iterator where several
            passes are needed.
        """
        validation.epochs(epochs)
        bottleneck = self.bottleneck
        data = loader.split(BATCH) if isinstance(loader, Tensor) else loader
        extract = inputs_extractor or key_learning.first

        @torch.no_grad()
        def encoded(item: Any) -> Tensor:
            return self.forward_encoder(self._moved(extract(item)))

        def initialise(source: Iterable[Any], take: Callable[[Any], Tensor], method: str | None, passes: int) -> None:
            self.key_report = bottleneck.init_keys(
                source, method, epochs=passes, inputs_extractor=take, generator=generator, progress=progress
            )

        if bottleneck.init_mode in ("kmeans", "kmeans++"):
            rows = key_learning.ROWS_PER_KEY * bottleneck.key_value_pairs_per_codebook
            kept = key_learning.first_rows(data, encoded, rows, progress=progress, passes=1 + epochs)
            initialise(kept, lambda features: self._split(features.to(bottleneck.keys.device)), None, 0)
            if epochs:
                initialise(data, lambda item: self._split(encoded(item)), "random", epochs)  # from the keys there are
        elif epochs or bottleneck.init_mode == "sample":
            initialise(data, lambda item: self._split(encoded(item)), None, epochs)
        return self

    def freeze_encoder(self: _Self) -> _Self:
        """The encoder gets no gradients."""
        self.frozen_encoder = True
        self.encoder.requires_grad_(False)
        return self

    def unfreeze_encoder(self: _Self) -> _Self:
        """All parameters of the encoder can learn again, from the distances; it stays in eval mode."""
        self.frozen_encoder = False
        self.encoder.requires_grad_(True)
        return self

    def freeze_splitter(self: _Self) -> _Self:
        """A learned projection gets no gradients."""
        self.frozen_splitter = True
        self.splitter.requires_grad_(False)
        return self

    def unfreeze_splitter(self: _Self) -> _Self:
        """A learned projection can learn again, from the distances."""
        self.frozen_splitter = False
        self.splitter.requires_grad_(True)
        return self

    def freeze_keys(self: _Self) -> _Self:
        """As ``KeyValueBottleneck.freeze_keys``, like all the following."""
        self.bottleneck.freeze_keys()
        return self

    def unfreeze_keys(self: _Self) -> _Self:
        self.bottleneck.unfreeze_keys()
        return self

    def enable_update_keys(self: _Self) -> _Self:
        return self.unfreeze_keys()

    def disable_update_keys(self: _Self) -> _Self:
        return self.freeze_keys()

    def activate_counts(self: _Self) -> _Self:
        self.bottleneck.activate_counts()
        return self

    def deactivate_counts(self: _Self) -> _Self:
        self.bottleneck.deactivate_counts()
        return self

    def reset_cluster_size_counter(self: _Self) -> _Self:
        self.bottleneck.reset_cluster_size_counter()
        return self

    def mask_pairs(self: _Self, mask: Tensor | None) -> _Self:
        self.bottleneck.mask_pairs(mask)
        return self

    def fraction_of_unused_keys(self) -> Tensor:
        return self.bottleneck.fraction_of_unused_keys()

    def usage(self) -> Tensor:
        return self.bottleneck.usage()

    def perplexity(self) -> Tensor:
        return self.bottleneck.perplexity()

    # --- files --------------------------------------------------------------------------------------------------------

    def _learnt(self) -> nn.ModuleDict:
        return nn.ModuleDict({"bottleneck": self.bottleneck, "splitter": self.splitter})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write bottleneck and splitter, without the encoder, to a file: see ``kvb.save``."""
        checkpoints.save(self._learnt(), path)

    def load(self: _Self, path: str | os.PathLike[str]) -> _Self:
        """Read a file of ``save``, or of the authors' ``save``: all of it, or nothing; returns self.

        Raises:
            CheckpointError: the file is damaged or of another model.
        """
        checkpoints.load(self._learnt(), path)
        return self

    def save_model(self, path: str | os.PathLike[str]) -> None:
        """Pickle the whole module; ``torch.load(path, weights_only=False)`` runs code of the file: trust it first."""
        torch.save(self, path)

    def extra_repr(self) -> str:
        layout = "channel-last" if self.encoder_is_channel_last else "channel-first"
        frozen = [name for name in ("encoder", "splitter") if getattr(self, f"frozen_{name}")]
        return f"{layout}, {self.splitting_mode}, frozen: {', '.join(frozen) or 'nothing'}"


# --- the named ones ---------------------------------------------------------------------------------------------------


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

    BACKBONES: ClassVar[Mapping[str, backbones.Backbone]]

    def __init__(
        self,
        num_codebooks: int,
        key_value_pairs_per_codebook: int,
        dim_keys: int | None = None,
        dim_values: int | None = None,
        init_mode: str = "random",
        kmeans_iters: int = 10,
        backbone: str | None = None,
        extracted_layer: int = 3,
        pool_embedding: bool = True,
        splitting_mode: str = "chunk",
        decay: float = 0.95,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0.0,
        concat_values_from_all_codebooks: bool = True,
        sample_codebook_temperature: float = 0.0,
        return_values_only: bool = True,
        topk: int = 1,
        input_is_embedding: bool = False,
    ) -> None:
        validation.positive_int("num_codebooks", num_codebooks)
        backbone = validation.choice("backbone", backbone or next(iter(self.BACKBONES)), tuple(self.BACKBONES))
        chosen = self.BACKBONES[backbone]
        channels = chosen.channels
        if isinstance(channels, dict):
            if extracted_layer not in channels:
                raise ValueError(f"extracted_layer must be one of {list(channels)}, got {extracted_layer!r}")
            channels = channels[extracted_layer]
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
            init_mode,
            kmeans_iters,
            splitting_mode,
            decay,
            eps,
            threshold_ema_dead_code,
            False,
            concat_values_from_all_codebooks,
            sample_codebook_temperature,
            return_values_only,
            topk,
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
    """

    BACKBONES = backbones.DINO


class SwavBottleneckedEncoder(PretrainedEncoder):
    """SwAV (Caron et al., NeurIPS 2020): "swav_resnet50" or "swav_resnet50w2"; arguments: ``PretrainedEncoder``.

    Channels: 256, 512, 1024 or 2048 by layer; twice as many for "w2". On a GPU under autocast, as published.
    """

    BACKBONES = backbones.SWAV

    @staticmethod
    def _wrapped(network: nn.Module) -> nn.Module:
        return backbones.HalfOnGPU(network)


class VICRegBottleneckedEncoder(PretrainedEncoder):
    """VICReg (Bardes et al., ICLR 2022): "vicreg_resnet50" or "vicreg_resnet50w2"; arguments: ``PretrainedEncoder``.

    Channels: 256, 512, 1024 or 2048 by layer; twice as many for "w2".
    """

    BACKBONES = backbones.VICREG


class SLPretrainedBottleneckedEncoder(PretrainedEncoder):
    """Supervised ResNets, of CIFAR-10, CIFAR-100 or ImageNet; arguments: ``PretrainedEncoder``.

    "cifar10_resnet56", "cifar10_resnet22", "cifar100_resnet56", "cifar100_resnet22": 16, 32 or 64 channels by layer.
    "resnet50_imagenet_v2", of torchvision: 256, 512, 1024 or 2048, and ``transforms`` for images.
    """

    BACKBONES = backbones.SUPERVISED


class CLIPBottleneckedEncoder(PretrainedEncoder):
    """CLIP (Radford et al., ICML 2021): "clip_vit_b32", 512 channels; arguments: ``PretrainedEncoder``.

    ``transforms`` makes its input of a PIL image. Loaded in float32 on the CPU: move the whole module with ``to``.
    """

    BACKBONES = backbones.CLIP

    @staticmethod
    def _wrapped(network: nn.Module) -> nn.Module:
        return backbones.ImageTower(network)


class ConvMixerBottleneckedEncoder(PretrainedEncoder):
    """Embeddings of 256 numbers of a ConvMixer (Bricken et al., ICLR 2023); arguments: ``PretrainedEncoder``.

    Its weights are nowhere to be loaded from: ``input_is_embedding`` must be True.
    """

    BACKBONES = backbones.CONVMIXER
