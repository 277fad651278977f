"""Modules as files of ONNX, run by ONNX Runtime: the codes are those of PyTorch, near ties and broken data included."""

import logging

import pytest
import torch
from torch import nn

import kvb
from kvb.testing import data

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # of torch, about its own code
for package in ("onnx", "onnxscript"):
    pytest.importorskip(package, reason="pip install 'kvb[integrations]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'kvb[integrations]'")
from kvb.integrations import onnx as kvb_onnx  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    """torch.onnx warns of each translation for torchvision that it has no use for."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def exported(tmp_path):
    """A module and an example of its inputs -> a function that runs its file."""

    def make(module, *example, **options):
        kvb_onnx.export(module.eval(), example, tmp_path / "model.onnx", **options)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", settings, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]

        def run(*inputs):
            fed = {name: tensor.detach().numpy() for name, tensor in zip(names, inputs, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, fed)]

        run.session = session
        return run

    return make


class Search(nn.Module):
    """Keys are inputs here, so that one file searches data of every kind."""

    def __init__(self, topk):
        super().__init__()
        self.topk = topk

    def forward(self, queries, keys):
        return kvb.functional.nearest(queries, keys, topk=self.topk)


# All but numbers whose squares float64 cannot hold.
KINDS = [kind for name, kind in data.DATA.items() if name != "magnitudes"]


def untied(got, want, queries, keys):
    """``got``, with ``want`` where float64 ties both keys, so far off is the query: the file takes the lower then."""
    books = torch.arange(keys.shape[0])
    near, other = ((queries - keys[books, codes]).square().sum(-1) for codes in (got, want))
    return torch.where((near == other) & (got <= want), want, got)


@pytest.mark.parametrize(
    ("dtype", "keys_in", "K", "D", "topk"),
    [
        (torch.float32, torch.float32, 130, 14, 1),
        (torch.float32, torch.float32, 40, 5, 3),
        (torch.float16, torch.float32, 130, 3, 1),
        (torch.float16, torch.float16, 33, 8, 2),
        (torch.float64, torch.float32, 40, 7, 4),
        (torch.float64, torch.float64, 65, 1, 1),
    ],
)
def test_the_search_finds_what_pytorch_finds(exported, dtype, keys_in, K, D, topk):
    C, shapes = 3, ({0: torch.export.Dim("batch")}, None)
    module = Search(topk)
    run = exported(
        module, torch.randn(4, 1, C, D, dtype=dtype), torch.randn(C, K, D, dtype=keys_in), dynamic_shapes=shapes
    )
    for kind in KINDS:
        queries, keys = kind(60, C, K, D, torch.promote_types(dtype, keys_in))
        queries, keys = queries.to(dtype), keys.to(keys_in)
        (got, got_distances), (want, want_distances) = run(queries, keys), module(queries, keys)
        assert (got.dtype, got_distances.dtype) == (want.dtype, want_distances.dtype), kind.__name__
        assert torch.equal(got_distances.nan_to_num(-1), want_distances.nan_to_num(-1)), kind.__name__
        if kind is data.overflowing and topk == 1 and dtype == torch.float64:
            got = untied(got, want, queries, keys)
        assert torch.equal(got, want), kind.__name__


def test_the_last_bit_decides(exported):
    """Distances that float32 cannot tell apart, between keys that are far from zero."""
    keys = torch.full((1, 3, 4), 4096.0)
    keys[0, 0, 0] += 2**-11  # 0, 1 and 2 are neighbours in float32
    keys[0, 2, 0] -= 2**-11
    run = exported(Search(1), torch.zeros(2, 1, 1, 4), keys, dynamic_shapes=({0: torch.export.Dim("batch")}, None))
    queries = torch.full((3, 1, 1, 4), 4096.0)
    queries[:, 0, 0, 1] += 1
    queries[1, 0, 0, 0] += 2**-11
    queries[2, 0, 0, 0] -= 2**-11
    found, distances = run(queries, keys)
    assert found.flatten().tolist() == [1, 0, 2]
    assert distances.flatten().tolist() == [1, 1, 1]


def taught(module, *sizes):
    module.train()
    module(torch.randn(40, *sizes))
    return module.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_bottleneck_in_any_batch(exported, dtype):
    module = kvb.KeyValueBottleneck(3, 16, 5, 4, topk=2, return_values_only=False).freeze_keys().eval()
    run = exported(module, torch.randn(3, 3, 2, 5, dtype=dtype))
    assert run.session.get_inputs()[0].shape == ["batch", 3, 2, 5]
    for B in (0, 1, 3, 50):
        x = torch.randn(B, 3, 2, 5).to(dtype)
        for got, want in zip(run(x), module(x), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)


@pytest.mark.parametrize("usable", [1, 3])
def test_masked_pairs(exported, usable):
    """With fewer usable pairs than are fetched, too."""
    module = kvb.KeyValueBottleneck(3, 16, 5, 4, topk=2, return_values_only=False).freeze_keys().eval()
    module.mask_pairs((torch.arange(16) * 7 % 16 < usable).expand(3, 16))
    run, x = exported(module, torch.randn(3, 3, 5)), torch.randn(20, 3, 5)
    for got, want in zip(run(x), module(x), strict=True):
        assert torch.equal(got, want)


def test_codes_to_logits(exported):
    module = kvb.KeyValueBottleneck(6, 16, 5, 4).freeze_keys().eval()

    class Decode(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = module

        def forward(self, codes):
            return self.memory.decode(codes, pool="mean")

    codes = torch.randint(16, (9, 6), dtype=torch.int16)
    torch.testing.assert_close(exported(Decode().eval(), codes[:2])(codes)[0], module.decode(codes, pool="mean"))


def test_padding_has_no_vote(exported):
    module = kvb.KeyValueBottleneck(3, 16, 5, 4).freeze_keys().eval()
    x, mask = torch.randn(8, 3, 4, 5), torch.rand(8, 4) < 0.6
    run = exported(module, x[:2], kwargs={"mask": mask[:2]})
    assert torch.equal(run(x, mask)[0], module(x, mask=mask))


@pytest.mark.parametrize("head", ["voting", "probe", "mlp"])
def test_a_classifier(exported, head):
    """Splitters cut here: a projection rounds differently in another runtime, before anything is searched."""
    decoder = {
        "voting": lambda: kvb.decoders.CodebookVoting(4),
        "probe": lambda: kvb.decoders.LinearProbe(3 * 4, 7),
        "mlp": lambda: kvb.decoders.MLP(3 * 4, 7, hidden=8),
    }[head]()
    memory = taught(kvb.KeyValueBottleneck(3, 16, 5, 4, init_mode="kmeans"), 3, 5)
    module = nn.Sequential(kvb.splitters.Chunk(15, 3), memory.freeze_keys(), decoder).eval()
    x = torch.randn(30, 15)
    torch.testing.assert_close(exported(module, x[:2])(x)[0], module(x))


def test_an_encoder_in_front(exported):
    encoder = nn.Sequential(nn.Conv2d(3, 12, 4, stride=4), nn.ReLU())
    module = kvb.BottleneckedEncoder(encoder, 12, 3, 16, 4, 5, encoder_is_channel_last=False, init_mode="kmeans")
    taught(module, 3, 16, 16).freeze_keys()
    images = torch.randn(20, 3, 16, 16)
    got, want = exported(module, images[:2])(images)[0], module(images)
    assert got.shape == want.shape
    same = (got == want).all(2)
    assert same.float().mean() > 0.999, "another runtime's convolutions may move a feature over a boundary, rarely"


def test_a_text_encoder_of_transformers(exported):
    """Tensors by name, so that the file has an input for each."""
    transformers = pytest.importorskip("transformers", reason="pip install 'kvb[integrations]'")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    options = {"num_codebooks": 4, "key_value_pairs_per_codebook": 16, "dim_keys": 4, "dim_values": 5}

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = kvb.BottleneckedEncoder.from_transformers(bert, **options).freeze_keys()

        def forward(self, input_ids, attention_mask):
            return self.memory(input_ids=input_ids, attention_mask=attention_mask, pool="mean")

    module = Text().eval()
    ids, mask = torch.randint(50, (12, 7)), (torch.arange(7) < torch.randint(1, 8, (12, 1))).long()
    got, want = exported(module, ids[:2], mask[:2])(ids, mask)[0], module(ids, mask)
    assert torch.isclose(got, want, atol=1e-4).all(-1).float().mean() > 0.9, "a feature may cross a boundary, rarely"


def test_two_memories_and_a_projection_of_embeddings(exported):
    first = taught(kvb.DiscreteKeyValueBottleneck(dim=8, dim_embed=6, num_memories=16, num_memory_codebooks=3), 6)
    second = taught(kvb.DiscreteKeyValueBottleneck(dim=5, dim_embed=8, num_memories=16, num_memory_codebooks=2), 8)
    module = nn.Sequential(first.freeze_keys(), second.freeze_keys()).eval()
    x = torch.randn(20, 6)
    torch.testing.assert_close(exported(module, x[:2])(x)[0], module(x))


def test_one_batch_size_and_tensors_beside_the_file(exported, tmp_path):
    module = kvb.KeyValueBottleneck(3, 64, 5, 40).freeze_keys().eval()
    run = exported(module, torch.randn(1, 3, 5), dynamic_batch=False, external_data=True)
    assert (tmp_path / "model.onnx.data").exists()
    assert run.session.get_inputs()[0].shape == [1, 3, 5]
    x = torch.randn(1, 3, 5)
    assert torch.equal(run(x)[0], module(x))


def test_what_cannot_be_exported():
    module, x = kvb.KeyValueBottleneck(3, 16, 5, 4), torch.randn(2, 3, 5)
    with pytest.raises(RuntimeError, match=r"expects a module in eval mode.*call module.eval\(\)"):
        kvb_onnx.export(module, (x,))
    with pytest.raises(ValueError, match="an example of at least two samples, got 1"):
        kvb_onnx.export(module.eval(), (x[:1],))
    drawing = kvb.KeyValueBottleneck(3, 16, 5, 4, sample_codebook_temperature=0.5).freeze_keys().eval()
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"kvb.sample"):
        kvb_onnx.export(drawing, (x,))


def test_torchs_own_call_takes_the_translations(tmp_path):
    module = kvb.KeyValueBottleneck(3, 16, 5, 4).freeze_keys().eval()
    x = torch.randn(2, 3, 5)
    program = torch.onnx.export(
        module, (x,), dynamo=True, custom_translation_table=kvb_onnx.translations(), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert torch.equal(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), module(x))
