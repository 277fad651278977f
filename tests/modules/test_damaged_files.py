"""Files that are bent at random: a typed error and everything as it was, or exactly what was saved."""

from __future__ import annotations

import collections
import io
import pickle
import random
import zipfile

import pytest
import torch
from saved_models import safetensors, snapshot, with_safetensors
from torch import nn

import kvb
from kvb import CheckpointError, CodeDataset, KeyValueBottleneck

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about what it finds

KINDS = ["kvb.pt", "plain.pt", *(pytest.param(f"{k}.safetensors", marks=with_safetensors) for k in ("kvb", "plain"))]
ROUNDS = [300, pytest.param(10_000, marks=pytest.mark.slow)]


def cut(data, other, chance):
    return data[: chance.randrange(len(data))]


def longer(data, other, chance):
    return data + chance.randbytes(chance.randint(1, 200))


def flipped(data, other, chance):
    """One to three bits, half of the time among the first or last bytes, where formats keep what they are."""
    bent = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        edge = chance.randrange(min(len(bent), 200))
        place = chance.choice((edge, len(bent) - 1 - edge, *[chance.randrange(len(bent))] * 2))
        bent[place] ^= 1 << chance.randrange(8)
    return bytes(bent)


def noisy(data, other, chance):
    bent, start = bytearray(data), chance.randrange(len(data))
    bent[start : start + 64] = chance.randbytes(len(bent[start : start + 64]))
    return bytes(bent)


def swapped(data, other, chance):
    """The beginning of one file with the end of another."""
    first, second = chance.sample((data, other), 2)
    place = chance.choice((8, 64, 128, 256, chance.randrange(len(data))))
    return first[:place] + second[place:]


def moved(data, other, chance):
    """Two parts in each other's place."""
    size = chance.choice((1, 8, 64, 200))
    a, b = sorted(chance.randrange(len(data)) for _ in "ab")
    if b - a < size:
        return cut(data, other, chance)
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


BENDS = (cut, longer, flipped, flipped, noisy, swapped, moved)


def make():
    return nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), KeyValueBottleneck(2, 9, 3, 4))


def same(state, other):
    """NaN equals NaN."""
    return state.keys() == other.keys() and all(
        torch.equal(value.view(torch.uint8), other[name].view(torch.uint8)) for name, value in state.items()
    )


def written(module, path):
    if path.name.startswith("kvb"):
        kvb.save(module, path)
    elif path.suffix == ".pt":
        torch.save(module.state_dict(), path)
    else:
        safetensors.save_file(module.state_dict(), path)
    return path.read_bytes()


def outcome(target, path, before, sources):
    """What loading came to, and that it is one of the two allowed: an error, or the state of a source if there are."""
    try:
        kvb.load(target, path)
    except CheckpointError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert len(str(refused)) < 3000
        assert same(snapshot(target), before)
        return "refused"
    found = snapshot(target)
    assert found.keys() == before.keys()
    assert sources is None or any(same(found, source) for source in sources)
    target.load_state_dict(before)
    return "loaded"


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("kind", KINDS)
def test_bent_checkpoints(kind, rounds, tmp_path):
    first, second, target, path = make(), make(), make(), tmp_path / kind
    second[-1].freeze_keys()
    before, sources = snapshot(target), (snapshot(first), snapshot(second))
    one, two = written(first, path), written(second, path)
    chance, found = random.Random(rounds), collections.Counter()
    for _ in range(rounds):
        path.write_bytes(chance.choice(BENDS)(one, two, chance))
        # Plain safetensors have no checksum: numbers may be wrong, but nothing else.
        found[outcome(target, path, before, None if kind == "plain.safetensors" else sources)] += 1
    assert found["refused"] > 0.5 * rounds
    path.write_bytes(one)
    assert outcome(target, path, before, sources) == "loaded"


# --- pickles that mean harm -------------------------------------------------------------------------------------------


OPCODES = [bytes([code]) for code in range(256)]


def mangled(source, chance):
    """A torch file whose pickle was rewritten by somebody who corrects the checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as archive, zipfile.ZipFile(out, "w") as copy:
        for name in archive.namelist():
            data = archive.read(name)
            if name.endswith("data.pkl"):
                data = bytearray(data)
                for _ in range(chance.randint(1, 4)):
                    place = chance.randrange(len(data))
                    kind = chance.randrange(4)
                    if kind == 0:
                        data[place : place + 1] = chance.choice(OPCODES)
                    elif kind == 1:
                        del data[place : place + chance.randint(1, 9)]
                    elif kind == 2:
                        data[place:place] = chance.choice((b"cos\nsystem\n", b"R", b"\x85R", b"}", b"N", b"2", b"b"))
                    else:
                        data[place:place] = pickle.dumps(chance.choice((1 << 40, -1, "x" * 99, None, [1], {})))[2:-1]
                data = bytes(data)
            copy.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("kind", ["kvb.pt", "plain.pt"])
def test_rewritten_pickles(kind, rounds, tmp_path, monkeypatch):
    monkeypatch.setattr("os.system", lambda command: pytest.fail("code of a file ran"))
    source, target, path = make(), make(), tmp_path / kind
    before, data = snapshot(target), written(source, path)
    chance, refused = random.Random(rounds), 0
    for _ in range(rounds):
        path.write_bytes(mangled(data, chance))
        # What loads is a valid file of other numbers, if the file has no checksum of its own.
        refused += outcome(target, path, before, None if kind == "plain.pt" else (snapshot(source),)) == "refused"
    assert refused > 0.5 * rounds


# --- codes ------------------------------------------------------------------------------------------------------------


def code_files(tmp_path):
    """Two files of codes, one with labels."""
    module = KeyValueBottleneck(3, 11, 5, 4).freeze_keys()
    for name, data in (("one", torch.randn(9, 3, 5)), ("two", [(torch.randn(6, 3, 2, 5), torch.arange(6.0))])):
        module.encode_dataset(data, out=tmp_path / name, progress=False)
        yield (tmp_path / name).read_bytes()


@pytest.mark.parametrize("rounds", ROUNDS)
def test_bent_code_files(rounds, tmp_path):
    """What opens is what its bytes say: as many as its shapes ask for, and headers that are whole."""
    numpy = pytest.importorskip("numpy")
    one, two = code_files(tmp_path)
    path, chance, messages = tmp_path / "bent", random.Random(rounds), []
    for _ in range(rounds):
        data = chance.choice(BENDS)(*chance.sample((one, two), 2), chance)
        path.write_bytes(data)
        try:
            dataset = CodeDataset.open(path)
        except ValueError as error:
            messages.append(str(error))
            continue
        with path.open("rb") as file:
            assert numpy.load(file).tolist() == dataset.codes.tolist()
            if dataset.labels is not None:
                assert numpy.array_equal(numpy.load(file), dataset.labels.numpy(), equal_nan=True)
            assert not file.read()
        assert dataset.labels is None or len(dataset.labels) == len(dataset)
    assert all(message.startswith("expected a .npy file of int16, int32 or int64 codes in ") for message in messages)
    assert max(map(len, messages)) < 1000
    assert 0.4 * rounds < len(messages) < 0.95 * rounds  # bits of the numbers themselves have no checksum
