"""What scikit-learn's users hand over, as tensors: rows of features, and labels of any kind.

The messages hold what scikit-learn's own checks look for.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvb import items, validation

Label = Any  # a str, int, float or bool


def _numpy() -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError as error:
        raise RuntimeError("NumPy is not installed: pip install numpy, or give tensors") from error


def is_loader(X: Any) -> bool:
    """Whether X yields batches: an iterable without rows of its own, a DataLoader say."""
    return isinstance(X, Iterable) and not (isinstance(X, (Tensor, Sequence)) or hasattr(X, "__array__") or _sparse(X))


def _sparse(X: Any) -> bool:
    return hasattr(X, "tocsr")


def features(X: Any, owner: str) -> Tensor:
    """X as a dense float32 [N, F] of finite numbers.

    Raises:
        TypeError: sparse or complex numbers, or what is no number. ValueError: another shape, no rows or columns, NaN
        or Inf.
    """
    if _sparse(X):
        raise TypeError(f"{owner} got a sparse X, but a dense one is required: call X.toarray() first")
    if not isinstance(X, Tensor):
        numpy = _numpy()
        array = numpy.asarray(X)
        if array.dtype.kind == "c":
            raise ValueError("Complex data not supported: take its parts apart")
        X = torch.from_numpy(numpy.ascontiguousarray(array, dtype=numpy.float64).copy())
    if validation.tensor(owner, "X", X).is_complex():
        raise ValueError("Complex data not supported: take its parts apart")
    if X.dim() != 2:
        raise ValueError(
            f"Expected 2D array, got an X of shape {tuple(X.shape)} instead. Reshape your data: X[:, None] for one "
            "feature, X[None] for one sample, X.flatten(1) for images"
        )
    for axis, name in enumerate(("sample", "feature")):
        if X.shape[axis] == 0:
            raise ValueError(f"Found array with 0 {name}(s) (shape={tuple(X.shape)}) while a minimum of 1 is required.")
    X = X.detach().to(torch.float32)
    if not bool(X.isfinite().all()):
        rows = int((~X.isfinite().all(-1)).sum())
        raise ValueError(f"Input X contains NaN or infinity (inf) in {rows} of {len(X)} rows; {owner} needs numbers")
    return X


def labels(y: Any, owner: str) -> list[Label]:
    """One label of each sample, as Python objects.

    Raises:
        ValueError: none, several a sample, or numbers that are no classes.
    """
    if y is None:
        raise ValueError(f"{owner} requires y to be passed, but the target y is None")
    if isinstance(y, Tensor):
        flat = y.detach().cpu()
    else:
        flat = _numpy().asarray(y)
        if flat.ndim == 2 and flat.shape[1] == 1:
            _warn_of_column(owner)
            flat = flat[:, 0]
    if flat.ndim != 1:
        raise ValueError(f"y should be a 1d array, one label of each sample, got an array of shape {tuple(flat.shape)}")
    found: list[Label] = flat.tolist()
    for label in found:
        if isinstance(label, float) and not (math.isfinite(label) and label.is_integer()):
            kind = "NaN or infinity (inf)" if not math.isfinite(label) else "continuous numbers"
            raise ValueError(f"Unknown label type: {kind} in y: {label}; a class is a name or a whole number")
    return found


def _warn_of_column(owner: str) -> None:
    kind = exception("DataConversionWarning", UserWarning)
    warnings.warn(
        f"A column-vector y was passed when a 1d array was expected by {owner}: pass y[:, 0]", kind, stacklevel=5
    )


def exception(name: str, otherwise: type[Any]) -> type[Any]:
    """An exception of scikit-learn where it is installed: its users catch that."""
    try:
        found: type[Any] = getattr(importlib.import_module("sklearn.exceptions"), name)
    except ImportError:
        return otherwise
    return found


def batches(X: Any, y: Any, size: int, *, encoder: Any, labelled: bool, owner: str) -> Iterator[tuple[Any, Any]]:
    """(inputs, labels or None) of one batch after the other, as they are.

    X is rows that are cut, or a loader whose items hold both, as ``kvb.items`` takes them apart.

    Raises:
        ValueError: as many labels as samples are expected.
    """
    if is_loader(X):
        if y is not None:
            raise ValueError("y must be None where X is a loader: its items hold the labels")
        for item in X:
            inputs = items.inputs_of(item)
            found = items.labels_of(item, inputs) if labelled else None
            if labelled and found is None:
                raise ValueError(f"{owner} requires y to be passed, but the target y is None: items must be (X, y)")
            yield inputs, found
        return
    rows = X if encoder is not None else features(X, owner)
    if labelled and y is not None and len(y) != len(rows):
        raise ValueError(f"Found input variables with inconsistent numbers of samples: [{len(rows)}, {len(y)}]")
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size], None if y is None else y[begin : begin + size]


def array(names: list[Label]) -> Any:
    return _numpy().array(names)


class Estimator:
    """Parameters as scikit-learn reads and writes them: what ``__init__`` takes, under the same names."""

    @classmethod
    def _parameters(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name; ``deep`` adds those of an encoder that has any."""
        found = {name: getattr(self, name) for name in self._parameters()}
        for name, value in list(found.items()):
            if deep and hasattr(value, "get_params") and not isinstance(value, type):
                found |= {f"{name}__{inner}": one for inner, one in value.get_params().items()}
        return found

    def set_params(self, **parameters: Any) -> Any:
        """Change parameters by name, those of an encoder as ``encoder__name``; returns self.

        Raises:
            ValueError: a name that is none.
        """
        for name, value in parameters.items():
            outer, _, inner = name.partition("__")
            if outer not in self._parameters():
                known = self._parameters()
                raise ValueError(f"Invalid parameter {outer!r} for {type(self).__name__}; valid are {known!r}")
            if inner:
                getattr(self, outer).set_params(**{inner: value})
            else:
                setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        changed = [
            f"{name}={getattr(self, name)!r}"
            for name in self._parameters()
            if getattr(self, name) is not defaults[name].default and getattr(self, name) != defaults[name].default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn, which alone calls this, may expect of a classifier."""
        utils = importlib.import_module("sklearn.utils")
        return utils.Tags(
            estimator_type="classifier",
            target_tags=utils.TargetTags(required=True),
            classifier_tags=utils.ClassifierTags(),
            input_tags=utils.InputTags(),
        )
