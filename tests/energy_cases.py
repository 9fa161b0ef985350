"""A clock that a test moves, a meter that it invents, a recorded trace played back, and the fake NVML library."""

from __future__ import annotations

import csv
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_gpu.energy_monitor import Clock, EnergyMonitor
from moe_gpu.nvml import NvmlError, Sample

ROOT = Path(__file__).resolve().parent.parent
UUID = "GPU-00000000-0000-0000-0000-00000000fa4e"


class MovedClock:
    """Time passes only by `pass_s`, in steps of `step_s`, after each of which whatever listens is called."""

    def __init__(self, step_s: float = 0.005) -> None:
        self.now_ns, self.step_ns = 10**12, int(step_s * 1e9)
        self.listeners: list[Callable[[], object]] = []

    def pass_s(self, seconds: float) -> None:
        end = self.now_ns + round(seconds * 1e9)
        while self.now_ns < end:
            self.now_ns = min(end, self.now_ns + self.step_ns)
            for listen in self.listeners:
                listen()

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now_ns, self.pass_s)


class InventedMeter:
    """A GPU of `watts(t)` (seconds since the clock began) whose counter ticks every `tick_s`."""

    uuid, scope, name = UUID, "gpu", "Invented GPU, no real one"

    def __init__(self, time: MovedClock, watts: Callable[[float], float] | float = 300.0, tick_s: float = 0.1) -> None:
        self.time, self.tick_s, self.begin_ns = time, tick_s, time.now_ns
        self.watts = watts if callable(watts) else lambda t: watts
        self.faults: dict[str, Callable[[float], Exception | None]] = {}  # by reading
        self.reasons, self.shared, self.closed = 0, False, False
        self._ticks, self._joules, self.offset_j = 0, 1000.0, 0.0

    @property
    def now_s(self) -> float:
        return (self.time.now_ns - self.begin_ns) / 1e9

    def _may_fail(self, reading: str) -> None:
        error = self.faults.get(reading, lambda t: None)(self.now_s)
        if error is not None:
            raise error

    def energy_mj(self) -> int:
        while (self._ticks + 1) * self.tick_s <= self.now_s:
            self._joules += self.watts(self._ticks * self.tick_s) * self.tick_s
            self._ticks += 1
        self._may_fail("energy")
        return round((self._joules + self.offset_j) * 1000)

    def power_instant_w(self) -> float:
        self._may_fail("power")
        return self.watts(self.now_s)

    def temperature_c(self) -> int:
        self._may_fail("temperature")
        return 40 + int(self.now_s)

    def utilisation_pct(self) -> tuple[int, int]:
        self._may_fail("utilisation")
        return 97, 41

    def clocks_event_reasons(self) -> int:
        self._may_fail("reasons")
        return self.reasons

    def shared_with_others(self) -> bool | None:
        return self.shared

    def driver_version(self) -> str | None:
        return "999.99"

    def close(self) -> None:
        self.closed = True


class RecordedMeter(InventedMeter):
    """Plays back the samples that `PowerSampler.to_csv` wrote: every reading is that of the newest sample by then."""

    def __init__(self, time: MovedClock, path: Path) -> None:
        super().__init__(time)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        first = int(rows[0]["timestamp_ns"])
        self.uuid, self.scope = rows[0]["gpu_uuid"], rows[0]["scope"]
        self.rows = [(int(row["timestamp_ns"]) - first, row) for row in rows]
        self.duration_s = self.rows[-1][0] / 1e9
        self._at = 0

    def _value(self, name: str) -> float:
        while self._at + 1 < len(self.rows) and self.rows[self._at + 1][0] <= self.time.now_ns - self.begin_ns:
            self._at += 1
        text = self.rows[self._at][1][name]
        if text == "":
            raise NvmlError("NO_DATA", f"{name} in the recorded trace")
        return float(text)

    def energy_mj(self) -> int:
        return int(self._value("energy_counter_mj"))

    def power_instant_w(self) -> float:
        return self._value("power_instant_w")

    def temperature_c(self) -> int:
        return int(self._value("temperature_c"))

    def utilisation_pct(self) -> tuple[int, int]:
        return int(self._value("gpu_util_pct")), int(self._value("mem_util_pct"))

    def clocks_event_reasons(self) -> int:
        return int(self._value("clocks_event_reasons"))


def moved_monitor(watts=300.0, tick_s: float = 0.1, **options) -> tuple[MovedClock, InventedMeter, EnergyMonitor]:
    """A monitor without a thread or a GPU: it reads after each step of its clock."""
    time = MovedClock()
    meter = InventedMeter(time, watts, tick_s)
    monitor = EnergyMonitor(meter, synchronise=None, clock=time.clock, background=False, **options)
    time.listeners.append(monitor.poll)
    return time, meter, monitor


def sample_at(meter: InventedMeter) -> Callable[[int], Sample]:
    """A `sample` for an invented meter."""
    return lambda at: Sample(
        at, meter.uuid, meter.scope, meter.power_instant_w(), None, None, meter.energy_mj(), meter.temperature_c()
    )


@functools.cache
def fake_nvml() -> Path:
    """The folder of a `libnvidia-ml.so.1` built from fake_nvml.c; the test is skipped where there is no C compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not compiler or not shutil.which(compiler):
        pytest.skip("no C compiler to build the fake NVML with")
    folder = Path(tempfile.mkdtemp(prefix="fake_nvml_"))
    library = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(ROOT / "tests" / "fake_nvml.c")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


# What a program run by `with_fake_nvml` begins with: the library, and how to steer it.
STEER = """
import ctypes, json, sys
from moe_gpu import nvml
fake = ctypes.CDLL("libnvidia-ml.so.1")
fake.fake_nvml_get.restype = ctypes.c_longlong
def put(**values):
    for name, value in values.items():
        assert fake.fake_nvml_set(name.encode(), ctypes.c_longlong(value)) == 0, name
def get(name):
    return fake.fake_nvml_get(name.encode())
"""


def with_fake_nvml(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process of its own that finds the fake NVML library; it must end well."""
    variables = {**os.environ, "LD_LIBRARY_PATH": str(fake_nvml()), "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [sys.executable, "-c", STEER + code, *arguments], capture_output=True, text=True, cwd=ROOT, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done
