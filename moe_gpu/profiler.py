"""ExpertProfiler: what every expert is asked to do, counted on the device and read without stalling it."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_gpu.results import write_atomically


class AsyncCopy:
    """A device tensor on its way to the host: `ready()` never waits, `result()` waits for this copy alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.detach().to("cpu", copy=True)

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def result(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


@dataclass(frozen=True)
class ExpertSnapshot:
    """Expert load of one layer over the rolling window.

    counts_E: routes since the profiler began; tokens_per_s_E: routes a second over the last `window_s` seconds, None
    until two readings lie apart; share_E: share of the window's routes, None likewise. hot and cold: experts with more
    than twice, or less than half, an even share. invalid_routes: NaN logits and ids out of range, since the beginning.
    """

    layer: int
    window_s: float | None
    counts_E: list[int]
    tokens_per_s_E: list[float] | None
    share_E: list[float] | None
    hot: list[int]
    cold: list[int]
    invalid_routes: int


class ExpertProfiler:
    """Counts routes per layer and expert on the device and copies them out now and then, asynchronously.

    `record` adds the routing kernel's own histogram to a device counter: one small launch, no synchronisation, safe in
    a CUDA graph (the addition replays; copies are started by `poll` or by later eager calls). Raises ValueError for
    sizes below 1.
    """

    HOT, COLD = 2.0, 0.5

    def __init__(
        self, num_experts: int, num_layers: int = 1, window_s: float = 10.0, copy_interval_s: float = 0.25
    ) -> None:
        if num_experts < 1 or num_layers < 1:
            raise ValueError(f"num_experts={num_experts} and num_layers={num_layers} must be at least 1")
        if window_s <= 0 or copy_interval_s < 0:
            raise ValueError(f"window_s={window_s} must be positive and copy_interval_s={copy_interval_s} not negative")
        self.num_experts, self.num_layers = num_experts, num_layers
        self.window_s, self.copy_interval_s = window_s, copy_interval_s
        self._counter_LP: torch.Tensor | None = None
        self._pending: deque[tuple[float, AsyncCopy]] = deque()
        self._readings: deque[tuple[float, torch.Tensor]] = deque()
        self._last_copy = -float("inf")

    def attach(self, device: torch.device | str) -> None:
        """Create the device counter now; `record` does it on the first call outside a graph capture."""
        shape = (self.num_layers, self.num_experts + 1)
        self._counter_LP = torch.zeros(shape, dtype=torch.int64, device=device)
        self._start_copy()

    @property
    def counter_LP(self) -> torch.Tensor | None:
        """int64 device counter, a row per layer, the last column for invalid routes; None before the first step."""
        return self._counter_LP

    def record(self, demand_P: torch.Tensor, layer: int = 0) -> None:
        """Add one step's histogram (E + 1 bins, the last for invalid routes) of one layer.

        A call inside a backward pass counts nothing: it is a checkpointed layer that is computed again.
        """
        if demand_P.shape != (self.num_experts + 1,):
            raise ValueError(
                f"histogram has {demand_P.numel()} bins, expected num_experts + 1 = {self.num_experts + 1}"
            )
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer={layer} is outside the profiler's {self.num_layers} layers")
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # in a backward pass: activation checkpointing computes again what was counted
        if self._counter_LP is None:
            self.attach(demand_P.device)
        assert self._counter_LP is not None
        if demand_P.device.type != self._counter_LP.device.type:
            raise ValueError(
                f"the profiler counts on {self._counter_LP.device} and the layer runs on {demand_P.device}; "
                f"call attach({str(demand_P.device)!r})"
            )
        self._counter_LP[layer].add_(demand_P.to(self._counter_LP.device, non_blocking=True))
        if not torch.compiler.is_compiling() and time.monotonic() - self._last_copy >= self.copy_interval_s:
            self.poll()

    def poll(self) -> None:
        """Take in copies that have arrived and start another; never waits. Does nothing during a graph capture."""
        if self._counter_LP is None:
            return
        if self._counter_LP.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        while self._pending and self._pending[0][1].ready():
            taken_at, copy = self._pending.popleft()
            self._readings.append((taken_at, copy.result()))
        newest = self._readings[-1][0] if self._readings else 0.0
        while len(self._readings) > 2 and self._readings[1][0] <= newest - self.window_s:
            self._readings.popleft()
        if len(self._pending) < 8:
            self._start_copy()

    def _start_copy(self) -> None:
        assert self._counter_LP is not None
        self._last_copy = time.monotonic()
        self._pending.append((self._last_copy, AsyncCopy(self._counter_LP)))

    def flush(self) -> None:
        """Wait for the device and read the counter as it is now; for the end of a run."""
        if self._counter_LP is not None:
            self._start_copy()
            while self._pending:
                taken_at, copy = self._pending.popleft()
                self._readings.append((taken_at, copy.result()))

    def counts_LE(self) -> torch.Tensor | None:
        """int64 routes per layer and expert as of the newest copy that has arrived; None before the first."""
        self.poll()
        return self._readings[-1][1][:, :-1] if self._readings else None

    def snapshot(self, layer: int = 0) -> ExpertSnapshot | None:
        """The rolling window's figures from copies that have arrived; None before the first. Never waits."""
        self.poll()
        if not self._readings:
            return None
        newest_at, newest_LP = self._readings[-1]
        oldest_at, oldest_LP = self._readings[0]
        counts = newest_LP[layer, :-1]
        delta = (counts - oldest_LP[layer, :-1]).double()
        span = newest_at - oldest_at
        rates = shares = None
        hot: list[int] = []
        cold: list[int] = []
        if span > 0 and delta.sum() > 0:
            rates = (delta / span).tolist()
            shares = (delta / delta.sum()).tolist()
            even = 1 / self.num_experts
            hot = [expert for expert, share in enumerate(shares) if share > self.HOT * even]
            cold = [expert for expert, share in enumerate(shares) if share < self.COLD * even]
        return ExpertSnapshot(layer, span or None, counts.tolist(), rates, shares, hot, cold, int(newest_LP[layer, -1]))


class TraceError(ValueError):
    """A routing trace cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token of a text chose, layer by layer; recorded once and replayed anywhere.

    topk_ids_LTK: int16 ids on the host. source: where it came from, in words.
    """

    topk_ids_LTK: torch.Tensor
    num_experts: int
    source: str

    @classmethod
    def from_steps(cls, steps: Sequence[Sequence[torch.Tensor]], num_experts: int, source: str) -> RoutingTrace:
        """From `steps[step][layer]` = ids (T, K) on any device."""
        if not steps:
            raise ValueError("a routing trace needs at least one step")
        layers = [torch.cat([step[layer].cpu() for step in steps]) for layer in range(len(steps[0]))]
        return cls(torch.stack(layers).to(torch.int16), num_experts, source)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save

        metadata = {"format": "moe_gpu.routing_trace/1", "num_experts": str(self.num_experts), "source": self.source}
        write_atomically(path, save({"topk_ids_LTK": self.topk_ids_LTK.contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read a trace; TraceError for a file that is missing, damaged or not a trace."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "moe_gpu.routing_trace/1":
                    raise TraceError(f"{path} is not a routing trace; record one with `moe-gpu demo`")
                return cls(file.get_tensor("topk_ids_LTK"), int(metadata["num_experts"]), metadata["source"])
        except (OSError, SafetensorError, KeyError) as error:
            raise TraceError(f"cannot read routing trace {path}: {error}; record it again") from error

    @property
    def num_layers(self) -> int:
        return self.topk_ids_LTK.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids_LTK.shape[2]

    def counts_LE(self) -> torch.Tensor:
        """int64 routes per layer and expert over the whole trace."""
        flat = self.topk_ids_LTK.long().flatten(1)
        return torch.stack([torch.bincount(ids[ids >= 0], minlength=self.num_experts) for ids in flat])

    def replay(self, num_tokens: int, layer: int = 0, start: int = 0) -> torch.Tensor:
        """int32 ids (num_tokens, K) of consecutive tokens from `start`, wrapping at the trace's end."""
        ids_TK = self.topk_ids_LTK[layer]
        if ids_TK.shape[0] == 0:
            raise ValueError("the routing trace holds no tokens")
        index = (start + torch.arange(num_tokens)) % ids_TK.shape[0]
        return ids_TK[index].to(torch.int32)

    def summary(self) -> str:
        """One JSON line for people and scripts."""
        counts_LE = self.counts_LE().double()
        share = (counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1)).max(1).values
        return json.dumps(
            {
                "source": self.source,
                "layers": self.num_layers,
                "tokens": self.topk_ids_LTK.shape[1],
                "num_experts": self.num_experts,
                "top_k": self.top_k,
                "max_share_per_layer": [round(value, 4) for value in share.tolist()],
            }
        )
