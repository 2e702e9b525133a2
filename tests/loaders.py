"""Everything that reads a run directory, and what each may do with a file that anybody may have written."""

import fcntl
import json
import os
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import fastmono as fm
from fastmono.files import DirectoryLock
from fastmono.halving import Halving, Rungs, stopped_at, write_record
from fastmono.plan import content_hashes
from fastmono.run import Run
from fastmono.status import status_lines
from fastmono.store import RunDirectory
from fastmono.tables import Telemetry, write_tables
from fastmono.trainer import Options, steps_left

TINY = fm.ModelSpec(
    task="reprojector", n_features=6, d_embed=3, n_neurons=4, feature_prob=0.25, batch_size=8, steps=18, lr=0.01
)
GRID = fm.Grid(TINY, lr=[0.003, 0.01])
HASHES = content_hashes(GRID, Options("reference", "fp32"))


def load(path):
    run = fm.load_run(path)
    for i in range(len(run)):
        for step in run.kept_steps(i):
            run.module(i, step)
        run.parameters(i)


def resume(path):
    """What `train` reads before it goes on, and what its workers do."""
    directory = RunDirectory(path)
    directory.expected = dict(zip(HASHES, GRID, strict=True))
    directory.read_grid()
    saved = directory.newest_states(HASHES)
    for spec, name in zip(GRID, HASHES, strict=True):
        if name in saved:
            directory.restore(spec, saved[name])
    done = {name: not steps_left(spec, saved.get(name)) for spec, name in zip(GRID, HASHES, strict=True)}
    write_tables(directory, GRID, HASHES, {name: "done" if yes else "pending" for name, yes in done.items()})
    Run(path)


def telemetry(path):
    told = Telemetry(RunDirectory(path), {name: spec.flops_per_step for name, spec in zip(HASHES, GRID, strict=True)})
    told.started(HASHES, 0, "a device")
    told.add(HASHES, 4, 0.5, 2.0)
    told.write()


def decisions(path):
    """Which models of the run have stopped, as `train` and `--status` ask."""
    assert Rungs(RunDirectory(path), dict(zip(HASHES, GRID, strict=True)), Halving(0.5, 16)).stopped == set(
        stopped_at(RunDirectory(path))
    )


def lock(path):
    """Taken while somebody else holds it, so that what it says of the holder is read."""
    with (path / "lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with patch.object(DirectoryLock, "PATIENCE", 0.0), suppress(BlockingIOError):
            DirectoryLock(path).release()


def status(path):
    """What is said of a run from outside, without waiting for a sign of life."""
    with patch("fastmono.status.PATIENCE_SECONDS", 0.0):
        assert all(line.isprintable() for line in status_lines(path))


def complaints(sample, reader):
    """What a reader says of a run, as an error or a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            reader(sample.path)
        except (ValueError, OSError) as error:
            return str(error)
    return " ".join(str(warning.message) for warning in caught)


def with_header(original, text):
    """A tensor file with another JSON header of ours, its checksum made right."""
    size = int.from_bytes(original[:8], "little")
    outer = json.loads(original[8 : 8 + size])
    outer["__metadata__"]["fastmono"] = f"{zlib.crc32(text.encode()):08x}{text}"
    return with_outer_header(original, json.dumps(outer).encode())


def with_outer_header(original, header):
    """A tensor file with another header of safetensors, its length made right."""
    return len(header).to_bytes(8, "little") + header + original[8 + int.from_bytes(original[:8], "little") :]


def our_header(original):
    size = int.from_bytes(original[:8], "little")
    return json.loads(original[8 : 8 + size])["__metadata__"]["fastmono"][8:].encode()


def outer_header(original):
    return original[8 : 8 + int.from_bytes(original[:8], "little")]


def whole(original):
    return original


TENSOR_FILES = {"history.safetensors": load, "checkpoints/state-*": resume, "checkpoints/step-000000000004-*": load}
KINDS = [("grid.json", load, "whole"), ("grid.json", resume, "whole"), ("models.csv", load, "whole")]
KINDS += [("telemetry.csv", telemetry, "whole"), ("lock", lock, "whole"), ("events.jsonl", status, "whole")]
KINDS += [("status.json", status, "whole"), ("halving.json", decisions, "whole")]
KINDS += [(name, read, part) for name, read in TENSOR_FILES.items() for part in ("whole", "header", "outer header")]
"""A file, who reads it, and which part of it is replaced."""


class Sample:
    """A small trained run, of which one file at a time is replaced."""

    def __init__(self, path):
        self.path = Path(path)
        fm.train(GRID, self.path, engine="reference", workers=1, quiet=True)
        record = {16: {HASHES[0]: (0.5, True), HASHES[1]: (0.75, False)}}
        write_record(self.path / "halving.json", Halving(0.5, 16), record)
        self.files = {file: file.read_bytes() for file in self.path.rglob("*") if file.is_file()}
        # What tells of the holder is there while a lock is held.
        self.files[self.path / "lock"] = json.dumps({"pid": os.getpid(), "host": "here"}).encode()

    def file(self, name):
        return max(self.path.glob(name))

    def part(self, kind):
        """The bytes that are replaced, as they are in the sound file."""
        name, _, part = kind
        return {"whole": whole, "header": our_header, "outer header": outer_header}[part](self.files[self.file(name)])

    def restore(self):
        for file in self.path.rglob("*"):
            if file.is_symlink() or not (file.is_dir() or (file in self.files and file.is_file())):
                file.unlink()
        for file, data in self.files.items():
            if file.is_dir():
                file.rmdir()
            if not file.exists() or file.stat().st_size != len(data) or file.read_bytes() != data:
                file.write_bytes(data)

    def read(self, kind, data):
        """Have the reader find `data` in the file's place. Returns what it says of the file, None where it reads it.

        Anything but a value or a `ValueError` of one printable line that names the file passes through, or is an
        `AssertionError`.
        """
        name, reader, part = kind
        file = self.file(name)
        if part == "header":
            data = with_header(self.files[file], data.decode(errors="replace"))
        elif part == "outer header":
            data = with_outer_header(self.files[file], data)
        file.write_bytes(data)
        said = []
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    reader(self.path)
                except ValueError as error:
                    said.append(error)
            said += [warning.message for warning in caught]
            for message in map(str, said):
                assert message.isprintable() and len(message) < 1000, repr(message)
                assert str(self.path) in message, message
        finally:
            self.restore()
        return str(said[0]) if said else None
