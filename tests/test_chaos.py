"""Many models, and many faults at once: `python -m pytest -m slow tests/test_chaos.py`."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_cases import ROOT

import fastmono as fm

MANY = """
import sys, fastmono as fm
from fastmono import plan
plan.SHARD_SECONDS = 0.25  # so that these seconds have as many shards as a run of hours
spec = fm.ModelSpec(n_features=8, d_embed=3, n_neurons=4, batch_size=8, feature_prob=.25, steps=16)
fm.train(fm.Grid(spec, lr=[.001, .003, .01, .03], seed=range(500)), sys.argv[1], workers=2, quiet=True, save_every=1e9)
"""


def resident(pid):
    """Bytes of memory that a process holds."""
    try:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    except (OSError, TypeError):
        return 0


@pytest.mark.slow
def test_thirty_faults_at_random_leave_a_hundred_models_complete_and_bitwise_right(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--seed", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 of 100 models are complete; bitwise the calm run: yes" in done.stdout
    assert "all models were complete after" not in done.stdout, "the run ended before the faults did"


@pytest.mark.slow
def test_two_thousand_models_finish_with_the_drivers_memory_flat(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", MANY, str(tmp_path)])
    sizes = []
    while process.poll() is None:
        log = tmp_path / "events.jsonl"
        ended = log.read_text().count('"finished"') if log.exists() else 0
        sizes.append((ended, resident(process.pid)))
        time.sleep(0.25)
    assert process.returncode == 0
    run = fm.load_run(tmp_path)
    assert len(run) == 2000 and {row["status"] for row in run.table} == {"done"}
    shards = sizes[-1][0]
    assert shards >= 20, "too few shards to say anything"
    early = max(size for ended, size in sizes if ended <= shards / 4)
    late = max(size for ended, size in sizes if ended > shards / 4)
    # What grows with the models that are done is the table and the listing of their states: kilobytes a model.
    assert late - early < 2000 * 8 * 2**10, (early, late)
