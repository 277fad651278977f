"""Labels: found in every kind of item, turned into tensors, or an error that says what was found instead."""

from __future__ import annotations

import array
import collections

import numpy
import pytest
import torch

from kvb import KeyValueBottleneck, items
from kvb.data import encode
from kvb.unlearning import class_hits


@pytest.fixture
def module():
    return KeyValueBottleneck(3, 11, 5, 4).freeze_keys()


def encoded(module, data, **options):
    """What ``encode_dataset`` does, with labels as chosen."""
    options = {"out": None, "inputs_extractor": None, **options}

    def search(x, mask):
        return module.encode(x, mask=mask, dtype=torch.int16), mask

    return encode(data, search, cut=lambda x: x.split(4), progress=False, **options)


X, Y = torch.randn(6, 3, 5), torch.tensor([4, 1, 0, 2, 2, 7])
# Labels as loaders give them; each of Y.
KINDS = {
    "tensor": Y,
    "list": Y.tolist(),
    "tuple": tuple(Y.tolist()),
    "numpy": Y.numpy(),
    "read-only numpy": numpy.frombuffer(Y.numpy().tobytes(), dtype=numpy.int64),
    "numpy scalars": list(Y.numpy()),
    "tensors": list(Y),
    "an array": array.array("q", Y.tolist()),
    "mapping": {"ids": "abc", "targets": Y.tolist()},
    "with a gradient": Y.double().requires_grad_().long(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("out", [None, "codes.npy"])
def test_labels_of_every_kind(module, kind, out, tmp_path):
    y, out = KINDS[kind], out and tmp_path / out
    for found in (
        encoded(module, [(X, y)], out=out),
        encoded(module, [[X, y]], out=out),
        encoded(module, [(X, "anything", y)], out=out, labels_extractor=lambda item: item[2]),
    ):
        assert torch.equal(found.labels, Y)
        assert found.labels.dtype == torch.int64
        assert torch.equal(found.codes.long(), module.encode(X))


@pytest.mark.parametrize("name", ["labels", "label", "targets", "y"])
def test_a_mapping_holds_labels_under_known_names(module, name):
    first = collections.UserDict({"x": X[:4], name: Y[:4].tolist()})
    found = encoded(module, [first, {"x": X[4:], name: Y[4:]}], inputs_extractor=lambda item: item["x"])
    assert torch.equal(found.labels, Y)
    assert items.inputs_of({"x": 1, "z": 2, name: 3}) == {"x": 1, "z": 2}
    assert items.inputs_of({"x": 1, name: None}) == {"x": 1, name: None}
    order = dict.fromkeys(items.NAMES, 0) | {name: 5}
    assert items.labels_of(order, None) == (5 if name == "labels" else 0)


def test_an_extractor_of_inputs_never_leaves_them_as_labels(module):
    index = torch.arange(6)
    images = {"inputs_extractor": lambda item: item[1], "out": None}
    with pytest.raises(ValueError, match=r"which element .* got \(tuple of 3: Tensor \(6,\) torch.int64, T"):
        encoded(module, [(index, X, Y)], **images)
    assert encoded(module, [(index, X, Y)], labels=False, **images).labels is None
    assert torch.equal(encoded(module, [(index, X, Y)], labels_extractor=lambda item: item[2], **images).labels, Y)
    assert torch.equal(encoded(module, [(Y, X)], **images).labels, Y)
    flat = X.flatten(1)
    restored = encoded(module, [(flat, Y)], inputs_extractor=lambda item: item[0].view(-1, 3, 5))
    assert torch.equal(restored.labels, Y)
    with pytest.raises(ValueError, match="leaves open which element of an item holds the labels"):
        encoded(module, [(Y, X)], inputs_extractor=lambda item: item[1] * 2)
    both = torch.cat([X.flatten(1), Y[:, None].float()], 1)  # inputs and labels are views of one tensor
    with pytest.raises(ValueError, match="leaves open"):
        encoded(module, [(both[:, :-1], both[:, -1])], inputs_extractor=lambda item: item[0].reshape(-1, 3, 5) + 0)
    assert encoded(module, [(X,)], inputs_extractor=lambda item: item[0] + 0).labels is None


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            ["cat"] * 6,
            TypeError,
            r"got list of 6: str, .* \(.*\); pass labels_extractor=.*, or labels=False",
        ),
        (numpy.array(["cat"] * 6), TypeError, r"got ndarray \(6,\) .*; pass labels_extractor"),
        ([[1], [2, 3], [4], [5], [6], [7]], TypeError, "got list of 6: list of 1, list of 2"),
        (object(), TypeError, "got object"),
        ({"mask": Y, "boxes": Y}, TypeError, "a mapping with 'mask', 'boxes' and none of"),
        (Y.float().to_sparse(), TypeError, "dense labels, got layout torch.sparse_coo"),
        (Y[:5], ValueError, r"labels for each of the 6 samples of an item, got Tensor \(5,\) torch.int64; pass"),
        (3, ValueError, "labels for each of the 6 samples of an item, got int"),
        (torch.zeros(6, 0), ValueError, r"got Tensor \(6, 0\)"),
    ],
)
def test_what_cannot_be_labels_is_named(module, labels, error, message, tmp_path):
    for out in (None, tmp_path / "codes.npy"):
        with pytest.raises(error, match=message):
            encoded(module, [(X, labels)], out=out)
    assert not list(tmp_path.iterdir())
    assert encoded(module, [(X, labels)], labels=False).labels is None


def test_labels_stay_of_one_kind(module):
    halves = X.split(3)
    with pytest.raises(ValueError, match=r"one dtype and shape for all samples, torch.int64 \(\), got torch.float32"):
        encoded(module, [(halves[0], [1, 2, 3]), (halves[1], [1.0, 2, 3])])
    with pytest.raises(ValueError, match=r"torch.int64 \(\), got torch.int64 \(2,\)"):
        encoded(module, [(halves[0], Y[:3]), (halves[1], Y.view(3, 2))])
    for first, second in ((Y[:3], None), (None, Y[:3])):
        read = []
        data = ((half, y) for half, y in zip((*halves, X), (first, second, Y), strict=True) if not read.append(1))
        with pytest.raises(ValueError, match="labels in all items of data or in none"):
            encoded(module, data)
        assert len(read) == 2  # it is said at once
    assert torch.equal(encoded(module, [(X[:1], 3), (X[1:2], torch.tensor(4))]).labels, torch.tensor([3, 4]))
    assert encoded(module, [(X[:0], []), (X, Y)]).labels.dtype == torch.int64


def test_choices_that_contradict_each_other(module):
    with pytest.raises(ValueError, match="labels=False contradicts labels_extractor"):
        encoded(module, [(X, Y)], labels=False, labels_extractor=len)
    with pytest.raises(TypeError, match=r"labels must be True or False, got Tensor \(6,\)"):
        encoded(module, [(X, Y)], labels=Y)


def test_a_file_has_no_name_for_every_dtype(module, tmp_path):
    labels = Y.bfloat16()
    assert encoded(module, [(X, labels)]).labels.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="a .npy file cannot hold labels of torch.bfloat16: convert them first"):
        encoded(module, [(X, labels)], out=tmp_path / "codes.npy")


@pytest.mark.parametrize("kind", KINDS)
def test_hits_of_classes_take_the_same_labels(module, kind):
    want = class_hits(module, [(X, Y)])
    assert torch.equal(class_hits(module, [(X, KINDS[kind])]), want)
    with pytest.raises(TypeError, match="got list of 6: str"):
        class_hits(module, [(X, ["cat"] * 6)])
