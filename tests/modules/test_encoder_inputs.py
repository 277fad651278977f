"""``BottleneckedEncoder`` takes encoders and inputs of every kind."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
from small_models import CHANNELS, C, Recorder, V, build
from torch import nn

import kvb

pytestmark = pytest.mark.fallback


class Named(types.SimpleNamespace):
    """Like the outputs of Hugging Face models."""


class Language(nn.Module):
    """Takes and returns what Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, CHANNELS)

    def forward(self, input_ids, attention_mask=None):
        states = self.embedding(input_ids)
        if attention_mask is not None:
            states = states * attention_mask[..., None]
        return Named(last_hidden_state=states, pooler_output=states.mean(1))


def test_mappings_and_named_outputs():
    model = build(Language()).eval()
    batch = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": torch.ones(2, 7)}
    assert model(batch).shape == (2, C, 7, V)
    torch.testing.assert_close(model(batch["input_ids"], attention_mask=batch["attention_mask"]), model(batch))
    model.prepare([batch], epochs=2, inputs_extractor=lambda item: item, progress=False)
    assert model.key_report.rows == 14
    pooled = build(Language(), outputs_extractor=lambda output: output.pooler_output)
    assert pooled(batch).shape == (2, C, V)


def test_more_arguments_go_to_the_encoder():
    model = build()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model.forward_encoder(x, scale=2.0), 2 * model.forward_encoder(x))


def test_transforms_are_applied_when_asked():
    model = build()
    model.activate_pre_transform = True
    with pytest.raises(RuntimeError, match="activate_pre_transform is set, but there are no transforms"):
        model(torch.randn(3, 6))
    model.transforms = lambda rows: torch.tensor(rows, dtype=torch.float32)
    assert model([[1, 2, 3, 4, 5, 6]]).shape == (1, C, V)


def test_a_hugging_face_model():
    transformers = pytest.importorskip("transformers", reason="not among the packages that kvb needs")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=CHANNELS, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = build(transformers.BertModel(config), return_values_only=False)
    tokens = transformers.BatchEncoding({"input_ids": torch.randint(50, (2, 7)), "attention_mask": torch.ones(2, 7)})
    assert model.prepare([tokens], inputs_extractor=lambda item: item, progress=False)(tokens).values.shape == (
        2,
        C,
        7,
        V,
    )


def test_a_timm_model():
    timm = pytest.importorskip("timm", reason="not among the packages that kvb needs")
    network = timm.create_model("resnet10t", num_classes=0, global_pool="")
    model = build(network, num_channels=512, dim_keys=128, splitting_mode="chunk", encoder_is_channel_last=False)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, C, V, 2, 2)


def test_bad_encoders_and_outputs_are_named():
    with pytest.raises(TypeError, match="encoder must be a torch.nn.Module, got function"):
        build(lambda x: x)
    with pytest.raises(ValueError, match=r"\(B, \*spatial, 12\), got \(3, 6\); check num_channels"):
        build(nn.Identity())(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"\(B, 12, \*spatial\), got \(3, 5, 12\); .*encoder_is_channel_last=False"):
        build(nn.Identity(), encoder_is_channel_last=False)(torch.randn(3, 5, 12))
    with pytest.raises(ValueError, match=r"got \(12,\)"):
        build(nn.Identity())(torch.randn(12))
    with pytest.raises(TypeError, match=r"got tuple; pass outputs_extractor"):
        build(nn.Identity())((torch.randn(3, 12),))
    with pytest.raises(TypeError, match="expected a floating-point output, got torch.int64"):
        build(nn.Identity())(torch.ones(3, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"splitting_mode must be one of 'chunk'"):
        build(splitting_mode="slice")
    with pytest.raises(ValueError, match=r"dim_keys must be num_channels / num_codebooks = 12 / 4 = 3 .* got 5"):
        build(splitting_mode="chunk", dim_keys=5)
    with pytest.raises(ValueError, match="num_channels must be a positive integer, got 0"):
        build(num_channels=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", kvb.splitters.MODES)
def test_every_dtype(dtype, mode):
    model = build(splitting_mode=mode, return_values_only=False).to(dtype).freeze_keys()
    out = model(torch.randn(9, 6, dtype=dtype))
    assert out.values.dtype == dtype
    assert out.distances.isfinite().all()


def test_it_compiles_whole():
    model = build(Recorder(False), encoder_is_channel_last=False).freeze_keys().eval()
    x = torch.randn(2, 4, 5, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_copies_and_pickles():
    model = build(init_mode="kmeans", splitting_mode="sparse_projection").prepare([torch.randn(99, 6)], progress=False)
    x = torch.randn(4, 6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert twin.frozen_encoder
