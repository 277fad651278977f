"""BottleneckedEncoder and the named ones: layouts, freezing, key initialisation, inputs, loading, files."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import CHANNELS, C, D, K, Recorder, V, build
from torch import nn

import kvb
from kvb.decoders import CodebookVoting

pytestmark = pytest.mark.fallback


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4), (1, 1), (0, 2)])
def test_layouts(shape, last, concat, topk):
    options = {"encoder_is_channel_last": last, "concat_values_from_all_codebooks": concat, "topk": topk}
    model = build(Recorder(last), return_values_only=False, **options).eval()
    x = torch.randn(2, *shape, 6)
    plain = model.bottleneck(model.splitter(model.encoder.linear(x)))  # [B, C, (T), *shape, V]
    t = topk - 1  # the number of axes for the ranks
    keys, values = plain.keys, plain.values
    if concat and last:
        want = torch.cat([values[:, c] for c in range(C)], -1)
    elif concat:
        want = torch.cat([values[:, c].movedim(-1, 1 + t) for c in range(C)], 1 + t)
    else:
        want = values if last else values.movedim(-1, 2 + t)
    out = model(x)
    assert torch.equal(out.values, want)
    assert torch.equal(out.keys, keys if last else keys.movedim(-1, 2 + t))
    assert torch.equal(out.indices, plain.indices)
    assert torch.equal(out.distances, plain.distances)
    assert out.values.is_contiguous()
    assert out.keys.is_contiguous()
    ranks = (2,) if t else ()
    sizes = (*ranks, *((*shape, C * V) if last else (C * V, *shape)))
    if not concat:
        sizes = (C, *ranks, *((*shape, V) if last else (V, *shape)))
    assert out.values.shape == (2, *sizes)
    values_only = build(Recorder(last), **options).eval()
    values_only.load_state_dict(model.state_dict())
    assert torch.equal(values_only(x), out.values)


def test_an_empty_batch():
    model = build(Recorder(False), encoder_is_channel_last=False, concat_values_from_all_codebooks=True).freeze_keys()
    out = model(torch.randn(0, 4, 5, 6))
    assert out.shape == (0, C * V, 4, 5)
    out.sum().backward()
    assert not model.bottleneck.values.grad.any()


def test_heads_are_what_the_keys_see():
    model = build(Recorder(False), encoder_is_channel_last=False)
    x = torch.randn(2, 4, 5, 6)
    features = model.encoder.linear(x)
    assert torch.equal(model.forward_encoder(x), features)
    torch.testing.assert_close(model.forward_splitter(x), model.splitter(features))
    assert model.forward_splitter(x).shape == (2, C, 4, 5, D)


def test_heads_of_a_subclass_are_what_the_keys_see():
    class Scaled(kvb.BottleneckedEncoder):
        def forward_splitter(self, x):
            return super().forward_splitter(x) * 3

    model, x = build(Recorder(False), encoder_is_channel_last=False).freeze_keys(), torch.randn(2, 4, 5, 6)
    heads = model.forward_splitter(x) * 3
    model.__class__ = Scaled
    assert torch.equal(model.encode(x), model.bottleneck.encode(heads))
    assert torch.equal(model(x), model.decode(model.bottleneck.encode(heads)))


def test_voting_on_a_channel_first_map():
    model = build(Recorder(False), encoder_is_channel_last=False).freeze_keys()
    logits = nn.Sequential(model, CodebookVoting(V, channel_last=False))(torch.randn(2, 4, 5, 6))
    assert logits.shape == (2, V)


# --- modes ------------------------------------------------------------------------------------------------------------


def test_prepare_leaves_values_alone_to_learn():
    data = [(torch.randn(40, 6), torch.zeros(40)) for _ in range(3)]
    model = build(init_mode="kmeans", threshold_ema_dead_code=0.1)
    steps = copy.deepcopy(model)
    values = model.bottleneck.values.clone()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    torch.manual_seed(1)
    assert model.prepare(data, 2, generator=generators[0], progress=False) is model
    torch.manual_seed(1)
    steps.freeze_encoder().freeze_splitter()
    steps.initialize_keys(data, epochs=2, generator=generators[1], progress=False).freeze_keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, steps.state_dict()[name]), name
    assert torch.equal(model.bottleneck.values, values)
    assert model.key_report.rows == 120
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["bottleneck.values"]

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, _ in data:
        model(inputs).square().sum().backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"bottleneck.values", "bottleneck.cluster_size_counter"}


def test_the_encoder_stays_in_eval_mode():
    encoder = nn.Sequential(nn.Linear(6, CHANNELS), nn.BatchNorm1d(CHANNELS), nn.Dropout(0.5))
    model = build(encoder).train()
    assert model.bottleneck.training
    assert not any(part.training for part in encoder.modules())
    model(torch.randn(9, 6))
    assert encoder[1].num_batches_tracked == 0
    nn.Sequential(model, nn.ReLU()).train()
    assert not encoder.training
    encoder.train()  # whoever wants it can have it
    model(torch.randn(9, 6))
    assert encoder[1].num_batches_tracked == 1


def test_no_graph_where_no_gradient_could_go():
    model = build().freeze_keys()
    heads = []
    model.bottleneck.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    x = torch.randn(5, 6, requires_grad=True)
    model(x).sum().backward()
    assert not heads[0].requires_grad
    assert x.grad is None


@pytest.mark.parametrize("frozen_encoder", [False, True])
@pytest.mark.parametrize("frozen_splitter", [False, True])
def test_distances_reach_what_is_not_frozen(frozen_encoder, frozen_splitter):
    """Published: a learned projection behind a frozen encoder fails in backward."""
    model = build(return_values_only=False, splitting_mode="learned_projection").freeze_keys()
    if frozen_encoder:
        model.freeze_encoder()
    if frozen_splitter:
        model.freeze_splitter()
    output = model(torch.randn(9, 6))
    (output.distances.sum() + output.values.sum()).backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    want = {"bottleneck.values"}
    if not frozen_splitter:  # a frozen one also cuts off the encoder, as published
        want |= {"splitter.proj.weight"} | (
            set() if frozen_encoder else {"encoder.linear.weight", "encoder.linear.bias"}
        )
    assert learns == want
    model.unfreeze_encoder().unfreeze_splitter()
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(9, 6)).distances.sum().backward()
    assert model.encoder.linear.weight.grad.any()


@pytest.mark.parametrize("mode", kvb.splitters.MODES)
def test_an_encoder_in_inference_mode(mode):
    encoder = Recorder()
    encoder.forward = torch.inference_mode()(encoder.forward)
    model = build(encoder, splitting_mode=mode, return_values_only=False, threshold_ema_dead_code=0.5)
    for _ in range(2):
        output = model(torch.randn(9, 6))
        (output.values.sum() + output.distances.sum()).backward()
        assert model.bottleneck.values.grad.any()
        model.freeze_keys()
    learned = getattr(model.splitter, "proj", None)
    assert learned is None or learned.weight.grad.any()
    with torch.inference_mode():
        assert not model(torch.randn(9, 6)).values.requires_grad


def test_every_mode_of_the_bottleneck_is_at_hand():
    model = build().freeze_keys()
    assert model.fraction_of_unused_keys() == 1
    model(torch.randn(50, 6))
    assert model.fraction_of_unused_keys() < 1
    torch.testing.assert_close(model.usage().sum(-1), torch.ones(C))
    assert (model.perplexity() > 1).all()
    assert model.deactivate_counts() is model
    assert not model.bottleneck.count_cluster_size
    assert model.activate_counts().bottleneck.count_cluster_size
    assert model.reset_cluster_size_counter().fraction_of_unused_keys() == 1
    assert model.enable_update_keys().bottleneck.update_keys
    assert not model.disable_update_keys().bottleneck.update_keys
    assert model.unfreeze_keys().bottleneck.update_keys
    mask = torch.zeros(C, K, dtype=torch.bool)
    mask[:, 3] = True
    out = build(return_values_only=False).mask_pairs(mask)(torch.randn(5, 6))
    assert (out.indices == 3).all()


def test_counts_are_not_taken_in_eval_mode():
    model = build().freeze_keys().eval()
    model(torch.randn(50, 6))
    assert model.fraction_of_unused_keys() == 1


# --- initialising the keys --------------------------------------------------------------------------------------------


class Loader:
    """Counts how often it is read."""

    def __init__(self, items):
        self.items, self.passes = items, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.items)


@pytest.mark.parametrize(
    ("mode", "epochs", "passes"),
    [
        ("random", 0, 0),
        ("random", 2, 2),
        ("kmeans", 0, 1),
        ("kmeans++", 0, 1),
        ("kmeans", 3, 4),
        ("sample", 0, 2),
    ],
)
def test_passes_over_the_data(mode, epochs, passes):
    loader = Loader([torch.randn(30, 6) for _ in range(4)])
    model = build(init_mode=mode).initialize_keys(loader, epochs=epochs, progress=False)
    assert loader.passes == passes
    assert model.encoder.calls == 4 * passes
    assert model.bottleneck.initted.item() == 1
    assert (model.key_report is None) == (passes == 0)


def test_kmeans_takes_a_sample_of_all_data():
    loader = Loader([torch.randn(2 * K, 4, 6) for _ in range(100)])  # 64 rows an item; 64*K are needed
    model = build(init_mode="kmeans").initialize_keys(loader, epochs=0, progress=False)
    assert model.encoder.calls == 100
    assert model.key_report.rows == 64 * K


def test_kmeans_keys_are_means_of_the_heads():
    centres = 10 * torch.randn(K, 6)
    data = (centres[torch.randint(K, (600,))] + 0.01 * torch.randn(600, 6)).split(100)
    model = build(init_mode="kmeans++", splitting_mode="chunk")
    model.prepare(data, epochs=0, progress=False)
    want = model.forward_splitter(centres).transpose(0, 1)
    assert torch.cdist(want, model.bottleneck.keys).amin(-1).max() < 0.05
    torch.testing.assert_close(model.bottleneck.keys_avg, model.bottleneck.keys)


def test_keys_keep_learning_after_kmeans():
    data = torch.randn(300, 6)
    model = build(init_mode="kmeans")
    generator = torch.Generator().manual_seed(0)
    model.initialize_keys(data, epochs=0, generator=generator, progress=False)
    first = model.bottleneck.keys.clone()
    again = copy.deepcopy(model)
    again.initialize_keys(data, epochs=2, generator=torch.Generator().manual_seed(0), progress=False)
    assert (again.bottleneck.keys - first).abs().max() > 1e-4
    assert (again.bottleneck.keys - first).abs().max() < 1  # moved, not drawn again
    assert again.key_report.method == "kmeans"


def test_a_tensor_and_a_generator_of_batches_do():
    data = torch.randn(600, 6)
    batches = data.split(256)
    tensors, iterator = (
        build(Recorder(), init_mode="kmeans").initialize_keys(source, 0, generator=torch.Generator(), progress=False)
        for source in (data, iter(batches))
    )
    assert tensors.encoder.calls == iterator.encoder.calls == 3
    with pytest.raises(ValueError, match="can be iterated only once, but 2 passes are needed"):
        build(init_mode="kmeans").initialize_keys(iter(batches), 1)
    with pytest.raises(ValueError, match="can be iterated only once"):
        build().initialize_keys(iter(batches), 2)


def test_inputs_are_extracted():
    data = [{"pixels": torch.randn(30, 6), "label": 3}]
    model = build(init_mode="kmeans").initialize_keys(
        data, epochs=1, inputs_extractor=lambda item: item["pixels"], progress=False
    )
    assert model.key_report.rows == 30


def test_frozen_keys_and_no_data_are_refused():
    with pytest.raises(RuntimeError, match="keys are frozen"):
        build().freeze_keys().initialize_keys([torch.randn(3, 6)])
    for mode in ("random", "kmeans"):
        model = build(init_mode=mode)
        with pytest.raises(ValueError, match="epochs must be an integer >= 0, got -1"):
            model.initialize_keys([torch.randn(3, 6)], -1)
        assert model.encoder.calls == 0
    with pytest.raises(ValueError, match="data yielded no rows"):
        build(init_mode="kmeans").initialize_keys([], 0)
    with pytest.raises(RuntimeError, match="keys are not initialised"):
        build(init_mode="kmeans").freeze_keys()
    with pytest.raises(RuntimeError, match="keys are not initialised"):
        build(init_mode="kmeans").eval()(torch.randn(3, 6))


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_and_load_leave_the_encoder_out(tmp_path):
    model = build(init_mode="kmeans").prepare([torch.randn(99, 6)], progress=False)
    model.save(tmp_path / "keys.pt")
    other = build(init_mode="kmeans")
    encoder = copy.deepcopy(other.encoder.state_dict())
    assert other.load(tmp_path / "keys.pt") is other
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(other.state_dict()[name], encoder[name.removeprefix("encoder.")])
        else:
            assert torch.equal(other.state_dict()[name], tensor), name
    assert not other.bottleneck.update_keys


def test_files_of_the_published_class_load(tmp_path):
    model, other = build(), build()
    published = model.bottleneck.state_dict()
    del published["kvb_flags"], published["kvb_mask"]
    torch.save({"bottleneck": published, "splitter": model.splitter.state_dict()}, tmp_path / "published.pt")
    other.load(tmp_path / "published.pt")
    assert torch.equal(other.bottleneck.keys, model.bottleneck.keys)
    assert torch.equal(other.splitter.rand_proj, model.splitter.rand_proj)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    model, wider = build(), build(dim_values=V + 1)
    wider.save(tmp_path / "wider.pt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kvb.CheckpointError, match=r"bottleneck\.values"):
        model.load(tmp_path / "wider.pt")
    content = (tmp_path / "wider.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(kvb.CheckpointError):
        model.load(tmp_path / "cut.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_whole_module_can_be_pickled_to_a_file(tmp_path):
    model = build().freeze_keys()
    model.save_model(tmp_path / "model.pt")
    x = torch.randn(4, 6)
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))
