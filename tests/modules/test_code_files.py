"""Files of codes: readable by NumPy, labels with them, whole or not there, the same for workers and two writers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from kvb import CodeDataset, KeyValueBottleneck, files, npy


@pytest.fixture
def module():
    return KeyValueBottleneck(3, 11, 5, 4).freeze_keys()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_numpy_reads_the_file_and_the_map_is_private(module, tmp_path):
    path = tmp_path / "codes.npy"
    found = module.encode_dataset([(torch.randn(9, 3, 2, 5), torch.arange(9.0))], out=path, progress=False)
    read = numpy.load(path)
    assert read.dtype == numpy.int16
    assert read.shape == (9, 3, 2)
    assert read.tolist() == found.codes.tolist()
    assert numpy.load(path, mmap_mode="r").tolist() == read.tolist()
    with path.open("rb") as file:
        assert numpy.load(file).tolist() == read.tolist()
        assert numpy.load(file).tolist() == list(range(9))
        assert not file.read()
    found.codes.zero_()
    found.labels.zero_()
    assert numpy.load(path).tolist() == read.tolist()
    assert CodeDataset.open(path).labels.tolist() == list(range(9))


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
@pytest.mark.parametrize("labels", [None, "bool", "uint8", "int8", "uint16", "float16", "float64", "complex64"])
def test_files_of_numpy_are_read(dtype, labels, tmp_path):
    codes = numpy.arange(24, dtype=dtype).reshape(4, 2, 3)
    named = None if labels is None else (numpy.arange(8) % 2).reshape(4, 2).astype(labels)
    with (tmp_path / "theirs.npy").open("wb") as file:
        numpy.save(file, codes)
        if named is not None:
            numpy.save(file, named)
    found = CodeDataset.open(tmp_path / "theirs.npy")
    assert numpy.array_equal(found.codes.numpy(), codes)
    assert str(found.codes.dtype) == f"torch.{dtype}"
    assert found.labels is None if labels is None else numpy.array_equal(found.labels.numpy(), named)
    ours = torch.arange(4)
    assert CodeDataset.open(tmp_path / "theirs.npy", ours).labels is ours


def test_labels_of_every_dtype_travel_with_the_file(module, tmp_path):
    for dtype in npy._LABELS.values():
        labels = (torch.arange(14) % 2).view(7, 2).to(dtype)
        for shape in ((7, 3, 5), (7, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 5)):
            found = module.encode_dataset([(torch.randn(shape), labels)], out=tmp_path / "file", progress=False)
            again = CodeDataset.open(tmp_path / "file")
            for one in (found, again):
                assert one.labels.dtype == dtype
                assert one.labels.tolist() == labels.tolist()
                assert one.labels.data_ptr() % 16 == 0
                assert torch.equal(one.codes, found.codes)
            assert found.codes.shape == shape[:-1]


def test_a_file_that_is_no_code_table_is_refused(module, tmp_path):
    path = tmp_path / "codes.npy"
    module.encode_dataset([(torch.randn(9, 3, 5), torch.zeros(9))], out=path, progress=False)
    labelled = path.read_bytes()
    module.encode_dataset(torch.randn(9, 3, 5), out=path, progress=False)
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], r"\(9, 3\) asks for \d+ bytes, got \d+"),
        (whole + b"\0", "got something else"),
        (b"", "got something else"),
        (whole[:9], "got something else"),
        (whole[:40], "got the header b"),
        (b"\x93NUMPX" + whole[6:], "got something else"),
        (whole.replace(b"<i2", b"<f2"), "got numbers of type '<f2'"),
        (whole.replace(b"<i2", b">i2"), "got numbers of type '>i2'"),
        (whole.replace(b"False", b"True "), "got the header .*fortran_order': True"),
        (whole.replace(b"{", b"("), r"got the header b.\('descr"),
        (whole.replace(b"(9, 3)", b"(0, 3)"), r"\(0, 3\) asks for"),
        (whole.replace(b"(9, 3)", b"(27,) "), r"got numbers of shape \(27,\)"),
        (whole.replace(b"(9, 3)", b"(9,-3)"), "got the header"),
        (whole.replace(b"(9, 3), } ", b"(9" + b"9" * 17 + b", 3)}")[: len(whole)], "asks for|got the header"),
        (labelled[:-1], r"\(9,\) asks for \d+ bytes"),
        (labelled + b"\0", "got 1 bytes after its arrays"),
        (labelled.replace(b"(9,)", b"(8,)"), "got 8 labels of 9 samples"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"expected a .npy file of int16, int32 or int64 codes in .*{message}"):
            CodeDataset.open(path)
    with pytest.raises(FileNotFoundError):
        CodeDataset.open(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        CodeDataset.open(tmp_path)


def test_a_failure_leaves_the_old_file(module, tmp_path):
    path = tmp_path / "codes.npy"
    kept = module.encode_dataset(torch.randn(9, 3, 5), out=path, progress=False).codes.tolist()
    x = torch.randn(2, 3, 5)

    def stopped():
        yield x
        raise KeyboardInterrupt

    for data, error in (
        ([x, torch.randn(2, 3, 6)], ValueError),
        ([(x, torch.zeros(2)), x], ValueError),
        ([(x, torch.zeros(2)), (x, torch.zeros(2, 3))], ValueError),
        ([], ValueError),
        (stopped(), KeyboardInterrupt),
    ):
        with pytest.raises(error):
            module.encode_dataset(data, out=path, progress=False)
        assert CodeDataset.open(path).codes.tolist() == kept
        assert names(tmp_path) == ["codes.npy"]


def test_two_writers_each_get_their_own_codes(module, tmp_path):
    """One begins while the other writes and is done before it."""
    path, x = tmp_path / "codes.npy", torch.randn(40, 3, 5)
    inner = []

    def slow():
        yield x[:20]
        inner.append(module.encode_dataset(x[:7].flip(0), out=path, progress=False))
        yield x[20:]

    outer = module.encode_dataset(slow(), out=path, progress=False)
    assert torch.equal(outer.codes.long(), module.encode(x))
    assert torch.equal(inner[0].codes.long(), module.encode(x[:7].flip(0)))
    assert torch.equal(CodeDataset.open(path).codes, outer.codes)
    assert names(tmp_path) == ["codes.npy"]
    results = {}

    def write(rows):
        results[rows] = module.encode_dataset(list(x[:rows].split(1)), out=path, progress=False)

    threads = [threading.Thread(target=write, args=(rows,)) for rows in (11, 23, 37)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found.codes.long(), module.encode(x[:rows])) for rows, found in results.items())
    assert names(tmp_path) == ["codes.npy"]


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_that_are_no_forks_map_the_file(method, tmp_path):
    module = KeyValueBottleneck(3, 11, 5, 4).freeze_keys()
    data = [(torch.randn(9, 3, 5), torch.arange(9))]
    found = module.encode_dataset(data, out=tmp_path / "codes.npy", progress=False)
    again = CodeDataset.open(tmp_path / "codes.npy", torch.arange(9) + 9)
    for dataset in (found, again):
        loader = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context=method)
        codes, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(codes, found.codes)
        assert torch.equal(labels, dataset.labels)


def test_a_worker_gets_a_path_or_the_numbers(module, tmp_path, monkeypatch):
    """As if a worker was being started, without starting one."""
    path = tmp_path / "codes.npy"
    found = module.encode_dataset([(torch.randn(900, 3, 5), torch.arange(900))], out=path, progress=False)
    found.extra = "kept"
    assert len(pickle.dumps(found)) > found.codes.nbytes
    monkeypatch.setattr("multiprocessing.context.get_spawning_popen", lambda: True)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    back = pickle.loads(sent)
    assert torch.equal(back.codes, found.codes)
    assert torch.equal(back.labels, found.labels)
    assert back.extra == "kept"
    own = CodeDataset.open(path)
    own.codes = own.codes + 1
    assert torch.equal(pickle.loads(pickle.dumps(own)).codes, found.codes + 1)
    module.encode_dataset(torch.randn(900, 3, 5), out=path, progress=False)
    with pytest.raises(ValueError, match="was replaced while a worker was about to open it"):
        pickle.loads(sent)
    assert torch.equal(pickle.loads(pickle.dumps(found)).codes, found.codes)  # the old ones, though their file is gone


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("labels", [None, torch.arange(9)])
def test_torch_loads_a_saved_data_set_without_running_code(module, mapped, labels, tmp_path):
    x = torch.randn(9, 3, 5)
    out = tmp_path / "codes.npy" if mapped else None
    found = module.encode_dataset([x if labels is None else (x, labels)], out=out, progress=False)
    torch.save(found, tmp_path / "saved.pt")
    again = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert type(again) is CodeDataset
    assert torch.equal(again.codes, found.codes)
    assert again.labels is None if labels is None else torch.equal(again.labels, labels)
    found.labels = torch.zeros(3)
    torch.save(found, tmp_path / "saved.pt")
    with pytest.raises(Exception, match="one for each of the 9 samples"):
        torch.load(tmp_path / "saved.pt", weights_only=True)


def test_a_default_device_changes_nothing(module, tmp_path):
    x, y = torch.randn(9, 3, 5), list(range(9))
    want = module.encode(x)
    with torch.device("meta"):
        found = module.encode_dataset([(x, y)], out=tmp_path / "codes.npy", progress=False)
        again = CodeDataset.open(tmp_path / "codes.npy")
        (batch,) = found.batches(9, generator=torch.Generator("cpu"))
        single = again.__getitems__([3, 1])
    for codes, labels in (batch, *single, (found.codes, found.labels)):
        assert torch.equal(codes.long(), want[labels])


# --- how a file is replaced -------------------------------------------------------------------------------------------


def write(path, data=b"new"):
    with files.replacing(path) as file:
        file.write(data)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    for name, target in (("link", "real/file"), ("chain", "link")):
        (tmp_path / name).symlink_to(target)
        write(tmp_path / name, name.encode())
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real/file").read_bytes() == name.encode()
    assert names(tmp_path) == ["chain", "link", "real"]
    assert names(tmp_path / "real") == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_mode_and_owner_stay(mode, tmp_path):
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    owner = (1234, 2345) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(path, *owner)
    seen = []
    with files.replacing(path) as file:
        seen.append(os.fstat(file.fileno()).st_mode & 0o777)
        file.write(b"new")
    status = path.stat()
    assert status.st_mode & 0o777 == mode
    assert (status.st_uid, status.st_gid) == owner
    assert seen == [0o600]
    assert path.read_bytes() == b"new"


def test_a_group_that_cannot_stay_gets_no_more_than_everybody(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o2664)

    def refused(path, user, group):
        if group != -1:
            raise PermissionError

    monkeypatch.setattr(os, "chown", refused)
    write(path)
    assert path.stat().st_mode & 0o7777 == 0o644


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    old = os.umask(0o027)
    try:
        write(tmp_path / "file")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(OSError, match="only a regular file can be replaced, and this is none"):
            write(tmp_path / name)
    with pytest.raises(OSError, match="loop|only a regular file"):
        write(tmp_path / "loop")
    with pytest.raises(OSError, match="only a regular file"):
        write("/dev/full")
    with pytest.raises(FileNotFoundError, match="there is no such folder to write to: .*nowhere"):
        write(tmp_path / "nowhere" / "file")
    assert names(tmp_path) == ["folder", "link", "loop", "pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path):
    (tmp_path / "file").touch(0o444)
    with pytest.raises(PermissionError):
        write(tmp_path / "file")


@pytest.mark.parametrize("name", ["file", "x" * 250])
def test_what_a_kill_left_behind_goes_with_the_next_write(name, tmp_path):
    path, others = tmp_path / name, [".file.txt.0123456789abcdef.part", ".file.part", "other"]
    code = """if True:
        import os, sys
        from kvb import files
        with files.replacing(sys.argv[1]) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    assert len(names(tmp_path)) == 1
    for other in others:
        (tmp_path / other).touch()
    with files.replacing(path) as file:
        assert len(names(tmp_path)) == 4
        file.write(b"first")
        write(path, b"second")  # begins and ends while the other still writes
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == sorted([name, *others])


def test_a_failure_of_any_kind_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_bytes(b"old")

    def fail(error):
        with files.replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            fail(error)
        assert (tmp_path / "file").read_bytes() == b"old"
        assert names(tmp_path) == ["file"]
