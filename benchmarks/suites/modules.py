"""Whole modules, from their input to their output, and a step of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvb
from benchmarks import verify
from benchmarks.peers import need
from benchmarks.shapes import Module
from benchmarks.suites.case import Case, random, random_keys, random_values
from benchmarks.timing import Contestant

EMBEDDING = 64  # channels of the end-to-end suite's inputs
CHANNELS = 256  # and of its encoder's features
Found = tuple[Tensor, Tensor]  # what a peer's run returns: outputs, and its own indices [B, S, C]


class _Lookup:
    """What is searched and fetched, with kvb's own codes; a run returns what it fetched and where."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    codes: Tensor

    def check_fetched(self, out: Tensor, found: Tensor) -> None:
        raise NotImplementedError

    def check(self, out: Tensor, found: Tensor) -> None:
        verify.same_choice(self.queries, self.keys, found, self.codes)
        self.check_fetched(out, found)

    def check_ours(self, out: Tensor) -> None:
        verify.sampled_choice(self.queries, self.keys, self.codes)
        self.check(out, self.codes)

    def contestant(self, run: Callable[[], Found]) -> Contestant:
        return Contestant(run, lambda result: self.check(*result))


class Forward(_Lookup):
    """Heads [B, C, S, D], the same as queries [B, S, C, D], keys and values; a run returns [B, C, S, V] and codes."""

    def __init__(self, heads: Tensor, keys: Tensor, values: Tensor, codes: Tensor) -> None:
        self.heads, self.queries, self.keys, self.values = heads, heads.transpose(1, 2), keys, values
        self.codes = codes

    def check_fetched(self, out: Tensor, found: Tensor) -> None:
        verify.fetched(self.values, found, out.view(*self.heads.shape[:3], -1), "none", "bcsv")


def forward(shape: Module) -> Case:
    """A frozen ``KeyValueBottleneck``: heads [B, C, *positions, D] to values [B, C, *positions, V]."""
    B, C, S = shape.B, shape.C, shape.S
    module = kvb.KeyValueBottleneck(C, shape.K, shape.D, shape.V).eval().freeze_keys()
    module.keys.copy_(random_keys(shape))
    module.values.data.copy_(random_values(shape))
    module.requires_grad_(False)
    x = random(0, B, C, *shape.positions, shape.D)
    codes = module.encode(x).view(B, C, S).transpose(1, 2)
    # Others get keys of their own: a module looks at keys that somebody else holds in each call.
    given = Forward(x.view(B, C, S, shape.D), module.keys.clone(), module.values.data, codes)
    return Case(Contestant(lambda: module(x), given.check_ours), given, shape.search.flops, "flops")


class _Embedded:
    """Embeddings x [B, S, E], a projection [C, E, D], keys and values, and what kvb makes of them."""

    def __init__(self, shape: Module) -> None:
        sizes = {"num_memories": shape.K, "num_memory_codebooks": shape.C, "dim_memory": shape.V}
        module = kvb.DiscreteKeyValueBottleneck(shape.D, **sizes).eval().freeze_keys().requires_grad_(False)
        # As far apart as what is projected: xavier's variance times D of the inputs.
        spread = (2 / (shape.D + shape.C * shape.D)) ** 0.5 * shape.D**0.5
        module.bottleneck.keys.copy_(random_keys(shape) * spread)
        module.values.data.copy_(random_values(shape))
        self.module, self.projection = module, module.rand_proj
        self.keys, self.values = module.bottleneck.keys.clone(), module.values.data
        self.x = random(0, shape.B, shape.S, shape.D)
        self.queries = module.splitter(self.x).transpose(1, 2)
        self.codes = module.encode(self.x).transpose(1, 2)

    def project(self) -> Tensor:
        """Queries [B, S, C, D] of the embeddings, in plain PyTorch."""
        return torch.einsum("bse,ced->bscd", self.x, self.projection)


class Memories(_Embedded, _Lookup):
    """Embeddings, a projection, keys and values; a run returns the mean memories [B, S, V] and codes."""

    def check_fetched(self, out: Tensor, found: Tensor) -> None:
        verify.fetched(self.values, found, out, "mean", "bscv")


def memories(shape: Module) -> Case:
    """A frozen ``DiscreteKeyValueBottleneck``: embeddings [B, S, D], projected, to their mean memories [B, S, V]."""
    given = Memories(shape)
    projection = 2 * shape.N * shape.C * shape.D**2
    ours = Contestant(lambda: given.module(given.x), given.check_ours)
    return Case(ours, given, shape.search.flops + projection, "flops")


