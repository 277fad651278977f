"""Encoders of other libraries: how many channels their features have, where these are, and how to pool them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from kvb import validation

Pooling = Literal["mean", "first", "none"]
_Self = TypeVar("_Self", bound="FromLibraries")


class FromLibraries:
    """Constructors of ``BottleneckedEncoder`` for the models of three libraries."""

    @classmethod
    def from_transformers(cls: type[_Self], model: Any, *, pooling: Pooling = "mean", **options: Any) -> _Self:
        """Around a model of Hugging Face transformers: ``module(**batch)``, or ``module(batch)``, of its tokenizer.

        Args:
            model: returns an object with ``last_hidden_state``, [B, L, d] or [B, d, H, W]: ``AutoModel``, not
                ``AutoModelFor…``.
            pooling: "mean" over the positions that the attention mask counts, or the "first" ([CLS]): one embedding per
                sample. "none": every position is looked up, those of padding excepted.
            options: of the constructor, but for ``encoder``, ``num_channels`` and ``outputs_extractor``.
        Raises:
            TypeError: a model without ``config``, or whose config does not say its hidden size.
        """
        validation.choice("pooling", pooling, get_args(Pooling))
        channels = _hidden_size(model)
        options.setdefault("encoder_is_channel_last", not _is_convolutional(model))
        extractor = {"mean": mean_over_positions, "first": first_position, "none": None}[pooling]
        return _around(cls, model, channels, outputs_extractor=extractor, **options)

    @classmethod
    def from_sentence_transformers(cls: type[_Self], model: Any, **options: Any) -> _Self:
        """Around a ``SentenceTransformer``: ``module(["a sentence", ...])``, or what its tokenizer makes of them.

        Args:
            options: of the constructor, but for ``encoder`` and ``num_channels``.
        """
        return _around(cls, SentenceFeatures(model), _embedding_size(model), **options)

    @classmethod
    def from_timm(cls: type[_Self], model: Any, *, pooling: Literal["head", "none"] = "head", **options: Any) -> _Self:
        """Around a model of timm.

        Args:
            pooling: "head", as the model's own head pools: one embedding per image. "none": every position of
                ``forward_features``, [B, L, d] or [B, H, W, d].
            options: of the constructor, but for ``encoder`` and ``num_channels``.
        Raises:
            TypeError: a model without ``num_features``, ``forward_features`` and ``forward_head``.
        """
        validation.choice("pooling", pooling, ("head", "none"))
        if missing := [
            name for name in ("num_features", "forward_features", "forward_head") if not hasattr(model, name)
        ]:
            raise TypeError(f"from_timm() expects a model of timm, got {type(model).__name__} without {missing[0]}")
        pooled = pooling == "head"
        # Some heads have a layer of their own before the classes.
        channels = getattr(model, "head_hidden_size", model.num_features) if pooled else model.num_features
        return _around(cls, TimmFeatures(model, pooled), channels, **options)


def _around(cls: Any, encoder: nn.Module, channels: int, **options: Any) -> Any:
    return cls(encoder=encoder, num_channels=channels, **options)


class SentenceFeatures(nn.Module):
    """The embeddings [B, d] of a ``SentenceTransformer``, of sentences or of their tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, sentences: Any = None, **tokens: Any) -> Tensor:
        if isinstance(sentences, str):
            raise TypeError(
                "expected a list of sentences, got a str; a loader whose items are such lists needs "
                "inputs_extractor=lambda item: item, as the first of a list is taken otherwise"
            )
        if sentences is not None:
            tokens = self.model.tokenize(list(sentences))
        device = next(self.model.parameters()).device
        tokens = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tokens.items()}
        found: Tensor = self.model(tokens)["sentence_embedding"]
        return found


class TimmFeatures(nn.Module):
    """The features of a timm model before its classes, channels last."""

    def __init__(self, model: Any, pooled: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.pooled = pooled

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(images)
        if self.pooled:
            features = self.model.forward_head(features, pre_logits=True)
        elif features.dim() == 4 and getattr(self.model, "output_fmt", "NCHW") != "NHWC":
            features = features.movedim(1, -1)
        return features


def mean_over_positions(output: Any, batch: Any) -> Tensor:
    """[B, d]: over the positions [B, L] that an attention mask counts, over all [B, d, H, W] where there is none."""
    hidden: Tensor = output.last_hidden_state
    if hidden.dim() == 4:
        return hidden.mean((2, 3))
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return hidden.mean(1)
    # What an encoder makes of padding does not count, even if it is NaN.
    counted = mask.bool()[..., None]
    return torch.where(counted, hidden, 0).sum(1) / counted.sum(1).clamp(min=1)


def first_position(output: Any) -> Tensor:
    """[B, d] of the first position of [B, L, d]."""
    hidden: Tensor = output.last_hidden_state
    return hidden[:, 0]


def _hidden_size(model: Any) -> int:
    config = getattr(model, "config", None)
    for name in ("hidden_size", "d_model", "dim", "hidden_sizes"):
        size = getattr(config, name, None)
        if isinstance(size, (list, tuple)) and size:
            size = size[-1]  # of the last stage
        if isinstance(size, int):
            return size
    raise TypeError(
        f"from_transformers() expects a model whose config has a hidden_size, got {type(model).__name__}; "
        "call BottleneckedEncoder(model, num_channels=...) instead"
    )


def _is_convolutional(model: Any) -> bool:
    return isinstance(getattr(model.config, "hidden_sizes", None), (list, tuple))


def _embedding_size(model: Any) -> int:
    # The newer name first: the older one warns.
    for name in ("get_embedding_dimension", "get_sentence_embedding_dimension"):
        if hasattr(model, name):
            return int(getattr(model, name)())
    raise TypeError(f"from_sentence_transformers() expects a SentenceTransformer, got {type(model).__name__}")
