"""What a ``KeyValueClassifier`` keeps in a file: tensors, and one of them the text of all that is none."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import torch
from torch import Tensor

from kvb.files import replacing
from kvb.projection import NearestCodes

_NOT_SAVED = ("encoder", "device")


def write(model: Any, path: str | os.PathLike[str]) -> None:
    """All that a fitted classifier learned, and its parameters but for encoder and device."""
    chosen = {name: value for name, value in model.get_params(deep=False).items() if name not in _NOT_SAVED}
    slots = sorted(model._slots, key=lambda name: model._slots[name])
    learned = {"slots": slots, "declared": sorted(model._declared), "active": sorted(model._active)}
    flags = {"tensors": model._tensors, "own_keys": model._own_keys}
    text = json.dumps({"options": chosen, **learned, **flags})
    state = {f"coder.{name}": part for name, part in model.coder_.state_dict().items()}
    state |= {"text": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    if model.method == "count":
        state |= {f"counts.{name}": part for name, part in model.counts_.state_dict().items()}
    else:
        state["values"] = model.values_
    buffer = io.BytesIO()
    torch.save({name: part.cpu() for name, part in state.items()}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def options(state: dict[str, Tensor]) -> dict[str, Any]:
    """The parameters of a classifier that was written."""
    found: dict[str, Any] = _text(state)["options"]
    return found


def restore(model: Any, state: dict[str, Tensor]) -> None:
    """Put what was written into a classifier with these parameters."""
    text, place = _text(state), model.device or "cpu"
    state = {name: part.to(place) for name, part in state.items()}
    F, (C, K, D) = len(state["coder.projection.mean"]), state["coder.keys"].shape
    model.n_features_in_ = F
    model.coder_ = NearestCodes(F, C, K, D, model.topk).to(place)
    model.coder_.load_state_dict({name: state[f"coder.{name}"] for name in model.coder_.state_dict()})
    model._own_keys = text["own_keys"]
    model._start()
    model._slots.update({name: number for number, name in enumerate(text["slots"])})
    model._declared.update(text["declared"])
    model._active.update(text["active"])
    model._tensors = text["tensors"]
    if model.method == "count":
        model.counts_.load_state_dict({name: state[f"counts.{name}"] for name in model.counts_.state_dict()})
    else:
        model.values_ = state["values"]


def _text(state: dict[str, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(state["text"].tolist()))
    return found
