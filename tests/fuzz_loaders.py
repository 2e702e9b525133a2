"""A coverage-guided fuzzer on what reads a run directory: mutates sound files, and goes on from what reaches new code.

    pip install atheris && python tests/fuzz_loaders.py --minutes 10

Ends with an error at the first input with which a reader does anything but read the file or name it in one line, or
takes more than two minutes or 2 GiB; the input is in a file then: `python tests/fuzz_loaders.py FILE` reads it again.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["fastmono", "json", "csv"]):
    from loaders import KINDS, Sample


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("again", nargs="*", type=Path, metavar="FILE", help="inputs to read again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sample = Sample(Path(folder) / "run")
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for i, kind in enumerate(KINDS):  # the first byte says which file the others replace
            (corpus / str(i)).write_bytes(bytes([i]) + sample.part(kind))

        def read(data):
            if data:
                sample.read(KINDS[data[0] % len(KINDS)], data[1:])

        limits = [
            "-timeout=120",
            "-rss_limit_mb=2048",
            "-max_len=20000",
            "-len_control=0",
            "-keep_seed=1",
            f"-max_total_time={60 * arguments.minutes:.0f}",
        ]
        atheris.Setup([sys.argv[0], *limits, *map(str, arguments.again or [corpus])], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
