"""publish: a running job's figures in a file once a second, from a daemon thread that asks nothing of the device.

Counts are the profiler's host copies, which the job's own calls bring in: a job that only replays CUDA graphs of its
own calls `profiler.poll()` between replays, or its counts grow old, and say so.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_gpu.energy_monitor import EnergyUnavailableError
from moe_gpu.energy_monitor.monitor import open_meter
from moe_gpu.expert_cache import ExpertCache
from moe_gpu.files import write_atomically
from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.huggingface.attachment import Attachment
from moe_gpu.huggingface.forward import backend_of
from moe_gpu.huggingface.layout import ATTACHMENT
from moe_gpu.live.figures import tokens_of
from moe_gpu.live.gpu import Meter, read_gpu
from moe_gpu.live.status import (
    CacheStatus,
    Cost,
    Energy,
    GpuReading,
    GraphStatus,
    JobMemory,
    JobStatus,
    LayerLoad,
    Progress,
    SliceStatus,
    StatusError,
    live_directory,
    process_ticks,
    read_status,
)
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.profiler import ExpertProfiler, LoadReading
from moe_gpu.slices.plan import GPUSlice

logger = logging.getLogger("moe_gpu")

KEPT_S = 3600.0  # how long the file of a job that has ended is left for `moe-gpu top` to show
SHORT_S = 2.0  # before it, energy is not given: either end of it is cut by up to a tick of the counter


@dataclass(frozen=True)
class _Layer:
    """A layer to look at; it is not kept alive."""

    name: str
    profiler: ExpertProfiler | None
    index: int
    top_k: int | None
    num_experts: int | None
    module: weakref.ref[nn.Module] | None = None


def _layers_of(source: nn.Module | ExpertProfiler) -> list[_Layer]:
    if isinstance(source, ExpertProfiler):
        return [_Layer(f"layer {index}", source, index, None, source.num_experts) for index in range(source.num_layers)]
    found = []
    for name, module in source.named_modules():
        attachment = vars(module).get(ATTACHMENT)
        if isinstance(module, AdvancedMoELayer):
            c, profiler, index = module.config, module.profiler, module.layer_index
            found.append(_Layer(name or "layer", profiler, index, c.top_k, c.num_experts, weakref.ref(module)))
        elif attachment is not None and attachment.served:
            top_k = getattr(attachment.config, "num_experts_per_tok", None)
            profiler, index = attachment.profiler, attachment.layer_index
            num_experts = None if profiler is None else profiler.num_experts
            found.append(_Layer(name, profiler, index, top_k, num_experts, weakref.ref(module)))
    return found


def _device_of(source: nn.Module | ExpertProfiler) -> torch.device | None:
    if isinstance(source, ExpertProfiler):
        return None if source.state_LS is None else source.state_LS.device
    return next((parameter.device for parameter in source.parameters() if parameter.device.type == "cuda"), None)


class Publisher:
    """Writes the status of a job to `path` until `close`, the end of its source, or that of the program.

    `status` is the newest one written. Made by `publish`; a thread that does not keep the source alive does the rest.
    """

    def __init__(
        self,
        source: nn.Module | ExpertProfiler,
        path: Path,
        interval_s: float,
        name: str,
        slices: AdvancedGPUSliceManager | None,
        progress: Callable[[], Progress] | None,
        graphs: Callable[[], tuple[int, int]] | None,
    ) -> None:
        self.path, self.interval_s, self.name = path, interval_s, name
        self._layers = _layers_of(source)
        self._source = weakref.ref(source)
        self._device = _device_of(source)
        self._slices, self._progress, self._graphs = slices, progress, graphs
        self._stop, self._lock, self._ended = threading.Event(), threading.Lock(), False
        self._pid, self._began, self._began_at = os.getpid(), time.monotonic(), time.time()
        self._ticks = process_ticks(self._pid)
        self._cpu_s, self._writes = 0.0, 0
        self._meter: Meter | None = None
        self._meter_asked, self._gpu_reason = False, "no GPU: the job's model is on the CPU"
        self._energy_from: tuple[float, int, int | None] | None = None
        self._warned: set[str] = set()
        self.status = self._look()
        write_atomically(path, self.status.to_json().encode())
        threading.Thread(target=self._run, name="moe_gpu-publish", daemon=True).start()
        atexit.register(self.close)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            if self._source() is None:
                self.close()
            else:
                self._write()

    def close(self) -> None:
        """Say that the job has ended, and stop; once closed this does nothing."""
        if self._pid != os.getpid():  # in a forked child the job is the parent's
            return
        self._stop.set()
        self._write(ended=True)
        if _PUBLISHERS.get(self.path) is self:
            del _PUBLISHERS[self.path]
        atexit.unregister(self.close)

    def _write(self, ended: bool = False) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = ended
            began = time.thread_time()
            try:
                self.status = self._look()
                write_atomically(self.path, self.status.to_json().encode())
            except OSError as error:
                self._warn(f"cannot write {self.path}: {error.strerror}; `moe-gpu top` shows an old state")
            self._cpu_s += time.thread_time() - began
            self._writes += 1

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("publish: %s", message)

    def _look(self) -> JobStatus:
        readings = {id(layer.profiler): layer.profiler.latest() for layer in self._layers if layer.profiler}
        layers = [_load(layer, readings.get(id(layer.profiler))) for layer in self._layers]
        gpu, tokens = self._read_gpu(), tokens_of(layers)
        energy, energy_reason = self._energy(gpu, tokens)
        rank = os.environ.get("RANK", "")
        return JobStatus(
            pid=self._pid,
            name=self.name,
            host=socket.gethostname(),
            started_at=self._began_at,
            written_at=time.time(),
            interval_s=self.interval_s,
            process_ticks=self._ticks,
            rank=int(rank) if rank.isdecimal() else None,
            ended=self._ended,
            progress=self._ask(self._progress, "progress"),
            layers=layers,
            slices=self._slice_list(),
            expert_cache=self._cache(),
            graphs=self._graph_counts(),
            gpu=gpu,
            gpu_reason=None if gpu else self._gpu_reason,
            energy=energy,
            energy_reason=energy_reason,
            memory=self._memory(),
            cost=Cost(self._cpu_s, time.monotonic() - self._began, self._writes) if self._writes else None,
        )

    def _ask(self, question: Callable[[], Any] | None, what: str) -> Any:
        """What the job's own function answers; a mistake in it is said once, and the job goes on."""
        try:
            return None if question is None else question()
        except Exception as error:  # noqa: BLE001 anything may go wrong in there
            self._warn(f"{what}() raised {type(error).__name__}: {error}; it is left out")
            return None

    def _read_gpu(self) -> GpuReading | None:
        if self._device is None:  # a profiler's device is known from its first step on
            source = self._source()
            self._device = None if source is None else _device_of(source)
        if self._device is None or self._device.type != "cuda":
            return None
        if not self._meter_asked:
            self._meter_asked = True
            try:
                self._meter = open_meter(self._device)  # type: ignore[assignment]  # nvml.Device has all of it
            except EnergyUnavailableError as error:
                self._gpu_reason = str(error)
        return None if self._meter is None else read_gpu(self._meter)

    def _energy(self, gpu: GpuReading | None, tokens: int | None) -> tuple[Energy | None, str | None]:
        """Joules and tokens since the first reading; the reason where there are none."""
        counter = None if gpu is None else gpu.energy_counter_mj
        if counter is None:
            return None, self._gpu_reason if gpu is None else "the driver has no energy counter for this GPU"
        now = time.monotonic()
        if self._energy_from is None or counter < self._energy_from[1]:  # the counter of a new driver begins anew
            self._energy_from = (now, counter, tokens)
        since, base_mj, base_tokens = self._energy_from
        if now - since < SHORT_S:
            return None, f"publishing began less than {SHORT_S:g} s ago"
        counted = None if tokens is None else tokens - (base_tokens or 0)
        return Energy((counter - base_mj) / 1000, now - since, counted), None

    def _memory(self) -> JobMemory | None:
        if self._device is None or self._device.type != "cuda":
            return None
        return JobMemory(torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device))

    def _graph_counts(self) -> GraphStatus | None:
        """What the job says itself, else what the layers' graph managers have counted."""
        if self._graphs is not None:
            counts = self._ask(self._graphs, "graphs")
            return None if counts is None else GraphStatus(int(counts[0]), int(counts[1]))
        managers = {id(flags.graphs): flags.graphs for flags in self._flags() if flags.graphs is not None}
        stats = [manager.get_stats() for manager in managers.values()]
        eager = sum(sum(each["eager_calls"].values()) for each in stats)
        return GraphStatus(sum(each["hits"] for each in stats), eager) if stats else None

    def _flags(self) -> list[AdvancedMoELayer | Attachment]:
        """What holds each layer's graphs, slice and cache."""
        return [flags for flags in map(_flags_of, self._layers) if flags is not None]

    def _slice_list(self) -> list[SliceStatus] | None:
        """Of the manager that was given; else each layer's own, or those that its experts are divided among."""
        if self._slices is not None:
            return _slices_of(self._slices)
        found: list[SliceStatus] = []
        for layer in self._layers:
            flags = _flags_of(layer)
            held, divided = getattr(flags, "slice", None), getattr(flags, "divided", None)
            if held is not None:
                found.append(_slice_status(layer.name, held))
            elif divided is not None:
                found += _slices_of(divided.manager, f"{layer.name}: ")
        return found or None

    def _cache(self) -> CacheStatus | None:
        caches: list[ExpertCache] = []
        for flags in self._flags():
            if flags.expert_cache is not None and flags.expert_cache not in caches:
                caches.append(flags.expert_cache)
        if not caches:
            return None
        counts = [cache.counts() for cache in caches]
        return CacheStatus(
            sum(one.hits for one in counts),
            sum(one.misses for one in counts),
            sum(one.bytes_copied for one in counts),
            sum(layer.allocated_bytes for cache in caches for layer in cache.layers),
        )


