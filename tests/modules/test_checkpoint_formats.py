"""The two formats of checkpoints: what others write is read here and the other way round, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from saved_models import FORMATS, safetensors, with_safetensors
from torch import nn

import kvb
from benchmarks import memory
from kvb import CheckpointError, checkpoints, safetensors_format

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64]
DTYPES += [torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32]
DTYPES += [torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@with_safetensors
def test_safetensors_of_every_dtype(dtype, tmp_path):
    """What the library writes is read here, and what is written here the library reads."""
    module = nn.Module()
    for name, shape in {"b": (3, 5), "none": (0, 3), "a": (), "c": (1, 2, 1)}.items():
        module.register_buffer(name, (torch.rand(shape) * 90).to(dtype))
    module.register_buffer("turned", (torch.rand(3, 5) * 90).to(dtype).T)
    kvb.save(module, tmp_path / "ours.safetensors")
    whole = {name: value.contiguous() for name, value in module.state_dict().items()}
    safetensors.save_file(whole, tmp_path / "theirs.safetensors", {"format": "pt"})
    for found in (
        safetensors.load_file(tmp_path / "ours.safetensors"),
        checkpoints.read_state(tmp_path / "theirs.safetensors"),
        checkpoints.read_state(tmp_path / "ours.safetensors"),
    ):
        assert found.keys() == whole.keys()
        assert all(value.dtype == dtype and torch.equal(value, whole[name]) for name, value in found.items())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128], ids=str)
def test_torch_files_of_every_dtype(dtype, tmp_path):
    """``torch.load`` reads what is written here, mapped too, and what ``torch.save`` writes is read here."""
    module = nn.Module()
    for name, shape in {"b": (3, 5), "none": (0, 3), "a": (), "c": (1, 2, 1)}.items():
        module.register_buffer(name, (torch.rand(shape) * 90).to(dtype))
    module.register_buffer("turned", (torch.rand(3, 5) * 90).to(dtype).T)
    state, (ours, theirs) = module.state_dict(), (tmp_path / "ours.pt", tmp_path / "theirs.pt")
    kvb.save(module, ours)
    torch.save({**state, "part": state["b"][1:]}, theirs)
    read = checkpoints.read_state(theirs)
    assert torch.equal(read.pop("part"), state["b"][1:])
    for found in (
        torch.load(ours, weights_only=True)["state_dict"],
        torch.load(ours, weights_only=True, mmap=True)["state_dict"],
        checkpoints.read_state(ours),
        read,
    ):
        assert list(found) == list(state)
        assert all(value.dtype == dtype and torch.equal(value, state[name]) for name, value in found.items())
    mapped = torch.load(ours, weights_only=True, mmap=True)["state_dict"]
    assert all(value.data_ptr() % 64 == 0 for value in mapped.values() if value.numel())


def test_a_file_of_another_byte_order(tmp_path):
    value = torch.arange(5, dtype=torch.int32)
    with zipfile.ZipFile(tmp_path / "theirs", "w") as out:
        torch.save({"a": value}, tmp_path / "plain")
        with zipfile.ZipFile(tmp_path / "plain") as plain:
            for name in plain.namelist():
                data = plain.read(name)
                other = b"big" if sys.byteorder == "little" else b"little"
                data = other if name.endswith("byteorder") else data
                out.writestr(name, value.numpy().byteswap().tobytes() if "/data/" in name else data)
    assert torch.equal(torch.load(tmp_path / "theirs", weights_only=True)["a"], value)
    assert torch.equal(checkpoints.read_state(tmp_path / "theirs")["a"], value)


PEAK = """if True:
    import os, sys, torch, kvb
    from benchmarks import memory

    action, folder, name, hooked = sys.argv[1:]
    act, path = {"save": kvb.save, "load": kvb.load}[action], os.path.join(folder, name)
    module = torch.nn.Sequential(torch.nn.Linear(7, 5), kvb.KeyValueBottleneck(1, 1 << 17, 20, 80))
    small = kvb.KeyValueBottleneck(1, 4, 14, 10)
    for each in (small, module):
        if hooked:
            each.register_load_state_dict_post_hook(lambda *others: None)
        kvb.save(each, path)
        if each is small:  # starts threads and loads code
            kvb.load(each, path)
    size = sum(value.nbytes for value in module.state_dict().values())
    print(memory.peak(lambda: act(module, path))[1] / size)
