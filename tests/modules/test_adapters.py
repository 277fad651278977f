"""Encoders of other libraries, by modules with their methods; the packages themselves are in tests/integrations."""

import types

import pytest
import torch
from torch import nn

import kvb

SIZES = {"num_codebooks": 2, "key_value_pairs_per_codebook": 8, "dim_keys": 4, "dim_values": 3}


class Images(nn.Module):
    """As timm's models are: 6 channels, 5 after a layer that the head begins with."""

    num_features, head_hidden_size = 6, 5

    def __init__(self, output_fmt=None):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 5)
        if output_fmt:
            self.output_fmt = output_fmt

    def forward_features(self, images):
        found = self.body(images)
        return found.movedim(1, -1) if getattr(self, "output_fmt", "") == "NHWC" else found

    def forward_head(self, features, pre_logits):
        assert pre_logits
        return self.head(features.mean((2, 3)))


@pytest.mark.parametrize("output_fmt", [None, "NCHW", "NHWC"])
def test_positions_of_images(output_fmt):
    model, images = Images(output_fmt), torch.randn(2, 3, 8, 12)
    module = kvb.BottleneckedEncoder.from_timm(model, pooling="none", **SIZES).eval()
    assert torch.equal(module.forward_encoder(images), model.body(images).movedim(1, -1))
    assert module(images).shape == (2, 2, 2, 3, 3)


def test_images_pooled_by_their_head():
    model, images = Images(), torch.randn(2, 3, 8, 12)
    module = kvb.BottleneckedEncoder.from_timm(model, **SIZES, init_values="zeros").eval()
    assert torch.equal(module.forward_encoder(images), model.forward_head(model.body(images), True))
    assert module(images).shape == (2, 2, 3)
    assert not module.values.any()


class Text(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.config, self.embed = types.SimpleNamespace(**sizes), nn.Embedding(20, 6)

    def forward(self, input_ids, attention_mask=None):
        return types.SimpleNamespace(last_hidden_state=self.embed(input_ids))


@pytest.mark.parametrize("sizes", [{"hidden_size": 6}, {"d_model": 6}, {"dim": 6}])
@pytest.mark.parametrize("masked", [True, False])
def test_text(sizes, masked):
    tokens = torch.randint(20, (3, 5))
    batch = {"input_ids": tokens}
    lengths = torch.tensor([5, 2, 1]) if masked else torch.tensor([5, 5, 5])
    if masked:
        batch["attention_mask"] = (torch.arange(5) < lengths[:, None]).long()
    model = Text(**sizes)
    mean = kvb.BottleneckedEncoder.from_transformers(model, **SIZES).eval()
    want = torch.stack([model.embed(tokens[i, : lengths[i]]).mean(0) for i in range(3)])
    torch.testing.assert_close(mean.forward_encoder(batch), want)
    assert torch.equal(mean(**batch), mean(batch))
    first = kvb.BottleneckedEncoder.from_transformers(model, pooling="first", **SIZES).eval()
    assert torch.equal(first.forward_encoder(batch), model.embed(tokens[:, 0]))


def test_what_padding_holds_leaves_no_trace():
    model = Text(hidden_size=6)
    with torch.no_grad():
        model.embed.weight[0] = torch.nan  # of padding
    batch = {"input_ids": torch.tensor([[3, 4, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    module = kvb.BottleneckedEncoder.from_transformers(model, **SIZES)
    torch.testing.assert_close(module.forward_encoder(batch), model.embed(torch.tensor([[3, 4]])).mean(1))


def test_a_text_without_a_token_that_counts_is_zero():
    batch = {"input_ids": torch.tensor([[3, 4, 0]]), "attention_mask": torch.zeros(1, 3)}
    module = kvb.BottleneckedEncoder.from_transformers(Text(hidden_size=6), **SIZES)
    assert not module.forward_encoder(batch).any()


def test_maps_of_images():
    class Maps(nn.Conv2d):
        config = types.SimpleNamespace(hidden_sizes=[4, 6])

        def forward(self, pixel_values):
            return types.SimpleNamespace(last_hidden_state=super().forward(pixel_values))

    model, pixels = Maps(3, 6, 4, stride=4), torch.randn(2, 3, 8, 12)
    maps = kvb.BottleneckedEncoder.from_transformers(model, pooling="none", **SIZES).eval()
    assert maps(pixel_values=pixels).shape == (2, 2, 3, 2, 3)  # channel-first, as the model has it
    mean = kvb.BottleneckedEncoder.from_transformers(model, **SIZES).eval()
    torch.testing.assert_close(mean.forward_encoder(pixels), model(pixels).last_hidden_state.mean((2, 3)))
    assert mean(pixels).shape == (2, 2, 3)


class Sentences(nn.Module):
    """As a ``SentenceTransformer`` is."""

    def __init__(self):
        super().__init__()
        self.embed = nn.EmbeddingBag(30, 6)

    def get_sentence_embedding_dimension(self):
        return 6

    def tokenize(self, sentences):
        return {"input_ids": torch.tensor([[len(word) for word in sentence.split()[:2]] for sentence in sentences])}

    def forward(self, tokens):
        return {"sentence_embedding": self.embed(tokens["input_ids"])}


def test_sentences():
    model, sentences = Sentences(), ["one two three", "four fives", "a sentence"]
    module = kvb.BottleneckedEncoder.from_sentence_transformers(model, **SIZES, init_mode="sample")
    with pytest.raises(TypeError, match="inputs_extractor=lambda item: item"):
        module.prepare([sentences] * 3)
    module.prepare([sentences] * 3, inputs_extractor=lambda item: item)
    assert torch.equal(module(sentences), module(model.tokenize(sentences)))
    assert module(sentences).shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: kvb.BottleneckedEncoder.from_timm(nn.Linear(3, 3), **SIZES), "expects a model of timm, got Linear"),
        (lambda: kvb.BottleneckedEncoder.from_transformers(nn.Linear(3, 3), **SIZES), "whose config has a hidden_size"),
        (lambda: kvb.BottleneckedEncoder.from_sentence_transformers(nn.Linear(3, 3), **SIZES), "a SentenceTransformer"),
    ],
)
def test_models_of_another_kind(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_unknown_pooling():
    with pytest.raises(ValueError, match="pooling must be one of 'mean', 'first', 'none'"):
        kvb.BottleneckedEncoder.from_transformers(Text(hidden_size=6), pooling="max", **SIZES)
