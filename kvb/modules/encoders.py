"""``BottleneckedEncoder``: a frozen encoder, a splitter and a bottleneck in one module."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from kvb import checkpoints, splitters, validation
from kvb._torch import constant_when_compiled
from kvb.functional import Pool
from kvb.modules import key_learning
from kvb.modules.adapters import FromLibraries
from kvb.modules.bottleneck import KeyValueBottleneck
from kvb.modules.key_report import KeyReport
from kvb.modules.outputs import BottleneckOutput, Encoding
from kvb.modules.tables import ValuesStart
from kvb.modules.wrapping import BottleneckOptions, BottleneckWrapper

_OF_THE_BOTTLENECK = (  # arguments that go to it unchanged
    *("num_codebooks", "key_value_pairs_per_codebook", "dim_keys", "dim_values"),
    *sorted(BottleneckOptions.__optional_keys__),
)
_Self = TypeVar("_Self", bound="BottleneckedEncoder")


class BottleneckedEncoder(FromLibraries, BottleneckWrapper):
    """An encoder whose features are split over C codebooks and replaced by the values of their nearest keys.

    Equivalent to ``bottleneck(splitter(encoder(x)))``, with channels moved last before the splitter, and back at the
    end.

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
        splitting_mode: "chunk", "random_projection", "sparse_projection" or "learned_projection"; or any ``nn.Module``
            that makes heads [B, C, *spatial, D] of features [B, *spatial, d].
        decay, eps, threshold_ema_dead_code: as for ``KeyValueBottleneck``.
        encoder_is_channel_last: its output is [B, *spatial, d]; or else [B, d, *spatial]. Embeddings [B, d] are both.
        concat_values_from_all_codebooks: join the codebooks' values in one axis of C·V.
        sample_codebook_temperature: as for ``KeyValueBottleneck``.
        return_values_only: return a tensor, or else a ``BottleneckOutput``.
        topk: how many nearest pairs to fetch; > 1 adds an axis after C, or after B with concatenated values.
        outputs_extractor: takes the features out of what the encoder returns, if it is neither of the two. If it
            needs two arguments, the second is the encoder's input: for a mean over its attention mask, say.
        sparse_grad, check_finite, pool: as for ``KeyValueBottleneck``.
        device: of the splitter and the bottleneck; the encoder stays where it is.
        dtype: of the values.
    Methods:
        those of ``KeyValueBottleneck``, which take what ``forward`` takes.
    Attributes:
        every argument under its name, as it was given, but for device and dtype.
    Shape:
        | encoder output                | values          | concatenated    |
        | channel-first [B, d, *spatial] | [B, C, V, *spatial] | [B, C·V, *spatial] |
        | channel-last [B, *spatial, d]  | [B, C, *spatial, V] | [B, *spatial, C·V] |
        | embedding [B, d]               | [B, C, V]           | [B, C·V]           |
        Keys of a ``BottleneckOutput`` are like values that are not concatenated; its indices and distances are
        [B, C, *spatial].
    State:
        encoder.*, splitter.*, bottleneck.*. Whether encoder and splitter are frozen is not part of a state_dict, as
        ``requires_grad`` never is.

    Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240), section 3.
    Examples:
        >>> encoder = torch.nn.Linear(32, 64)
        >>> model = kvb.BottleneckedEncoder(encoder, 64, 4, 16, dim_keys=8, dim_values=10, init_mode="sample")
        >>> model.prepare(torch.randn(100, 32), progress=False)(torch.randn(5, 32)).shape
        torch.Size([5, 4, 10])
    """

    __call__: Encoding
    num_channels: int
    dim_keys: int
    dim_values: int
    decay: float
    eps: float
    topk: int
    splitter: nn.Module
    bottleneck: KeyValueBottleneck
    encoder: nn.Module
    splitting_mode: splitters.Mode | nn.Module
    pool: Pool = "none"  # also of a module pickled before there was a choice

    def __init__(
        self,
        encoder: nn.Module,
        num_channels: int,
        num_codebooks: int,
        key_value_pairs_per_codebook: int,
        dim_keys: int,
        dim_values: int,
        init_mode: key_learning.Method = "random",
        kmeans_iters: int = 10,
        splitting_mode: splitters.Mode | nn.Module = "random_projection",
        decay: float = 0.95,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0.0,
        encoder_is_channel_last: bool = True,
        concat_values_from_all_codebooks: bool = False,
        sample_codebook_temperature: float = 0.0,
        return_values_only: bool = True,
        topk: int = 1,
        *,
        outputs_extractor: Callable[..., Tensor] | None = None,
        init_values: ValuesStart = "random",
        sparse_grad: bool = False,
        check_finite: bool = False,
        pool: Pool = "none",
        device: validation.Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {type(encoder).__name__}")
        self.num_channels = validation.positive_int("num_channels", num_channels)
        self.num_codebooks = num_codebooks
        self.key_value_pairs_per_codebook = key_value_pairs_per_codebook
        self.dim_keys, self.dim_values = dim_keys, dim_values
        self.init_mode = init_mode
        self.kmeans_iters = kmeans_iters
        self.__dict__["splitting_mode"] = splitting_mode  # a module becomes a child only as the splitter
        self.decay, self.eps = decay, eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.encoder_is_channel_last = encoder_is_channel_last
        self.concat_values_from_all_codebooks = concat_values_from_all_codebooks
        self.sample_codebook_temperature = sample_codebook_temperature
        self.return_values_only = return_values_only
        self.init_values = init_values
        self.sparse_grad = sparse_grad
        self.check_finite = check_finite
        self.topk, self.pool = topk, pool
        self.outputs_extractor = outputs_extractor
        self.transforms: Callable[[Any], Any] | None = None  # what makes the encoder's input of an image
        self.activate_pre_transform = False  # whether forward applies it
        self.frozen_encoder = self.frozen_splitter = False
        self.key_report: KeyReport | None = None  # of the last ``initialize_keys``
        self.encoder = encoder.eval()
        with validation.placed(device):
            self.splitter = self._init_splitter()
            self.bottleneck = self._init_bottleneck()
        values = self.bottleneck.values
        values.data = values.data.to(dtype=validation.float_dtype(dtype))

    def _init_splitter(self) -> nn.Module:
        """The splitter of a new module, from the attributes of the constructor; subclasses may return another."""
        return splitters.make(self.splitting_mode, self.num_channels, self.num_codebooks, self.dim_keys)

    def _init_bottleneck(self) -> KeyValueBottleneck:
        """The bottleneck of a new module, built after the splitter; subclasses may return another."""
        return KeyValueBottleneck(**self._bottleneck_options())

    def _bottleneck_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OF_THE_BOTTLENECK}

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Any = None,
        *,
        mask: Tensor | None = None,
        pool: Pool | None = None,
        return_values_only: bool | None = None,
        **encoder_options: Any,
    ) -> Tensor | BottleneckOutput:
        """x, as the encoder wants it, -> values, or a ``BottleneckOutput``; shapes as above, contiguous.

        Args:
            x: the encoder's first argument; a mapping (of a tokenizer, say) is given as its keyword arguments, and so
                is ``**batch``.
            mask: bool [B, *spatial], True where a position counts; see ``KeyValueBottleneck.forward``. By default the
                ``attention_mask`` of x or of encoder_options, unless the features are one embedding [B, d] per sample.
            pool: "mean" or "sum" over codebooks: values [B, *spatial, V], channel-first [B, V, *spatial].
            return_values_only: overrides the module's for this call.
            encoder_options: more keyword arguments of the encoder.
        Raises:
            TypeError: the encoder returned something without features, or not floating-point ones. ValueError: their
            shape does not fit, or that of a mask does not fit theirs. RuntimeError: keys that still wait for data in
            eval mode.
        """
        if isinstance(x, Proxy):
            options = {"mask": mask, "pool": pool, "return_values_only": return_values_only}
            return self._call_of(x, more=encoder_options, **options)
        if x is None:
            x, encoder_options = encoder_options, {}
        own = self.bottleneck
        values_only = own.return_values_only if return_values_only is None else return_values_only
        with torch.set_grad_enabled(torch.is_grad_enabled() and not values_only):
            heads, mask = self._prepared(x, mask, encoder_options)
        output = own(heads, mask=mask, pool=self._pool(pool), return_values_only=values_only)
        if isinstance(output, Tensor):
            return self._arranged(output, self._pool(pool))
        keys = self._channels_placed(output.keys, books=True)
        return output._replace(values=self._arranged(output.values, self._pool(pool)), keys=keys)

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
        features = self._picked(output, {**x, **encoder_options} if isinstance(x, Mapping) else x)
        if not torch.compiler.is_compiling() and features.is_inference() and torch.is_grad_enabled():
            features = features.clone()  # autograd refuses tensors that an encoder created in inference mode
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

    def _picked(self, output: Any, batch: Any) -> Tensor:
        if self.outputs_extractor is not None:
            asks = _takes_batch(self.outputs_extractor)
            output = self.outputs_extractor(output, batch) if asks else self.outputs_extractor(output)
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

    def _arranged(self, fetched: Tensor, pool: Pool) -> Tensor:
        """[B, C, (T), *spatial, V], without C where pooled, in the layout of the encoder's output."""
        if pool != "none" or not self.concat_values_from_all_codebooks:
            return self._channels_placed(fetched, books=pool == "none")
        books = 1 + int(self.bottleneck.topk > 1)
        fetched = fetched.movedim(1, books)  # [B, (T), C, *spatial, V]
        if self.encoder_is_channel_last:
            return fetched.movedim(books, -2).flatten(-2).contiguous()
        return fetched.movedim(-1, books + 1).flatten(books, books + 1).contiguous()

    def _channels_placed(self, fetched: Tensor, *, books: bool) -> Tensor:
        """The last axis after B, C (if there is one) and T, where channels come first."""
        place = 1 + int(books) + int(self.bottleneck.topk > 1)
        return (fetched if self.encoder_is_channel_last else fetched.movedim(-1, place)).contiguous()

    def _resized(self: _Self) -> _Self:
        for name in ("num_codebooks", "key_value_pairs_per_codebook", "dim_values"):
            setattr(self, name, getattr(self.bottleneck, name))
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

        Examples:
            >>> model = kvb.BottleneckedEncoder(torch.nn.Linear(32, 64), 64, 4, 16, dim_keys=8, dim_values=10)
            >>> model.prepare(torch.randn(100, 32), progress=False).keys_frozen
            True
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
        """The published name of ``init_keys``; its report is in ``key_report``. Zero epochs of "random" read nothing.

        Args:
            loader: the ``data`` of ``init_keys``; the others are those of ``init_keys``.
        Returns:
            self.
        Raises:
            as ``init_keys``.
        """
        validation.epochs(epochs)
        if epochs or self.bottleneck.init_mode != "random":
            self.key_report = self.init_keys(
                loader, epochs=epochs, inputs_extractor=inputs_extractor, generator=generator, progress=progress
            )
        return self

    def freeze_encoder(self: _Self) -> _Self:
        """The encoder gets no gradients."""
        return self._hold("encoder", True)

    def unfreeze_encoder(self: _Self) -> _Self:
        """All parameters of the encoder can learn again, from the distances; it stays in eval mode."""
        return self._hold("encoder", False)

    def freeze_splitter(self: _Self) -> _Self:
        """A learned projection gets no gradients."""
        return self._hold("splitter", True)

    def unfreeze_splitter(self: _Self) -> _Self:
        """A learned projection can learn again, from the distances."""
        return self._hold("splitter", False)

    def _hold(self: _Self, part: Literal["encoder", "splitter"], frozen: bool) -> _Self:
        setattr(self, f"frozen_{part}", frozen)
        getattr(self, part).requires_grad_(not frozen)
        return self

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
        mode = self.splitting_mode if isinstance(self.splitting_mode, str) else type(self.splitter).__name__
        return f"{layout}, {mode}, frozen: {', '.join(frozen) or 'nothing'}"


@constant_when_compiled
def _takes_batch(extractor: Callable[..., Any]) -> bool:
    """Whether it must be given two arguments."""
    try:
        parameters = inspect.signature(extractor).parameters.values()
    except ValueError:  # a function written in C may have no signature
        return False
    places = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(one.kind in places and one.default is one.empty for one in parameters) > 1
