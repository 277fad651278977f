"""``encode_dataset`` and ``init_keys`` of every module on items of every kind, and with any default device."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import kvb
from kvb import BottleneckedEncoder, DiscreteKeyValueBottleneck, KeyValueBottleneck, unlearning


class Words(nn.Module):
    """Takes what a tokenizer gives, by name, and no labels."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)

    def forward(self, input_ids, token_type_ids=None):
        return self.table(input_ids)


def encoder():
    return BottleneckedEncoder(Words(), 6, 3, 9, 4, 5).freeze_encoder()


IDS, Y = torch.randint(20, (12, 7)), torch.randint(4, (12,))
NAMES = ("labels", "label", "targets", "y")


@pytest.mark.parametrize("name", NAMES)
def test_a_loader_of_hugging_face(name):
    rows = [{"input_ids": ids, name: int(y)} for ids, y in zip(IDS, Y, strict=True)]
    model, loader = encoder(), DataLoader(rows, batch_size=5)
    torch.manual_seed(1)
    report = model.init_keys(loader, "kmeans", progress=False)
    assert report.rows == IDS.numel()
    found = model.freeze_keys().encode_dataset(loader, progress=False)
    assert torch.equal(found.codes.long(), model.encode({"input_ids": IDS}))
    assert torch.equal(found.labels, Y)
    batch = [collections.UserDict({"input_ids": IDS, "token_type_ids": IDS, name: Y.tolist()})]
    assert torch.equal(model.encode_dataset(batch, progress=False).labels, Y)
    assert model.encode_dataset(loader, labels=False, progress=False).labels is None
    shifted = model.encode_dataset(loader, labels_extractor=lambda item: item[name] + 1, progress=False)
    assert torch.equal(shifted.labels, Y + 1)


@pytest.mark.parametrize("kind", ["bottleneck", "encoder", "discrete"])
@pytest.mark.parametrize("out", [None, "codes.npy"])
def test_every_module_takes_labels_from_where_they_are(kind, out, tmp_path):
    model, x = {
        "bottleneck": lambda: (KeyValueBottleneck(3, 9, 4, 5), torch.randn(12, 3, 4)),
        "encoder": lambda: (encoder(), IDS),
        "discrete": lambda: (DiscreteKeyValueBottleneck(dim=6, num_memories=9), torch.randn(12, 2, 6)),
    }[kind]()
    model.freeze_keys()
    out = out and tmp_path / out
    triple = [(torch.arange(12), x, Y)]
    options = {"inputs_extractor": lambda item: item[1], "out": out, "progress": False}
    with pytest.raises(ValueError, match="which element of an item holds the labels"):
        model.encode_dataset(triple, **options)
    found = model.encode_dataset(triple, labels_extractor=lambda item: item[2], **options)
    assert torch.equal(found.labels, Y)
    assert torch.equal(found.codes.long(), model.encode(x))
    assert model.encode_dataset(triple, labels=False, **options).labels is None
    assert torch.equal(model.encode_dataset([(x, Y.numpy())], out=out, progress=False).labels, Y)


def test_a_default_device_other_than_that_of_a_masked_module(tmp_path):
    module = KeyValueBottleneck(3, 11, 5, 4).freeze_keys()
    mask = torch.rand(3, 11) < 0.6
    mask[:, 0] = True
    module.mask_pairs(mask)
    twin, x = KeyValueBottleneck(3, 11, 5, 4), torch.randn(20, 3, 5)
    want = module.encode(x)
    with torch.device("meta"):
        state = module.state_dict()
        twin.load_state_dict(state)
        kvb.save(module, tmp_path / "file.pt")
        kvb.load(twin, tmp_path / "file.pt")
        found = twin.encode(x)
        cached = twin.encode_dataset(x, progress=False).codes
        values = twin(x)
        unlearning.forget(twin, mask)
    assert twin.pair_mask.device == torch.device("cpu")
    assert torch.equal(found, want)
    assert torch.equal(cached.long(), want)
    assert torch.equal(values, twin.decode(want))


def masked_parts():
    x, mask, labels = torch.randn(6, 2, 7, 3), torch.rand(6, 7) < 0.5, torch.arange(6)
    return KeyValueBottleneck(2, 5, 3, 4).freeze_keys(), x, mask, labels


@pytest.mark.parametrize("order", ["x m", "x m y", "x y m"])
@pytest.mark.parametrize("extracted", [False, True])
def test_a_mask_is_never_the_labels(order, extracted):
    module, x, mask, labels = masked_parts()
    names = order.split()
    parts = {"x": x, "m": mask, "y": labels}
    items = [tuple(parts[name][begin : begin + 4] for name in names) for begin in (0, 4)]
    take = {"mask_extractor": lambda item: item[names.index("m")]}
    if extracted:
        take["inputs_extractor"] = lambda item: item[0]
    data = module.encode_dataset(items, **take, progress=False)
    assert torch.equal(data.mask, mask)
    assert data.labels is None if "y" not in names else torch.equal(data.labels, labels)


def test_a_mask_made_of_an_element_is_not_taken_for_labels():
    module, x, mask, labels = masked_parts()
    attention = mask.long()
    take = {"mask_extractor": lambda item: item[1] == 1, "progress": False}
    for item in ((x, attention), (x, attention, labels)):
        with pytest.raises(ValueError, match="mask_extractor leaves open .* labels_extractor"):
            module.encode_dataset([item], **take)
    data = module.encode_dataset([(x, attention, labels)], labels_extractor=lambda item: item[2], **take)
    assert torch.equal(data.mask, mask)
    assert torch.equal(data.labels, labels)
    data = module.encode_dataset(
        [(x, labels, attention)], mask_extractor=lambda item: item[2] == 1, progress=False
    )  # labels of another shape than the mask
    assert torch.equal(data.labels, labels)
