"""Models of Hugging Face around a bottleneck, and a bottleneck inside of one; nothing is downloaded."""

import pytest
import torch
from torch import nn

import kvb

transformers = pytest.importorskip("transformers", reason="pip install 'kvb[integrations]'")

pytestmark = pytest.mark.integrations
SIZES = {"num_codebooks": 3, "key_value_pairs_per_codebook": 8, "dim_keys": 4, "dim_values": 5}


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()


def batch(B=4, L=7):
    mask = torch.arange(L) < torch.tensor([L, 3, 1, 5])[:, None]
    return {"input_ids": torch.randint(50, (B, L)), "attention_mask": mask.long()}


@pytest.mark.parametrize("pooling", ["mean", "first", "none"])
def test_a_model_of_text(pooling):
    model, inputs = bert(), batch()
    module = kvb.BottleneckedEncoder.from_transformers(model, pooling=pooling, **SIZES).eval()
    found = module(**inputs)
    assert torch.equal(found, module(inputs))
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].bool()
    if pooling == "none":
        want = module.bottleneck(module.splitter(torch.where(mask[..., None], hidden, 0)), mask=mask)
        assert torch.equal(found, want)
        assert not found.movedim(1, 2)[~mask].any()
    else:
        rows = [hidden[i, 0] if pooling == "first" else hidden[i, mask[i]].mean(0) for i in range(4)]
        torch.testing.assert_close(module.forward_encoder(inputs), torch.stack(rows))
        assert found.shape == (4, 3, 5)


def test_padding_changes_nothing():
    model, short = bert(), {"input_ids": torch.randint(50, (2, 3)), "attention_mask": torch.ones(2, 3).long()}
    padded = {name: torch.nn.functional.pad(tensor, (0, 4)) for name, tensor in short.items()}
    module = kvb.BottleneckedEncoder.from_transformers(model, **SIZES).eval()
    assert torch.equal(module.encode(short), module.encode(padded))


def test_a_model_of_images():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = transformers.ResNetModel(transformers.ResNetConfig(num_channels=3, **sizes)).eval()
    images = torch.randn(2, 3, 32, 32)
    module = kvb.BottleneckedEncoder.from_transformers(model, pooling="none", **SIZES).eval()
    assert module(images).shape == (2, 3, 5, *model(images).last_hidden_state.shape[2:])
    pooled = kvb.BottleneckedEncoder.from_transformers(model, encoder_is_channel_last=True, **SIZES).eval()
    assert pooled(images).shape == (2, 3, 5)


def test_a_model_without_a_hidden_size():
    with pytest.raises(TypeError, match=r"call BottleneckedEncoder\(model, num_channels=...\) instead"):
        kvb.BottleneckedEncoder.from_transformers(nn.Linear(3, 3), **SIZES)


# --- inside of a PreTrainedModel --------------------------------------------------------------------------------------


class Config(transformers.PretrainedConfig):
    model_type = "kvb-test"


class Model(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.memory = kvb.BottleneckedEncoder(nn.Linear(6, 12), 12, **SIZES)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.normal_()

    def forward(self, x):
        return self.memory(x)


@pytest.fixture
def taught(tmp_path):
    model = Model(Config()).train()
    for _ in range(3):
        model(torch.randn(20, 6))
    model.memory.freeze_keys().mask_pairs(torch.arange(8).expand(3, 8) < 6)
    model(torch.randn(20, 6))
    model.eval().save_pretrained(tmp_path)
    return model


def test_there_and_back(taught, tmp_path):
    again = Model.from_pretrained(tmp_path)
    x = torch.randn(9, 6)
    assert torch.equal(again(x), taught(x))
    assert again.memory.keys_frozen
    assert again.memory.pair_mask is not None
    for name, tensor in taught.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_in_half_precision_keys_stay_exact(taught, tmp_path):
    again = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.memory.values.dtype == torch.bfloat16
    assert torch.equal(again.memory.keys, taught.memory.keys)


def test_an_auto_class_finds_it(taught, tmp_path):
    transformers.AutoConfig.register(Config.model_type, Config, exist_ok=True)
    transformers.AutoModel.register(Config, Model, exist_ok=True)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    x = torch.randn(9, 6)
    assert type(again) is Model
    assert torch.equal(again(x), taught(x))
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path / "copy")(x), taught(x))


@pytest.mark.parametrize("buffers", [False, True])
def test_dispatched_by_accelerate(taught, tmp_path, buffers):
    accelerate = pytest.importorskip("accelerate", reason="pip install 'kvb[integrations]'")
    with accelerate.init_empty_weights(include_buffers=buffers):
        empty = Model(Config())
    again = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    x = torch.randn(9, 6)
    assert torch.equal(again.eval()(x), taught(x))


# --- sentences --------------------------------------------------------------------------------------------------------


def test_sentences_in_values_out(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="pip install 'kvb[integrations]'")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "dog", "ran"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    bert().save_pretrained(tmp_path)
    transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")  # pools by the mean
    sentences = ["a cat sat", "a dog", "ran a cat ran"]
    module = kvb.BottleneckedEncoder.from_sentence_transformers(model, **SIZES).eval()
    embeddings = torch.from_numpy(model.encode(sentences))
    torch.testing.assert_close(module.forward_encoder(sentences), embeddings)
    assert module(sentences).shape == (3, 3, 5)
    assert torch.equal(module(model.tokenize(sentences)), module(sentences))
