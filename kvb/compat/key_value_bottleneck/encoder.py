"""The authors' ``BottleneckedEncoder`` as they published it last."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from kvb import bars
from kvb.compat.key_value_bottleneck import splitters
from kvb.compat.key_value_bottleneck.bottleneck import KeyValueBottleneck
from kvb.items import inputs_of
from kvb.modules import encoders, streams
from kvb.splitters import MODES

_Encoder = TypeVar("_Encoder", bound="BottleneckedEncoder")


class BottleneckedEncoder(encoders.BottleneckedEncoder):
    """The published class: always a tuple out, ``(values, [keys, indices, distances, counts,] heads, features)``.

    The middle four come with ``return_values_only=False``. Channel-first features [b, d, *spatial] give values
    [b, C, T, V, *spatial], and the other four alike with D or 1 instead of V; channel-last ones, of embeddings [b, d]
    too, [b, C, T, n, V], with n positions. heads are [b, C, n, D], features what the encoder returned.
    ``concat_values_from_all_codebooks``, at which the published code crashes, joins C and V: [b, T, C·V, *spatial] and
    so on.

    A subclass may build its own splitter and bottleneck: ``_init_splitter`` and ``_init_bottleneck`` are called once
    each, in this order, and find every argument of the constructor as an attribute.

    Args:
        bugs: as for ``KeyValueBottleneck``; the others are those of ``kvb.BottleneckedEncoder``.
    """

    __call__: Callable[..., tuple[Tensor, ...]]  # type: ignore[assignment]
    bugs: frozenset[str]
    VALID_SPLITTING_MODES: ClassVar[set[str]] = set(MODES)
    bottleneck: KeyValueBottleneck

    def __init__(self, *arguments: Any, bugs: Collection[str] = (), **options: Any) -> None:
        self.bugs = frozenset(bugs)
        super().__init__(*arguments, **options)

    def _init_splitter(self) -> nn.Module:
        kinds = {
            "chunk": splitters.Chunker,
            "random_projection": splitters.RandomDownProjection,
            "learned_projection": splitters.LearnedDownProjection,
        }
        mode = self.splitting_mode
        if not isinstance(mode, str) or mode not in kinds:
            return super()._init_splitter()
        return kinds[mode](self.num_codebooks, self.num_channels, self.dim_keys)

    def _init_bottleneck(self) -> KeyValueBottleneck:
        return KeyValueBottleneck(**self._bottleneck_options(), bugs=self.bugs)

    def forward(self, x: Any, **encoder_options: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        """x, as the encoder wants it, -> the tuple described above."""
        features = self.forward_encoder(x, **encoder_options)
        heads = self._split(features)
        values, *others = self.bottleneck(heads)
        if self.concat_values_from_all_codebooks:
            values = values.movedim(1, 3).flatten(-2)
        first = not self.encoder_is_channel_last
        parts = [self._unfolded(part, features.shape[1:-1]) if first else part for part in (values, *others)]
        return (*parts, heads, features.movedim(-1, 1) if first else features)

    def _split(self, features: Tensor) -> Tensor:
        """Features -> heads [b, C, n, D]."""
        heads = super()._split(features)
        return heads[:, :, None] if heads.dim() == 3 else heads.flatten(2, -2)

    def _masked_features(self, x: Any, mask: Tensor | None, encoder_options: Mapping[str, Any]) -> streams.Part:
        features, mask = super()._masked_features(x, mask, encoder_options)
        sizes = features.shape[1:-1]  # one axis of positions, as heads have it
        return streams.Part(features, None if mask is None else mask.reshape(len(mask), sizes.numel()))

    def _attention(self, x: Any, encoder_options: Mapping[str, Any], sizes: torch.Size) -> Tensor | None:
        """None: the published class looks at no attention mask."""
        return None

    def _unfolded(self, part: Tensor, spatial: Iterable[int]) -> Tensor:
        """[..., n, V] -> [..., V, *spatial]."""
        return part.transpose(-1, -2).reshape(*part.shape[:-2], part.shape[-1], *spatial)

    def initialize_keys(  # type: ignore[override]
        self: _Encoder,
        loader: Iterable[Any],
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        *,
        progress: bool = True,
    ) -> _Encoder:
        """Let the keys learn for ``epochs`` passes over a loader; nothing at all for 0.

        The inputs of an item are its first element, as published; of a mapping all but the labels, and a tensor itself.
        """
        training = self.bottleneck.training
        self.bottleneck.train()
        try:
            for epoch in range(epochs):
                title = f"keys: pass {epoch + 1} of {epochs}"
                for item in bars.of(loader, title, shown=progress):
                    with torch.no_grad():
                        self(self._moved(inputs_of(item, inputs_extractor)))
        finally:
            self.bottleneck.train(training)
        return self

    def prepare(  # type: ignore[override]
        self: _Encoder,
        loader: Iterable[Any],
        epochs: int = 1,
        inputs_extractor: Callable[[Any], Any] | None = None,
        *,
        progress: bool = True,
    ) -> _Encoder:
        """Equivalent to ``freeze_encoder().freeze_splitter().initialize_keys(loader, epochs).freeze_keys()``."""
        self.freeze_encoder().freeze_splitter()
        return self.initialize_keys(loader, epochs, inputs_extractor, progress=progress).freeze_keys()

    def save(self, model_path: str | os.PathLike[str]) -> None:
        """Write ``{"bottleneck": state_dict, "splitter": state_dict}`` with ``torch.save``."""
        torch.save({name: part.state_dict() for name, part in self._learnt().items()}, model_path)

    def load(self: _Encoder, model_path: str | os.PathLike[str]) -> _Encoder:
        """As ``kvb.BottleneckedEncoder.load``: a file of ``save``, here or of the published package; returns self."""
        return super().load(model_path)

    def save_model(self, model_path: str | os.PathLike[str]) -> None:
        """As ``kvb.BottleneckedEncoder.save_model``: the whole module, pickled."""
        super().save_model(model_path)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a pickle of the published class."""
        if "bugs" not in state:
            with torch.random.fork_rng(devices=[]):
                own = vars(BottleneckedEncoder(nn.Identity(), 1, 1, 1, 1, 1))
            state = {**own, **state}
        super().__setstate__(state)
