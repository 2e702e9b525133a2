"""Files that survive a kill: whole or not there, checked when read, and never executed.

A file is written under a temporary name in its own directory, flushed, renamed over the old one, and the directory is
flushed. Tensor files are safetensors with one JSON header entry, which holds a CRC-32 for every row of every tensor:
safetensors itself notices a truncated file but not a changed byte.
"""

from __future__ import annotations

import json
import os
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

HEADER = "fastmono"
TEMPORARY = ".writing"


class BadFile(ValueError):
    """A file that is truncated, corrupted or not ours; the message names it."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}")
        self.path = path


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's content so that, killed at any moment, it holds all of the old or all of the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
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
    """A JSON file's value. `BadFile` when it is missing, truncated or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFile(path, "there is no such file") from None
    except OSError as error:
        raise BadFile(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(path, f"is not valid JSON ({error})") from None


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

    Raises `BadFile` for anything that `write_tensors` did not write, or that has changed since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            text = (file.metadata() or {}).get(HEADER)
            self.names = set(file.keys())
        if text is None:
            raise BadFile(path, "was not written by fastmono")
        if f"{zlib.crc32(text[8:].encode()):08x}" != text[:8]:
            raise BadFile(path, "is corrupted (its header has changed)")
        self.header: dict[str, Any] = json.loads(text[8:])

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except FileNotFoundError:
            raise BadFile(self.path, "there is no such file") from None
        except (SafetensorError, OSError) as error:
            raise BadFile(self.path, f"is truncated or corrupted ({error})") from None

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor, or one row of it, verified."""
        with self._open() as file:
            if name not in self.names:
                raise BadFile(self.path, f"lacks the tensor {name}")
            tensor: Tensor = file.get_tensor(name) if row is None else file.get_slice(name)[row : row + 1]
        expected = self.header["crc32"].get(name, [])
        found = _row_checksums(tensor) if tensor.numel() else []
        if found != (expected if row is None else expected[row : row + 1]):
            raise BadFile(self.path, f"is corrupted (tensor {name} has changed)")
        return tensor if row is None else tensor[0]

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor, verified."""
        return {name: self.read(name) for name in sorted(self.names)}


class DirectoryLock:
    """Exclusive use of a directory for as long as this process, or a child that was given `descriptor`, lives.

    The operating system drops the lock with the last process that holds it, so a dead holder's lock is never in the
    way. Raises `BlockingIOError` that says who holds it.
    """

    PATIENCE = 10.0  # seconds: the workers of a driver that was killed need a moment to notice

    def __init__(self, directory: Path) -> None:
        self.path = directory / "lock"
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + self.PATIENCE
        while not _try_lock(self.descriptor):
            holder = self._holder()
            if time.monotonic() > deadline or _is_alive(holder):
                os.close(self.descriptor)
                who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
                raise BlockingIOError(f"{directory} is in use by {who}; wait for it, or stop it first")
            time.sleep(0.1)
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def _holder(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            holder = json.loads(self.path.read_text())
            if isinstance(holder, dict) and {"pid", "host"} <= set(holder):
                return holder
        return {}

    def release(self) -> None:
        """Let others use the directory. The file stays: whoever waits for it has it open already."""
        os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)


def _is_alive(holder: dict[str, Any]) -> bool:
    if not holder or holder["host"] != socket.gethostname():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:  # pragma: no cover
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True
