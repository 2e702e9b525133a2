"""Utilisation, memory, power, temperature and energy of a GPU, by NVML. What NVML does not give is left out."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch


def handle(nvml: Any) -> Any:
    """The device that PyTorch computes on: NVML counts all of a machine, and knows nothing of CUDA_VISIBLE_DEVICES."""
    with suppress(Exception):
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return nvml.nvmlDeviceGetHandleByIndex(0)


class GpuMonitor:
    """Reads the device in use.

    Attributes:
        note: why there is nothing to read, in one line; None where there is.
    """

    def __init__(self) -> None:
        self.note: str | None = None
        self._nvml: Any = None
        self._joules_at_start: float | None = None
        self._watt_seconds, self._last = 0.0, time.monotonic()
        try:
            import pynvml

            pynvml.nvmlInit()
            self._device = handle(pynvml)
            self._nvml = pynvml
        except Exception as error:  # not installed, no driver, no such device: a note, not an error
            self.note = f"no GPU readings ({type(error).__name__}: {error})"
            return
        self._joules_at_start = self._joules()

    def _joules(self) -> float | None:
        with suppress(Exception):  # cards before Volta do not count energy
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3
        return None

    def read(self) -> dict[str, float]:
        """What is known now: utilisation (0 to 1), memory (GiB), power (W), temperature (degrees C), joules so far."""
        found: dict[str, float] = {}
        if self._nvml is None:
            return found
        nvml, device = self._nvml, self._device
        with suppress(Exception):
            found["utilisation"] = nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
        with suppress(Exception):
            found["memory_GiB"] = nvml.nvmlDeviceGetMemoryInfo(device).used / 2**30
        with suppress(Exception):
            found["watts"] = nvml.nvmlDeviceGetPowerUsage(device) / 1e3
        with suppress(Exception):
            found["celsius"] = float(nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU))
        now = time.monotonic()
        self._watt_seconds += found.get("watts", 0.0) * (now - self._last)
        self._last = now
        joules = self._joules()
        if joules is not None and self._joules_at_start is not None:
            found["joules"] = joules - self._joules_at_start
        elif "watts" in found:
            found["joules"] = self._watt_seconds
        return found

    def line(self) -> str:
        """The readings as the end of a progress line; empty where there are none."""
        found = self.read()
        shown = {"utilisation": "GPU {:.0%}", "memory_GiB": "{:.1f} GiB", "watts": "{:.0f} W", "celsius": "{:.0f} C"}
        return "  ".join(text.format(found[name]) for name, text in shown.items() if name in found)

    def close(self) -> None:
        """Let NVML go."""
        if self._nvml is not None:
            with suppress(Exception):
                self._nvml.nvmlShutdown()
            self._nvml = None
