"""Files that survive a kill: whole or not there, checked when read, and never executed.

A file is written under a temporary name in its own directory, flushed, renamed over the old one, and the directory is
flushed. Tensor files are safetensors with one JSON header entry, which holds a CRC-32 for every row of every tensor:
safetensors itself notices a truncated file but not a changed byte.

A run directory may come from anybody. What is read from it is a regular file of limited size (a link could lead
anywhere, and a FIFO would block for ever), and what it says of itself is compared with its size, and with the models,
before memory is taken for it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import stat
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

HEADER = "fastmono"
TEMPORARY = ".writing"
TYPES = ("F32", "F64", "I64")
"""Of the tensors that are written, as safetensors calls them."""


LARGEST_TEXT = 2**26
"""Bytes of a JSON file or a table: a grid of 150,000 models."""
LARGEST_STRUCTURE = 2**23
"""Lists, objects and quotes in a JSON text, for each of which Python takes tens of bytes: 600 MB at most."""
LARGEST_HEADER = 2**24
"""Bytes of a tensor file's header: 40,000 models in one block."""
MOST_TENSORS = 64
LONGEST_MESSAGE = 300
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""For a file that has become a link or a FIFO since it was looked at."""


def printable(text: str, most: int | None = None) -> str:
    """A text for a terminal: control characters and other invisible ones as escapes, cut to so many characters."""
    if most is not None and len(text) > most:
        text = text[: most - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class BadFile(ValueError):
    """A file that is truncated, corrupted or not ours; the message names it."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{printable(str(path))}: {printable(what, LONGEST_MESSAGE)}")
        self.path = path


def require_regular(path: Path) -> None:
    """`BadFile` where something else than a regular file lies: a link, a folder, a FIFO, a device."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise BadFile(path, "is a symbolic link, which is not followed: put the file itself there")
    if not stat.S_ISREG(mode):
        raise BadFile(path, "is not a regular file")


def open_in_place(path: Path, flags: int) -> int:
    """A descriptor of a file that is written where it lies, made if need be: never of what a link points to.

    Raises `BadFile` for what is not a regular file, and `OSError`.
    """
    require_regular(path)
    return os.open(path, flags | os.O_CREAT | NO_LINK, 0o644)


def read_bytes(path: Path, most: int = LARGEST_TEXT) -> bytes:
    """A file's content. `BadFile` when it is missing, not a regular file, or larger than `most` bytes."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1) if size <= most else b""
    if size > most or len(data) > most:
        raise BadFile(path, f"has {max(size, len(data)):,} bytes, where at most {most:,} are read")
    return data


def read_tail(path: Path, most: int) -> bytes:
    """The last bytes of a file, at most so many. `BadFile` when it is missing or not a regular file."""
    with _opened(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        require_regular(path)
        with open(os.open(path, os.O_RDONLY | NO_LINK), "rb") as file:
            yield file
    except FileNotFoundError:
        raise BadFile(path, "there is no such file") from None
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error.strerror})") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content so that, killed at any moment, it holds all of the old or all of the new."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")  # machines may share the directory
    try:
        temporary.unlink(missing_ok=True)  # also where a link was put there
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _flush_directory(path.parent)


def _flush_directory(path: Path) -> None:
    if os.name != "posix":  # Windows cannot open a directory; its rename is durable by itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Delete what killed writers left behind."""
    for path in directory.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            path.unlink()


def read_json(path: Path) -> Any:
    """A JSON file's value. `BadFile` when it is missing, truncated, larger than such files are, or not JSON."""
    return parse_json(path, read_bytes(path))


def parse_json(path: Path, text: bytes) -> Any:
    """The value of a JSON text found in a file, which `BadFile` names when it is not one.

    Refused besides: NaN and infinity, which JSON does not have, and a name that stands twice in an object.
    """
    if sum(map(text.count, (b"[", b"{", b'"'))) > LARGEST_STRUCTURE:
        raise BadFile(path, f"has more than {LARGEST_STRUCTURE:,} lists, objects and strings")
    try:
        return json.loads(text.decode(), object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"is not valid JSON ({error})") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _row_checksums(tensor: Tensor) -> list[int]:
    return [zlib.crc32(row.numpy()) for row in tensor.contiguous().view(len(tensor), -1).view(torch.uint8)]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors, each with one row a model, and a JSON header."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    checksums = {name: _row_checksums(tensor) for name, tensor in tensors.items() if tensor.numel()}
    body = json.dumps({**header, "crc32": checksums}, sort_keys=True)
    # One entry: safetensors writes several in no fixed order, and equal runs should give equal files.
    text = f"{zlib.crc32(body.encode()):08x}{body}"
    write_bytes(path, save(tensors, {HEADER: text}))


