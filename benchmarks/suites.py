"""What is measured: each suite is a function from a shape to kvb's contestant and its peers', all of them verified.

Every contestant of a case gets the same keys, values and inputs. A peer's codes may differ from kvb's where two keys
are as near as float32 can tell, nowhere else, and its result must be what its own codes stand for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvb
from benchmarks import ceilings, memory, verify
from benchmarks.peers import keops, need, plain, published, scikit
from benchmarks.peers.faiss import FaissSearch
from benchmarks.shapes import SHAPES, Module
from benchmarks.timing import Absent, Contestant, Effort, Race, WrongResult, run_on, timed, verified
from kvb import functional

KVB, CEILING = "kvb", "ceiling"
EMBEDDING = 64  # channels of the end-to-end suite's inputs
CHANNELS = 256  # and of its encoder's features
VERIFIED = 16  # codebooks of a gradient that are summed again in float64
Run = Callable[[], Any]
Prepare = Callable[[], Contestant]


class Case(NamedTuple):
    """One suite at one shape: who takes part, and what the algorithm needs at least of what the machine has."""

    kvb: Contestant
    peers: Mapping[str, Prepare]  # prepared only when asked for; may raise Absent
    amount: float  # operations, or bytes read and written
    ceiling: str  # "flops" or "bytes"


def _random(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def _codes(shape: Module) -> Tensor:
    return torch.randint(shape.K, (shape.B, shape.S, shape.C), generator=torch.Generator().manual_seed(3))


def _keys(shape: Module) -> Tensor:
    return _random(1, shape.C, shape.K, shape.D)


def _values(shape: Module) -> Tensor:
    return _random(2, shape.C, shape.K, shape.V)


def _frozen(shape: Module) -> kvb.KeyValueBottleneck:
    module = kvb.KeyValueBottleneck(shape.C, shape.K, shape.D, shape.V).eval().freeze_keys()
    module.keys.copy_(_keys(shape))
    module.values.data.copy_(_values(shape))
    return module.requires_grad_(False)


# --- search -----------------------------------------------------------------------------------------------------------


def search(shape: Module) -> Case:
    """The nearest key of every query in every codebook, keys prepared: indices, and kvb's distances, too."""
    B, S, C = shape.B, shape.S, shape.C
    queries, keys = _random(0, B, S, C, shape.D), _keys(shape)
    packed = functional.pack_keys(keys)
    expected, _ = functional.nearest(queries, keys, packed=packed)

    def by(run: Run, codes: Callable[[Any], Tensor]) -> Contestant:
        return Contestant(run, lambda found: verify.same_choice(queries, keys, codes(found), expected))

    def by_finder(prepare: Callable[[Tensor, Tensor], plain.Finder]) -> Contestant:
        return by(functools.partial(prepare(queries, keys), queries), lambda found: found)

    def by_codebook(found: Any) -> Tensor:
        """C rows of N codes."""
        return torch.stack([torch.as_tensor(row) for row in found]).view(C, B, S).permute(1, 2, 0)

    def by_quantizer() -> Contestant:
        module = published.quantizer(keys, shape.N).requires_grad_(False)
        flat = queries.flatten(2)
        return by(lambda: module(flat), lambda found: found[1].view(B, S, C))

    peers: dict[str, Prepare] = {
        "faiss": lambda: by(FaissSearch(queries, keys), by_codebook),
        **{name: functools.partial(by_finder, prepare) for name, prepare in plain.FINDERS.items()},
        "scikit-learn": lambda: by(scikit.search(queries, keys), by_codebook),
        "pykeops": lambda: by(keops.search(queries, keys), by_codebook),
        "vector-quantize": by_quantizer,
    }
    ours = Contestant(
        lambda: functional.nearest(queries, keys, packed=packed), lambda found: verify.nearest(queries, keys, *found)
    )
    return Case(ours, peers, shape.search.flops, "flops")


# --- values -----------------------------------------------------------------------------------------------------------


