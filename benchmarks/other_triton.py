"""Another Triton than the one that is installed, in a folder of its own: what a user's PyTorch brings along.

`pip install --no-deps --target` puts it there once; a process that finds that folder first imports it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def folder_of(version: str) -> Path:
    """Where a version is unpacked."""
    return Path(tempfile.gettempdir()) / f"fastmono-triton-{version}-py{sys.version_info[0]}{sys.version_info[1]}"


def install(version: str) -> Path:
    """The folder of a version, which is filled if it is not there yet.

    Raises `ValueError` where it cannot be installed.
    """
    folder = folder_of(version)
    if not (folder / "triton").is_dir():
        print(f"installing Triton {version} into {folder}", file=sys.stderr, flush=True)
        partial = folder.with_name(folder.name + f".{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(partial)]
        done = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"Triton {version} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        partial.rename(folder)
    return folder


def run_with(version: str, command: Sequence[str]) -> int:
    """Run a command of Python with that Triton; returns its exit code."""
    paths = [str(install(version)), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *command], env=environment).returncode
