"""``ClassCounts``: a head that learns by counting which classes fetched which pair, and forgets by subtracting.

Every pair keeps a histogram of the classes of the samples that fetched it. Learning adds whole numbers, so that neither
the order of the samples nor the cut into batches changes a bit, counts of several processes add up to those of one, and
taking samples away leaves exactly what would be there had they never come. ::

    head = ClassCounts(bottleneck.num_codebooks, bottleneck.key_value_pairs_per_codebook, num_classes=10)
    head.add(bottleneck.encode(x), labels)  # any number of times, in any order
    classes = head.predict(bottleneck.encode(queries))
    head.remove(bottleneck.encode(x[:100]), labels[:100])  # as if these had never been seen

Source: ours; naive Bayes over the codes of a bottleneck (Träuble et al., ICML 2023, arXiv:2207.11240), with the linear
interpolation of Jelinek and Mercer, Interpolated estimation of Markov source parameters from sparse data, 1980.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvb import ops, validation  # noqa: F401  (importing ops registers the operators)

METHODS = ("bayes", "vote")
DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)
_PIECE = 1 << 15  # numbers of one logarithm: always so many, so that the same count has the same bits everywhere
_FETCHED = 1 << 22  # elements of rows fetched at a time where every hit has its own weight


class ClassCounts(nn.Module):
    """Class histograms [C, K, V] of the pairs of a bottleneck, and the classes that they speak for.

    Equivalent to, for ``counts`` of zeros and codes [B, C, T]::

        for b, c, t in product(range(B), range(C), range(T)):  # add
            counts[c, codes[b, c, t], labels[b]] += 1
        share = counts / counts.sum(1, keepdim=True)  # [C, K, V]: how a class spreads over the pairs of a codebook
        scores = log(share + smoothing / K)[arange(C)[:, None], codes].sum((1, 2)) / (C * T)  # predict

    A score depends on the counts of its own class only: whatever others learn or forget leaves it bit for bit alone.

    Args:
        num_codebooks: C.
        pairs: K.
        num_classes: V; ``expand`` adds more.
        smoothing: > 0: what a class that never fetched a pair is worth there, as a share of even use.
        rank_weights: how much the rank t of a nearest pair counts in a prediction, [T]; None weighs them alike.
        dtype: of the counts: torch.int32, int64, float32 or float64. Integers are exact, and take integer weights.
        device: of the counts.
    State:
        counts [C, K, V]; totals [C, 1, V], their sums over the pairs, int64 or float64.
    Examples:
        >>> head = kvb.counting.ClassCounts(num_codebooks=1, pairs=3, num_classes=2)
        >>> codes, labels = torch.tensor([[[0]], [[2]]]), torch.tensor([0, 1])
        >>> head = head.add(codes, labels)
        >>> head.predict(codes)
        tensor([0, 1])
        >>> bool(head.remove(codes, labels).counts.any())
        False
    """

    smoothing: float
    rank_weights: tuple[float, ...] | None
    counts: Tensor
    totals: Tensor

    def __init__(
        self,
        num_codebooks: int,
        pairs: int,
        num_classes: int,
        *,
        smoothing: float = 0.1,
        rank_weights: Sequence[float] | None = None,
        dtype: torch.dtype = torch.int32,
        device: validation.Device = None,
    ) -> None:
        super().__init__()
        C = validation.positive_int("num_codebooks", num_codebooks)
        K = validation.positive_int("pairs", pairs)
        V = validation.positive_int("num_classes", num_classes)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.int32, torch.int64, torch.float32 or torch.float64, got {dtype!r}")
        self.smoothing = validation.number("smoothing", smoothing, 0.0, float("inf"), open_low=True)
        self.rank_weights = None if rank_weights is None else tuple(map(float, rank_weights))
        sums = torch.float64 if dtype.is_floating_point else torch.int64
        self.register_buffer("counts", torch.zeros(C, K, V, dtype=dtype, device=device))
        self.register_buffer("totals", torch.zeros(C, 1, V, dtype=sums, device=device))
        self._table: Tensor | None = None  # logarithms [C, K, V], made for a prediction
        self._stale = torch.ones(V, dtype=torch.bool)  # classes that have changed since

    @property
    def _fractional(self) -> bool:
        return self.counts.is_floating_point()

    @property
    def num_classes(self) -> int:
        """V."""
        return self.counts.shape[2]

    def seen(self) -> Tensor:
        """bool [V]: the classes that hold a count."""
        return (self.totals > 0).any(0)[0]

    # --- learning -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, codes: Tensor, labels: Tensor, weights: Tensor | None = None) -> ClassCounts:
        """Count the classes of samples in the pairs that they fetched.

        Args:
            codes: [B, C] or [B, C, T] of any integer dtype, from ``encode`` with the nearest pair or the nearest T.
            labels: [B] integers in [0, V).
            weights: what each hit counts, >= 0, shaped like codes or to be expanded to them, of the counts' kind: whole
                numbers for integer counts. ``distance_weights`` makes them of distances.
        Returns:
            self.
        Raises:
            TypeError: codes or labels that are no integers, weights of another kind. ValueError: shapes that disagree,
            negative weights. IndexError: a code outside [0, K) or a label outside [0, V). RuntimeError: devices differ.
            OverflowError: more than int32 holds; nothing is added then.
        """
        flat, labels, given = self._checked("add", codes, labels, weights)
        more = self._totals_of(flat, labels, given)
        if self.counts.dtype == torch.int32 and int((self.totals + more).amax()) >= 1 << 31:
            raise OverflowError("counts may pass 2**31 - 1, which torch.int32 cannot hold; use dtype=torch.int64")
        self._tally(flat, labels, given, remove=False)
        self.totals += more
        self._stale[labels.cpu()] = True
        return self

    @torch.no_grad()
    def remove(self, codes: Tensor, labels: Tensor, weights: Tensor | None = None) -> ClassCounts:
        """Take away what ``add`` added for the same arguments: bit for bit the counts of never having added it.

        Float counts lose what rounding costs; integers lose nothing.

        Raises:
            as ``add``; ValueError: these samples were not all added before; nothing is removed then.
        """
        flat, labels, given = self._checked("remove", codes, labels, weights)
        lowest = self._tally(flat, labels, given, remove=True)
        if not self._fractional and int(lowest) < 0:
            self._tally(flat, labels, given, remove=False)
            raise ValueError("expected samples that were added before with these labels: a count would be negative")
        self.totals -= self._totals_of(flat, labels, given)
        self._stale[labels.cpu()] = True
        return self

    def _tally(self, codes: Tensor, labels: Tensor, weights: Tensor | None, *, remove: bool) -> Tensor:
        lowest: Tensor = torch.ops.kvb.tally_(self.counts, codes, labels, weights, remove)
        return lowest

    def _totals_of(self, codes: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """What these samples add to ``totals``."""
        if weights is None:
            samples = labels.bincount(minlength=self.num_classes) * codes.shape[1]
            return samples.expand_as(self.totals).to(self.totals.dtype)
        each = weights.to(self.totals.dtype).sum(1)
        return torch.zeros_like(self.totals[:, 0]).index_add_(1, labels, each.T)[:, None]

    @torch.no_grad()
    def merge(self, other: ClassCounts) -> ClassCounts:
        """Add what another head of the same sizes has counted; returns self.

        Raises:
            TypeError: no ``ClassCounts``, or counts of another dtype. ValueError: other sizes.
        Examples:
            >>> one, other = (kvb.counting.ClassCounts(1, pairs=3, num_classes=2) for _ in range(2))
            >>> one = one.add(torch.tensor([[0]]), torch.tensor([0]))
            >>> other = other.add(torch.tensor([[2]]), torch.tensor([1]))
            >>> one.merge(other).counts
            tensor([[[1, 0],
                     [0, 0],
                     [0, 1]]], dtype=torch.int32)
        """
        if not isinstance(other, ClassCounts) or other.counts.dtype != self.counts.dtype:
            kind = f"ClassCounts of {other.counts.dtype}" if isinstance(other, ClassCounts) else type(other).__name__
            raise TypeError(f"expected another ClassCounts of {self.counts.dtype}, got {kind}")
        validation.shape("other.counts", other.counts, "C K V", tuple(self.counts.shape))
        self.counts += other.counts.to(self.counts.device)
        self.totals += other.totals.to(self.totals.device)
        return self.changed()

    def forget_classes(self, classes: Tensor) -> ClassCounts:
        """Empty the histograms of these classes [M]; returns self."""
        validation.integer("forget_classes", "classes", classes)
        places = classes.to(self.counts.device, torch.int64)
        self.counts[:, :, places] = 0
        self.totals[:, :, places] = 0
        return self.changed()

    def expand(self, num_classes: int) -> ClassCounts:
        """Make room for more classes, without a count; the others keep theirs. Returns self.

        Raises:
            ValueError: fewer classes than there are.
        """
        more = validation.positive_int("num_classes", num_classes) - self.num_classes
        if more < 0:
            raise ValueError(f"num_classes must be at least the {self.num_classes} that there are, got {num_classes}")
        self.counts = nn.functional.pad(self.counts, (0, more))
        self.totals = nn.functional.pad(self.totals, (0, more))
        return self.changed()

    def changed(self) -> ClassCounts:
        """To be called after ``counts`` and ``totals`` were written to, by an ``all_reduce`` say; returns self."""
        self._table, self._stale = None, torch.ones(self.num_classes, dtype=torch.bool)
        return self

    # --- prediction ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, codes: Tensor, weights: Tensor | None = None, *, method: str = "bayes") -> Tensor:
        """Scores [B, V] of the classes, float32; -inf for those without a count.

        "bayes": the weighted mean over all hits of the logarithm of the share, a log likelihood. "vote": the weighted
        mean over all hits of how the pair's shares divide among the classes; these depend on one another.

        Args:
            codes: [B, C] or [B, C, T].
            weights: of each hit, >= 0, shaped like codes or to be expanded to them; None takes ``rank_weights``.
        Raises:
            as ``add``; ValueError: an unknown method, or fewer ``rank_weights`` than T.
        """
        validation.choice("method", method, METHODS)
        flat = self._flat("ClassCounts", codes)
        table = self._logarithms() if method == "bayes" else self._shares()
        if weights is None:
            scores = self._by_rank(table, flat)
        else:
            given = self._weights("ClassCounts", weights, codes, kind=table.dtype)
            scores = self._by_hit(table, flat, given)
        return scores.masked_fill_(~self.seen(), -torch.inf)

    def predict(self, codes: Tensor, weights: Tensor | None = None, *, method: str = "bayes") -> Tensor:
        """The class with the highest score, [B] int64."""
        return self(codes, weights, method=method).argmax(-1)

    def _by_rank(self, table: Tensor, flat: Tensor) -> Tensor:
        B, T, C = flat.shape
        ranks = self.rank_weights or (1.0,) * T
        if len(ranks) < T:
            raise ValueError(f"expected rank_weights for each of the {T} ranks of codes, got {len(ranks)}")
        scores = torch.zeros(B, self.num_classes, dtype=table.dtype, device=table.device)
        for t, weight in enumerate(ranks[:T]):
            # One product and one sum: a fused pair would round otherwise in some lanes than in others.
            part = torch.ops.kvb.gather(table, flat[:, t : t + 1], "sum", "bscv")[:, 0]
            scores += part.mul_(weight / (C * sum(ranks[:T])))
        return scores

    def _by_hit(self, table: Tensor, flat: Tensor, weights: Tensor) -> Tensor:
        rows = max(1, _FETCHED // max(1, flat[:1].numel() * self.num_classes))
        parts = []
        for codes, given in zip(flat.split(rows), weights.split(rows), strict=True):
            fetched = torch.ops.kvb.gather(table, codes, "none", "bscv")
            total = given.sum((1, 2)).clamp(min=torch.finfo(table.dtype).tiny)
            parts.append((fetched * given[..., None]).sum((1, 2)) / total[:, None])
        return torch.cat(parts) if parts else table.new_zeros(0, self.num_classes)

    def _logarithms(self) -> Tensor:
        """log(share + smoothing / K) [C, K, V]; only of the classes that have changed since."""
        K = self.counts.shape[1]
        if self._table is None or self._table.device != self.counts.device:
            self._table = torch.empty(self.counts.shape, device=self.counts.device)
            self._stale.fill_(True)
        for v in self._stale.nonzero()[:, 0].tolist():
            share = self.counts[:, :, v].float() / self.totals[:, :, v].clamp(min=1).float()
            self._table[:, :, v] = _log(share + self.smoothing / K)
        self._stale.fill_(False)
        return self._table

    def _shares(self) -> Tensor:
        """How the shares of a pair divide among the classes, [C, K, V]; zeros for a pair without a count."""
        share = self.counts.float() / self.totals.clamp(min=1).float()
        return share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)

    # --- checks -------------------------------------------------------------------------------------------------------

    def _flat(self, owner: str, codes: Tensor) -> Tensor:
        """codes [B, C] or [B, C, T] as [B, T, C]."""
        validation.integer(owner, "codes", codes)
        if codes.dim() not in (2, 3) or codes.shape[1] != self.counts.shape[0]:
            C = self.counts.shape[0]
            raise ValueError(f"expected codes of shape (B, {C}) or (B, {C}, T), got {tuple(codes.shape)}")
        validation.same_device("codes", codes, "counts", self.counts)
        return codes[:, None] if codes.dim() == 2 else codes.transpose(1, 2)

    def _weights(self, owner: str, weights: Tensor, codes: Tensor, kind: torch.dtype) -> Tensor:
        """Weights of each hit as [B, T, C]."""
        check = validation.floating if kind.is_floating_point else validation.integer
        check(owner, "weights", weights)
        validation.same_device("weights", weights, "codes", codes)
        if weights.numel() and bool((weights < 0).any()):
            raise ValueError(f"weights must be >= 0, got {weights.min().item()}")
        try:
            full = weights.expand(codes.shape)
        except RuntimeError as error:
            wanted, got = tuple(codes.shape), tuple(weights.shape)
            raise ValueError(f"expected weights of the shape of codes, {wanted}, got {got}") from error
        return self._flat_weights(full).to(kind)

    @staticmethod
    def _flat_weights(weights: Tensor) -> Tensor:
        return weights[:, None] if weights.dim() == 2 else weights.transpose(1, 2)

    def _checked(
        self, owner: str, codes: Tensor, labels: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        flat = self._flat(owner, codes)
        validation.integer(owner, "labels", labels)
        validation.shape("labels", labels, "B", (len(codes),))
        validation.same_device("labels", labels, "counts", self.counts)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            wrong = int(labels.min() if labels.min() < 0 else labels.max())
            raise IndexError(f"label {wrong} is out of bounds for {self.num_classes} classes")
        given = None if weights is None else self._weights(owner, weights, codes, kind=self.counts.dtype)
        return flat, labels.to(torch.int64), given

    def extra_repr(self) -> str:
        C, K, V = self.counts.shape
        return f"{C} codebooks x {K} pairs x {V} classes, {self.counts.dtype}, smoothing={self.smoothing:g}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        """Counts of a file may be of more classes: room is made for them."""
        given = state_dict.get(prefix + "counts")
        if given is not None and given.dim() == 3 and given.shape[2] > self.num_classes:
            self.expand(given.shape[2])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.changed()


def _log(numbers: Tensor) -> Tensor:
    """Logarithms with bits that do not depend on the place: PyTorch computes what does not fill a vector otherwise."""
    flat = numbers.flatten()
    if numbers.device.type != "cpu":
        return flat.log().view_as(numbers)
    padded = nn.functional.pad(flat, (0, -len(flat) % _PIECE), value=1.0)
    return torch.cat([piece.log() for piece in padded.split(_PIECE)])[: len(flat)].view_as(numbers)


def distance_weights(distances: Tensor, *, levels: int | None = None) -> Tensor:
    """Weights of the nearest T pairs by distance: 1 where the distance is 0, falling to 0 at 1.05 times the farthest.

    Equivalent to ``1 - d / (1.05 * d[..., -1:])`` for the squared distances d. A function of each sample's own
    distances, so that order and batches change nothing.

    Args:
        distances: [B, C, T] squared distances, nearest first, as ``nearest`` and ``BottleneckOutput`` give them.
        levels: round to whole numbers from 0 to ``levels``, for integer counts; None returns float32.
    Returns:
        [B, C, T] in [0, 1] or int64 in [0, levels]; 0 where the distance is not finite.
    Raises:
        TypeError: no floating-point tensor. ValueError: fewer than three axes, or no positive number of levels.
    Examples:
        >>> kvb.counting.distance_weights(torch.tensor([[[0.0, 1.0, 2.0]]]), levels=10)
        tensor([[[10,  5,  0]]])
    """
    validation.floating("distance_weights", "distances", distances)
    if distances.dim() < 3:
        raise ValueError(f"expected distances of shape (B, C, T), got {tuple(distances.shape)}")
    finite = distances.isfinite()
    known = torch.where(finite, distances, 0)
    farthest = known.amax(-1, keepdim=True)
    weights = torch.where(farthest > 0, 1 - known / (1.05 * farthest).clamp(min=torch.finfo(known.dtype).tiny), 1)
    weights = torch.where(finite, weights, 0)
    if levels is None:
        return weights
    return (weights * validation.positive_int("levels", levels)).round().to(torch.int64)