def gather(shape: Module) -> Case:
    """The values that codes name, as [B, C, S, V]."""
    values, codes = _values(shape), _codes(shape)
    books = torch.arange(shape.C)[:, None]

    def by(run: Run) -> Contestant:
        return Contestant(run, lambda out: verify.fetched(values, codes, out, "none", "bcsv"))

    peers: dict[str, Prepare] = {
        "torch index_select": lambda: by(lambda: plain.fetch(values, codes)),
        "torch index": lambda: by(lambda: values[books, codes.transpose(1, 2)]),
    }
    nbytes = codes.nbytes + 2 * 4 * codes.numel() * shape.V
    return Case(by(lambda: functional.gather(values, codes, layout="bcsv")), peers, nbytes, "bytes")


def backward(shape: Module) -> Case:
    """The gradient of the values, dense, of one of what they were fetched for [B, C, S, V]."""
    C, K, V = shape.C, shape.K, shape.V
    codes, grad = _codes(shape), _random(4, shape.B, C, shape.S, V)
    rows = grad.transpose(1, 2)
    books = torch.arange(C)[:, None]

    def by(run: Run) -> Contestant:
        return Contestant(run, lambda found: verify.sums(rows, codes, found, books=VERIFIED))

    def index_add() -> Tensor:
        flat = (codes + torch.arange(C) * K).transpose(1, 2).flatten()
        return torch.zeros(C * K, V).index_add_(0, flat, grad.view(-1, V)).view(C, K, V)

    def autograd() -> Tensor:
        (found,) = torch.autograd.grad(fetched, values, grad, retain_graph=True)
        return found

    with torch.enable_grad():
        values = torch.zeros(C, K, V, requires_grad=True)
        fetched = values[books, codes.transpose(1, 2)]
    peers: dict[str, Prepare] = {"torch index": lambda: by(autograd), "torch index_add": lambda: by(index_add)}
    ours = by(lambda: torch.ops.kvb.gather_backward(rows, codes, K, "none"))
    return Case(ours, peers, grad.nbytes + codes.nbytes + 4 * C * K * V, "bytes")


# --- keys -------------------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    keys: Tensor
    keys_avg: Tensor
    cluster_size: Tensor


def key_update(shape: Module) -> Case:
    """One step of learning keys in training mode: search, statistics, moving averages."""
    B, S, (C, K, D) = shape.B, shape.S, (shape.C, shape.K, shape.D)
    heads, keys = _random(0, B, C, S, D), _keys(shape)
    queries, decay, eps = heads.transpose(1, 2), 0.95, 1e-5
    codes, _ = functional.nearest(queries, keys)
    hits = torch.stack([torch.bincount(codes[:, :, c].flatten(), minlength=K) for c in range(C)])
    sums = torch.zeros(C, K, D, dtype=torch.float64)
    for c in range(C):
        sums[c].index_add_(0, codes[:, :, c].flatten(), queries[:, :, c].reshape(-1, D).double())
    size = decay + (1 - decay) * hits.double()
    smoothed = (size + eps) / (size.sum(-1, keepdim=True) + K * eps) * size.sum(-1, keepdim=True)
    want = (decay * keys.double() + (1 - decay) * sums) / smoothed[..., None]
    hit = hits > 0

    def check(state: _State, moved_elsewhere: float = 0.0) -> None:
        # A query between two keys may go either way, and moves both.
        off = ((state.keys - want).abs() > 1e-4 * (1 + want.abs())).any(-1) & hit
        if off.sum() > moved_elsewhere * hit.sum():
            raise WrongResult(f"{int(off.sum())} of {int(hit.sum())} keys that were hit moved elsewhere")

    module = kvb.KeyValueBottleneck(C, K, D, 1, decay=decay, eps=eps).requires_grad_(False)
    state = _State(module.keys, module.keys_avg, module.cluster_size)

    def reset(state: _State) -> None:
        state.keys.copy_(keys)
        state.keys_avg.copy_(keys)
        state.cluster_size.fill_(1.0)

    def ours() -> _State:
        module(heads)
        return state

    def by_quantizer() -> Contestant:
        theirs = published.quantizer(keys, shape.N, decay).requires_grad_(False).train()
        book, flat = theirs._codebook, queries.flatten(2).contiguous()
        theirs_state = _State(book.embed.data, book.embed_avg.data, book.cluster_size.data)

        def run() -> _State:
            theirs(flat)
            return theirs_state

        return Contestant(run, lambda state: check(state, 1e-3), lambda: reset(theirs_state))

    def by_hand() -> Contestant:
        find, mine = plain.chunked(queries, keys), _State(keys.clone(), keys.clone(), torch.ones(C, K))
        first = torch.arange(C) * K

        def run() -> _State:
            find.update(mine.keys)
            flat = (find(queries) + first).flatten()
            number = torch.bincount(flat, minlength=C * K).view(C, K)
            added = torch.zeros(C * K, D).index_add_(0, flat, queries.reshape(-1, D)).view(C, K, D)
            mine.cluster_size.mul_(decay).add_(number, alpha=1 - decay)
            mine.keys_avg.mul_(decay).add_(added, alpha=1 - decay)
            total = mine.cluster_size.sum(-1, keepdim=True)
            smooth = (mine.cluster_size + eps) / (total + K * eps) * total
            mine.keys.copy_(torch.where((number > 0)[..., None], mine.keys_avg / smooth[..., None], mine.keys))
            return mine

        return Contestant(run, lambda state: check(state, 1e-3), lambda: reset(mine))

    peers: dict[str, Prepare] = {"torch baddbmm": by_hand, "vector-quantize": by_quantizer}
    return Case(Contestant(ours, check, lambda: reset(state)), peers, shape.search.flops, "flops")


