"""Clocks, power, temperature and throttle reasons while arms run, read through NVML without root."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

INTERVAL_S = 0.2
REASONS = {  # nvmlClocksEventReason*; idle (1) and application clocks (2) are no reason to worry
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
Sample = tuple[float, int, float, int, int]  # seconds since start, SM MHz, watts, degrees C, reasons


class Telemetry:
    """A thread that samples the current GPU. Without NVML or a GPU it records nothing and says why."""

    def __init__(self, device: torch.device):
        self.samples: list[Sample] = []
        self.problem: str | None = None
        self._handle: Any = None
        self._nvml: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start = time.perf_counter()
        if device.type != "cuda":
            self.problem = "no GPU"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except Exception as error:
            self.problem = f"no NVML ({error})"

    def __enter__(self) -> Telemetry:
        if self._handle is not None:
            self._thread = threading.Thread(target=self._loop, daemon=True, name="bench-telemetry")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _loop(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self.samples.append(self.read())
            except Exception as error:
                self.problem = f"NVML stopped answering ({error})"
                return

    def read(self) -> Sample:
        """One sample."""
        nvml, handle = self._nvml, self._handle
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        reasons = reasons or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        return (
            round(time.perf_counter() - self._start, 2),
            int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            round(nvml.nvmlDeviceGetPowerUsage(handle) / 1e3, 1),
            int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            int(reasons(handle)),
        )

    def mark(self) -> int:
        """A position to summarise from."""
        return len(self.samples)

    def since(self, mark: int) -> dict[str, Any] | None:
        """Summary of the samples after a mark; None where there are none."""
        return summarise(self.samples[mark:])


def summarise(samples: list[Sample]) -> dict[str, Any] | None:
    """Ranges and the union of the throttle reasons."""
    if not samples:
        return None
    clocks = sorted(sample[1] for sample in samples)
    seen = 0
    for sample in samples:
        seen |= sample[4]
    return {
        "sm_mhz": [clocks[0], clocks[len(clocks) // 2], clocks[-1]],
        "watts": max(sample[2] for sample in samples),
        "celsius": max(sample[3] for sample in samples),
        "throttle": [name for bit, name in REASONS.items() if seen & bit],
    }