def _flags_of(layer: _Layer) -> AdvancedMoELayer | Attachment | None:
    """The layer itself, or what `enable` left at it; None where it is gone, disabled, or a profiler's."""
    module = None if layer.module is None else layer.module()
    return module if isinstance(module, AdvancedMoELayer) else vars(module).get(ATTACHMENT) if module else None


def _backend_of(layer: _Layer) -> str | None:
    module = None if layer.module is None else layer.module()
    if isinstance(module, AdvancedMoELayer):
        return module.ops.backend_for(module.gate_up_proj.dtype).name
    return None if _flags_of(layer) is None else backend_of(module).name


def _slices_of(manager: AdvancedGPUSliceManager, of: str = "") -> list[SliceStatus]:
    holders: dict[int | None, str] = {None: "everybody"}
    holders |= {allocation.expert_id: _experts_named(allocation.experts) for allocation in manager.allocations}
    return [_slice_status(of + holders.get(item.tenant, f"expert {item.tenant}"), item) for item in manager.plan.slices]


def _experts_named(experts: tuple[int, ...]) -> str:
    """`expert 3`, `experts 0-31`, or `experts 0, 4, 9 +2` of those that are apart."""
    if len(experts) == 1:
        return f"expert {experts[0]}"
    first, *_, last = sorted(experts)
    if last - first == len(experts) - 1:
        return f"experts {first}-{last}"
    more = f" +{len(experts) - 3}" if len(experts) > 3 else ""
    return f"experts {', '.join(map(str, sorted(experts)[:3]))}{more}"