# --- whole modules ----------------------------------------------------------------------------------------------------


def forward(shape: Module) -> Case:
    """A frozen ``KeyValueBottleneck``: heads [B, C, *positions, D] to values [B, C, *positions, V]."""
    module = _frozen(shape)
    B, C, S, V = shape.B, shape.C, shape.S, shape.V
    x = _random(0, B, C, *shape.positions, shape.D)
    heads = x.view(B, C, S, shape.D)
    queries, values = heads.transpose(1, 2), module.values.data
    codes = module.encode(x).view(B, C, S).transpose(1, 2)

    def check(out: Tensor, found: Tensor) -> None:
        verify.same_choice(queries, module.keys, found, codes)
        verify.fetched(values, found, out.view(B, C, S, V), "none", "bcsv")

    def check_ours(out: Tensor) -> None:
        verify.sampled_choice(queries, module.keys, codes)
        check(out, codes)

    def by_finder(prepare: Callable[[Tensor, Tensor], plain.Finder]) -> Contestant:
        find = prepare(queries, module.keys)

        def run() -> tuple[Tensor, Tensor]:
            found = find(queries)
            return plain.fetch(values, found), found

        return Contestant(run, lambda result: check(*result))

    def by_faiss() -> Contestant:
        index = FaissSearch(queries, module.keys)

        def run() -> tuple[Tensor, Tensor]:
            found = index().view(C, B, S).permute(1, 2, 0)
            return plain.fetch(values, found), found

        return Contestant(run, lambda result: check(*result))

    def by_authors() -> Contestant:
        theirs = published.authors(module.keys, values, shape.N).requires_grad_(False)

        def check_theirs(result: tuple[Tensor, ...]) -> None:
            check(result[0], result[2].reshape(B, C, S).transpose(1, 2))

        return Contestant(lambda: theirs(heads), check_theirs)

    peers: dict[str, Prepare] = {
        "faiss": by_faiss,
        "torch baddbmm": functools.partial(by_finder, plain.chunked),
        "torch.cdist": functools.partial(by_finder, plain.cdist),
        "authors": by_authors,
    }
    return Case(Contestant(lambda: module(x), check_ours), peers, shape.search.flops, "flops")


