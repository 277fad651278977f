"""``DiscreteKeyValueBottleneck``: shapes, pooling, encoders, learning, and what its arguments must be."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from kvb import DiscreteKeyValueBottleneck, DiscreteKeyValueBottleneckConfig, KeyValueBottleneck

pytestmark = pytest.mark.fallback

SIZES = {"dim": 4, "num_memories": 9, "dim_embed": 6, "num_memory_codebooks": 3, "dim_memory": 5}


def make(**options):
    return DiscreteKeyValueBottleneck(**{**SIZES, **options})


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 3), (0,)], ids=lambda shape: f"shape={shape}")
def test_shapes(shape):
    module = make().eval()
    x = torch.randn(8, *shape, 6)
    pooled, (quantized, indices, commit_loss) = module(x, return_intermediates=True)
    each = module(x, average_pool_memories=False)
    assert pooled.shape == (8, *shape, 5)
    assert each.shape == (8, 3, *shape, 5)
    assert quantized.shape == (8, *shape, 12)
    assert indices.shape == (8, 3, *shape)
    assert commit_loss.shape == ()
    torch.testing.assert_close(pooled, each.mean(1))
    torch.testing.assert_close(pooled, module.bottleneck.decode(module.encode(x), "mean"))
    assert torch.equal(indices, module.encode(x, dtype="auto"))


def test_what_it_computes():
    module = make(average_pool_memories=False).eval()
    x = torch.randn(8, 7, 6)
    heads = torch.einsum("bnd,cde->bnce", x.double(), module.rand_proj.double())
    nearest = torch.cdist(heads.flatten(0, 1).transpose(0, 1), module.bottleneck.keys.double()).argmin(-1)
    indices = nearest.view(3, 8, 7).transpose(0, 1)
    memories, found = module(x, return_intermediates=True)
    assert torch.equal(found.memory_indices, indices)
    books = torch.arange(3)[:, None]
    assert torch.equal(memories, module.values[books, indices])
    keys = module.bottleneck.keys[books, indices]
    assert torch.equal(found.quantized, torch.cat(keys.unbind(1), -1))


def test_keyword_config_and_positional_forms_agree():
    config = DiscreteKeyValueBottleneckConfig(**SIZES, decay=0.5, init_mode="kmeans", average_pool_memories=False)
    options = {name: value for name, value in dataclasses.asdict(config).items() if name != "dim"}
    for module in (
        DiscreteKeyValueBottleneck(config),
        DiscreteKeyValueBottleneck(config=config),
        DiscreteKeyValueBottleneck(4, **options),
        DiscreteKeyValueBottleneck(dim=4, **options),
        DiscreteKeyValueBottleneck(dataclasses.replace(config, decay=0.1), decay=0.5),
    ):
        assert module.config == config
        assert not module.average_pool_memories
        assert module.bottleneck.decay == 0.5
        assert module.bottleneck.init_mode == "kmeans"


def test_every_parameter_has_its_default():
    module = DiscreteKeyValueBottleneck(dim=4, num_memories=9)
    assert module.dim_embed == 4
    assert module.values.shape == (1, 9, 4)
    assert module.rand_proj.shape == (1, 4, 4)
    assert module.average_pool_memories
    assert make(codebook_dim=2).bottleneck.keys.shape == (3, 9, 2)


def test_memories_are_the_only_parameter():
    module = make()
    assert {name: tuple(value.shape) for name, value in module.named_parameters()} == {"bottleneck.values": (3, 9, 5)}
    assert [name for name, _ in module.named_buffers() if "proj" in name] == ["splitter.rand_proj"]


def test_fetched_memories_alone_get_a_gradient():
    module = make()
    x = torch.randn(2, 6, requires_grad=True)
    memories, found = module(x, return_intermediates=True)
    memories.sum().backward(retain_graph=True)
    fetched = torch.zeros(3, 9, dtype=torch.bool)
    for book, indices in enumerate(found.memory_indices.unbind(1)):
        fetched[book, indices] = True
    assert torch.equal(module.values.grad.abs().sum(-1) > 0, fetched)
    assert x.grad is None
    found.commit_loss.backward()
    assert x.grad.abs().sum() > 0


def test_commit_loss_is_the_mean_squared_distance_in_training():
    module = make().freeze_keys()
    x = torch.randn(8, 7, 6)
    _, found = module(x, return_intermediates=True)
    heads = module.splitter(x).movedim(1, -2).flatten(-2)
    torch.testing.assert_close(found.commit_loss, (found.quantized - heads).square().mean())
    assert module.eval()(x, return_intermediates=True)[1].commit_loss == 0
    x[0, 0, 0] = torch.nan
    loss = module.train()(x, return_intermediates=True)[1].commit_loss
    torch.testing.assert_close(loss, (found.quantized - heads)[x.isfinite().all(-1)].square().mean())


# --- encoders ---------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2, 6), nn.Dropout(0.5)

    def forward(self, x, scale=1.0, *, shift=None):
        out = self.dropout(self.linear(x)) * scale
        return out if shift is None else out + shift


def test_encoder_stays_in_eval_mode_and_gets_no_gradient():
    module = make(encoder=Encoder())
    x = torch.randn(8, 7, 2)
    for _ in range(2):
        assert not any(part.training for part in module.encoder.modules())
        module.train()
    module.encoder.train()
    assert torch.equal(module.freeze_keys()(x), module(x))
    assert not module(x, return_intermediates=True)[1].commit_loss.requires_grad


def test_encoder_arguments_go_to_the_encoder():
    module = make(encoder=Encoder()).eval()
    x, shift = torch.randn(8, 7, 2), torch.randn(6)
    embeddings = module.encoder(x) * 2 + shift
    plain = copy.deepcopy(module)
    plain.encoder = None
    assert torch.equal(module(x, scale=2, shift=shift), plain(embeddings))
    assert torch.equal(module.encode(x, scale=2, shift=shift), plain.encode(embeddings))


def test_encoder_must_return_embeddings():
    with pytest.raises(TypeError, match="argument 'output of the encoder' must be Tensor, not tuple"):
        make(encoder=nn.LSTM(2, 6))(torch.randn(8, 7, 2))
    with pytest.raises(ValueError, match=r"expected output of the encoder of shape .*\(B, \*shape, 6\), got \(8, 4\)"):
        make(encoder=nn.Linear(2, 4))(torch.randn(8, 2))


# --- keys -------------------------------------------------------------------------------------------------------------


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(300, 7, 2), torch.zeros(300)), 50)


@pytest.mark.parametrize("data", [loader(), torch.randn(300, 7, 2), [torch.randn(50, 7, 2)] * 6], ids=type)
@pytest.mark.parametrize("method", ["sample", "kmeans"])
def test_init_keys_runs_through_encoder_and_projection(data, method):
    module = make(encoder=Encoder(), init_mode=method)
    report = module.init_keys(data, epochs=1, progress=False)
    assert (report.method, report.rows) == (method, 2100)
    found = module.freeze_keys().eval()(torch.randn(300, 7, 2), return_intermediates=True)[1]
    assert len(found.memory_indices.unique()) == 9


def test_kmeans_encodes_all_rows_once():
    module, calls = make(encoder=Encoder()), []
    module.encoder.register_forward_hook(lambda *_: calls.append(1))
    module.init_keys(loader(), "kmeans", epochs=0, progress=False)
    assert len(calls) == 6  # of 350 rows each
    assert module.init_keys(iter(loader()), "kmeans", epochs=0, progress=False).rows == 64 * 9
    with pytest.raises(ValueError, match="data can be iterated only once, but 2 passes are needed"):
        module.init_keys(iter(loader()), "kmeans", epochs=1, progress=False)


def test_init_keys_takes_an_extractor():
    module = make()
    x = torch.randn(300, 6)
    report = module.init_keys(
        [{"label": 1, "x": x}], "kmeans", epochs=2, inputs_extractor=lambda item: item["x"], progress=False
    )
    assert report.rows == 300


def test_keys_learn_until_frozen_and_never_in_eval_mode():
    module = make()
    x = torch.randn(50, 6)
    keys = module.bottleneck.keys.clone()
    module.eval()(x)
    assert torch.equal(module.bottleneck.keys, keys)
    module.train()(x)
    assert not torch.equal(module.bottleneck.keys, keys)
    keys = module.freeze_keys().bottleneck.keys.clone()
    module(x)
    assert torch.equal(module.bottleneck.keys, keys)
    module.unfreeze_keys()(x)
    assert not torch.equal(module.bottleneck.keys, keys)


def test_keys_that_wait_for_data_say_so():
    module = make(init_mode="kmeans")
    with pytest.raises(RuntimeError, match="keys are not initialised"):
        module.freeze_keys()
    with pytest.raises(RuntimeError, match="keys are not initialised"):
        module.eval()(torch.randn(8, 6))
    module.train()(torch.randn(100, 6))
    module.freeze_keys().eval()(torch.randn(8, 6))


def test_memories_learn_a_task():
    module = make(dim_memory=2, num_memories=32).freeze_keys()
    x = torch.randn(500, 6)
    labels = (x[:, 0] > 0).long()
    optimizer = torch.optim.SGD(module.parameters(), lr=10)
    before = nn.functional.cross_entropy(module(x), labels)
    for _ in range(200):
        loss = nn.functional.cross_entropy(module(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < before / 2


# --- state, graphs, arguments -----------------------------------------------------------------------------------------


def test_state_and_copies():
    module = make(encoder=Encoder()).freeze_keys()
    twin = make(encoder=Encoder())
    twin.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(8, 7, 2)
    for other in (twin, copy.deepcopy(module)):
        assert torch.equal(other(x), module(x))
        assert not other.bottleneck.update_keys


def test_compile_fullgraph_and_export():
    module = make().freeze_keys().eval()
    x = torch.randn(8, 7, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (x, x[:3]):
        torch.testing.assert_close(compiled(batch), module(batch))
        torch.testing.assert_close(compiled(batch, True), module(batch, True))
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:3]), module(x[:3]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be a positive integer, got 0"),
        ({"num_memories": 2.0}, TypeError, "num_memories must be a positive integer, got 2.0"),
        ({"num_memory_codebooks": True}, TypeError, "num_memory_codebooks must be a positive integer, got True"),
        ({"dim_memory": -1}, ValueError, "dim_memory must be a positive integer, got -1"),
        ({"dim_embed": "6"}, TypeError, "dim_embed must be a positive integer, got '6'"),
        ({"decay": 1.0}, ValueError, r"decay must be in \[0.0, 1.0\), got 1.0"),
        ({"init_mode": "zeros"}, ValueError, "init_mode must be one of 'random', "),
        ({"encoder": len}, TypeError, "encoder must be a torch.nn.Module or None, got builtin_function"),
        ({"surplus": 1}, TypeError, "unexpected keyword argument 'surplus'"),
    ],
)
def test_bad_parameters(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], TypeError, "argument 'x' must be Tensor, not list"),
        (torch.zeros(3, 6, dtype=torch.int64), TypeError, "expected a floating-point x, got torch.int64"),
        (torch.zeros(6), ValueError, r"expected x of shape \(B, \*shape, dim_embed\) = \(B, \*shape, 6\), got \(6,\)"),
        (torch.zeros(3, 4), ValueError, r"got \(3, 4\); dim_embed defaults to dim"),
    ],
)
def test_bad_inputs(x, error, message):
    with pytest.raises(error, match=message):
        make()(x)


def test_arguments_without_an_encoder_and_configs_of_another_type():
    with pytest.raises(TypeError, match="'attention_mask' would go to the encoder, but there is none"):
        make()(torch.zeros(3, 6), attention_mask=None)
    with pytest.raises(TypeError, match="config must be a DiscreteKeyValueBottleneckConfig, got dict"):
        DiscreteKeyValueBottleneck({"dim": 3})


# --- pooling inside KeyValueBottleneck --------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_a_pooled_forward_is_the_forward_pooled(pool):
    module = KeyValueBottleneck(3, 9, 4, 5).freeze_keys().eval()
    x = torch.randn(8, 3, 2, 7, 4)
    pooled = module(x, pool=pool)
    assert pooled.shape == (8, 2, 7, 5)
    torch.testing.assert_close(pooled, getattr(module(x), pool)(1))
    full = module(x, pool=pool, return_values_only=False)
    assert torch.equal(full.values, pooled)
    assert full.indices.shape == (8, 3, 2, 7)


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(), (2, 7)])
def test_a_pooled_forward_keeps_the_ranks(pool, shape):
    module = KeyValueBottleneck(3, 9, 4, 5, topk=2).eval()
    x = torch.randn(8, 3, *shape, 4)
    pooled = module(x, pool=pool)
    assert pooled.shape == (8, 2, *shape, 5)
    torch.testing.assert_close(pooled, getattr(module(x), pool)(1))
    torch.testing.assert_close(pooled, module.decode(module.encode(x), pool))
