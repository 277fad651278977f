"""``kvb.save`` and ``kvb.load``: all or nothing, whatever is in the file."""

from __future__ import annotations

import gc
import itertools
import json
import os
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from saved_models import FORMATS, make, safetensors, same, snapshot, trained, with_safetensors
from torch import nn

import kvb
from kvb import CheckpointError, KeyValueBottleneck, checkpoints
from kvb.compat.key_value_bottleneck import core

# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_save_and_load(name, tmp_path):
    source, target = trained(), make()
    kvb.save(source, tmp_path / name)
    assert kvb.load(target, tmp_path / name) is target
    assert same(snapshot(source), snapshot(target))
    assert not target[-1].update_keys
    assert torch.equal(target[-1].pair_mask, source[-1].pair_mask)
    x = torch.randn(9, 6)
    assert torch.equal(source.eval()(x), target.eval()(x))
    assert os.listdir(tmp_path) == [name]


def test_a_file_is_a_torch_file(tmp_path):
    source = trained()
    kvb.save(source, str(tmp_path / "file.pt"))
    file = torch.load(tmp_path / "file.pt", weights_only=True)
    assert file["kvb_checkpoint"] == 1
    assert same(file["state_dict"], snapshot(source))


@with_safetensors
def test_a_file_is_a_safetensors_file(tmp_path):
    source = trained()
    kvb.save(source, tmp_path / "file.safetensors")
    assert same(safetensors.load_file(tmp_path / "file.safetensors"), snapshot(source))


def test_without_safetensors_its_name_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RuntimeError, match="safetensors is not installed: pip install safetensors, or use a name"):
        kvb.save(trained(), tmp_path / "file.safetensors")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("safe", [False, pytest.param(True, marks=with_safetensors)])
def test_plain_state_dicts_of_others_load_under_any_name(safe, tmp_path):
    source, target = trained(), make()
    state = {name: value for name, value in source.state_dict().items() if not name.endswith(("kvb_flags", "kvb_mask"))}
    save = safetensors.save_file if safe else torch.save
    save(state, tmp_path / "file.bin")
    kvb.load(target, tmp_path / "file.bin")
    assert torch.equal(target[-1].values, source[-1].values)
    assert target[-1].update_keys


def test_tensors_that_share_memory_and_other_dtypes(tmp_path):
    source, target = nn.ModuleList([nn.Linear(3, 3)] * 2), nn.ModuleList([nn.Linear(3, 3)] * 2)
    source.register_buffer("view", torch.randn(4, 100)[:, :2].t())
    source.register_buffer("none", torch.zeros(0, 3))
    source.register_buffer("complex", torch.randn(3, dtype=torch.complex64).conj())
    target.register_buffer("view", torch.zeros(2, 4))
    target.register_buffer("none", torch.ones(0, 3))
    target.register_buffer("complex", torch.zeros(3, dtype=torch.complex64))
    kvb.save(source, tmp_path / "file.pt")
    assert (tmp_path / "file.pt").stat().st_size < 4000
    assert same(snapshot(kvb.load(target, tmp_path / "file.pt")), snapshot(source))


def test_replicas_take_files_of_kvb_and_the_other_way_round(tmp_path):
    source, replica = KeyValueBottleneck(2, 9, 3, 4).freeze_keys(), core.KeyValueBottleneck(2, 9, 3, 4)
    kvb.save(source, tmp_path / "file.pt")
    kvb.load(replica, tmp_path / "file.pt")
    assert torch.equal(replica.values, source.values)
    kvb.save(core.KeyValueBottleneck(2, 9, 3, 4), tmp_path / "file.pt")
    kvb.load(source, tmp_path / "file.pt")
    assert not torch.equal(replica.values, source.values)
    with pytest.raises(CheckpointError, match="missing 'weight'"):
        kvb.load(nn.Linear(2, 2), tmp_path / "file.pt")


