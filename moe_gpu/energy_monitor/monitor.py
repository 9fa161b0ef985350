"""EnergyMonitor: the joules of a GPU over named windows, per token and per expert; never 0 for unknown."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_gpu.energy_monitor.ticks import Clock, Meter, Readings, TickReader, fit_slope, known
from moe_gpu.files import write_atomically
from moe_gpu.nvml import SLOWED, Device, GpuLostError, NvmlUnavailableError
from moe_gpu.results import EnergyMeasurement

logger = logging.getLogger("moe_gpu")

ENOUGH_TICKS = 20
KEPT_WINDOWS = 4096
# Share of a window that failed readings may leave unseen at its ends (without a counter: anywhere in it).
MAX_UNSEEN = 0.2
MEASUREMENT_COLUMNS = (
    *("run_id", "window", "duration_s", "energy_j", "stderr_j", "idle_w", "net_energy_j", "tokens"),
    *("joules_per_token", "tokens_per_joule", "sm_count", "temp_start_c", "temp_end_c", "n_ticks"),
    *("source", "scope", "quality", "driver"),
)


class EnergyUnavailableError(NvmlUnavailableError):
    """The energy of this device cannot be read; the message names the cause."""


def device_uuid(device: Any = None) -> str | None:
    """The UUID by which NVML knows a torch device (or its name or index); a UUID is itself.

    None, for the first GPU that NVML lists, where `device` is None and PyTorch sees no GPU. Raises
    EnergyUnavailableError for a device that is no NVIDIA GPU.
    """
    if isinstance(device, str) and device.startswith(("GPU-", "MIG-")):
        return device
    import torch

    if device is None and not torch.cuda.is_available():
        return None
    try:
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
    except RuntimeError as error:
        raise EnergyUnavailableError(f"device={device!r} is neither a device of PyTorch nor a GPU's UUID") from error
    if chosen.type != "cuda":
        raise EnergyUnavailableError(f"energy is read from the NVIDIA driver, and device={device!r} is no NVIDIA GPU")
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise EnergyUnavailableError(f"device={device!r}: PyTorch sees {torch.cuda.device_count()} GPUs")
    return f"GPU-{torch.cuda.get_device_properties(chosen).uuid}"


def open_meter(device: Any = None) -> Meter:
    """The device, open for readings; EnergyUnavailableError where NVML or the device is not there."""
    try:
        name = device_uuid(device)
        try:
            return Device(name)
        except NvmlUnavailableError:
            # PyTorch names a MIG device by the UUID that NVML knows with another prefix.
            if name is None or not name.startswith("GPU-") or device == name:
                raise
            return Device(name.replace("GPU-", "MIG-", 1))
    except EnergyUnavailableError:
        raise
    except NvmlUnavailableError as error:
        raise EnergyUnavailableError(str(error)) from error


def _wait_for(device: Any) -> None:
    """Wait for a torch device, or for the current GPU where it is named otherwise, if PyTorch has begun to use one."""
    import torch

    if torch.cuda.is_initialized():
        named = isinstance(device, (int, torch.device)) or (isinstance(device, str) and device.startswith("cuda"))
        torch.cuda.synchronize(device if named else None)


@dataclass
class Window:
    """An open window; what ran in it may be told until it ends. `measurement` is there once it has ended."""

    name: str
    begin_ns: int
    temp_start_c: float | None
    shared: bool | None
    tokens: int | None = None
    calls: int | None = None
    sm_count: int | None = None
    spoiled: str | None = None
    measurement: EnergyMeasurement | None = None


@dataclass
class _Totals:
    """Sums over all ended windows, kept apart so that old windows may be forgotten."""

    tokens: int | None = None
    without_energy: int = 0
    counted: int = 0  # windows with tokens and energy; the sums below are of these
    counted_tokens: int = 0
    energy_j: float = 0.0
    variance_j2: float | None = 0.0

    def add(self, m: EnergyMeasurement) -> None:
        if m.tokens is not None:
            self.tokens = (self.tokens or 0) + m.tokens
        if m.energy_j is None:
            self.without_energy += 1
        elif m.tokens:
            self.counted += 1
            self.counted_tokens += m.tokens
            self.energy_j += m.energy_j
            if self.variance_j2 is not None:
                self.variance_j2 = None if m.stderr_j is None else self.variance_j2 + m.stderr_j**2


@dataclass
class _Expert:
    tokens: float = 0.0
    energy_j: float | None = None
    counted_tokens: float = 0.0  # of the executions whose energy is known
    executions: int = 0
    methods: set[str] = field(default_factory=set)


class EnergyMonitor:
    """Measures windows on the energy counter of one GPU; windows nest and overlap, each its own measurement.

    device: a torch device, its name or index, a UUID (`GPU-...`, `MIG-...`), or an open meter; None: the current GPU.
    on_unavailable: "raise" EnergyUnavailableError, or "none": every window's energy is then None, and says why.
    While a window is open one daemon thread reads the counter every `poll_s`; nothing that NVML does wrong is raised
    from a window. synchronise: wait for the GPU (the current one, where `device` is a UUID) where a window begins and
    ends, so that it holds its own work alone.
    After a fork the child's windows are its own; `close`, or the end of the program, ends the thread. Begin and end
    windows from one thread.
    background=False: nobody reads but `poll`.
    """

    def __init__(
        self,
        device: Any = None,
        on_unavailable: str = "raise",
        *,
        poll_s: float = 0.01,
        synchronise: bool = True,
        clock: Clock = Clock(),  # noqa: B008 frozen
        background: bool = True,
        run_id: str | None = None,
    ) -> None:
        if on_unavailable not in ("raise", "none"):
            raise ValueError(f"on_unavailable={on_unavailable!r} is not one of raise, none")
        if not poll_s > 0:
            raise ValueError(f"poll_s={poll_s} must be positive")
        self.clock, self.run_id = clock, run_id or uuid.uuid4().hex[:12]
        self.reason: str | None = None
        self.idle_w: float | None = None
        self.uuid: str | None = None
        self.scope: str | None = None
        self.driver: str | None = None
        self.power_limit_w: float | None = None
        self.measurements: deque[EnergyMeasurement] = deque(maxlen=KEPT_WINDOWS)
        self._totals = _Totals()
        self._synchronise = synchronise
        self._device, self._poll_s, self._background = device, poll_s, background
        self._windows: list[Window] = []
        self._experts: dict[tuple[int, int], _Expert] = {}
        self._reader: TickReader | None = None
        self._warned = False
        self._pid = os.getpid()
        try:
            self._open()
        except EnergyUnavailableError as error:
            if on_unavailable == "raise":
                raise
            self.reason = str(error)

    def _open(self) -> None:
        meter = self._device if hasattr(self._device, "energy_mj") else open_meter(self._device)
        self.uuid, self.scope, self.driver = meter.uuid, meter.scope, meter.driver_version()
        self.power_limit_w = meter.power_limit_w()
        self._meter = meter
        self._reader = TickReader(meter, self._poll_s, self.clock, self._background)
        self._end = weakref.finalize(self, _close, self._reader, meter)

    @property
    def available(self) -> bool:
        """Whether windows can be measured; `reason` says why not."""
        return self._reader is not None and self._reader.lost is None

    def __enter__(self) -> EnergyMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and let the driver go; windows from now on measure nothing."""
        if self._reader is not None:
            self._end()
            self._reader, self.reason = None, "the monitor is closed"

    def poll(self) -> None:
        """Read the counter now; for a monitor without a thread."""
        if self._reader is not None:
            self._reader.poll()

    def wait_for_gpu(self) -> None:
        """Wait for what has been launched, as windows do at their ends; not with synchronise=False."""
        if self._synchronise:
            _wait_for(self._device)

    def begin_window(self, name: str) -> None:
        """Begin a window, after waiting for the GPU; `end_window` ends the innermost one of a name."""
        self._begin(name)

    def end_window(
        self, name: str, tokens: int | None = None, *, calls: int | None = None, sm_count: int | None = None
    ) -> EnergyMeasurement:
        """The measurement of the innermost open window of this name; ValueError where none is open.

        tokens, calls: how many ran in it; sm_count: on how many SMs.
        """
        self._after_fork()
        window = next((window for window in reversed(self._windows) if window.name == name), None)
        if window is None:
            open_now = ", ".join(window.name for window in self._windows) or "none"
            raise ValueError(f"window {name!r} is not open (open: {open_now}); begin it first")
        for key, value in (("tokens", tokens), ("calls", calls), ("sm_count", sm_count)):
            if value is not None:
                setattr(window, key, value)
        return self._finish(window)

    @contextmanager
    def window(self, name: str, tokens: int | None = None) -> Iterator[Window]:
        """A window around a block; yields the Window, whose `measurement` is there afterwards.

        A block that raises leaves no measurement.
        """
        window = self._begin(name)
        window.tokens = tokens
        try:
            yield window
        except BaseException:
            self._discard(window)
            raise
        self._after_fork()
        self._finish(window)

    def measure_idle(self, duration_s: float = 5.0) -> EnergyMeasurement:
        """What the GPU takes with nothing to do; windows ended from then on say what is above it."""
        with self.window("idle") as window:
            self.clock.sleep(duration_s)
        assert window.measurement is not None
        if window.measurement.energy_j is not None:
            self.idle_w = window.measurement.energy_j / window.measurement.duration_s
        return window.measurement

    def record_expert_execution(
        self, expert: int, tokens: float, *, layer: int = 0, energy_j: float | None = None, method: str = "measured"
    ) -> None:
        """Count tokens that an expert served, with its joules where they are known (`method` says from where)."""
        if tokens < 0 or (energy_j is not None and energy_j < 0):
            raise ValueError(f"tokens={tokens} and energy_j={energy_j} of expert {expert} must not be negative")
        entry = self._experts.setdefault((layer, expert), _Expert())
        entry.tokens += tokens
        entry.executions += 1
        if energy_j is not None:
            entry.energy_j = (entry.energy_j or 0.0) + energy_j
            entry.counted_tokens += tokens
            entry.methods.add(method)

    def get_efficiency_metrics(self) -> dict[str, float | int | None]:
        """Tokens per joule and joules per 1000 tokens over all ended windows that have both; None without any.

        Windows that lie inside one another are each counted: give tokens to one of them only.
        """
        t, some = self._totals, self._totals.counted > 0
        return {
            "windows": t.counted,
            "windows_without_energy": t.without_energy,
            "tokens": t.counted_tokens if some else None,
            "energy_j": t.energy_j if some else None,
            "stderr_j": t.variance_j2**0.5 if some and t.variance_j2 is not None else None,
            "tokens_per_joule": t.counted_tokens / t.energy_j if some else None,
            "joules_per_1000_tokens": 1000 * t.energy_j / t.counted_tokens if some else None,
        }

    @property
    def tokens_total(self) -> int | None:
        """Tokens of all ended windows that were told them; None before the first."""
        return self._totals.tokens

    def get_expert_comparison(self) -> list[dict[str, Any]]:
        """Every recorded expert: tokens, joules, joules per token, and that over the mean expert's; None is unknown."""
        with_energy = [e for e in self._experts.values() if e.energy_j is not None and e.counted_tokens]
        tokens = sum(e.counted_tokens for e in with_energy)
        mean = sum(e.energy_j or 0.0 for e in with_energy) / tokens if tokens else None
        rows = []
        for (layer, expert), entry in sorted(self._experts.items()):
            each = (
                entry.energy_j / entry.counted_tokens if entry.energy_j is not None and entry.counted_tokens else None
            )
            rows.append(
                {
                    "layer": layer,
                    "expert": expert,
                    "tokens": entry.tokens,
                    "executions": entry.executions,
                    "energy_j": entry.energy_j,
                    "joules_per_token": each,
                    "over_mean": each / mean if each is not None and mean else None,
                    "method": "+".join(sorted(entry.methods)) or None,
                }
            )
        return rows

    def to_csv(self, path: str | Path) -> None:
        """Write the ended windows (the newest 4096) as CSV, whole or not at all; what is unknown is empty."""
        write_csv(path, MEASUREMENT_COLUMNS, self.measurements)

    def _begin(self, name: str) -> Window:
        self._after_fork()
        self.wait_for_gpu()
        reader = self._reader
        temperature = shared = None
        if reader is not None:
            temperature, shared = self._surroundings()
            if not self._windows:
                reader.start()
            elif reader.lost is None:
                reader.forget_before(min(window.begin_ns for window in self._windows))
        window = Window(name, self.clock.now_ns(), temperature, shared)
        self._windows.append(window)
        self.poll()  # whatever its length, a window has seen clocks and utilisation once
        return window

    def _surroundings(self) -> tuple[float | None, bool | None]:
        """Temperature, and whether other processes are on the GPU."""
        try:
            return known(self._meter.temperature_c), self._meter.shared_with_others()
        except GpuLostError:
            return None, None

    def _discard(self, window: Window) -> None:
        self._windows = [other for other in self._windows if other is not window]
        if not self._windows and self._reader is not None:
            self._reader.stop()

    def _finish(self, window: Window) -> EnergyMeasurement:
        self.wait_for_gpu()
        end_ns = self.clock.now_ns()
        reader = self._reader
        if reader is not None:
            reader.poll()
        self._discard(window)
        measurement = self._measure(window, end_ns)
        window.measurement = measurement
        self.measurements.append(measurement)
        self._totals.add(measurement)
        return measurement

    def _measure(self, window: Window, end_ns: int) -> EnergyMeasurement:
        duration_s = (end_ns - window.begin_ns) / 1e9
        common: dict[str, Any] = dict(
            run_id=self.run_id,
            window=window.name,
            duration_s=duration_s,
            tokens=window.tokens,
            calls=window.calls,
            sm_count=window.sm_count,
            temp_start_c=window.temp_start_c,
        )
        reader = self._reader
        if reader is None:
            return EnergyMeasurement(**common, reason=self.reason)
        readings = reader.read(window.begin_ns, end_ns)
        temp_end_c, shared = self._surroundings()
        seen = 0
        for _, reasons, _ in readings.slow:
            seen |= reasons or 0
        known_reasons = any(reasons is not None for _, reasons, _ in readings.slow)
        busy = [util for _, _, util in readings.slow if util is not None]
        common.update(
            temp_end_c=temp_end_c,
            n_ticks=len(readings.ticks),
            source=reader.source,
            scope=self.scope,
            driver=self.driver,
            gpu_uuid=self.uuid,
            failed_reads=len(readings.faults),
            clocks_event_reasons=seen if known_reasons else None,
            gpu_util_pct=sum(util[0] for util in busy) / len(busy) if busy else None,
            mem_util_pct=sum(util[1] for util in busy) / len(busy) if busy else None,
        )
        times_s = [(at - window.begin_ns) / 1e9 for at, _ in readings.ticks]
        slope = fit_slope(times_s, [joules for _, joules in readings.ticks])
        reason = window.spoiled or reader.lost or _discarded(readings, times_s, duration_s, reader.source)
        self._warn_of_permission(readings)
        if reason is None and (slope is None or slope.watts <= 0):
            found = f"{len(readings.ticks)} ticks of the counter in {duration_s:.3g} s"
            reason = f"{found}; a window needs 2, and {ENOUGH_TICKS} to be good"
        if reason is not None or slope is None:
            return EnergyMeasurement(**common, reason=reason)
        energy_j = slope.watts * duration_s
        words = ["short"] if len(readings.ticks) < ENOUGH_TICKS else []
        if seen & SLOWED or window.shared or shared:
            words.append("contaminated")
        return EnergyMeasurement(
            **common,
            energy_j=energy_j,
            stderr_j=None if slope.stderr_w is None else slope.stderr_w * duration_s,
            idle_w=self.idle_w,
            net_energy_j=None if self.idle_w is None else energy_j - self.idle_w * duration_s,
            joules_per_token=energy_j / window.tokens if window.tokens else None,
            tokens_per_joule=window.tokens / energy_j if window.tokens else None,
            quality="+".join(words) or "ok",
        )

    def _warn_of_permission(self, readings: Readings) -> None:
        if not self._warned and any(name == "NO_PERMISSION" for _, name in readings.faults):
            self._warned = True
            logger.warning("energy: the driver does not let this process read the energy counter; it is not measured")

    def _after_fork(self) -> None:
        """In a child, open the device anew and spoil the windows that its parent began."""
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        for window in self._windows:
            window.spoiled = "the window was begun before this process was forked"
        if self._reader is None:
            return
        self._reader.after_fork()
        self._end.detach()
        try:
            self._open()
        except EnergyUnavailableError as error:
            self._reader, self.reason = None, str(error)


def _discarded(readings: Readings, times_s: Sequence[float], duration_s: float, source: str) -> str | None:
    """Why a window's readings do not say what it took, or None."""
    if readings.resets:
        return "the energy counter went backwards (the driver or the GPU was reset)"
    if not readings.faults:
        return None
    names = "; ".join(dict.fromkeys(name for _, name in readings.faults))
    edges = [0.0, *times_s, duration_s]
    gaps = [later - earlier for earlier, later in itertools.pairwise(edges)]
    unseen = max(gaps) if source == "integrated" else max(gaps[0], gaps[-1])
    if unseen > MAX_UNSEEN * duration_s:
        return f"the meter could not be read for {unseen:.3g} of {duration_s:.3g} s: {names}"
    return None


def _close(reader: TickReader, meter: Meter) -> None:
    reader.stop()
    meter.close()


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[object]) -> None:
    """Write fields of dataclasses as CSV, whole or not at all; None is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for row in rows:
        values = [getattr(row, name) for name in columns]
        table.writerow(["" if value is None else value for value in values])
    write_atomically(path, text.getvalue().encode())
