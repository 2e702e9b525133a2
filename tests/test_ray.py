"""The pool of a Ray cluster. A Ray takes seconds to start: few tests, each in processes of its own."""

import importlib.util
import os
import signal
import subprocess
import sys

import pytest
from fault_cases import command, job, processes, results, wait_for

import fastmono as fm
from fastmono.on_ray import connect

STEPS = 6000
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'fastmono[ray]'")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    out = tmp_path_factory.mktemp("calm") / "run"
    assert job(out, "--workers", "1", steps=STEPS).returncode == 0
    return results(out)


@needs_ray
def test_ray_gives_bitwise_what_this_process_gives_and_a_killed_worker_costs_nothing_else(calm, tmp_path):
    out = tmp_path / "run"
    driver = subprocess.Popen(
        command(out, "--ray", "--workers", "2", steps=STEPS), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: list(out.glob("checkpoints/step-000000000512-*")))
    workers = processes(driver.pid, "ray::run_task")
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    said, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    assert "models are trained again (try 1 failed): WorkerCrashedError" in said + errors
    assert results(out) == calm
    assert not (out / "reports").exists()


def test_where_ray_is_not_installed_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'fastmono\[ray\]'"):
        fm.train(fm.ModelSpec(n_features=8, d_embed=3, n_neurons=4, steps=2), tmp_path, ray="local")
    with pytest.raises(ValueError, match="Ray is not installed"):
        connect("auto", 2)


@needs_ray
def test_a_cluster_that_does_not_answer_ends_in_one_line(tmp_path):
    done = job(tmp_path / "run", "--ray", "auto")  # no cluster has been started here
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ray='auto': no cluster was found")