"""


# Beyond the module, in parts of the state. Code that nobody here knows gets copies of its own, and the old content is
# kept meanwhile.
MOST = {("save", ""): 0.1, ("load", ""): 1.15, ("load", "hooked"): 2.15}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux with glibc")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("action", "hooked"), [pytest.param(*which, marks=[pytest.mark.slow] if which[1] else []) for which in MOST]
)
def test_peak_memory(action, hooked, name, tmp_path):
    """Of a state of 63 MB."""
    command = [sys.executable, "-c", PEAK, action, tmp_path, name, hooked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=memory.ROOT)
    print(f"\n{action} {name} {hooked}: {done.stdout.strip()} of the state")
    assert float(done.stdout or "inf") <= MOST[action, hooked], done.stderr


def claiming(path, count, size):
    """A file in which ``weight`` is ``size`` elements of a storage that is said to have ``count``, where 36 are."""
    value = torch.arange(36.0).view(6, 6)
    torch.save({"weight": value, "bias": torch.zeros(6)}, path / "plain")
    with zipfile.ZipFile(path / "plain") as plain, zipfile.ZipFile(path / "file", "w") as out:
        for name in plain.namelist():
            data = plain.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"K$") == 1
                data = data.replace(b"K$", b"J" + count.to_bytes(4, "little")).replace(
                    b"K\x06K\x06\x86", b"K\x06K%c\x86" % size
                )
            out.writestr(name, data)
    return path / "file"


def test_tensors_that_claim_more_than_the_file_holds(tmp_path):
    """Not mapped, PyTorch reads what lies behind them in memory."""
    module = nn.Linear(6, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert kvb.load(module, claiming(tmp_path, 36, 6)).weight.flatten().tolist() == list(range(36))
    module.load_state_dict(before)
    for count in (9, 37, 99, 10**9):
        with pytest.raises(CheckpointError, match="claims other memory than an entry holds|storage"):
            kvb.load(module, claiming(tmp_path, count, 6))
    wide = nn.Linear(9, 6)
    for count, message in ((99, "claims other memory than an entry holds"), (36, "storage .* not resizable")):
        with pytest.raises(CheckpointError, match=message):
            kvb.load(wide, claiming(tmp_path, count, 9))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        *([], {"weight": []}, {"__metadata__": {"a": 1}}, {"__metadata__": [], "weight": F32}),
        *({"weight": {**F32, "shape": shape}} for shape in ([-2, -2], [2, 2.0], [True, 4], [2**64, 0], [4, 2], None)),
        *({"weight": {**F32, "data_offsets": place}} for place in ([0, 8], [16, 0], [0, 8, 16], [4, 20], None)),
        *({"weight": {**F32, "dtype": kind}} for kind in ("F4", ["F32"], None)),
        {"weight": F32, "bias": F32},
    ],
)
@with_safetensors
def test_headers_of_safetensors_that_are_not_what_they_should_be(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError):
        kvb.load(nn.Linear(2, 2, bias=False), tmp_path / "file")


@with_safetensors
def test_a_header_without_an_end(tmp_path):
    text = "{" + "[" * 10**5
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(16))
    with pytest.raises(CheckpointError):
        kvb.load(nn.Linear(2, 2, bias=False), tmp_path / "file")


def rewritten(path, change):
    """The entries of a file as ``change`` gives them."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_name("new"), "w") as new:
        for name in old.namelist():
            for one, data in change(name, old.read(name)):
                new.writestr(one, data)
    return path.with_name("new")


def test_archives_of_others(tmp_path):
    module, source, path = nn.Linear(2, 2), nn.Linear(2, 2), tmp_path / "file"
    torch.save(dict(source.named_parameters()), path)
    loaded = kvb.load(module, rewritten(path, lambda name, data: [(f"root/{name.partition('/')[2]}", data)]))
    assert torch.equal(loaded.weight, source.weight)
    turned = {"weight": torch.arange(4.0).view(2, 2).T.conj(), "bias": torch._neg_view(torch.ones(2))}
    torch.save(turned, tmp_path / "turned")
    kvb.load(module, tmp_path / "turned")
    assert torch.equal(module.weight, turned["weight"])
    assert module.bias.tolist() == [-1, -1]


