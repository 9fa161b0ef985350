"""JobStatus: what a running job says of itself in one JSON file, how such a file is read, and where jobs put theirs.

Imports no PyTorch, so that a monitor starts at once. What is not known is null, never 0.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from moe_gpu.files import cache_directory

FORMAT = "moe_gpu.live/1"
MAX_BYTES = 64 << 20
SILENT_INTERVALS, SILENT_S = 5, 5.0  # a job that has written nothing for longer than either is called silent


class StatusError(ValueError):
    """A job's file cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True)
class GpuReading:
    """What the driver says of a GPU. slowed: heat, a brake or the hardware holds the clocks down."""

    uuid: str
    name: str
    scope: str
    power_w: float | None = None
    energy_counter_mj: int | None = None
    temperature_c: int | None = None
    sm_clock_mhz: int | None = None
    mem_clock_mhz: int | None = None
    gpu_util_pct: int | None = None
    mem_util_pct: int | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    slowed: bool | None = None
    error: str | None = None


@dataclass(frozen=True)
class Energy:
    """Joules of the whole GPU, and tokens of this job, over the `seconds` since publishing began."""

    energy_j: float
    seconds: float
    tokens: int | None = None

    @property
    def j_per_1000_tokens(self) -> float | None:
        return 1000 * self.energy_j / self.tokens if self.tokens else None


@dataclass(frozen=True)
class Progress:
    """How far a job is, as it says itself; loss in its own unit."""

    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class LayerLoad:
    """Routes of one layer by expert: counts_E since the profiler began, window_E over the last window_s seconds.

    All None, with a reason, where nothing counts them. age_s: of the newest counts when the file was written.
    """

    name: str
    num_experts: int | None = None
    top_k: int | None = None
    backend: str | None = None
    counts_E: list[int] | None = None
    window_E: list[int] | None = None
    window_s: float | None = None
    calls: int | None = None
    invalid_routes: int | None = None
    age_s: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class SliceStatus:
    """A slice: SMs asked for, and what the device gave (None until it is carried out)."""

    holder: str
    backend: str
    asked_sms: int
    got_sms: int | None = None
    enforced: bool = False


@dataclass(frozen=True)
class CacheStatus:
    """An expert cache; a request is one expert needed by one step of one layer."""

    hits: int
    misses: int
    bytes_copied: int
    used_bytes: int


@dataclass(frozen=True)
class GraphStatus:
    """Calls that a captured CUDA graph served, and calls that ran eagerly."""

    replays: int
    eager_calls: int


@dataclass(frozen=True)
class JobMemory:
    """Device memory of the job's own PyTorch allocator."""

    allocated_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Cost:
    """What publishing has taken of the job: CPU seconds of its thread, over `seconds` and so many writes."""

    cpu_s: float
    seconds: float
    writes: int


@dataclass(frozen=True)
class JobStatus:
    """Everything a job publishes. Times in seconds since 1970; *_reason says why its neighbour is None."""

    pid: int
    name: str
    host: str
    started_at: float
    written_at: float
    interval_s: float
    process_ticks: int | None = None
    rank: int | None = None
    ended: bool = False
    progress: Progress | None = None
    layers: list[LayerLoad] = field(default_factory=list)
    slices: list[SliceStatus] | None = None
    expert_cache: CacheStatus | None = None
    graphs: GraphStatus | None = None
    gpu: GpuReading | None = None
    gpu_reason: str | None = None
    energy: Energy | None = None
    energy_reason: str | None = None
    memory: JobMemory | None = None
    cost: Cost | None = None

    @property
    def state(self) -> str:
        """`running`, `ended`, or `silent` for a job that is there and has stopped writing."""
        if self.ended or not self._process_lives():
            return "ended"
        silent_s = time.time() - self.written_at
        return "silent" if silent_s > max(SILENT_S, SILENT_INTERVALS * self.interval_s) else "running"

    def _process_lives(self) -> bool:
        """Whether the process that wrote this is there; one of another machine is taken to be."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return self.process_ticks is None or process_ticks(self.pid) in (None, self.process_ticks)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **_shallow(self)}, default=_shallow)


def _shallow(item: Any) -> dict[str, Any]:
    """A dataclass's fields without copying the lists in them, which are long."""
    return {each.name: getattr(item, each.name) for each in fields(item)}


def process_ticks(pid: int) -> int | None:
    """When a process began, in the system's ticks: with the pid it names one process for good. None if not known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def live_directory() -> Path:
    """Where this user's jobs publish: under XDG_RUNTIME_DIR, else under the cache folder; not made here."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime) / "moe_gpu"
    return cache_directory() / "live"


def read_status(path: str | Path) -> JobStatus:
    """The status in a file; StatusError in one line for one that is missing, damaged or something else."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise StatusError(f"{path} is no file of a job; name one that moe_gpu.publish writes")
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise StatusError(f"cannot read {path}: {error.strerror}; is the job running?") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, StatusError):
            raise
        raise StatusError(f"{path} holds no JSON; name a file that moe_gpu.publish writes") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise StatusError(f"{path} does not hold {FORMAT}: of another version, or no job's; update moe-gpu")
    try:
        return _checked(JobStatus, data, "status")
    except (TypeError, ValueError, OverflowError) as error:
        raise StatusError(f"{path} is damaged: {error}; restart the job") from error


_hints = cache(get_type_hints)


def _checked(kind: Any, value: Any, where: str) -> Any:
    """`value` from JSON as `kind`: a dataclass, a list, a union or a plain type. TypeError names what does not fit."""
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        if isinstance(value, list):
            return [_checked(inner, item, where) for item in value]
    elif hasattr(kind, "__dataclass_fields__"):
        if isinstance(value, dict):
            hints = _hints(kind)
            unknown = sorted(set(value) - set(hints))
            if unknown:
                raise TypeError(f"{where} has an unknown field {unknown[0]}")
            return kind(**{name: _checked(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif type(value) is kind:
        return value
    raise TypeError(f"{where} is a {type(value).__name__}")


def find_jobs(directory: str | Path | None = None) -> tuple[list[JobStatus], list[str]]:
    """The jobs of a folder, running ones first and newest first, and in words which files could not be read."""
    jobs, remarks = [], []
    for path in sorted(Path(directory or live_directory()).glob("*.json")):
        try:
            jobs.append(read_status(path))
        except StatusError as error:
            remarks.append(str(error))
    return sorted(jobs, key=lambda job: (job.state == "ended", -job.started_at)), remarks


def choose_job(jobs: Sequence[JobStatus], pid: int | None = None) -> JobStatus | None:
    """The job of a process, or the first; None for none. StatusError for a pid that published nothing."""
    if pid is None:
        return jobs[0] if jobs else None
    for job in jobs:
        if job.pid == pid:
            return job
    known = ", ".join(str(job.pid) for job in jobs) or "none"
    raise StatusError(f"no job with pid {pid} has published here; these have: {known}")