def _memories(shape: Module) -> tuple[kvb.DiscreteKeyValueBottleneck, Tensor, Tensor, Tensor]:
    """The module, embeddings [B, S, D], and what it makes of them: queries and codes, [B, S, C, ...]."""
    sizes = {"num_memories": shape.K, "num_memory_codebooks": shape.C, "dim_memory": shape.V}
    module = kvb.DiscreteKeyValueBottleneck(shape.D, **sizes).eval().freeze_keys().requires_grad_(False)
    # As far apart as what is projected: xavier's variance times D of the inputs.
    spread = (2 / (shape.D + shape.C * shape.D)) ** 0.5 * shape.D**0.5
    module.bottleneck.keys.copy_(_keys(shape) * spread)
    module.values.data.copy_(_values(shape))
    x = _random(0, shape.B, shape.S, shape.D)
    queries = module.splitter(x).transpose(1, 2)
    codes = module.encode(x).transpose(1, 2)
    return module, x, queries, codes


def memories(shape: Module) -> Case:
    """A frozen ``DiscreteKeyValueBottleneck``: embeddings [B, S, D], projected, to their mean memories [B, S, V]."""
    module, x, queries, codes = _memories(shape)
    keys, values = module.bottleneck.keys, module.values.data

    def check(out: Tensor, found: Tensor) -> None:
        verify.same_choice(queries, keys, found, codes)
        verify.fetched(values, found, out, "mean", "bscv")

    def check_ours(out: Tensor) -> None:
        verify.sampled_choice(queries, keys, codes)
        check(out, codes)

    def by_finder(prepare: Callable[[Tensor, Tensor], plain.Finder]) -> Contestant:
        find = prepare(queries, keys)

        def run() -> tuple[Tensor, Tensor]:
            found = find(torch.einsum("bse,ced->bscd", x, module.rand_proj))
            return plain.fetch(values, found).mean(1), found

        return Contestant(run, lambda result: check(*result))

    def by_published() -> Contestant:
        theirs = published.discrete(module.rand_proj, keys, values, shape.N).requires_grad_(False)

        def check_theirs(result: tuple[Tensor, tuple[Tensor, Tensor, Tensor]]) -> None:
            check(result[0], result[1][1].view_as(codes))

        return Contestant(lambda: theirs(x, return_intermediates=True), check_theirs)

    peers: dict[str, Prepare] = {
        "dkvb-pytorch": by_published,
        "torch baddbmm": functools.partial(by_finder, plain.chunked),
        "torch.cdist": functools.partial(by_finder, plain.cdist),
    }
    projection = 2 * shape.N * shape.C * shape.D**2
    return Case(Contestant(lambda: module(x), check_ours), peers, shape.search.flops + projection, "flops")


