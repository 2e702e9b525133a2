"""The pool of a Ray cluster. A Ray takes seconds to start: few tests, each in processes of its own."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from fault_cases import command, grid, is_alive, job, processes, results, wait_for

import fastmono as fm
from fastmono.engines import resolve
from fastmono.on_ray import Cluster, RayTasks, connect
from fastmono.store import RunDirectory
from fastmono.trainer import Options

STEPS = 6000
LONG = 1_000_000
"""Of runs that something is done to twice, or after seconds: most of a minute."""
HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install 'fastmono[ray]'")


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return results(fm.train(grid(STEPS), tmp_path_factory.mktemp("calm"), workers=1, quiet=True).path)


@pytest.fixture(scope="module")
def long_calm(tmp_path_factory):
    return results(fm.train(grid(LONG), tmp_path_factory.mktemp("calm"), workers=2, quiet=True).path)


@contextmanager
def started(out, *flags, steps):
    """A run over Ray, which does not outlive the test."""
    driver = subprocess.Popen(
        command(out, "--ray", *flags, steps=steps), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield driver
    finally:
        driver.kill()
        driver.communicate()


@needs_ray
def test_ray_gives_bitwise_what_this_process_gives_and_a_killed_worker_costs_nothing_else(calm, tmp_path):
    out = tmp_path / "run"
    with started(out, "--workers", "2", steps=STEPS) as driver:
        wait_for(lambda: list(out.glob("checkpoints/step-000000000512-*")), 120)
        workers = processes(driver.pid, "ray::run_task")
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    assert "models are trained again (try 1 failed): WorkerCrashedError" in said
    assert results(out) == calm
    assert not (out / "reports").exists()


def test_where_ray_is_not_installed_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'fastmono\[ray\]'"):
        fm.train(fm.ModelSpec(n_features=8, d_embed=3, n_neurons=4, steps=2), tmp_path, ray="local")
    with pytest.raises(ValueError, match="Ray is not installed"):
        connect("auto", 2)


@needs_ray
def test_a_cluster_that_does_not_answer_is_an_error_of_one_line():
    with pytest.raises(ValueError, match=r"^ray='auto': no cluster was found \(") as refused:
        connect("auto", 2)  # none has been started here
    assert "\n" not in str(refused.value)


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
second = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.readline()
second.kill_raylet()
print("killed", flush=True)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.fixture
def two_machines():
    """A Ray cluster of two nodes of one core, on this machine: its address, and what kills the second's raylet."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = process.stdout.readline().strip()

    def kill_second():
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "killed\n"

    yield address, kill_second, process.pid
    process.communicate("\n", timeout=60)


@needs_ray
@pytest.mark.slow
def test_in_a_cluster_a_killed_worker_and_then_a_killed_raylet_cost_only_time(two_machines, long_calm, tmp_path):
    address, kill_second, head = two_machines

    def tasks():
        return processes(head, "ray::run_task")

    with started(tmp_path, address, "--save-every", "1", steps=LONG) as driver:
        wait_for(lambda: len(tasks()) == 2 and list(tmp_path.glob("checkpoints/step-000000000512-*")), 300)
        os.kill(tasks()[0], signal.SIGKILL)
        wait_for(lambda: '"kind": "retry"' in (tmp_path / "events.jsonl").read_text(), 60)
        wait_for(lambda: len(tasks()) == 2, 60)
        kill_second()
        said, _ = driver.communicate(timeout=500)
    assert driver.returncode == 0, said
    retries = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines() if '"retry"' in line]
    assert "WorkerCrashedError" in retries[0]["text"] and len(retries) >= 2, retries
    assert results(tmp_path) == long_calm


@needs_ray
@pytest.mark.slow
def test_ctrl_c_in_a_ray_run_saves_the_state_of_every_task_and_leaves_no_process(tmp_path):
    with started(tmp_path, "--workers", "2", steps=10**7) as driver:
        # A task is asked after each of its pages, which end with a checkpoint: by now the next is seconds away.
        wait_for(lambda: len(list(tmp_path.glob("checkpoints/step-000000262144-*"))) == 2, 120)
        offspring = processes(driver.pid, "ray")
        driver.send_signal(signal.SIGINT)
        said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 1 and "the state is saved" in said.splitlines()[-1]
    wait_for(lambda: not any(map(is_alive, offspring)), 60)
    newest = {
        path.stem.split("-")[1]: int(path.stem.split("-")[2]) for path in sorted(tmp_path.glob("checkpoints/state-*"))
    }
    assert len(newest) == 2 and all(step & (step - 1) for step in newest.values()), newest


@needs_ray
@pytest.mark.slow
def test_when_the_raylet_of_a_local_ray_is_killed_the_run_ends_whole_or_the_same_command_continues_it(
    long_calm, tmp_path
):
    with started(tmp_path, "--workers", "2", steps=LONG) as driver:
        wait_for(lambda: list(tmp_path.glob("checkpoints/step-000000000512-*")), 120)
        (raylet,) = processes(driver.pid, "raylet/raylet")
        os.kill(raylet, signal.SIGKILL)
        said, _ = driver.communicate(timeout=300)
    # Tasks that run already go on without it; one that is to be begun needs it.
    assert driver.returncode == 0 or said.splitlines()[-1].endswith("the same command continues the run"), said
    assert job(tmp_path, "--workers", "2", steps=LONG).returncode == 0
    assert results(tmp_path) == long_calm


class MadeUpRay:
    """A cluster's resources, without a cluster."""

    def cluster_resources(self):
        return {"CPU": 64.0, "GPU": 8.0, "memory": 2.0**38}

    def remote(self, **options):
        self.options = options
        return lambda function: function


def test_on_a_cluster_with_gpus_a_task_asks_for_one_and_as_many_run_as_there_are(tmp_path):
    ray = MadeUpRay()
    cluster = Cluster(ray, "auto", local=False)
    machine = cluster.machine()
    assert (machine.cores, machine.devices, machine.memory) == (64, 8, 2**38)
    assert resolve("auto", "auto", gpus_elsewhere=True)[:2] == ("triton", "bf16")
    pool = RayTasks(RunDirectory(tmp_path), Options("triton", "bf16"), cluster)
    assert pool.slots == 8 and ray.options["num_gpus"] == 1 and ray.options["max_retries"] == 0
    assert RayTasks(RunDirectory(tmp_path), Options("cpu", "fp32"), cluster).slots == 64
    assert ray.options["num_cpus"] == 1 and "num_gpus" not in ray.options
