"""Text of several lengths: how far it is padded changes nothing, neither keys nor codes nor outputs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from kvb import BottleneckedEncoder, DiscreteKeyValueBottleneck
from kvb.compat.key_value_bottleneck import core

pytestmark = pytest.mark.fallback

B, C, K, D, V, CHANNELS = 6, 4, 8, 2, 5, 8
LENGTHS = torch.tensor([3, 8, 1, 5, 8, 2])


class Output(NamedTuple):
    last_hidden_state: torch.Tensor


class Text(nn.Module):
    """Every token sees all that the attention mask lets it see. Numbers are small integers: sums are exact."""

    def __init__(self, padding=0.0, pooled=False, shortened=False):
        super().__init__()
        table = torch.randint(-2, 3, (20, CHANNELS)).float()
        self.register_buffer("table", table)
        self.padding, self.pooled, self.shortened = padding, pooled, shortened

    def forward(self, input_ids, attention_mask=None):
        tokens = self.table[input_ids]
        attention = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens = tokens + (tokens * attention[..., None]).sum(1, keepdim=True)
        tokens = torch.where(attention[..., None] != 0, tokens, self.padding)
        hidden = tokens[:, 0] if self.pooled else tokens[:, ::2] if self.shortened else tokens
        return Output(hidden)


def encoder(network=None, kind=BottleneckedEncoder, **options):
    options = {"splitting_mode": "chunk", "init_mode": "sample", "decay": 0.5, **options}
    return kind(network or Text(), CHANNELS, C, K, D, V, **options)


def texts(length, rows=slice(None)):
    """The same tokens, padded to a length with some token."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(20, (B, 32), generator=generator)[rows, :length]
    mask = (torch.arange(length) < LENGTHS[rows, None]).long()
    return {"input_ids": torch.where(mask == 1, ids, 7), "attention_mask": mask, "labels": torch.arange(B)[rows]}


def without_labels(batch):
    return {name: part for name, part in batch.items() if name != "labels"}


@pytest.mark.parametrize("padding", [0.0, 50.0, float("nan")])
@pytest.mark.parametrize("mode", ["chunk", "learned_projection"])
def test_padding_changes_nothing(padding, mode):
    network, found = Text(padding), {}
    for length in (8, 32):
        torch.manual_seed(0)
        model = encoder(network, splitting_mode=mode, return_values_only=False).double()
        with torch.no_grad():
            for weight in model.splitter.parameters():
                weight.copy_(torch.randint(-2, 3, weight.shape))
        report = model.init_keys([texts(length)], epochs=2, generator=torch.Generator().manual_seed(1), progress=False)
        assert report.rows == LENGTHS.sum()
        with torch.no_grad():
            model.values.copy_(torch.arange(V).expand_as(model.values))
        model.train()(without_labels(texts(length)))
        model.freeze_keys()
        batch = without_labels(texts(length))
        model(batch)
        out = model(batch, pool="mean")
        (out.values.sum() + out.distances.nansum()).backward()
        grad = [one.grad for one in model.splitter.parameters()]
        votes = model(**batch_as_arguments(batch), pool="sum").values.sum(1)
        data = model.encode_dataset([texts(length)], progress=False)
        assert torch.equal(data.mask, batch["attention_mask"] == 1)
        assert torch.equal(data.labels, torch.arange(B))
        assert torch.equal(model.decode(data.codes, mask=data.mask), model(batch).values)
        codes = model.encode(batch)
        assert torch.equal(codes, data.codes.long())
        assert (codes[:, :, 8:] == 0).all()
        state = (*model.bottleneck.state_dict().values(), model.usage(), model.perplexity())
        found[length] = (*state, model.values.grad, votes, out.values[:, :8], codes[:, :, :8]), grad
    for short, long in zip(found[8][0], found[32][0], strict=True):
        assert torch.equal(short, long)
        assert short.isfinite().all()
    torch.testing.assert_close(found[8][1], found[32][1])  # a matrix product, which may add in another order


