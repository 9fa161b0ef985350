"""The GPU's energy counter where it ticks: the thread that reads it, and watts as the slope over the ticks.

The counter moves about every 100 ms. Its value at a moment is therefore up to a tick old, but the moment at which it
moves is not: a window's power is the slope of a line through its ticks, which no edge cuts.
"""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moe_gpu.nvml import GpuLostError, NotSupportedError, NvmlError

# How long a reading may have been away for a tick that it finds to count: its moment is known to half of that.
MAX_AWAY_S = 0.05
# Between readings of power where there is no counter, and of utilisation and clocks: as often as they are renewed.
SLOW_S = 0.1
KEPT = 16384  # readings of a kind, about half an hour of ticks at full resolution


@dataclass(frozen=True)
class Clock:
    """Monotonic time and sleep; tests give their own."""

    now_ns: Callable[[], int] = time.monotonic_ns
    sleep: Callable[[float], None] = time.sleep


class Meter(Protocol):
    """What is read of a GPU; `nvml.Device`, or a recorded trace that is played back."""

    uuid: str
    scope: str

    def energy_mj(self) -> int: ...

    def power_instant_w(self) -> float: ...

    def temperature_c(self) -> int: ...

    def utilisation_pct(self) -> tuple[int, int]: ...

    def clocks_event_reasons(self) -> int: ...

    def shared_with_others(self) -> bool | None: ...

    def driver_version(self) -> str | None: ...

    def power_limit_w(self) -> float | None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Slope:
    """Watts through a window's ticks; the standard error is None for fewer than three."""

    watts: float
    stderr_w: float | None


def fit_slope(times_s: Sequence[float], joules: Sequence[float]) -> Slope | None:
    """The least-squares slope, None for fewer than two ticks.

    The standard error allows for scatter that lasts over several ticks (Newey and West, Econometrica 55, 1987), and is
    at least the distance to the mean power between the first and the last tick: where the load changes inside the
    window, a line is not what it took.
    """
    n = len(times_s)
    if n < 2:
        return None
    middle, level = sum(times_s) / n, sum(joules) / n
    x = [t - middle for t in times_s]
    spread = sum(v * v for v in x)
    if spread == 0:
        return None
    slope = sum(v * (e - level) for v, e in zip(x, joules, strict=True)) / spread
    if n < 3:
        return Slope(slope, None)
    score = [v * (e - level - slope * v) for v, e in zip(x, joules, strict=True)]
    own = sum(u * u for u in score)
    lags = min(n - 2, max(1, int(4 * (n / 100) ** (2 / 9))))
    total = own + 2 * sum(
        (1 - lag / (lags + 1)) * sum(a * b for a, b in zip(score[lag:], score, strict=False))
        for lag in range(1, lags + 1)
    )
    scatter = math.sqrt(max(total, own) * n / (n - 2)) / spread
    ends = (joules[-1] - joules[0]) / (times_s[-1] - times_s[0])
    return Slope(slope, max(scatter, abs(slope - ends)))


