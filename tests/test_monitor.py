"""What is read of a GPU, from a stand-in for NVML: there is no GPU where these tests run."""

import sys
import types

import pytest
import torch

import fastmono as fm
from fastmono.monitor import GpuMonitor

SPEC = fm.ModelSpec(n_features=12, d_embed=5, n_neurons=9, feature_prob=0.25, batch_size=24, steps=40, lr=0.01)


def nvml(missing=(), counts_energy=True):
    """A module like pynvml whose device has used 5 J more at each look; `missing` functions fail."""
    state = {"millijoules": 1_000_000}

    def energy(device):
        state["millijoules"] += 5000
        return state["millijoules"]

    functions = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetHandleByIndex": lambda i: "device",
        "nvmlDeviceGetUtilizationRates": lambda d: types.SimpleNamespace(gpu=87),
        "nvmlDeviceGetMemoryInfo": lambda d: types.SimpleNamespace(used=3 * 2**30),
        "nvmlDeviceGetPowerUsage": lambda d: 412_000, "nvmlDeviceGetTemperature": lambda d, kind: 56,
        "nvmlDeviceGetTotalEnergyConsumption": energy,
    }  # fmt: skip

    def fail(*_):
        raise RuntimeError("Not Supported")

    for name in (*missing, *(() if counts_energy else ("nvmlDeviceGetTotalEnergyConsumption",))):
        functions[name] = fail
    return types.SimpleNamespace(NVML_TEMPERATURE_GPU=0, **functions)


@pytest.fixture
def install(monkeypatch):
    return lambda module: monkeypatch.setitem(sys.modules, "pynvml", module)


def test_readings_are_in_the_units_that_the_line_shows(install):
    install(nvml())
    monitor = GpuMonitor()
    assert monitor.note is None and monitor.line() == "GPU 87%  3.0 GiB  412 W  56 C"
    assert monitor.read()["joules"] == 10.0  # two looks since the start, 5 J each


def test_the_device_read_is_the_one_that_pytorch_uses_whatever_nvml_calls_the_first(install, monkeypatch):
    module, asked = nvml(), []
    module.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or "device"
    module.nvmlDeviceGetHandleByIndex = lambda i: pytest.fail("the first of the machine is not the first visible")
    install(module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid="c0ffee"))
    assert GpuMonitor().note is None and asked == ["GPU-c0ffee"]


def test_a_reading_that_is_not_supported_is_left_out(install):
    install(nvml(missing=["nvmlDeviceGetTemperature", "nvmlDeviceGetUtilizationRates"]))
    assert GpuMonitor().line() == "3.0 GiB  412 W"


def test_without_a_counter_energy_is_power_over_time(install, monkeypatch):
    install(nvml(counts_energy=False))
    clock = iter([100.0, 102.0, 105.0])
    monkeypatch.setattr("fastmono.monitor.time.monotonic", lambda: next(clock))
    monitor = GpuMonitor()
    monitor.read()
    assert monitor.read()["joules"] == pytest.approx(412 * 5)


@pytest.mark.parametrize("module", [None, nvml(missing=["nvmlInit"]), nvml(missing=["nvmlDeviceGetHandleByIndex"])])
def test_where_nvml_is_absent_or_fails_there_is_a_note_and_no_error(module, install):
    install(module)
    monitor = GpuMonitor()
    assert monitor.note.startswith("no GPU readings") and monitor.read() == {} and monitor.line() == ""
    monitor.close()


def test_energy_goes_to_the_telemetry_of_each_model_and_never_to_its_results(install, tmp_path, monkeypatch):
    from fastmono import runner

    grid = fm.Grid(SPEC, lr=[0.01, 0.02])
    calm = fm.train(grid, tmp_path / "calm", workers=1, quiet=True)
    install(nvml())

    class Watched(runner.Session):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.monitor = GpuMonitor()

    monkeypatch.setattr(runner, "Session", Watched)
    run = fm.train(grid, tmp_path / "watched", workers=1, quiet=True)
    rows = [line.split(",") for line in (run.path / "telemetry.csv").read_text().splitlines()]
    joules = [float(row[rows[0].index("joules")]) for row in rows[1:]]
    assert joules[0] == joules[1] > 0
    assert (run.path / "models.csv").read_bytes() == (calm.path / "models.csv").read_bytes()
    assert torch.equal(run.losses, calm.losses)