def test_dtypes_follow_the_module(tmp_path):
    kvb.save(KeyValueBottleneck(2, 9, 3, 4).double(), tmp_path / "file.pt")
    assert kvb.load(KeyValueBottleneck(2, 9, 3, 4), tmp_path / "file.pt").keys.dtype == torch.float32


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    source = trained()
    kvb.save(source, tmp_path / "file.pt")
    old = (tmp_path / "file.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        kvb.save(make(), tmp_path / "file.pt")
    assert os.listdir(tmp_path) == ["file.pt"]
    assert (tmp_path / "file.pt").read_bytes() == old


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_replaced_hands_on_its_place_and_mode(name, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / name).symlink_to(f"real/{name}")
    source = trained()
    kvb.save(make(), tmp_path / name)
    (tmp_path / "real" / name).chmod(0o600)
    kvb.save(source, tmp_path / name)
    assert (tmp_path / name).is_symlink()
    assert os.listdir(tmp_path / "real") == [name]
    assert (tmp_path / "real" / name).stat().st_mode & 0o777 == 0o600
    assert same(snapshot(kvb.load(make(), tmp_path / name)), snapshot(source))
    with pytest.raises(OSError, match="only a regular file can be replaced"):
        kvb.save(source, "/dev/full")


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_is_an_error_and_leaves_the_old_file(name, tmp_path):
    """In a process whose files may have 20,000 bytes."""
    code = """if True:
        import os, resource, sys, torch, kvb
        module = kvb.KeyValueBottleneck(2, 9, 3, 4)
        kvb.save(module, sys.argv[1])
        old = open(sys.argv[1], "rb").read()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        large = kvb.KeyValueBottleneck(2, 9, 3, 4000)
        data = [torch.randn(2000, 2, 3), torch.randn(2000, 2, 3)]
        for write in (lambda: kvb.save(large, sys.argv[1]), lambda: module.encode_dataset(data * 9, out=sys.argv[1])):
            try:
                write()
            except OSError as error:
                print(error.strerror)
            print(open(sys.argv[1], "rb").read() == old, os.listdir(os.path.dirname(sys.argv[1])))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["File too large", f"True [{name!r}]"] * 2, done.stderr


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_is_never_damage_and_leaves_everything_as_it_was(name, tmp_path):
    """Ctrl-C between any two calls of Python, of which every tenth or so is tried."""
    source, path = trained(), tmp_path / name
    kvb.save(source, path)
    other, old = trained(), path.read_bytes()
    before, late = snapshot(other), 0

    def interrupted(action, call):
        calls = itertools.count()

        def watch(frame, event, argument):
            if next(calls) == call:
                sys.setprofile(None)
                raise KeyboardInterrupt

        sys.setprofile(watch)
        try:
            action()
        finally:
            sys.setprofile(None)
            torch.set_grad_enabled(True)  # an interruption within torch.no_grad() leaves gradients off
        return next(calls)

    for action in (lambda: kvb.load(other, path), lambda: kvb.save(other, path)):
        for call in range(0, 10**5, 13):
            path.write_bytes(old)
            try:
                interrupted(action, call)
            except KeyboardInterrupt:
                loaded, written = not same(snapshot(other), before), path.read_bytes() != old
                assert not loaded or same(snapshot(other), snapshot(source))
                assert not written or same(snapshot(kvb.load(trained(), path)), before)
                assert len(os.listdir(tmp_path)) == 1 or not written
                late = late + (loaded or written)
                other.load_state_dict(before)
            else:
                break
        assert call > 500
        other.load_state_dict(before)
    assert late < 10  # all but the last of all calls leave everything as it was
    kvb.save(other, path)
    assert os.listdir(tmp_path) == [name]
    gc.collect()  # archives that were left half written complain, here and not in another test


def test_save_takes_modules_of_tensors_only(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"step": 3}

    with pytest.raises(TypeError, match="dense tensors only, but the state_dict holds a dict as '_extra_state'"):
        kvb.save(Extra(2, 2), tmp_path / "file.pt")
    with pytest.raises(TypeError, match=r"save\(\): argument 'module' must be torch.nn.Module, not dict"):
        kvb.save({}, tmp_path / "file.pt")
    with pytest.raises(TypeError, match=r"load\(\): argument 'module' must be torch.nn.Module, not dict"):
        kvb.load({}, tmp_path / "file.pt")
    with pytest.raises(FileNotFoundError):
        kvb.load(make(), tmp_path / "file.pt")


# --- files that are not what they should be ---------------------------------------------------------------------------


def refused(path, message, module=None):
    """A typed error, and a module that is as it was, flags included."""
    module = trained() if module is None else module
    before, mask = snapshot(module), module[-1].pair_mask
    with pytest.raises(CheckpointError, match=message) as error:
        kvb.load(module, path)
    assert len(str(error.value)) < 2000
    assert same(snapshot(module), before)
    assert torch.equal(module[-1].pair_mask, mask)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is neither a torch zip file nor safetensors; it starts with b''"),
        (b"version https://git-lfs", "is neither a torch zip file nor safetensors; it starts with b'version '"),
        (b"PK\x03\x04 and so on", "is damaged or no checkpoint: BadZipFile"),
        (pickle.dumps({"keys": 1}), "is neither"),
    ],
)
def test_files_of_another_kind(data, message, tmp_path):
    (tmp_path / "file").write_bytes(data)
    refused(tmp_path / "file", message)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil was here",)


def doubled(times):
    """A list whose text has 2**times parts, though the file is small."""
    found = []
    for _ in range(times):
        found = [found, found]
    return found


def hostile():
    state = make().state_dict()
    big = torch.zeros(1).expand(1 << 40)
    name = "3.values"
    yield Evil(), "Weights only load failed"
    yield {**state, name: Evil()}, "Weights only load failed"
    yield [1, 2], "expected a state_dict, got list"
    yield {**state, 3: torch.zeros(1)}, "expected names of tensors, got int"
    yield {**state, name: "text"}, "expected dense tensors, got a str as '3.values'"
    yield {**state, name: state[name].to_sparse()}, "expected dense tensors, got a tensor of layout torch.sparse_coo"
    yield {**state, name: state[name].to("meta")}, "expected dense tensors, got a tensor of another kind .*meta"
    yield {**state, name: {"deep": {"deeper": torch.zeros(1)}}}, "expected dense tensors, got a dict as '3.values.deep'"
    yield {**state, name: big}, r"'3.values': expected shape \(2, 9, 4\), got \(1099511627776,\)"
    yield {**state, "3.kvb_state": torch.zeros(1, dtype=torch.uint8).expand(1 << 40)}, "kvb_state has version 0"
    yield {**state, name: state[name].to(torch.complex64)}, "'3.values': expected torch.float32, got torch.complex64"
    yield {**state, "3.keys": torch.full((2, 9, 3), torch.nan)}, "keys contains NaN or Inf in 18 of 18 pairs"
    yield {**state, "3.kvb_state": torch.full((8,), 9, dtype=torch.uint8)}, "kvb_state has version 9"
    yield {**state, "0.weight": torch.ones(6, 6), "3.cluster_size": -torch.ones(2, 9)}, "negative or NaN counts"
    yield {**state, "surplus": torch.zeros(1)}, "unexpected 'surplus'"
    yield {name: value for name, value in state.items() if name != "3.keys"}, "missing '3.keys'"
    yield {}, r"missing '0.weight'(\n.*){9}\n\tand 3 more"
    kvb_file = {"kvb_checkpoint": 1, "sha256": "0" * 64, "state_dict": state}
    yield kvb_file, "the tensors do not match their SHA-256"
    yield {**kvb_file, "state_dict": {**state, name: big}}, "'3.values' claims more elements than it holds"
    yield {**kvb_file, "kvb_checkpoint": 2}, "version 2, but this kvb reads version 1: upgrade kvb"
    yield {**kvb_file, "kvb_checkpoint": torch.ones(1)}, "version of type Tensor, but this kvb reads version 1"
    yield {**kvb_file, "kvb_checkpoint": 1 << 60}, "version of type int, but"
    yield {**kvb_file, "kvb_checkpoint": "x" * 10**6}, "version of type str, but"
    yield {**kvb_file, "kvb_checkpoint": doubled(60)}, "version of type list, but"
    yield {**kvb_file, "sha256": doubled(60)}, "expected a sha256, got list"
    yield {**state, "x" * 10**6: torch.zeros(1)}, r"unexpected 'x{200}...'$"
    yield {**state, "x" * 10**6: 1}, r"got a int as 'x{60}"
    yield {**kvb_file, "sha256": None}, "expected a sha256, got NoneType"
    yield {"kvb_checkpoint": 1, "sha256": "0"}, "expected a state_dict, got NoneType"


@pytest.mark.parametrize(("content", "message"), list(hostile()))
def test_hostile_contents(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "file")
    refused("file", message)
    assert os.listdir() == ["file"]


def test_zip_bombs_are_not_inflated(tmp_path):
    torch.save(make().state_dict(), tmp_path / "plain")
    with (
        zipfile.ZipFile(tmp_path / "plain") as plain,
        zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in plain.namelist():
            out.writestr(entry, plain.read(entry))
        out.writestr("archive/data/99", bytes(1 << 24))
    assert (tmp_path / "file").stat().st_size < 1 << 20
    refused(tmp_path / "file", "compressed entries")
    with zipfile.ZipFile(tmp_path / "plain", "a") as twice, pytest.warns(UserWarning, match="Duplicate name"):
        twice.writestr("plain/data/0", b"")
    refused(tmp_path / "plain", "entries that overlap")


@with_safetensors
def test_safetensors_of_another_version_or_content(tmp_path):
    state = make().state_dict()
    digest = checkpoints._sha256(state)
    for metadata, message in (
        ({"kvb_checkpoint": "2", "sha256": digest}, "version 2, but this kvb reads version 1"),
        ({"kvb_checkpoint": "x", "sha256": digest}, "invalid literal"),
        ({"kvb_checkpoint": "1"}, "expected a sha256"),
        ({"kvb_checkpoint": "1", "sha256": digest[::-1]}, "do not match their SHA-256"),
    ):
        safetensors.save_file(state, tmp_path / "file", metadata)
        refused(tmp_path / "file", message)
    header = json.dumps({"values": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(tmp_path / "file", "is damaged or no checkpoint")