@dataclass
class Readings:
    """What the reader has seen since the oldest open window began; moments in nanoseconds of its clock, rising."""

    ticks: list[tuple[int, float]] = field(default_factory=list)  # when, joules
    resets: list[tuple[int, float]] = field(default_factory=list)  # when, joules
    faults: list[tuple[int, str]] = field(default_factory=list)  # when, NVML's name
    slow: list[tuple[int, int | None, tuple[int, int] | None]] = field(default_factory=list)  # when, reasons, busy

    def since(self, begin_ns: int, end_ns: int) -> Readings:
        """The part from `begin_ns` to `end_ns`."""

        def part(items: list[Any]) -> list[Any]:
            first = bisect.bisect_left(items, begin_ns, key=_moment)
            return items[first : bisect.bisect_right(items, end_ns, key=_moment)]

        return Readings(part(self.ticks), part(self.resets), part(self.faults), part(self.slow))

    def thin(self) -> None:
        """Of lists longer than KEPT, drop every second item of the older half: a window may be open for days.

        The first stays, from which a window's mean power is taken.
        """
        for items in (self.ticks, self.resets, self.faults):
            if len(items) > KEPT:
                del items[1 : KEPT // 2 : 2]
        if len(self.slow) > KEPT:  # of two the later stays, with what held the clocks in either
            for index in range(0, KEPT // 2, 2):
                (_, first, _), (when, second, busy) = self.slow[index : index + 2]
                both = None if first is None and second is None else (first or 0) | (second or 0)
                self.slow[index + 1] = (when, both, busy)
            del self.slow[: KEPT // 2 : 2]


def _moment(item: tuple[int, Any]) -> int:
    return item[0]


class TickReader:
    """Reads a meter every `poll_s` in one daemon thread while `running`, and keeps where the counter moved.

    Without a counter (`source` is then "integrated") it adds up power instead. A reading that fails is a fault and the
    reading goes on; a lost GPU ends it, and `lost` says how. background=False: nobody reads but `poll`.
    """

    def __init__(self, meter: Meter, poll_s: float, clock: Clock, background: bool) -> None:
        self.meter, self.poll_s, self.clock, self.background = meter, poll_s, clock, background
        self.source = "counter"
        self.lost: str | None = None
        self.readings = Readings()
        self._lock = threading.RLock()
        self._last: tuple[int, float] | None = None  # when, and the counter or the watts
        self._has_counter = False
        self._sum_j = 0.0
        self._last_slow_ns: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Forget what was read before, and read until `stop`."""
        with self._lock:
            self.readings, self._last, self._last_slow_ns = Readings(), None, None
        if self.background and self.lost is None and self._thread is None:
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=_read_until, args=(self._stop, self.poll, self.poll_s), name="moe_gpu-energy", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End the thread, if there is one; what was read stays."""
        thread, self._thread = self._thread, None
        self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=1)

    def after_fork(self) -> None:
        """In a child: its parent's thread and lock are not here."""
        self._lock, self._thread = threading.RLock(), None
        self._stop.set()

    def poll(self) -> bool:
        """Read once; False once the GPU is lost."""
        with self._lock:
            if self.lost is not None:
                return False
            try:
                self._poll_slow()
                if self.source == "counter":
                    self._poll_counter()
                else:
                    self._poll_power()
            except GpuLostError as error:
                self.lost = str(error)
                self.readings.faults.append((self.clock.now_ns(), error.name))
                return False
            except NvmlError as error:
                self.readings.faults.append((self.clock.now_ns(), error.name))
            self.readings.thin()
            return True

    def read(self, begin_ns: int, end_ns: int) -> Readings:
        """What was seen from one moment to another."""
        with self._lock:
            return self.readings.since(begin_ns, end_ns)

    def forget_before(self, begin_ns: int) -> None:
        """Drop what no open window will ask for."""
        with self._lock:
            self.readings = self.readings.since(begin_ns, self.clock.now_ns())

    def _poll_counter(self) -> None:
        try:
            joules = self.meter.energy_mj() / 1000
        except NotSupportedError:
            if self._has_counter:  # it was there: this is a fault, and the two sources do not mix
                raise
            self.source, self._last = "integrated", None
            self._poll_power()
            return
        self._has_counter = True
        now = self.clock.now_ns()
        if self._last is not None:
            before_ns, before_j = self._last
            if joules < before_j:
                self.readings.resets.append((now, joules))
            elif joules > before_j and now - before_ns <= MAX_AWAY_S * 1e9:
                self.readings.ticks.append(((before_ns + now) // 2, joules))
        self._last = now, joules

    def _poll_power(self) -> None:
        now = self.clock.now_ns()
        if self._last is not None and now - self._last[0] < SLOW_S * 1e9:
            return
        watts = self.meter.power_instant_w()
        if self._last is not None:
            self._sum_j += (watts + self._last[1]) / 2 * (now - self._last[0]) / 1e9
        self.readings.ticks.append((now, self._sum_j))
        self._last = now, watts

    def _poll_slow(self) -> None:
        now = self.clock.now_ns()
        if self._last_slow_ns is not None and now - self._last_slow_ns < SLOW_S * 1e9:
            return
        self._last_slow_ns = now
        self.readings.slow.append((now, known(self.meter.clocks_event_reasons), known(self.meter.utilisation_pct)))


def known(reading: Callable[[], object]):
    """A reading, None where it fails; a lost GPU is passed on."""
    try:
        return reading()
    except GpuLostError:
        raise
    except NvmlError:
        return None


def _read_until(stop: threading.Event, poll: Callable[[], bool], poll_s: float) -> None:
    while not stop.wait(poll_s):
        if not poll():
            return