def training_step(shape: Module) -> Case:
    """Embeddings and targets to better memories: lookup, mean vote, cross entropy, clipped SGD; keys are frozen."""
    need.memory(10 * 4.0 * shape.C * shape.K * shape.V, "verifying a step in float64")
    module, x, queries, codes = _memories(shape)
    keys, start = module.bottleneck.keys, module.values.data.clone()
    targets = torch.randint(shape.V, (shape.N,), generator=torch.Generator().manual_seed(5))

    def check(values: Tensor, result: tuple[Tensor, Tensor]) -> None:
        loss, found = result
        verify.same_choice(queries, keys, found, codes)
        verify.trained(start, found.reshape(-1, shape.C), targets, values, loss)

    def ours() -> tuple[Tensor, Tensor]:
        found = module.encode(x).transpose(1, 2)
        loss, *_ = kvb.training.sgd_step(module.values.data, found.reshape(-1, shape.C), targets)
        return loss, found

    def check_ours(result: tuple[Tensor, Tensor]) -> None:
        verify.sampled_choice(queries, keys, codes)
        check(module.values.data, result)

    def by(values: nn.Parameter, look_up: Callable[[], tuple[Tensor, Tensor]]) -> Contestant:
        """``look_up`` gives logits [B, S, V] and codes [B, S, C]."""
        values.requires_grad_(True)
        optimizer = torch.optim.SGD([values], lr=0.3)

        def step() -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                logits, found = look_up()
                loss = F.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
            nn.utils.clip_grad_norm_([values], 1.0)
            optimizer.step()
            return loss.detach(), found

        return Contestant(step, lambda result: check(values.data, result), lambda: values.data.copy_(start))

    def by_hand() -> Contestant:
        values, find = nn.Parameter(start.clone()), plain.chunked(queries, keys)

        def look_up() -> tuple[Tensor, Tensor]:
            found = find(torch.einsum("bse,ced->bscd", x, module.rand_proj))
            return plain.fetch(values, found).mean(1), found

        return by(values, look_up)

    def by_published() -> Contestant:
        # The gradient of ``gather`` on memories that are expanded over the batch has the size of all of them.
        nbytes = 1.1 * 4.0 * shape.B * shape.C * shape.K * shape.V
        need.memory(nbytes, "the gradient of dkvb-pytorch, B*C*K*V numbers,")
        theirs = published.discrete(module.rand_proj, keys, start, shape.N).requires_grad_(False)

        def look_up() -> tuple[Tensor, Tensor]:
            out, (_, found, _) = theirs(x, return_intermediates=True)
            return out, found.view_as(codes)

        return by(theirs.values, look_up)

    peers: dict[str, Prepare] = {"torch baddbmm": by_hand, "dkvb-pytorch": by_published}
    ours_first = Contestant(ours, check_ours, lambda: module.values.data.copy_(start))
    return Case(ours_first, peers, shape.search.flops, "flops")


def end_to_end(shape: Module) -> Case:
    """A frozen encoder, the split into heads, the bottleneck, the vote: inputs to logits, in eval mode."""
    torch.manual_seed(6)
    encoder = nn.Sequential(nn.Linear(EMBEDDING, 4 * CHANNELS), nn.GELU(), nn.Linear(4 * CHANNELS, CHANNELS))
    sizes = {"num_codebooks": shape.C, "key_value_pairs_per_codebook": shape.K, "dim_keys": shape.D}
    model = kvb.BottleneckedEncoder(encoder, CHANNELS, dim_values=shape.V, encoder_is_channel_last=True, **sizes)
    model.freeze_encoder()
    model.freeze_splitter()
    model.freeze_keys()
    model.eval().requires_grad_(False)
    x = _random(0, *((shape.B, shape.S) if shape.positions else (shape.B,)), EMBEDDING)
    keys, values = model.bottleneck.keys, model.bottleneck.values.data
    heads = model.splitter(encoder(x))
    keys.copy_(_keys(shape) * heads.std())
    values.copy_(_values(shape))
    vote = kvb.decoders.CodebookVoting(shape.V)

    def queries_of(heads: Tensor) -> Tensor:
        return heads.reshape(shape.B, shape.C, shape.S, shape.D).transpose(1, 2)

    queries = queries_of(heads)
    codes = queries_of(model.bottleneck.encode(heads)[..., None].expand(*heads.shape))[..., 0]

    def check(out: Tensor, found: Tensor) -> None:
        verify.same_choice(queries, keys, found, codes)
        verify.voted(values, found, out)

    def check_ours(out: Tensor) -> None:
        verify.sampled_choice(queries, keys, codes)
        check(out, codes)

    def by_hand() -> Contestant:
        find = plain.chunked(queries, keys)

        def run() -> tuple[Tensor, Tensor]:
            found = find(queries_of(model.splitter(encoder(x))))
            return plain.fetch(values, found).mean((1, 2)), found

        return Contestant(run, lambda result: check(*result))

    dense = 2 * shape.N * (EMBEDDING * 4 * CHANNELS + 4 * CHANNELS * CHANNELS + CHANNELS * shape.C * shape.D)
    peers: dict[str, Prepare] = {"torch baddbmm": by_hand}
    return Case(Contestant(lambda: vote(model(x)), check_ours), peers, shape.search.flops + dense, "flops")


