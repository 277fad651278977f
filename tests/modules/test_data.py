"""Codes of whole data sets: every source and storage, files that can be trusted, the way back to values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kvb import BottleneckedEncoder, CodeDataset, DiscreteKeyValueBottleneck, KeyValueBottleneck, bars, unlearning
from kvb.modules import samples


@pytest.fixture
def module():
    return KeyValueBottleneck(3, 11, 5, 4).freeze_keys()


@pytest.mark.parametrize("shape", [(), (2, 3)])
@pytest.mark.parametrize(("K", "dtype"), [(1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)])
def test_a_tensor_becomes_the_smallest_codes_that_hold_it(shape, K, dtype):
    module = KeyValueBottleneck(2, K, 3, 1).freeze_keys()
    x = torch.randn(7, 2, *shape, 3)
    found = module.encode_dataset(x, progress=False)
    assert found.codes.dtype == dtype
    assert found.labels is None
    assert torch.equal(found.codes.long(), module.encode(x))
    assert torch.equal(found[3], found.codes[3])


def test_a_large_tensor_is_read_in_batches(module, monkeypatch):
    monkeypatch.setattr(samples, "BATCH", 4 * 15)
    x, sizes, encode = torch.randn(10, 3, 5), [], module.encode
    monkeypatch.setattr(module, "encode", lambda part, **given: sizes.append(len(part)) or encode(part, **given))
    assert torch.equal(module.encode_dataset(x, progress=False).codes.long(), encode(x))
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("out", [None, "codes.npy"])
@pytest.mark.parametrize("dtype", ["auto", torch.int16, torch.int32, torch.int64])
def test_a_loader_is_streamed_with_its_labels(module, tmp_path, out, dtype):
    x, y = torch.randn(23, 3, 5), torch.randint(9, (23,))
    path = out and tmp_path / out
    found = module.encode_dataset(DataLoader(TensorDataset(x, y), batch_size=5), dtype=dtype, out=path, progress=False)
    assert found.codes.dtype == (torch.int16 if dtype == "auto" else dtype)
    assert torch.equal(found.codes.long(), module.encode(x))
    assert torch.equal(found.labels, y)
    assert len(found) == 23
    if path:
        again = CodeDataset.open(path)
        assert torch.equal(again.codes, found.codes)
        assert torch.equal(again.labels, y)
        assert [file.name for file in tmp_path.iterdir()] == ["codes.npy"]


def test_one_pass_of_an_iterator_is_enough_and_an_extractor_finds_the_inputs(module):
    x, y = torch.randn(6, 3, 5), torch.arange(6)
    items = ({"x": part} for part in x.split(4))
    assert torch.equal(
        module.encode_dataset(items, inputs_extractor=lambda item: item["x"], progress=False).codes.long(),
        module.encode(x),
    )
    swapped = [(y, x)]
    found = module.encode_dataset(swapped, inputs_extractor=lambda item: item[1], progress=False)
    assert torch.equal(found.codes.long(), module.encode(x))
    assert torch.equal(found.labels, y)


def test_encoding_changes_nothing_in_training_mode(module):
    before = {name: value.clone() for name, value in module.train().state_dict().items()}
    module.encode_dataset(torch.randn(50, 3, 5), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_data_that_cannot_be_encoded_is_refused(module):
    with pytest.raises(TypeError, match="data must be a Tensor or an iterable of batches, not int"):
        module.encode_dataset(3, progress=False)
    with pytest.raises(ValueError, match="data yielded no samples"):
        module.encode_dataset([], progress=False)
    with pytest.raises(ValueError, match=r"codes of one shape for all samples, \(3, 2\), got \(3, 4\)"):
        module.encode_dataset([torch.randn(1, 3, 2, 5), torch.randn(1, 3, 4, 5)], progress=False)
    with pytest.raises(ValueError, match="labels in all items of data or in none"):
        module.encode_dataset([torch.randn(1, 3, 5), (torch.randn(1, 3, 5), torch.zeros(1))], progress=False)
    with pytest.raises(ValueError, match="dtype must be"):
        module.encode_dataset(torch.randn(1, 3, 5), dtype=torch.uint8, progress=False)


# --- the data set -----------------------------------------------------------------------------------------------------


def test_batches_visit_every_sample_once_in_an_order_that_can_be_repeated():
    codes, labels = torch.arange(20).view(10, 2), torch.arange(10)
    found = CodeDataset(codes, labels)
    passes = [list(found.batches(4, generator=torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    orders = [torch.cat([y for _, y in one]).tolist() for one in passes]
    assert [len(y) for _, y in passes[0]] == [4, 4, 2]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert all(torch.equal(x, codes[y]) for one in passes for x, y in one)
    assert [y.tolist() for _, y in found.batches(4, shuffle=False, drop_last=True)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [x.tolist() for x in CodeDataset(codes[:3]).batches(2, shuffle=False)] == [[[0, 1], [2, 3]], [[4, 5]]]
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        found.batches(0)


def test_a_data_loader_takes_it():
    found = CodeDataset(torch.arange(12).view(6, 2), torch.arange(6))
    assert [(x.tolist(), y.tolist()) for x, y in DataLoader(found, batch_size=3)] == [
        ([[0, 1], [2, 3], [4, 5]], [0, 1, 2]),
        ([[6, 7], [8, 9], [10, 11]], [3, 4, 5]),
    ]
    assert [x.tolist() for x in DataLoader(CodeDataset(found.codes), batch_size=4)][1] == [[8, 9], [10, 11]]


def test_codes_and_labels_must_fit():
    with pytest.raises(TypeError, match="expected integer codes, got torch.float32"):
        CodeDataset(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"codes of shape \(N, C, \*shape\), got \(3,\)"):
        CodeDataset(torch.zeros(3, dtype=torch.int16))
    with pytest.raises(ValueError, match="one for each of the 2 samples in codes, got \\(3,\\)"):
        CodeDataset(torch.zeros(2, 3, dtype=torch.int16), torch.zeros(3))


# --- the way back -----------------------------------------------------------------------------------------------------


def test_decoded_codes_are_the_forward_with_its_gradients(module):
    x = torch.randn(8, 3, 2, 5)
    codes = module.encode_dataset(x, progress=False).codes
    for pool in ("none", "mean", "sum"):
        want, got = module(x, pool=pool), module.decode(codes, pool)
        assert torch.equal(got, want)
        weight = torch.randn_like(want)
        grads = [torch.autograd.grad((out * weight).sum(), module.values)[0] for out in (want, got)]
        assert torch.equal(*grads)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("topk", [1, 2])
def test_an_encoder_does_the_same_from_raw_inputs(last, concat, topk, tmp_path):
    network = nn.Conv2d(3, 6, 2, stride=2)
    if last:
        network = nn.Sequential(network, nn.Flatten(2), _Transposed())
    model = BottleneckedEncoder(
        network, 6, 3, 9, 4, 5, encoder_is_channel_last=last, concat_values_from_all_codebooks=concat, topk=topk
    )
    images, labels = torch.randn(10, 3, 4, 4), torch.arange(10)
    model.prepare(images, progress=False)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    found = model.encode_dataset(loader, out=tmp_path / "codes", progress=False)
    assert torch.equal(found.labels, labels)
    assert found.codes.dtype == torch.int16
    assert torch.equal(found.codes, model.encode_dataset(images, progress=False).codes)
    assert torch.equal(found.codes.long(), model.encode(images))
    want, got = model(images), model.decode(found.codes)
    assert torch.equal(got, want)
    assert got.is_contiguous()
    (grad,) = torch.autograd.grad(got.square().sum(), model.bottleneck.values)
    assert torch.equal(grad, torch.autograd.grad(want.square().sum(), model.bottleneck.values)[0])
    if topk == 1:
        pooled = model.decode(found.codes, "mean")
        assert pooled.shape == ((10, 4, 5) if last else (10, 5, 2, 2))
        each = model.bottleneck.decode(found.codes).mean(1)
        torch.testing.assert_close(pooled, each if last else each.movedim(-1, 1), rtol=1e-6, atol=1e-6)


class _Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_discrete_does_the_same_from_embeddings():
    memory = DiscreteKeyValueBottleneck(dim=6, num_memories=9, num_memory_codebooks=2).freeze_keys()
    x, y = torch.randn(12, 3, 6), torch.arange(12)
    found = memory.encode_dataset([(x[:7], y[:7]), (x[7:], y[7:])], progress=False)
    assert torch.equal(found.codes.long(), memory.encode(x))
    assert torch.equal(found.labels, y)
    assert torch.equal(memory.bottleneck.decode(found.codes, "mean"), memory(x))
    assert torch.equal(memory.encode_dataset(x, progress=False).codes, found.codes)


def test_the_progress_bar_can_be_silenced(module, capsys, monkeypatch):
    monkeypatch.setattr(bars, "PATIENCE", 0.0)
    module.encode_dataset([torch.randn(2, 3, 5)], progress=False)
    assert capsys.readouterr().err == ""
    module.encode_dataset([torch.randn(2, 3, 5)])
    assert "encoding" in capsys.readouterr().err


# --- dtypes that cannot be computed with ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits_are_refused_with_what_to_do(module, dtype):
    x = torch.rand(6, 3, 5).to(dtype)
    for call in (
        module,
        module.encode,
        lambda x: module.encode_dataset(x, progress=False),
        lambda x: module.unfreeze_keys().init_keys(x, progress=False),
    ):
        with pytest.raises(TypeError, match=r"expected a floating-point x, got torch.float8.*; call x.float\(\) first"):
            call(x)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_codes_are_refused_with_what_to_do(module, dtype):
    codes = torch.zeros(6, 3, dtype=dtype)
    for call in (module.decode, CodeDataset, lambda codes: unlearning.hits(module, codes)):
        with pytest.raises(TypeError, match=r"cannot compute with torch.uint.*; call .*.long\(\) first"):
            call(codes)
