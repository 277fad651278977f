"""``KeyValueClassifier``: a bottleneck as a classifier of scikit-learn's kind, which learns and forgets by counting.

Source: Träuble et al., Discrete Key-Value Bottleneck, ICML 2023 (arXiv:2207.11240); ours: counts in place of gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvb import classifier_files, functional, tabular, training, validation
from kvb.checkpoints import CheckpointError, read_state
from kvb.counting import ClassCounts
from kvb.projection import BATCH, NearestCodes
from kvb.tabular import Label

METHODS = ("count", "sgd")
PAIRS, DIM_KEYS = 2048, 48  # at most; chosen with the other defaults on validation examples: docs/experiments.md
SHARPNESS = 4.0  # of probabilities: scores are mean log likelihoods, and codebooks are far from independent
_UNFIT = (KeyError, ValueError, TypeError, RuntimeError)  # of a file that holds something else
_KEPT = 16384  # rows that keys are drawn from
_SELF = TypeVar("_SELF", bound="KeyValueClassifier")


class KeyValueClassifier(tabular.Estimator):
    """A classifier of features, or of anything with an encoder, that learns class after class and can forget.

    Each of C codebooks looks at the features through a random projection of D numbers, finds the ``topk`` nearest of K
    keys, and knows how often each class fetched them. Keys come from unlabelled data and never change; learning adds to
    counts. So classes may come in any order, at any time, and ``forget`` leaves bit for bit what would be there had the
    samples never been learned with the same keys. ::

        model = KeyValueClassifier().fit(X, y)
        model.partial_fit(X_new, y_new)  # classes may be new
        model.forget(X[:100], y[:100])

    Follows scikit-learn's conventions; it works in its pipelines and searches, and needs none of it.

    Args:
        method: "count", or "sgd" for values that learn by ``kvb.training.sgd_step``, which ``forget`` cannot undo.
        topk: how many nearest pairs are fetched; fewer where there are few keys: one of 16.
        codebooks: C.
        pairs: K; None takes one key of each unlabelled sample, up to 2,048.
        dim_keys: D; None takes as many as there are features, up to 48.
        smoothing: as for ``ClassCounts``.
        epochs, learning_rate, batch_size: of "sgd".
        encoder: callable that makes features [B, F], a tensor or an array, of a batch of whatever X holds.
        device: that computes; None leaves it to the CPU.
        random_state: seed of keys and projections.
    Attributes:
        classes_: the labels that were learned and not forgotten, sorted.
        n_features_in_: F.
        coder_: the ``NearestCodes``, with keys [C, K, D].
        counts_: the ``ClassCounts``. values_: [C, K, V] of "sgd".
    Raises:
        what scikit-learn's classifiers raise: ValueError for wrong data, NotFittedError before ``fit``.
    Examples:
        >>> X, y = torch.randn(80, 8), torch.arange(80) % 2
        >>> X[:, 0] += 9 * y
        >>> kvb.KeyValueClassifier(codebooks=8).fit(X, y).score(X, y)
        1.0
    """

    coder_: NearestCodes
    counts_: ClassCounts
    values_: Tensor

    def __init__(
        self,
        method: str = "count",
        *,
        topk: int = 8,
        codebooks: int = 128,
        pairs: int | None = None,
        dim_keys: int | None = None,
        smoothing: float = 0.1,
        epochs: int = 10,
        learning_rate: float = 1.0,
        batch_size: int = 256,
        encoder: Callable[[Any], Any] | None = None,
        device: str | torch.device | None = None,
        random_state: int = 0,
    ) -> None:
        self.method = method
        self.topk = topk
        self.codebooks = codebooks
        self.pairs = pairs
        self.dim_keys = dim_keys
        self.smoothing = smoothing
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.encoder = encoder
        self.device = device
        self.random_state = random_state

    # --- learning -----------------------------------------------------------------------------------------------------

    def fit(self: _SELF, X: Any, y: Any = None) -> _SELF:
        """Forget everything, and learn from these samples; keys come from them, too, unless ``fit_keys`` made some.

        Args:
            X: [N, F] numbers: an array, a tensor or lists; whatever the encoder takes; or a DataLoader of (X, y).
            y: N labels: names or whole numbers; None for a loader.
        """
        self._require_parameters()
        if not tabular.is_loader(X):
            found = tabular.labels(y, type(self).__name__)
            if len(found) != self._size(X):
                sizes = [self._size(X), len(found)]
                raise ValueError(f"Found input variables with inconsistent numbers of samples: {sizes}")
        if not vars(self).get("_own_keys", False):
            self._make_keys(X)
        self._start()
        return self._learn(X, y, self.epochs)

    def partial_fit(self: _SELF, X: Any, y: Any = None, classes: Any = None) -> _SELF:
        """Learn more samples; their classes may be new. The first call makes keys of them, unless there are some.

        Args:
            X, y: as for ``fit``.
            classes: labels that will come; not needed.
        """
        self._require_parameters()
        if "coder_" not in vars(self):
            self._make_keys(X)
        if "_slots" not in vars(self):
            self._start()
        if classes is not None:
            self._declared |= set(tabular.labels(classes, type(self).__name__))
            self._slots_of(sorted(self._declared))
        return self._learn(X, y, self.epochs)

    def fit_keys(self: _SELF, X: Any) -> _SELF:
        """Make keys of unlabelled data, and forget what was learned; ``fit`` keeps them. More data: better keys.

        Args:
            X: as for ``fit``; labels are not looked at.
        """
        self._require_parameters()
        self._make_keys(X)
        for name in ("_slots", "counts_", "values_"):
            vars(self).pop(name, None)
        self._own_keys = True
        return self

    def forget(self: _SELF, X: Any, y: Any = None) -> _SELF:
        """Take away samples that were learned with these labels: the counts are those of never having learned them.

        Keys stay as they are: where these samples were among those that made the keys, use ``fit_keys`` on others.

        Raises:
            ValueError: samples or labels that were not learned, or method="sgd"; samples before them are forgotten.
        """
        self._require_fitted()
        if self.method != "count":
            raise ValueError(f"forget() takes method='count', got {self.method!r}: steps of SGD cannot be taken back")
        parts = [(codes, self._known(found)) for codes, found in self._coded(X, y)]
        for done, (codes, places) in enumerate(parts):
            try:
                self.counts_.remove(codes, places)
            except ValueError:
                for again, back in parts[:done]:
                    self.counts_.add(again, back)
                raise ValueError("expected samples that were learned with these labels, and not forgotten") from None
        return self

    def forget_classes(self: _SELF, classes: Any) -> _SELF:
        """Empty what was learned of these classes; the scores of all others stay bit for bit what they are."""
        self._require_fitted()
        names = tabular.labels(classes, type(self).__name__)
        places = self._known(names)
        self._declared -= set(names)
        if self.method == "count":
            self.counts_.forget_classes(places)
        else:
            self.values_[:, :, places] = 0
            self._active -= set(places.tolist())
        return self

    # --- prediction ---------------------------------------------------------------------------------------------------

    def decision_function(self, X: Any) -> Any:
        """Scores [N, V] in the order of ``classes_``; for two classes, the second minus the first, [N]."""
        scores = self._scores(X)
        return self._given_back(scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores)

    def predict_proba(self, X: Any) -> Any:
        """Probabilities [N, V] in the order of ``classes_``."""
        sharpness = SHARPNESS if self.method == "count" else 1.0
        return self._given_back((self._scores(X).double() * sharpness).softmax(-1))

    def predict(self, X: Any) -> Any:
        """The labels of the highest scores, [N]: a tensor where y was one, else an array."""
        best = self._scores(X).argmax(-1).cpu()
        classes = self.classes_
        return classes[best] if isinstance(classes, Tensor) else classes[best.numpy()]

    def score(self, X: Any, y: Any = None) -> float:
        """The share of samples whose label is predicted."""
        right = total = 0
        names = self._names
        for codes, found in self._coded(X, y):
            best = self._of(codes).argmax(-1).tolist()
            right += sum(names[place] == label for place, label in zip(best, found, strict=True))
            total += len(found)
        return right / total

    def novelty(self, X: Any, share: float = 0.99) -> Any:
        """The share of codebooks in which no key is near, [N] in [0, 1]: what keys were made of has about 1 - share.

        Near is what is within the distance that ``share`` of the codebook's keys have to another key. Where much is far
        the prediction is a guess: abstain there, or make keys of data that has such samples (``fit_keys``). Keys do not
        grow here: old samples would fetch new pairs, and could no longer be forgotten. ``kvb.growth`` does it for
        values that learn by steps.

        Raises:
            ValueError: share outside (0, 1].
        """
        if "coder_" not in vars(self):
            self._require_fitted()
        if validation.number("share", share, 0.0, float("inf"), open_low=True) > 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        parts = [self._far(rows, share) for rows, _ in self._batches(X, None, labelled=False)]
        return self._given_back(torch.cat(parts))

    @property
    def classes_(self) -> Any:
        """The labels, sorted: a tensor where y was one, else an array."""
        if "_slots" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no classes_ before fit")
        if self._tensors:
            return torch.tensor(self._names)
        return tabular.array(self._names)

    def __sklearn_is_fitted__(self) -> bool:
        return bool(vars(self).get("_slots"))

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that was learned, and the parameters but for encoder and device, to one file.

        Raises:
            TypeError: labels that are no strings or numbers. OSError: the file cannot be written.
        """
        self._require_fitted()
        classifier_files.write(self, path)

    @classmethod
    def load(
        cls: type[_SELF],
        path: str | os.PathLike[str],
        *,
        encoder: Callable[[Any], Any] | None = None,
        device: str | torch.device | None = None,
    ) -> _SELF:
        """What ``save`` wrote, with an encoder and on a device.

        Raises:
            CheckpointError: no such file, or damaged. OSError: it cannot be read.
        """
        state = read_state(path)
        try:
            model = cls(**classifier_files.options(state), encoder=encoder, device=device)
            classifier_files.restore(model, state)
        except _UNFIT as error:
            raise CheckpointError(f"{os.fspath(path)} holds no {cls.__name__}: {error}") from error
        return model

    # --- keys and codes -----------------------------------------------------------------------------------------------

    def _require_parameters(self) -> None:
        validation.choice("method", self.method, METHODS)
        for name in ("topk", "codebooks", "epochs", "batch_size"):
            validation.positive_int(name, getattr(self, name))
        for name in ("pairs", "dim_keys"):
            if getattr(self, name) is not None:
                validation.positive_int(name, getattr(self, name))
        if self.encoder is not None and not callable(self.encoder):
            raise TypeError(f"encoder must be callable, got {type(self.encoder).__name__}")

    def _size(self, X: Any) -> int:
        return len(X) if self.encoder is not None else len(tabular.features(X, type(self).__name__))

    def _batches(self, X: Any, y: Any, *, labelled: bool) -> Iterator[tuple[Tensor, Any]]:
        owner = type(self).__name__
        for inputs, found in tabular.batches(X, y, BATCH, encoder=self.encoder, labelled=labelled, owner=owner):
            yield self._encoded(inputs), found

    @torch.no_grad()
    def _encoded(self, inputs: Any) -> Tensor:
        """Features [B, F] on the device."""
        if self.encoder is not None:
            if isinstance(self.encoder, nn.Module):
                self.encoder.eval()
            inputs = self.encoder(inputs)
        return tabular.features(inputs, type(self).__name__).to(self.device or "cpu")

    def _make_keys(self, X: Any) -> None:
        generator = torch.Generator().manual_seed(self.random_state)
        kept, priority = torch.zeros(0), torch.zeros(0)
        for rows, _ in self._batches(X, None, labelled=False):
            kept = torch.cat([kept.to(rows).reshape(-1, rows.shape[1]), rows])
            priority = torch.cat([priority, torch.rand(len(rows), generator=generator)])
            if len(kept) > 2 * _KEPT:
                chosen = priority.topk(_KEPT).indices
                kept, priority = kept[chosen.to(kept.device)], priority[chosen]
        if not len(kept):
            raise ValueError("Found array with 0 sample(s) while a minimum of 1 is required.")
        kept = kept[priority.topk(min(_KEPT, len(kept))).indices.to(kept.device)]
        N, F = kept.shape
        self.n_features_in_ = F
        sizes = F, self.codebooks, min(self.pairs or PAIRS, N), min(F, self.dim_keys or DIM_KEYS), self.topk
        self.coder_ = NearestCodes(*sizes).to(kept.device).fit(kept, generator)
        self._own_keys = False

    def _codes(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, C, T]."""
        self._require_width(features)
        codes: Tensor = self.coder_(features)
        return codes

    def _require_width(self, features: Tensor) -> None:
        if features.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {features.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )

    def _far(self, features: Tensor, share: float) -> Tensor:
        """[B, F] -> [B], of codebooks."""
        self._require_width(features)
        return self.coder_.none_near(features, share).double().mean(-1)

    def _coded(self, X: Any, y: Any) -> Iterator[tuple[Tensor, list[Label]]]:
        """Codes and labels of one batch after the other."""
        owner = type(self).__name__
        if not tabular.is_loader(X):
            y = tabular.labels(y, owner)
        for features, found in self._batches(X, y, labelled=True):
            names = tabular.labels(found, owner)
            if len(names) != len(features):
                sizes = [len(features), len(names)]
                raise ValueError(f"Found input variables with inconsistent numbers of samples: {sizes}")
            yield self._codes(features), names

    # --- classes ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Nothing is learned."""
        C, K, _ = self.coder_.keys.shape
        device = self.coder_.keys.device
        self._slots: dict[Label, int] = {}
        self._declared: set[Label] = set()
        self._active: set[int] = set()
        self._tensors = False
        vars(self).pop("counts_", None)
        vars(self).pop("values_", None)
        if self.method == "count":
            self.counts_ = self.new_counts(1)
        else:
            self.values_ = torch.zeros(C, K, 1, device=device)

    def new_counts(self, num_classes: int) -> ClassCounts:
        """A counting head for the codes of ``coder_``, with these parameters, that has not counted anything."""
        C, K, _ = self.coder_.keys.shape
        ranks = tuple(1 / (1 + t) for t in range(self.coder_.topk))
        counts = ClassCounts(C, K, num_classes, smoothing=self.smoothing, rank_weights=ranks)
        return counts.to(self.coder_.keys.device)

    def _slots_of(self, names: list[Label]) -> Tensor:
        """The places of labels among those of the tables; new ones get room."""
        for name in names:
            self._slots.setdefault(name, len(self._slots))
        V = max(1, len(self._slots))
        if self.method == "count" and self.counts_.num_classes < V:
            self.counts_.expand(V)
        elif self.method == "sgd" and self.values_.shape[2] < V:
            self.values_ = nn.functional.pad(self.values_, (0, V - self.values_.shape[2])).contiguous()
        return torch.tensor([self._slots[name] for name in names], dtype=torch.int64, device=self.coder_.keys.device)

    def _known(self, names: Iterable[Label]) -> Tensor:
        names = list(names)
        unknown = sorted({str(name) for name in names if name not in self._slots})
        if unknown:
            raise ValueError(f"expected labels that were learned, got {', '.join(unknown[:8])}")
        return torch.tensor([self._slots[name] for name in names], dtype=torch.int64, device=self.coder_.keys.device)

    @property
    def _names(self) -> list[Label]:
        """The labels that hold something, or are to come, sorted."""
        if self.method == "count":
            seen = self.counts_.seen().tolist()
            held = {name for name, place in self._slots.items() if seen[place]}
        else:
            held = {name for name, place in self._slots.items() if place in self._active}
        return sorted(held | self._declared)

    def _learn(self: _SELF, X: Any, y: Any, epochs: int) -> _SELF:
        kept: list[tuple[Tensor, Tensor]] = []
        if not tabular.is_loader(X):
            self._tensors = isinstance(y, Tensor)
        for codes, names in self._coded(X, y):
            places = self._slots_of(names)
            self._active |= set(places.tolist())
            if self.method == "count":
                self.counts_.add(codes, places)
            else:
                kept.append((codes.to(torch.int32), places))
        if kept:
            codes, places = (torch.cat(part) for part in zip(*kept, strict=True))
            self._descend(codes, places, epochs)
        return self

    def _descend(self, codes: Tensor, places: Tensor, epochs: int) -> None:
        generator = torch.Generator().manual_seed(self.random_state)
        for _ in range(epochs):
            order = torch.randperm(len(codes), generator=generator).to(codes.device)
            for rows in order.split(self.batch_size):
                training.sgd_step(self.values_, codes[rows], places[rows], lr=self.learning_rate)

    def _scores(self, X: Any) -> Tensor:
        """[N, V] in the order of ``classes_``."""
        self._require_fitted()
        return torch.cat([self._of(self._codes(rows)) for rows, _ in self._batches(X, None, labelled=False)])

    def _of(self, codes: Tensor) -> Tensor:
        places = self._known(self._names)
        if self.method == "sgd":
            return functional.gather(self.values_, codes.transpose(1, 2), pool="mean", pool_positions=True)[:, places]
        scores: Tensor = self.counts_(codes)[:, places]
        return scores.clamp_(
            min=float(torch.tensor(self.smoothing / self.coder_.keys.shape[1]).log())
        )  # of no count at all

    def _require_fitted(self) -> None:
        if "_slots" not in vars(self) or not self._slots:
            kind = tabular.exception("NotFittedError", RuntimeError)
            raise kind(f"This {type(self).__name__} instance is not fitted yet: call fit or partial_fit first")

    def _given_back(self, numbers: Tensor) -> Any:
        return numbers if vars(self).get("_tensors", False) else numbers.cpu().numpy()