class TrainingStep(_Embedded):
    """The same with targets [B*S] and the values to ``start`` from; a peer learns values of its own."""

    def __init__(self, shape: Module) -> None:
        super().__init__(shape)
        self.start = self.values.clone()
        self.targets = torch.randint(shape.V, (shape.N,), generator=torch.Generator().manual_seed(5))

    def check_step(self, values: Tensor, loss: Tensor, found: Tensor) -> None:
        verify.same_choice(self.queries, self.keys, found, self.codes)
        verify.trained(self.start, found.reshape(-1, found.shape[-1]), self.targets, values, loss)

    def contestant(self, values: nn.Parameter, look_up: Callable[[], Found]) -> Contestant:
        """A step of PyTorch's own loss, clipping and optimizer around ``look_up``: logits [B, S, V] and codes."""
        values.requires_grad_(True)
        optimizer = torch.optim.SGD([values], lr=0.3)

        def step() -> Found:
            with torch.enable_grad():
                logits, found = look_up()
                loss = F.cross_entropy(logits.flatten(0, 1), self.targets, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
            nn.utils.clip_grad_norm_([values], 1.0)
            optimizer.step()
            return loss.detach(), found

        def reset() -> None:
            values.data.copy_(self.start)

        return Contestant(step, lambda result: self.check_step(values.data, *result), reset)


def training_step(shape: Module) -> Case:
    """Embeddings and targets to better memories: lookup, mean vote, cross entropy, clipped SGD; keys are frozen."""
    need.memory(10 * 4.0 * shape.C * shape.K * shape.V, "verifying a step in float64")
    given = TrainingStep(shape)

    def step() -> Found:
        found = given.module.encode(given.x).transpose(1, 2)
        loss, *_ = kvb.training.sgd_step(given.values, found.reshape(-1, shape.C), given.targets)
        return loss, found

    def check(result: Found) -> None:
        verify.sampled_choice(given.queries, given.keys, given.codes)
        given.check_step(given.values, *result)

    ours = Contestant(step, check, lambda: given.values.copy_(given.start))
    return Case(ours, given, shape.search.flops, "flops")


class EndToEnd(_Lookup):
    """A frozen model's input, its features as queries, keys and values; a run returns logits [B, V] and codes."""

    def __init__(self, shape: Module) -> None:
        torch.manual_seed(6)
        encoder = nn.Sequential(nn.Linear(EMBEDDING, 4 * CHANNELS), nn.GELU(), nn.Linear(4 * CHANNELS, CHANNELS))
        sizes = {"num_codebooks": shape.C, "key_value_pairs_per_codebook": shape.K, "dim_keys": shape.D}
        model = kvb.BottleneckedEncoder(encoder, CHANNELS, dim_values=shape.V, encoder_is_channel_last=True, **sizes)
        model.freeze_encoder()
        model.freeze_splitter()
        model.freeze_keys()
        model.eval().requires_grad_(False)
        self.shape, self.encoder, self.model = shape, encoder, model
        self.x = random(0, *((shape.B, shape.S) if shape.positions else (shape.B,)), EMBEDDING)
        heads = model.splitter(encoder(self.x))
        self.keys, self.values = random_keys(shape) * heads.std(), model.bottleneck.values.data
        model.bottleneck.keys.copy_(self.keys)
        self.values.copy_(random_values(shape))
        self.queries = self._queries_of(heads)
        self.codes = self._queries_of(model.bottleneck.encode(heads)[..., None].expand(*heads.shape))[..., 0]

    def _queries_of(self, heads: Tensor) -> Tensor:
        B, S, C, D = self.shape.B, self.shape.S, self.shape.C, self.shape.D
        return heads.reshape(B, C, S, D).transpose(1, 2)

    def project(self) -> Tensor:
        """Queries [B, S, C, D] of the inputs."""
        return self._queries_of(self.model.splitter(self.encoder(self.x)))

    def check_fetched(self, out: Tensor, found: Tensor) -> None:
        verify.voted(self.values, found, out)


def end_to_end(shape: Module) -> Case:
    """A frozen encoder, the split into heads, the bottleneck, the vote: inputs to logits, in eval mode."""
    given, vote = EndToEnd(shape), kvb.decoders.CodebookVoting(shape.V)
    dense = 2 * shape.N * (EMBEDDING * 4 * CHANNELS + 4 * CHANNELS * CHANNELS + CHANNELS * shape.C * shape.D)
    ours = Contestant(lambda: vote(given.model(given.x)), given.check_ours)
    return Case(ours, given, shape.search.flops + dense, "flops")
