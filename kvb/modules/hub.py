"""Modules in folders, as the Hugging Face Hub keeps them: what they were built from next to their tensors."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from kvb import checkpoints, files
from kvb.about import __version__

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1
_FIELDS = {"kvb_config", "kvb_version", "class", "options", "arguments"}
_OF_THIS_RUN = {"self", "process_group", "device", "dtype"}  # which no file holds, or the tensors say
_Self = TypeVar("_Self", bound="OnHub")


class OnHub:
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` for modules whose arguments are their attributes."""

    _more_options: ClassVar[frozenset[str]] = frozenset()  # arguments that hide behind ``**``

    def _arguments(self) -> dict[str, Any]:
        """What would build this module, as it is now."""
        named = inspect.signature(type(self).__init__).parameters.values()
        names = {one.name for one in named if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        return {name: getattr(self, name) for name in sorted((names | self._more_options) - _OF_THIS_RUN)}

    def _facts(self) -> dict[str, str]:
        """What a model card says in numbers."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the module to a folder: ``config.json``, ``model.safetensors``, and a model card where there is none.

        Each file is replaced as a whole. Arguments that are no numbers and no text, an encoder say, are named in the
        config, and ``from_pretrained`` wants them again; their tensors are in the weights.

        Raises:
            AttributeError: a subclass that does not keep an argument of its constructor. OSError, RuntimeError,
            TypeError: as ``kvb.save``.
        Examples:
            >>> kvb.KeyValueBottleneck(4, 16, dim_keys=8, dim_values=10).save_pretrained("memory")
            >>> kvb.KeyValueBottleneck.from_pretrained("memory").values.shape
            torch.Size([4, 16, 10])
        """
        folder = Path(folder)
        arguments = self._arguments()
        options = {name: value for name, value in arguments.items() if _is_plain(value)}
        parts = {name: type(value).__name__ for name, value in arguments.items() if name not in options}
        config = {
            "kvb_config": FORMAT,
            "kvb_version": __version__,
            "class": type(self).__name__,
            "options": options,
            "arguments": parts,
        }
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save(self, folder / WEIGHTS)  # type: ignore[arg-type]
        with files.replacing(folder / CONFIG) as file:
            file.write((json.dumps(config, indent=2) + "\n").encode())
        if not (folder / CARD).exists():
            (folder / CARD).write_text(self._card(parts))

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> _Self:
        """The module in a folder of ``save_pretrained``, or in a repository of the Hugging Face Hub; in eval mode.

        Args:
            source: a folder, or else the name of a repository, "owner/name".
            revision, token, cache_dir, local_files_only: as for ``huggingface_hub.snapshot_download``.
            arguments: of the constructor; they win over those that were saved. Necessary are those that a file cannot
                hold: the encoder.
        Raises:
            ValueError: a config that is damaged, of a newer kvb, or of another class. TypeError: an argument is
            missing. kvb.CheckpointError: the weights are damaged, or do not fit. OSError: a file cannot be read.
            RuntimeError: huggingface_hub is not installed.
        """
        folder = Path(source)
        if not folder.is_dir():
            options = {"revision": revision, "token": token, "cache_dir": cache_dir}
            wanted = [CONFIG, WEIGHTS]
            found = _library().snapshot_download(
                str(source), allow_patterns=wanted, local_files_only=local_files_only, **options
            )
            folder = Path(found)
        config = read_config(folder)
        if config["class"] != cls.__name__:
            raise ValueError(f"{source} holds a {config['class']}, not a {cls.__name__}: use that class")
        if missing := sorted(config["arguments"].keys() - arguments.keys()):
            kinds = ", ".join(f"{name}= (it was of type {config['arguments'][name]})" for name in missing)
            raise TypeError(f"{cls.__name__}.from_pretrained(): a file cannot hold {kinds}: pass it again")
        module = _built(cls, {**config["options"], **arguments}, source)
        return checkpoints.load(module, folder / WEIGHTS).eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a kvb module",
    ) -> str:
        """Upload what ``save_pretrained`` writes to a repository of the Hugging Face Hub, made if need be; its address.

        A model card that the repository has already stays as it is.

        Raises:
            RuntimeError: huggingface_hub is not installed; its own errors.
        """
        api = _library().HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            kept = [CARD] if api.file_exists(repository.repo_id, CARD, revision=revision) else []
            api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                ignore_patterns=kept,
            )
        return str(repository)

    def _card(self, parts: dict[str, str]) -> str:
        name = type(self).__name__
        again = "".join(f", {part}={part}" for part in parts)
        facts = "\n".join(f"| {fact} | {number} |" for fact, number in self._facts().items())
        return f"""---
library_name: kvb
tags:
- kvb
- discrete-key-value-bottleneck
- continual-learning
---

# {name}

A discrete key-value bottleneck ([arXiv:2207.11240](https://arxiv.org/abs/2207.11240)) of kvb {__version__}.

| | |
|---|---|
{facts}

```python
import kvb

module = kvb.{name}.from_pretrained("this folder or repository"{again})
```
"""


def read_config(folder: Path) -> dict[str, Any]:
    """The config in a folder of ``save_pretrained``; ValueError where it is none, or has fields that nobody knows."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or "kvb_config" not in config:
        raise ValueError(f"{path} was not written by kvb: expected a field kvb_config")
    version = config["kvb_config"]
    if type(version) is not int or version > FORMAT:
        raise ValueError(f"{path} has version {str(version)[:80]}, but this kvb reads version {FORMAT}: upgrade kvb")
    if unknown := sorted(config.keys() - _FIELDS):
        raise ValueError(f"{path} has fields that kvb does not know: {str(unknown)[:200]}")
    tables = [config.get(name) for name in ("options", "arguments")]
    if not all(isinstance(table, dict) for table in tables) or not isinstance(config.get("class"), str):
        raise ValueError(f"{path} is damaged: expected a class, options and arguments")
    return config


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _built(cls: type[_Self], arguments: dict[str, Any], source: Any) -> Any:
    """A module without memory of its own, for tensors of a file: whatever sizes a config claims, they cost nothing."""
    try:
        with torch.device("meta"):
            module: Any = cls(**arguments)
        if _makes_more_than_a_file_holds(module):
            return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{source} does not fit {cls.__name__}: {error}") from error
    if not checkpoints.can_adopt(module):  # code that nobody here knows copies tensors into those that are there
        for part in module.modules():
            if any(tensor.is_meta for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
                part.to_empty(device=torch.get_default_device(), recurse=False)
    return module


def _makes_more_than_a_file_holds(module: nn.Module) -> bool:
    """Whether a constructor made buffers, here without data, that are in no state_dict."""
    held = module.state_dict(keep_vars=True).keys()
    return any(buffer.is_meta and name not in held for name, buffer in module.named_buffers())


def _library() -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise RuntimeError("huggingface_hub is not installed: pip install huggingface_hub, or name a folder") from error