def _slice_status(holder: str, item: GPUSlice) -> SliceStatus:
    return SliceStatus(holder, item.backend, item.asked_sms, item.got_sms, item.enforced)


def _load(layer: _Layer, reading: LoadReading | None) -> LayerLoad:
    backend = _backend_of(layer)
    known = dict(name=layer.name, num_experts=layer.num_experts, top_k=layer.top_k, backend=backend)
    if layer.profiler is None:
        return LayerLoad(**known, reason="no profiler counts this layer: pass profiler=ExpertProfiler(...)")  # type: ignore[arg-type]
    if reading is None:
        return LayerLoad(**known, reason="no step has been counted yet")  # type: ignore[arg-type]
    several = reading.window_s > 0
    return LayerLoad(
        **known,  # type: ignore[arg-type]
        counts_E=reading.counts_LE[layer.index].tolist(),
        window_E=reading.window_LE[layer.index].tolist() if several else None,
        window_s=reading.window_s if several else None,
        calls=int(reading.calls_L[layer.index]) if several else None,
        invalid_routes=int(reading.invalid_L[layer.index]),
        age_s=time.monotonic() - reading.read_at_s,
    )


_PUBLISHERS: dict[Path, Publisher] = {}


def publish(
    source: nn.Module | ExpertProfiler,
    path: str | Path | None = None,
    interval_s: float = 1.0,
    *,
    name: str | None = None,
    slices: AdvancedGPUSliceManager | None = None,
    progress: Callable[[], Progress] | None = None,
    graphs: Callable[[], tuple[int, int]] | None = None,
) -> Publisher:
    """Let `moe-gpu top` watch this process: its MoE layers' load, GPU, energy, slices, cache and graphs.

    source: an AdvancedMoELayer, a model that holds some, a transformers model after `moe_gpu.enable`, or an
    ExpertProfiler. path: a JSON file, replaced whole every `interval_s` seconds; by default where `moe-gpu top` looks.
    Loads need the layers' profiler. progress, graphs: functions that say how far the job is, and how many calls graphs
    of its own and eager code served; a thread calls them, and they must not touch the device. Nothing waits for it.
    It goes on until `close`, the end of the program or of `source`; a second one of a path ends the first.
    Raises ValueError for a source without MoE layers, a wrong interval, or a path that cannot be written.
    """
    if not 0.05 <= interval_s <= 3600:
        raise ValueError(f"interval_s={interval_s} must lie between 0.05 and 3600")
    if not _layers_of(source):
        raise ValueError(
            f"{type(source).__name__} has no MoE layer to publish; pass an AdvancedMoELayer, a model that holds some "
            "or went through moe_gpu.enable, or an ExpertProfiler"
        )
    if path is None:
        directory = live_directory()
        path = directory / f"{os.getpid()}.json"
        _make(directory)
        _forget_old(directory)
    path = Path(path).absolute()
    earlier = _PUBLISHERS.pop(path, None)
    if earlier is not None:
        earlier.close()
    command = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    try:
        publisher = Publisher(source, path, interval_s, name or command, slices, progress, graphs)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; give another path") from error
    _PUBLISHERS[path] = publisher
    return publisher


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make {directory}: {error.strerror}; give a path, or set MOE_GPU_CACHE") from error


def _forget_old(directory: Path) -> None:
    """Remove files of jobs of this machine that ended a while ago."""
    for path in directory.glob("*.json"):
        with suppress(StatusError, OSError):
            old = read_status(path)
            if old.host == socket.gethostname() and old.state == "ended" and time.time() - old.written_at > KEPT_S:
                path.unlink()
