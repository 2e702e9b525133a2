"""Run as a process of its own, with a folder for a run: what it costs to read files that claim gigabytes; a JSON line
each: the trick, what was said, MiB by which the process grew, seconds of the processor."""

import json
import os
import resource
import sys
import time
import warnings

from loaders import Sample, load, lock, outer_header, resume, with_outer_header

from fastmono.files import BadFile


def sparse(path, start=b""):
    """10 GiB that take no block of the disk."""
    path.write_bytes(start)
    os.truncate(path, 10 * 2**30)


def huge(path, original):
    """A tensor file whose last tensor has a billion columns, of zeros that take no block of the disk."""
    claim = json.loads(outer_header(original))
    tensor = max((name for name in claim if name != "__metadata__"), key=lambda name: claim[name]["data_offsets"])
    begin, rows = claim[tensor]["data_offsets"][0], claim[tensor]["shape"][0]
    end = begin + rows * 10**9 * {"F32": 4, "F64": 8, "I64": 8}[claim[tensor]["dtype"]]
    claim[tensor] |= {"shape": [rows, 10**9], "data_offsets": [begin, end]}
    start = json.dumps(claim).encode()
    path.write_bytes(with_outer_header(original, start))
    os.truncate(path, 8 + len(start) + end)


def main():
    sample = Sample(sys.argv[1])
    grid, table, locked = (sample.path / name for name in ("grid.json", "models.csv", "lock"))
    state, history = sample.file("checkpoints/state-*"), sample.path / "history.safetensors"
    columns, objects = sample.files[table].splitlines()[0], b'{"schema":1,"models":['
    bombs = {
        "a grid of 10 GB": (lambda: sparse(grid), load),
        "many objects": (lambda: grid.write_bytes(objects + b"{}," * 2**21 + b"0]}"), load),
        "a long text": (lambda: grid.write_bytes(b'"' + b"a" * (2**26 - 2) + b'"'), load),
        "a table of 10 GB": (lambda: sparse(table), load),
        "many cells": (lambda: table.write_bytes(b"," * 2**25), load),
        "many rows": (lambda: table.write_bytes(columns + (b"\n" + b"," * 25) * (2**18 - 1)), load),
        "a lock of 10 GB": (lambda: sparse(locked), lock),
        "a header of 10 GB": (lambda: sparse(state, (10**10).to_bytes(8, "little")), resume),
        "a header of 2**63 bytes": (lambda: state.write_bytes(b"\xff" * 7 + b"\x7f"), resume),
        "a state of 10 GB": (lambda: huge(state, sample.files[state]), resume),
        "a history of 10 GB": (lambda: huge(history, sample.files[history]), load),
    }
    for name, (make, read) in bombs.items():
        make()
        before, started, said = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                read(sample.path)
            except BadFile as error:
                said = str(error)
        said = said or " ".join(str(warning.message) for warning in caught)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps([name, said, grown, time.process_time() - started]), flush=True)
        sample.restore()


if __name__ == "__main__":
    main()