class TensorFile:
    """A tensor file opened for reading: its header at once, its tensors (or single rows of them) when asked for.

    Attributes:
        header: what `write_tensors` was given, and the checksums.
        shapes: the shape of each tensor.
        types: its type as safetensors calls it: F32, F64, I64.

    Raises `BadFile` for anything that `write_tensors` did not write, or that has changed since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as start:  # a claim of gigabytes is refused before they are read
            size = int.from_bytes(start.read(8), "little")
            if size > min(LARGEST_HEADER, os.fstat(start.fileno()).st_size - 8):
                raise BadFile(path, f"is truncated or corrupted (a header of {size:,} bytes)")
        with self._open() as file:
            text = (file.metadata() or {}).get(HEADER)
            names = file.keys()
            if len(names) > MOST_TENSORS:
                raise BadFile(path, f"holds {len(names):,} tensors")
            slices = {name: file.get_slice(name) for name in names}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.types = {name: str(part.get_dtype()) for name, part in slices.items()}
        if text is None:
            raise BadFile(path, "was not written by fastmono")
        if f"{zlib.crc32(text[8:].encode()):08x}" != text[:8]:
            raise BadFile(path, "is corrupted (its header has changed)")
        self.header: dict[str, Any] = parse_json(path, text[8:].encode())
        if not isinstance(self.header, dict) or not isinstance(self.header.get("crc32"), dict):
            raise BadFile(path, "has a header that fastmono does not write")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            require_regular(self.path)
            with safe_open(self.path, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise BadFile(self.path, "there is no such file") from None
        except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: it went while it was being opened
            raise BadFile(self.path, f"is truncated or corrupted ({error})") from None

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of it, verified."""
        if name not in self.shapes:
            raise BadFile(self.path, f"lacks the tensor {name}")
        shape = self.shapes[name]
        if self.types[name] not in TYPES or not shape or (row is not None and not 0 <= row < shape[0]):
            raise BadFile(self.path, f"holds {name} {list(shape)} {self.types[name]}, which fastmono does not write")
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name) if row is None else file.get_slice(name)[row : row + 1]
        expected = self.header["crc32"].get(name, [])
        if not isinstance(expected, list):
            raise BadFile(self.path, "has a header that fastmono does not write")
        found = _row_checksums(tensor) if tensor.numel() else []
        if found != (expected if row is None else expected[row : row + 1]):
            raise BadFile(self.path, f"is corrupted (tensor {name} has changed)")
        return tensor if row is None else tensor[0]

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor, verified."""
        return {name: self.read(name) for name in sorted(self.shapes)}


class DirectoryLock:
    """Use of a directory for as long as this process, or a child that was given `descriptors`, lives.

    The operating system drops the lock with the last process that holds it, so a dead holder's lock is never in the
    way. Raises `BlockingIOError` that says who holds it.

    Args:
        part: None for exclusive use; else the name of a part of the directory's work, of which others may do other
            parts meanwhile.
    """

    PATIENCE = 10.0  # seconds: the workers of a driver that was killed need a moment to notice

    def __init__(self, directory: Path, part: str | None = None) -> None:
        self.descriptors: list[int] = []
        try:
            self._take(directory, directory / "lock", shared=part is not None)
            if part is not None:
                self._take(directory, directory / f"lock-{part}", shared=False)
        except BaseException:
            self.release()
            raise

    def _take(self, directory: Path, path: Path, shared: bool) -> None:
        descriptor = open_in_place(path, os.O_RDWR)
        try:
            self._wait(directory, path, descriptor, shared)
        except BaseException:
            os.close(descriptor)
            raise
        self.descriptors.append(descriptor)
        os.ftruncate(descriptor, 0)
        if not shared:
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def _wait(self, directory: Path, path: Path, descriptor: int, shared: bool) -> None:
        deadline = time.monotonic() + self.PATIENCE
        while not _try_lock(descriptor, shared):
            holder = _holder(path)
            if time.monotonic() > deadline or _is_alive(holder):
                who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
                raise BlockingIOError(f"{directory} is in use by {who}; wait for it, or stop it first")
            time.sleep(0.1)

    def release(self) -> None:
        """Let others use the directory. The files stay: whoever waits for one has it open already."""
        for descriptor in reversed(self.descriptors):
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)
        self.descriptors.clear()


def _holder(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        holder = parse_json(path, read_bytes(path, 4096))
        pid, host = (holder.get(name) if isinstance(holder, dict) else None for name in ("pid", "host"))
        if type(pid) is int and 0 < pid < 2**31 and isinstance(host, str):
            return {"pid": pid, "host": printable(host, 255)}
    return {}


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait for this process's turn at what a file stands for, and have it to itself."""
    descriptor = open_in_place(path, os.O_RDWR)
    try:
        while not _try_lock(descriptor, shared=False):
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _is_alive(holder: dict[str, Any]) -> bool:
    if not holder or holder["host"] != socket.gethostname():
        return bool(holder)
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _try_lock(descriptor: int, shared: bool) -> bool:
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif not shared:  # pragma: no cover
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            said = "the file system of the run directory has no file locks: mount it with them, or choose another"
            raise OSError(error.errno, said) from None
        return False
    return True