def batch_as_arguments(batch):
    return {"x": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_a_mask_of_ones_and_a_mask_of_your_own():
    model, batch = encoder(init_mode="random").freeze_keys().eval(), without_labels(texts(8))
    everywhere = torch.ones(B, 8, dtype=torch.bool)
    features = model.forward_encoder(batch)
    assert torch.equal(model(batch, mask=everywhere), model.bottleneck(model.splitter(features)))
    first = everywhere & (torch.arange(8) < 1)
    assert (model(batch, mask=first)[:, :, 1:] == 0).all()
    assert torch.equal(model.encode(batch, mask=first)[:, :, :1], model.encode(batch)[:, :, :1])


def test_one_embedding_per_sample_leaves_nothing_to_mask():
    model = encoder(Text(pooled=True), init_mode="random").freeze_keys().eval()
    batch = without_labels(texts(8))
    assert torch.equal(model(batch), model.bottleneck(model.splitter(model.forward_encoder(batch))))
    assert model.encode_dataset([texts(8)], progress=False).mask is None


def test_positions_that_are_not_those_of_the_tokens_need_a_mask_of_their_own():
    model, batch = encoder(Text(shortened=True), init_mode="random").freeze_keys(), without_labels(texts(8))
    with pytest.raises(ValueError, match=r"attention_mask .* = \(6, 4\), got \(6, 8\); pass mask="):
        model(batch)
    own = batch["attention_mask"][:, ::2] == 1
    assert (model(batch, mask=own).movedim(1, -2)[~own] == 0).all()
    item = texts(8)
    assert model.encode_dataset([item], mask_extractor=lambda one: own, progress=False).mask.equal(own)


@pytest.mark.parametrize("concatenated", [False, True])
def test_channels_first_and_an_image(concatenated):
    options = {"encoder_is_channel_last": False, "concat_values_from_all_codebooks": concatenated}
    model = encoder(nn.Identity(), init_mode="random", **options).freeze_keys().eval()
    x, mask = torch.randn(B, CHANNELS, 3, 2), torch.rand(B, 3, 2) < 0.5
    out = model(x, mask=mask).flatten(1, -3)
    assert torch.equal(out.movedim(1, -1)[mask], model(x).flatten(1, -3).movedim(1, -1)[mask])
    assert (out.movedim(1, -1)[~mask] == 0).all()
    codes = model.encode(x, mask=mask)
    assert torch.equal(model.decode(codes, mask=mask), model(x, mask=mask))


def test_an_extractor_may_ask_for_the_batch():
    def mean(output, batch):
        counts = batch["attention_mask"][..., None]
        return (output.last_hidden_state * counts).sum(1) / counts.sum(1)

    def last(output, batch=None):
        return output.last_hidden_state[:, -1] if batch is None else batch

    model, batch = encoder(outputs_extractor=mean, init_mode="random").freeze_keys(), without_labels(texts(8))
    assert torch.equal(model.forward_encoder(batch), mean(model.encoder(**batch), batch))
    assert torch.equal(model.forward_encoder(batch), model.forward_encoder(without_labels(texts(32))))
    assert model(batch).shape == (B, C, V)
    model.outputs_extractor = last
    assert torch.equal(model.forward_encoder(batch), last(model.encoder(**batch)))
    model.outputs_extractor = lambda output, batch: output.last_hidden_state + (batch * 0)[..., None]
    assert model.forward_encoder(batch["input_ids"]).shape == (B, 8, CHANNELS)


@pytest.mark.compiled
def test_compiled_with_an_extractor_that_asks():
    model = encoder(outputs_extractor=lambda output, batch: output.last_hidden_state, init_mode="random")
    model.freeze_keys().eval()
    batch = without_labels(texts(8))
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(batch), model(batch))


@pytest.mark.parametrize("pool", [None, "none", "sum"])
def test_memories_of_positions_that_count(pool):
    model = DiscreteKeyValueBottleneck(D, num_memories=K, dim_embed=CHANNELS, num_memory_codebooks=C, dim_memory=V)
    x, mask = torch.randn(B, 8, CHANNELS), texts(8)["attention_mask"] == 1
    x[~mask] = float("nan")
    model.init_keys(x, "sample", mask=mask, progress=False)
    model.freeze_keys()
    out, more = model(x, mask=mask, pool=pool, return_intermediates=True)
    want, others = model(x[mask], pool=pool, return_intermediates=True)
    placed = out if pool != "none" else out.movedim(1, -2)
    assert torch.equal(placed[mask], want)
    assert (placed[~mask] == 0).all()
    assert torch.equal(more.quantized[mask], others.quantized)
    assert (more.quantized[~mask] == 0).all()
    torch.testing.assert_close(more.commit_loss, others.commit_loss)
    codes = model.encode(x, mask=mask)
    torch.testing.assert_close(model.decode(codes, pool, mask=mask), out)
    text = DiscreteKeyValueBottleneck(
        D, num_memories=K, dim_embed=CHANNELS, num_memory_codebooks=C, encoder=Tokens()
    ).freeze_keys()
    batch = texts(8)
    assert (text(batch["input_ids"], attention_mask=batch["attention_mask"])[~mask] == 0).all()


class Tokens(Text):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids, attention_mask).last_hidden_state


def test_the_published_class_looks_at_no_attention_mask_but_takes_a_mask():
    model = encoder(kind=core.BottleneckedEncoder, init_mode="random").freeze_keys().eval()
    batch = without_labels(texts(8))
    mask = batch["attention_mask"] == 1
    assert torch.equal(model.encode(batch), model.encode(batch, mask=torch.ones_like(mask)))
    codes = model.encode(batch, mask=mask)
    assert (codes[:, :, 0][~mask[:, :1].expand(-1, C)] == 0).all()
    assert (codes.movedim(1, -1)[~mask] == 0).all()
    model.unfreeze_keys()
    assert model.init_keys([texts(8)], mask_extractor=lambda item: mask, progress=False).rows == mask.sum()


def test_what_is_wrong_is_said():
    model, batch = encoder(init_mode="random").freeze_keys(), without_labels(texts(8))
    with pytest.raises(TypeError, match=r"BottleneckedEncoder\(\): mask must be torch.bool, .* got torch.int64"):
        model(batch, mask=batch["attention_mask"])
    with pytest.raises(ValueError, match=r"expected mask of shape \(B, \*shape\) = \(6, 8\), got \(6, 9\)"):
        model.encode(batch, mask=torch.ones(6, 9, dtype=torch.bool))
