"""A clock that a test moves, a meter that it invents, a recorded trace played back, and the fake NVML library."""

from __future__ import annotations

import csv
import math
import os
import random
import subprocess
import sys
import threading
import time as wall
from collections.abc import Callable
from pathlib import Path

from moe_gpu.energy_model import CalibrationPoint, EnergyModel
from moe_gpu.energy_monitor import Clock, EnergyMonitor
from moe_gpu.energy_work import LayerWork, ProductWork
from moe_gpu.nvml import NvmlError, Sample
from moe_gpu.results import EnergyMeasurement
from tests.stand_ins import compiled

ROOT = Path(__file__).resolve().parent.parent
STATIC_W, J_PER_FLOP, J_PER_BYTE = 120.0, 0.6e-12, 60e-12  # of an invented GPU
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

    def power_limit_w(self) -> float | None:
        return None

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


class WorldClock(MovedClock):
    """Time as it passes."""

    def __init__(self) -> None:
        self.listeners = []

    @property
    def now_ns(self) -> int:
        return wall.monotonic_ns()


def failing(error: Exception, begin_s: float = 0.0, end_s: float = math.inf):
    """A fault of an invented meter over a stretch of its time."""
    return lambda t: error if begin_s <= t < end_s else None


def moved_monitor(watts=300.0, tick_s: float = 0.1, **options) -> tuple[MovedClock, InventedMeter, EnergyMonitor]:
    """A monitor without a thread or a GPU: it reads after each step of its clock."""
    time = MovedClock()
    meter = InventedMeter(time, watts, tick_s)
    monitor = EnergyMonitor(meter, synchronise=False, clock=time.clock, background=False, **options)
    time.listeners.append(monitor.poll)
    return time, meter, monitor


def measured(
    time: MovedClock, monitor: EnergyMonitor, seconds: float = 5.0, name: str = "work", **options
) -> EnergyMeasurement:
    """A window in which time passes."""
    with monitor.window(name, **options) as window:
        time.pass_s(seconds)
    return window.measurement


def threads() -> list[str]:
    """Names of the threads that monitors and samplers run now."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("moe_gpu-")]


def sample_at(meter: InventedMeter) -> Callable[[int], Sample]:
    """A `sample` for an invented meter."""
    return lambda at: Sample(
        at, meter.uuid, meter.scope, meter.power_instant_w(), None, None, meter.energy_mj(), meter.temperature_c()
    )


def true_energy(duration_s: float, flops: float, hbm_bytes: float) -> float:
    """What a GPU that obeys the model takes."""
    return STATIC_W * duration_s + J_PER_FLOP * flops + J_PER_BYTE * hbm_bytes


def points(noise: float = 0.0, seed: int = 0, trials: int = 4) -> list[CalibrationPoint]:
    """Windows of 5 s of a GPU that obeys the model, with relative noise."""
    chance = random.Random(seed)
    rates = {  # FLOP/s, bytes/s, anchor
        "idle": (0, 0, True),
        "copy": (0, 4e12, True),
        "product in L2": (7e14, 0, True),
        "experts, 1 rows each": (1e13, 3e12, False),
        "experts, 16 rows each": (1e14, 3e12, False),
        "experts, 256 rows each": (5e14, 1.5e12, False),
        "experts, 4096 rows each": (6.5e14, 0.5e12, False),
    }
    found = []
    for name, (flops, hbm_bytes, anchor) in rates.items():
        for _ in range(trials):
            energy = true_energy(5.0, 5 * flops, 5 * hbm_bytes) * chance.gauss(1, noise)
            found.append(CalibrationPoint(name, 5.0, energy, 5.0 * flops, 5.0 * hbm_bytes, anchor))
    return found


def simple_work(num_experts: int = 4, tile: int = 16, **changes) -> LayerWork:
    products = (ProductWork("up", 256, 128, tile, 200.0), ProductWork("down", 128, 128, tile, 256.0))
    return LayerWork(num_experts, 2, "bfloat16", 2, products, **changes)


def measured_window(energy_j: float | None = 700.0, duration_s: float = 5.0, **changes) -> EnergyMeasurement:
    common = dict(calls=1000, n_ticks=50, quality="ok", driver="999.99", gpu_uuid=UUID)
    return EnergyMeasurement("run", "work", duration_s, energy_j, **{**common, **changes})


MODEL = EnergyModel.fit(points(0.01), "bfloat16", UUID, "999.99")


def fake_nvml() -> Path:
    """The folder of a `libnvidia-ml.so.1` built from nvml_energy.c."""
    return compiled("nvml_energy.c", "libnvidia-ml.so.1").parent


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
