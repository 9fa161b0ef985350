"""PowerSampler: power, temperature, clocks and utilisation of a GPU several times a second, from one daemon thread."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from moe_gpu.energy_monitor.monitor import EnergyUnavailableError, open_meter, write_csv
from moe_gpu.energy_monitor.ticks import Clock
from moe_gpu.files import write_atomically
from moe_gpu.nvml import GpuLostError, Sample

logger = logging.getLogger("moe_gpu")

SAMPLE_COLUMNS = tuple(field.name for field in fields(Sample))


class _Recorder:
    """What the thread needs, so that it does not keep its sampler alive."""

    def __init__(self, meter: Any, clock: Clock, max_samples: int) -> None:
        self.meter, self.clock = meter, clock
        self.samples: deque[Sample] = deque(maxlen=max_samples)
        self.lost: str | None = None
        # Samples are stamped in the world's time, which may be set back while they are taken; the clock may not.
        self._epoch_ns = time.time_ns() - clock.now_ns()
        self._warned: set[str] = set()

    def take(self) -> bool:
        """Take one sample; False once the GPU is lost, which is the last sample's error."""
        at = self._epoch_ns + self.clock.now_ns()
        try:
            sample = self.meter.sample(at)
        except GpuLostError as error:
            self.lost = str(error)
            self.samples.append(Sample(at, self.meter.uuid, self.meter.scope, error=self.lost))
            logger.warning("energy: %s; sampling has ended", error)
            return False
        self.samples.append(sample)
        for part in (sample.error or "").split("; "):
            if part.endswith("NO_PERMISSION") and part not in self._warned:
                self._warned.add(part)
                logger.warning("energy: this process may not read the GPU's %s; it stays empty", part.split(":")[0])
        return True


class PowerSampler:
    """Samples a GPU `hz` times a second from `start` to `stop`; the newest `max_samples` are kept.

    device, on_unavailable: as EnergyMonitor's; "none" makes a sampler that takes no samples, and `reason` says why.
    What the driver does not say is None. Use it as a context manager, or it ends with the program.
    background=False: nobody samples but `take`.
    """

    def __init__(
        self,
        device: Any = None,
        hz: float = 10.0,
        on_unavailable: str = "raise",
        *,
        max_samples: int = 36000,
        clock: Clock = Clock(),  # noqa: B008 frozen
        background: bool = True,
    ) -> None:
        if not 0 < hz <= 100:
            raise ValueError(f"hz={hz} must be above 0 and at most 100: the driver renews its readings no faster")
        if on_unavailable not in ("raise", "none"):
            raise ValueError(f"on_unavailable={on_unavailable!r} is not one of raise, none")
        self.hz, self._background = hz, background
        self.reason: str | None = None
        self._recorder: _Recorder | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._pid = os.getpid()
        try:
            meter = device if hasattr(device, "sample") else open_meter(device)
        except EnergyUnavailableError as error:
            if on_unavailable == "raise":
                raise
            self.reason = str(error)
            return
        self._recorder = _Recorder(meter, clock, max_samples)
        self._end = weakref.finalize(self, _end, self._stop, meter)

    def __enter__(self) -> PowerSampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to sample; once begun this does nothing."""
        if self._pid != os.getpid():  # in a child the parent's thread is not here
            self._pid, self._thread = os.getpid(), None
        if self._recorder is None or not self._background or self._thread is not None:
            return
        self._stop.clear()
        arguments = (self._stop, self._recorder, 1 / self.hz)
        self._thread = threading.Thread(target=_sample, args=arguments, name="moe_gpu-power", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling; the samples stay, and `start` goes on."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
            self._thread = None

    def take(self) -> None:
        """Take a sample now."""
        if self._recorder is not None:
            self._recorder.take()

    def timeline(self) -> list[Sample]:
        """The samples so far, oldest first."""
        return [] if self._recorder is None else list(self._recorder.samples)

    @property
    def latest(self) -> Sample | None:
        """The newest sample, None before the first."""
        return self._recorder.samples[-1] if self._recorder is not None and self._recorder.samples else None

    @property
    def lost(self) -> str | None:
        """How the GPU was lost, None while it is there."""
        return None if self._recorder is None else self._recorder.lost

    def to_csv(self, path: str | Path) -> None:
        """Write the samples as CSV, whole or not at all; what the driver did not say is empty."""
        write_csv(path, SAMPLE_COLUMNS, self.timeline())

    def to_json(self, path: str | Path) -> None:
        """Write the samples as JSON lines, whole or not at all; what the driver did not say is null."""
        write_atomically(path, "".join(json.dumps(asdict(sample)) + "\n" for sample in self.timeline()).encode())


def _sample(stop: threading.Event, recorder: _Recorder, period_s: float) -> None:
    due = time.monotonic()
    while recorder.take():
        now = time.monotonic()
        due = max(due + period_s, now)  # a reading that took long is not made up for
        if stop.wait(due - now):
            return


def _end(stop: threading.Event, meter: Any) -> None:
    stop.set()
    meter.close()