SUITES: dict[str, Callable[[Module], Case]] = {
    "search": search,
    "gather": gather,
    "backward": backward,
    "key_update": key_update,
    "forward": forward,
    "memories": memories,
    "training_step": training_step,
    "end_to_end": end_to_end,
}
SLOW_PEERS = ("pykeops", "torch.cdist", "torch.compile", "scikit-learn", "vector-quantize")  # not for a quick look


FEW = ("seed_a", "seed_b", "paper_cifar10", "one_sample")  # shapes where no peer needs many seconds

# Shapes that tell nothing new: the value dim means nothing to a search, nobody learns from one sample, and so on.
LEFT_OUT = {
    "search": {"paper_cifar100"},
    "backward": {"one_sample"},
    "key_update": {"paper_cifar100", "one_sample"},
    "memories": {"paper_cifar100"},
    "training_step": {"paper_cifar100", "one_sample"},
    "end_to_end": {"paper_cifar100", "seed_b", "large_k"},
}


def shapes(suite: str) -> dict[str, Module]:
    """The shapes of a suite by name."""
    return {name: shape for name, shape in SHAPES.items() if name not in LEFT_OUT.get(suite, ())}


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a case gave: the race, the memory of every first call, and why others did not take part."""

    race: Race
    peak_bytes: Mapping[str, int]
    absent: Mapping[str, str]
    amount: float
    ceiling: str
    ceiling_amount: float | None  # what one run of the ceiling does, if it could be measured

    @property
    def peers(self) -> list[str]:
        """By time, the quickest first."""
        found = [name for name in self.race.turns if name not in (KVB, CEILING)]
        return sorted(found, key=self.race.seconds)

    @property
    def share(self) -> float | None:
        """kvb's useful operations or bytes a second, as a share of the most that the machine can do."""
        if self.ceiling_amount is None:
            return None
        return self.race.ratio(CEILING, KVB, self.amount / self.ceiling_amount).value


def _observed(run: Run) -> tuple[tuple[float, int | None], Any]:
    try:
        (seconds, result), extra = memory.peak(lambda: timed(run))
    except Absent:
        seconds, result = timed(run)
        return (seconds, None), result
    return (seconds, extra), result


@functools.cache
def _ceiling(kind: str, threads: int) -> tuple[Contestant, float]:
    return ceilings.multiply_add(threads) if kind == "flops" else ceilings.copy()


@contextlib.contextmanager
def attempt(name: str, absent: dict[str, str]) -> Iterator[None]:
    """Notes why a peer does not take part: it is absent, it is wrong, or it fails in a way of its own."""
    try:
        yield
    except Absent as why:
        absent[name] = str(why)
    except WrongResult as why:
        absent[name] = f"wrong, not timed: {why}"
    except Exception as error:
        # Nobody can list how other packages fail, but their failure must not stop the run.
        absent[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"[:300]


def measure(
    suite: str, shape: Module, effort: Effort, only: Callable[[str], bool] = lambda peer: True, limits: bool = True
) -> Outcome:
    """Verify kvb and the chosen peers, then time them and the ceiling in turns.

    Raises:
        Absent: the suite cannot run at this shape on this machine. WrongResult: kvb is wrong.
    """
    with torch.no_grad():
        case = SUITES[suite](shape)
        contestants, first, peaks, absent = {KVB: case.kvb}, {}, {}, {}

        def meet(name: str, contestant: Contestant) -> None:
            first[name], extra = verified(contestant, _observed)
            contestants[name] = contestant
            if extra is not None:
                peaks[name] = extra

        meet(KVB, case.kvb)
        for name, prepare in case.peers.items():
            if only(name):
                with attempt(name, absent):
                    meet(name, prepare())
        amount = None
        if limits:
            with attempt(CEILING, absent):
                contestants[CEILING], amount = _ceiling(case.ceiling, torch.get_num_threads())
                first[CEILING] = verified(contestants[CEILING])
        race = run_on(contestants, first, effort)
    return Outcome(race, peaks, absent, case.amount, case.ceiling, amount)
