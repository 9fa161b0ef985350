"""CostTable: what experts' products take on some of a device's SMs, measured there; nothing is ever extrapolated."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from moe_gpu.files import device_cache_path, write_atomically
from moe_gpu.results import Machine

SCHEMA = 1


class CostTableError(ValueError):
    """A table of costs cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class CostPoint:
    """Median milliseconds of the experts' forward products over `rows` rows of `experts` experts on `sms` SMs."""

    experts: int
    rows: int
    sms: int
    time_ms: float


def _ends(axis: list[int], value: float) -> list[tuple[int, float]]:
    """The measured sizes around a value and their shares, linear in logarithms; none beyond what was measured."""
    if not axis[0] <= value <= axis[-1]:
        return []
    high = bisect_left(axis, value)
    if axis[high] == value:
        return [(axis[high], 1.0)]
    low, top = axis[high - 1], axis[high]
    part = math.log(value / low) / math.log(top / low)
    return [(low, 1 - part), (top, part)]


@dataclass(frozen=True)
class CostTable:
    """Points on a full grid of experts, rows and SMs of one device, and what slices cost beside each other.

    slowdown: time of a slice beside busy other slices over its time alone. launch_ms: what each further slice adds to a
    call. backend: what made the slices that were measured.
    """

    machine: Machine
    model: str
    dtype: str
    backend: str
    points: tuple[CostPoint, ...]
    slowdown: float
    launch_ms: float

    @cached_property
    def _grid(self) -> tuple[list[int], list[int], list[int], dict[tuple[int, int, int], float]]:
        times = {(point.experts, point.rows, point.sms): point.time_ms for point in self.points}
        axes = [sorted({key[axis] for key in times}) for axis in range(3)]
        return axes[0], axes[1], axes[2], times

    @cached_property
    def _logs(self) -> dict[tuple[int, int, int], float]:
        return {key: math.log(time_ms) for key, time_ms in self._grid[3].items()}

    def check(self) -> None:
        """Raise CostTableError unless the points are positive and fill their grid."""
        experts, rows, sms, times = self._grid
        numbers = [self.slowdown, *(point.time_ms for point in self.points)]
        if not self.points or not all(math.isfinite(value) and value > 0 for value in numbers):
            raise CostTableError("it holds a time that is not a positive number, or none")
        if not (math.isfinite(self.launch_ms) and self.launch_ms >= 0) or min(experts[0], rows[0], sms[0]) < 1:
            raise CostTableError("it holds a size below 1 or a negative time")
        if len(times) != len(self.points) or len(times) != len(experts) * len(rows) * len(sms):
            raise CostTableError("its points do not fill a grid of experts, rows and SMs")

    def time_ms(self, experts: float, rows: float, sms: float) -> float | None:
        """Milliseconds on so many SMs, alone: linear in the logarithms between measured points.

        Fewer rows or experts than measured cost what the fewest did; None for more rows, experts or SMs than measured,
        or fewer SMs.
        """
        if rows <= 0 or experts <= 0:
            return 0.0
        *axes, _ = self._grid
        wanted = (max(experts, axes[0][0]), max(rows, axes[1][0]), sms)
        ends = [_ends(axis, value) for axis, value in zip(axes, wanted, strict=True)]
        if not all(ends):
            return None
        logs, log_ms = self._logs, 0.0
        for count, share in ends[0]:
            for row, row_share in ends[1]:
                for size, size_share in ends[2]:
                    log_ms += share * row_share * size_share * logs[count, row, size]
        return math.exp(log_ms)

    def sliced_ms(self, work: Sequence[tuple[float, float, int]]) -> float | None:
        """Milliseconds until the last of several slices, (experts, rows, SMs) each, that run side by side."""
        times = [self.time_ms(*item) for item in work]
        known = [time for time in times if time is not None]
        if len(known) < len(times):
            return None
        busy = len([time for time in known if time > 0])
        slowdown = self.slowdown if busy > 1 else 1.0
        return max(known, default=0.0) * slowdown + self.launch_ms * max(0, busy - 1)

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        head = {name: value for name, value in asdict(self).items() if name != "points"}
        points = ",\n".join(json.dumps(asdict(point)) for point in self.points)
        head_text = json.dumps({"schema": SCHEMA, **head}, allow_nan=False)[:-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f'{head_text}, "points": [\n{points}\n]}}\n'.encode())

    @classmethod
    def load(cls, path: str | Path, device_name: str) -> CostTable:
        """The table in a file; CostTableError for one of another GPU, damaged or missing."""
        remedy = "measure one with `moe-gpu slices bench` on that GPU"
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = values.pop("schema", None) if isinstance(values, dict) else None
            if schema != SCHEMA:
                raise CostTableError(f"its schema is {schema!r}, this version reads {SCHEMA}")
            points = tuple(CostPoint(**point) for point in values.pop("points"))
            table = cls(Machine(**values.pop("machine")), points=points, **values)
            table.check()
        except OSError as error:
            raise CostTableError(f"cannot read costs {path}: {error.strerror}; {remedy}") from error
        except CostTableError as error:
            raise CostTableError(f"costs {path} cannot be used: {error}; {remedy}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CostTableError(f"costs {path} are damaged ({type(error).__name__}: {error}); {remedy}") from error
        if table.machine.device != device_name:
            raise CostTableError(f"costs {path} are of {table.machine.device}, this is {device_name}; {remedy}")
        return table


def cached_costs(device_name: str) -> CostTable | None:
    """The table that `moe-gpu slices bench` left for a GPU model, None without one; CostTableError if damaged."""
    path = cache_path(device_name)
    return CostTable.load(path, device_name) if path.exists() else None


def cache_path(device_name: str) -> Path:
    return device_cache_path("slices", device_name)
