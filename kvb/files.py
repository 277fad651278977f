"""Writes a file as a whole: afterwards there is the new file or the old one, never a mixture and never a part.

The new file grows under its own name next to the old one, locked as long as its writer lives. So two writers never
collide, and a missing lock shows what a killed writer left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

fcntl: Any
try:
    import fcntl
except ImportError:  # on Windows, where nobody can remove a file that is open
    fcntl = None

_LONGEST = 200  # bytes of a name that leave room for what is added to it
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file, to write and to read, that takes the place of ``path`` when the block ends well.

    The file that a symbolic link names is replaced, not the link. Mode and owner stay those of the old file, as far as
    the user may set them; where the group cannot stay, it gets no more than everybody. Hard links keep the old content.

    Raises:
        OSError: there is no such folder, ``path`` is no regular file or may not be written, or writing fails; the old
        file is as it was.
    """
    target = Path(os.path.realpath(path))
    old = _replaceable(target)
    _sweep(target)
    unfinished = target.with_name(f".{_stem(target)}.{secrets.token_hex(8)}.part")
    try:
        with _begin(unfinished, 0o666 if old is None else 0o600) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if old is not None:
                _keep_access(unfinished, old)
            if fcntl is None:
                file.close()
            unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def content(tensor: Tensor) -> memoryview | bytes:
    """The bytes of a contiguous tensor in the host's memory, not copied: for as long as the tensor lives."""
    size = tensor.nbytes
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else b""


def _replaceable(target: Path) -> os.stat_result | None:
    """What is known about the old file; None if there is none."""
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to write to", str(target.parent))
    try:
        old = target.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(old.st_mode) else errno.EINVAL
        raise OSError(code, "only a regular file can be replaced, and this is none", str(target))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
    return old


def _begin(unfinished: Path, mode: int) -> BinaryIO:
    while True:
        file = os.fdopen(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, mode), "w+b")
        _lock(file.fileno())
        if fcntl is None or os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another writer swept it away before it was locked


def _stem(target: Path) -> str:
    name = os.fsencode(target.name)
    return target.name if len(name) <= _LONGEST else hashlib.sha256(name).hexdigest()


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed; False if another process has, or if there are no locks here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(target: Path) -> None:
    """Remove what writers of ``target`` left behind that no longer live."""
    pattern = re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{16}}\.part")
    for name in filter(pattern.fullmatch, os.listdir(target.parent)):
        with contextlib.suppress(OSError):  # it is gone, or not ours
            _sweep_one(target.with_name(name))


def _sweep_one(leftover: Path) -> None:
    if fcntl is None:
        leftover.unlink()
        return
    descriptor = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | _FLAGS)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock(descriptor):
            leftover.unlink()
    finally:
        os.close(descriptor)


def _keep_access(new: Path, old: os.stat_result) -> None:
    mode = stat.S_IMODE(old.st_mode)
    if hasattr(os, "chown"):
        kept = [_chown(new, old.st_uid, -1), _chown(new, -1, old.st_gid)]
        mode = mode if all(kept) else mode & 0o777
        mode = mode if kept[1] else mode & 0o707 | (mode & 0o007) << 3
    new.chmod(mode)


def _chown(path: Path, user: int, group: int) -> bool:
    try:
        os.chown(path, user, group)
    except PermissionError:
        return False
    return True
