"""What the tests of faults share: a small grid, what an undisturbed run of it comes to, and processes to do harm to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import fastmono as fm

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--n-features", "16", "--d-embed", "6", "--n-neurons", "8", "24", "--batch-size", "16", "--feature-prob", "1/8",
    "--lr", "0.003", "0.03", "--init-bias", "0", "--bias-decay", "0", "--seed", "0", "1",
]  # fmt: skip


def grid(steps=40):
    """The grid that FLAGS ask for: eight models of two widths."""
    spec = fm.ModelSpec(n_features=16, d_embed=6, n_neurons=8, batch_size=16, feature_prob=1 / 8, steps=steps)
    return fm.preset("demo").override(
        n_features=[16], d_embed=[6], n_neurons=[8, 24], batch_size=[16], feature_prob=[1 / 8], lr=[0.003, 0.03],
        init_bias=[0.0], bias_decay=[0.0], seed=[0, 1], steps=[spec.steps],
    )  # fmt: skip


def command(out, *flags, steps=40):
    """The main job for that grid."""
    return [sys.executable, str(ROOT / "scripts" / "grid.py"), *FLAGS, "--steps", str(steps), "--no-plots",
            "--out", str(out), *flags]  # fmt: skip


def job(out, *flags, steps=40, **settings):
    """Run it to its end."""
    return subprocess.run(command(out, *flags, steps=steps), capture_output=True, text=True, timeout=600, **settings)


def results(path):
    """What must be the same bits: the tables, and the parameters after every step that all runs keep."""
    path = Path(path)
    return {name: (path / name).read_bytes() for name in ("models.csv", "history.safetensors")}


def wait_for(condition, seconds=600.0):
    """Until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def processes(pid, words):
    """The running descendants of a process whose command line has these words."""
    parents, found = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                parents[int(stat.parent.name)] = int(fields[1])
        except OSError:
            continue
    for child in parents:
        above = child
        while above in parents and above != pid:
            above = parents[above]
        try:
            said = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if above == pid and child != pid and words in said:
            found.append(child)
    return found


def is_alive(pid):
    """Whether a process runs."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