def test_archives_that_lack_something(tmp_path):
    module, path = nn.Linear(2, 2), tmp_path / "file"
    torch.save(module.state_dict(), path)
    for part in ("data/0", "data.pkl"):
        with pytest.raises(CheckpointError, match=part):
            kvb.load(module, rewritten(path, lambda name, data, part=part: [(name, data)] * (not name.endswith(part))))
    with pytest.raises(CheckpointError, match="Unknown endianness type: middle"):
        kvb.load(module, rewritten(path, lambda name, data: [(name, b"middle" if "byteorder" in name else data)]))
    with pytest.raises(CheckpointError):
        kvb.load(module, rewritten(path, lambda name, data: []))


def test_a_sparse_tensor_that_is_refused_is_forgotten(tmp_path):
    """PyTorch would remember it, and fail over it in somebody else's ``torch.load``."""
    outside = torch.sparse_coo_tensor(torch.tensor([[9], [9]]), torch.ones(1), (2, 2), check_invariants=False)
    torch.save({"weight": outside, "bias": torch.zeros(2)}, tmp_path / "file")
    with pytest.raises(CheckpointError):
        kvb.load(nn.Linear(2, 2), tmp_path / "file")
    torch.save(torch.eye(2).to_sparse(), tmp_path / "good")
    assert torch.equal(torch.load(tmp_path / "good", weights_only=True).to_dense(), torch.eye(2))


def test_a_torch_file_by_the_name_of_another_format(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"a torch zip file that is called .safetensors: rename it to x.pt"):
        kvb.load(nn.Linear(2, 2), tmp_path / "file.safetensors")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("foreign", [False, True])
def test_a_module_holds_no_part_of_a_file(name, foreign, tmp_path):
    """Which somebody may cut or write to."""

    class Keeping(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            self.weight, self.bias = (nn.Parameter(state_dict[prefix + name]) for name in ("weight", "bias"))

    source = nn.Linear(300, 300)
    kvb.save(source, tmp_path / name)
    with torch.device("meta"):
        target = (Keeping if foreign else nn.Linear)(300, 300)
    kvb.load(target, tmp_path / name)
    (tmp_path / name).write_bytes(bytes((tmp_path / name).stat().st_size))
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize("name", FORMATS)
def test_a_module_that_changes_while_it_is_saved(name, tmp_path, monkeypatch):
    module, change = nn.Linear(2, 2), checkpoints._sha256
    kvb.save(module, tmp_path / name)
    old = (tmp_path / name).read_bytes()

    def changing(state):
        found = change(state)
        module.weight.data += 1
        return found

    monkeypatch.setattr(checkpoints, "_sha256", changing)
    with pytest.raises(RuntimeError, match="the module changed while it was saved"):
        kvb.save(module, tmp_path / name)
    assert (tmp_path / name).read_bytes() == old


@with_safetensors
def test_dtypes_that_safetensors_cannot_hold(tmp_path):
    module = nn.Linear(2, 2, dtype=torch.complex128)
    with pytest.raises(TypeError, match="safetensors cannot hold torch.complex128: save to another name"):
        kvb.save(module, tmp_path / "file.safetensors")


@with_safetensors
def test_safetensors_that_are_too_old(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.__version__", "0.7.0")
    with pytest.raises(RuntimeError, match=r"kvb needs safetensors 0.8 or later, and this is 0.7.0: pip install -U"):
        kvb.save(nn.Linear(2, 2), tmp_path / "file.safetensors")


@with_safetensors
def test_safetensors_of_the_other_byte_order(tmp_path, monkeypatch):
    """Where numbers lie in memory the other way round, they go to the file the right way."""
    state = {
        "a": torch.arange(5, dtype=torch.int32),
        "c": torch.randn(3, 2, dtype=torch.complex64),
        "f": torch.tensor(2.0),
    }
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    header, tensors = safetensors_format.parts(state, {})
    path = tmp_path / "file.safetensors"
    path.write_bytes(header + b"".join(value.numpy().tobytes() for value in tensors))
    monkeypatch.undo()
    for name, value in safetensors.load_file(path).items():
        numbers = torch.view_as_real(state[name]) if state[name].is_complex() else state[name]
        found = torch.view_as_real(value) if value.is_complex() else value
        assert torch.equal(torch.from_numpy(numbers.numpy().byteswap()), found)


@with_safetensors
def test_a_name_that_the_format_keeps_for_itself(tmp_path):
    module = nn.Module()
    module.register_buffer("__metadata__", torch.zeros(1))
    with pytest.raises(TypeError, match="safetensors cannot hold a tensor called '__metadata__'"):
        kvb.save(module, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
