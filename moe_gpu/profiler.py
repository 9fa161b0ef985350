"""ExpertProfiler: what every expert is asked to do, counted on the device and read without stalling it."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_gpu.config import COLD, HOT
from moe_gpu.files import write_atomically
from moe_gpu.reference import PADDING_TILES, count_load_reference, load_state_size
from moe_gpu.triton_kernels.ops import TritonExpertOps


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
    """Expert load of one layer over the rolling window; None for what two readings are needed to tell.

    counts_E: routes since the profiler began; tokens_per_s_E: routes a second over the last `window_s` seconds (None
    for a trace, which has no clock); share_E: share of the window's routes. hot and cold: experts with more than twice,
    or less than half, an even share. invalid_routes: NaN logits and ids out of range, since the beginning.
    ewma_tokens_per_s_E: exponentially weighted, of all readings. active_experts: with any route in the window.
    max_over_mean: the busiest expert's routes over the mean. normalised_entropy: of the shares, 1 when even; None for
    one expert. peak_rows: most rows of one expert in one call. calls, rows_per_call_E: of the window. padding: share of
    the rows computed that are padding, by tile height, if every call tiles each expert's rows alone.
    """

    layer: int
    window_s: float | None
    counts_E: list[int]
    tokens_per_s_E: list[float] | None
    share_E: list[float] | None
    hot: list[int]
    cold: list[int]
    invalid_routes: int
    ewma_tokens_per_s_E: list[float] | None = None
    active_experts: int | None = None
    max_over_mean: float | None = None
    normalised_entropy: float | None = None
    peak_rows: int | None = None
    calls: int | None = None
    rows_per_call_E: list[float] | None = None
    padding: dict[int, float] | None = None

    def padding_ratio(self, tile: int) -> float | None:
        """Share of computed rows that are padding with tiles of so many rows; ValueError for a height not counted."""
        if tile not in PADDING_TILES:
            raise ValueError(f"tile={tile} is not one of {', '.join(map(str, PADDING_TILES))}, the heights counted")
        return None if self.padding is None else self.padding[tile]


@dataclass(frozen=True)
class LoadReading:
    """Load of every layer as the host knows it; int64 tensors on the host, times in seconds of `time.monotonic`.

    read_at_s: when the newest copy was started. counts_LE, invalid_L: since the beginning. window_LE, calls_L: over
    the last `window_s` seconds, 0 where there is one reading so far.
    """

    read_at_s: float
    window_s: float
    counts_LE: torch.Tensor
    invalid_L: torch.Tensor
    window_LE: torch.Tensor
    calls_L: torch.Tensor


@dataclass(frozen=True)
class LoadWindow:
    """Routes of every layer and expert between two readings; times in seconds of `time.monotonic`."""

    begin_s: float
    end_s: float
    counts_LE: torch.Tensor


class ExpertProfiler:
    """Counts routes per layer and expert on the device and copies them out now and then, asynchronously.

    `record` adds the routing kernel's own histogram to device counters: one small launch, no synchronisation, safe in
    a CUDA graph (the addition replays; copies are started by `poll` or by later eager calls). A forward pass that
    gradient checkpointing repeats is not counted again. Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        num_experts: int,
        num_layers: int = 1,
        window_s: float = 10.0,
        copy_interval_s: float = 0.25,
        ewma_half_life_s: float = 5.0,
        history: int = 256,
    ) -> None:
        if num_experts < 1 or num_layers < 1 or history < 1:
            raise ValueError(
                f"num_experts={num_experts}, num_layers={num_layers} and history={history} must be at least 1"
            )
        if window_s <= 0 or copy_interval_s < 0 or ewma_half_life_s <= 0:
            raise ValueError(
                f"window_s={window_s} and ewma_half_life_s={ewma_half_life_s} must be positive and "
                f"copy_interval_s={copy_interval_s} not negative"
            )
        self.num_experts, self.num_layers = num_experts, num_layers
        self.window_s, self.copy_interval_s, self.ewma_half_life_s = window_s, copy_interval_s, ewma_half_life_s
        self._state_LS: torch.Tensor | None = None
        self._by_triton = False
        self._pending: deque[tuple[float, AsyncCopy]] = deque()
        self._readings: deque[tuple[float, torch.Tensor]] = deque()
        self._ewma_LE: torch.Tensor | None = None
        self._history: deque[LoadWindow] = deque(maxlen=history)
        self._last_copy = -float("inf")

    def attach(self, device: torch.device | str) -> None:
        """Create the device counters now; `record` does it on the first call outside a graph capture."""
        shape = (self.num_layers, load_state_size(self.num_experts))
        self._by_triton = TritonExpertOps(device).backend.name == "triton"
        self._state_LS = torch.zeros(shape, dtype=torch.int64, device=device)
        self._start_copy()

    @property
    def state_LS(self) -> torch.Tensor | None:
        """The int64 device counters, a row per layer as `load_state_size` says; None before the first step."""
        return self._state_LS

    def has_room_for(self, num_experts: int, layer: int) -> bool:
        """Whether it counts so many experts and has a layer of this index."""
        return num_experts == self.num_experts and 0 <= layer < self.num_layers

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
        if self._state_LS is None:
            self.attach(demand_P.device)
        assert self._state_LS is not None
        if demand_P.device.type != self._state_LS.device.type:
            raise ValueError(
                f"the profiler counts on {self._state_LS.device} and the layer runs on {demand_P.device}; "
                f"call attach({str(demand_P.device)!r})"
            )
        demand_P = demand_P.to(self._state_LS.device, non_blocking=True)
        if self._by_triton:
            torch.ops.moe_gpu.count_load(self._state_LS[layer], demand_P)
        else:
            count_load_reference(self._state_LS[layer], demand_P)
        if not torch.compiler.is_compiling():
            self.poll_if_due()

    def discount_invalid(self, routes: int, layer: int = 0) -> None:
        """Take back invalid routes that were counted and were padding, as of a replayed graph; never waits."""
        assert self._state_LS is not None
        self._state_LS[layer, self.num_experts].sub_(routes)

    def poll_if_due(self) -> None:
        """`poll`, if `copy_interval_s` has passed since the last copy began; for after a graph's replay."""
        if time.monotonic() - self._last_copy >= self.copy_interval_s:
            self.poll()

    def poll(self) -> None:
        """Take in copies that have arrived and start another; never waits. Does nothing during a graph capture."""
        if self._state_LS is None:
            return
        if self._state_LS.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        while self._pending and self._pending[0][1].ready():
            self._take(*self._pending.popleft())
        newest = self._readings[-1][0] if self._readings else 0.0
        while len(self._readings) > 2 and self._readings[1][0] <= newest - self.window_s:
            self._readings.popleft()
        if len(self._pending) < 8:
            self._start_copy()

    def _start_copy(self) -> None:
        assert self._state_LS is not None
        self._last_copy = time.monotonic()
        self._pending.append((self._last_copy, AsyncCopy(self._state_LS)))
        self._state_LS[:, self._peaks].zero_()  # behind the copy: the next reading's peaks are its own

    @property
    def _peaks(self) -> slice:
        return slice(self.num_experts + 1, 2 * self.num_experts + 1)

    def _take(self, taken_at: float, copy: AsyncCopy) -> None:
        """Take in a reading: window, moving average and history."""
        state_LS = copy.result()
        if self._readings:
            before_at, before_LS = self._readings[-1]
            delta_LE = (state_LS - before_LS)[:, : self.num_experts]
            span = taken_at - before_at
            if span > 0:
                rate_LE = delta_LE.double() / span
                kept = 0.0 if self._ewma_LE is None else 0.5 ** (span / self.ewma_half_life_s)
                old_LE = rate_LE if self._ewma_LE is None else self._ewma_LE
                self._ewma_LE = kept * old_LE + (1 - kept) * rate_LE
            self._history.append(LoadWindow(before_at, taken_at, delta_LE))
        self._readings.append((taken_at, state_LS))

    def flush(self) -> None:
        """Wait for the device and read the counter as it is now; for the end of a run."""
        if self._state_LS is not None:
            self._start_copy()
            while self._pending:
                self._take(*self._pending.popleft())

    def counts_LE(self) -> torch.Tensor | None:
        """int64 routes per layer and expert as of the newest copy that has arrived; None before the first."""
        self.poll()
        return self._readings[-1][1][:, : self.num_experts] if self._readings else None

    def history(self) -> list[LoadWindow]:
        """The newest windows between readings, oldest first: a heatmap's columns. Never waits."""
        self.poll()
        return list(self._history)

    def latest(self) -> LoadReading | None:
        """What has arrived by now; None before the first copy. Asks nothing of the device: any thread may call it."""
        readings = list(self._readings)
        if not readings:
            return None
        (oldest_at, oldest_LS), (newest_at, newest_LS) = readings[0], readings[-1]
        delta_LS, experts = newest_LS - oldest_LS, slice(self.num_experts)
        return LoadReading(
            newest_at,
            newest_at - oldest_at,
            newest_LS[:, experts],
            newest_LS[:, self.num_experts],
            delta_LS[:, experts],
            delta_LS[:, -1],
        )

    def snapshot(self, layer: int = 0) -> ExpertSnapshot | None:
        """The rolling window's figures from copies that have arrived; None before the first. Never waits."""
        self.poll()
        if not self._readings:
            return None
        newest_at, newest_LS = self._readings[-1]
        oldest_at, oldest_LS = self._readings[0]
        newest, delta = newest_LS[layer], newest_LS[layer] - oldest_LS[layer]
        peaks = [state_LS[layer, self._peaks] for _, state_LS in list(self._readings)[1:]]
        return _snapshot(
            layer,
            newest[: self.num_experts],
            delta[: self.num_experts],
            newest_at - oldest_at,
            int(newest[self.num_experts]),
            int(delta[-1]),
            int(torch.stack(peaks).max()) if peaks else 0,
            delta[2 * self.num_experts + 1 : -1].tolist(),
            None if self._ewma_LE is None else self._ewma_LE[layer].tolist(),
        )


def _snapshot(
    layer: int,
    counts: torch.Tensor,
    delta: torch.Tensor,
    span: float | None,
    invalid: int,
    calls: int,
    peak_rows: int,
    padded: Sequence[int],
    ewma: list[float] | None = None,
) -> ExpertSnapshot:
    """Figures of a window: routes since the beginning and in it, its seconds and calls, and padded rows by tile."""
    total = int(delta.sum())
    rows = delta.double()
    if total == 0 or span == 0:
        return ExpertSnapshot(layer, span or None, counts.tolist(), None, None, [], [], invalid, ewma)
    share = rows / total
    num_experts = len(rows)
    entropy = float(torch.special.entr(share).sum()) / math.log(num_experts) if num_experts > 1 else None
    even = 1 / num_experts
    return ExpertSnapshot(
        layer,
        span,
        counts.tolist(),
        None if span is None else (rows / span).tolist(),
        share.tolist(),
        [expert for expert, value in enumerate(share.tolist()) if value > HOT * even],
        [expert for expert, value in enumerate(share.tolist()) if value < COLD * even],
        invalid,
        ewma,
        int((delta > 0).sum()),
        float(rows.max() / rows.mean()),
        entropy,
        peak_rows,
        calls,
        (rows / calls).tolist() if calls else None,
        {tile: 1 - total / rows_computed for tile, rows_computed in zip(PADDING_TILES, padded, strict=True)},
    )


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

    def calls_LCE(self, tokens_per_call: int) -> torch.Tensor:
        """int64 routes of each layer and expert in consecutive calls of so many tokens; the last may be shorter."""
        if tokens_per_call < 1:
            raise ValueError(f"tokens_per_call={tokens_per_call} must be at least 1")
        ids_LTK = self.topk_ids_LTK.long()
        layers, tokens, top_k = ids_LTK.shape
        call_T = torch.arange(tokens) // tokens_per_call
        calls = int(call_T[-1]) + 1 if tokens else 0
        bins = torch.zeros(layers, calls * (self.num_experts + 1), dtype=torch.int64)
        valid = (ids_LTK >= 0) & (ids_LTK < self.num_experts)
        index = call_T[:, None] * (self.num_experts + 1) + ids_LTK.where(valid, torch.tensor(self.num_experts))
        bins.scatter_add_(1, index.flatten(1), torch.ones(layers, tokens * top_k, dtype=torch.int64))
        return bins.view(layers, calls, self.num_experts + 1)[:, :, :-1]

    def snapshot(self, tokens_per_call: int, layer: int = 0) -> ExpertSnapshot:
        """The whole trace's figures as if it came in calls of so many tokens; it has no clock, so no rates."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer={layer} is outside the trace's {self.num_layers} layers")
        calls_CE = self.calls_LCE(tokens_per_call)[layer]
        counts = calls_CE.sum(0)
        padded = [int(((calls_CE + tile - 1) // tile * tile).sum()) for tile in PADDING_TILES]
        invalid = self.topk_ids_LTK[layer].numel() - int(counts.sum())
        peak = int(calls_CE.max()) if calls_CE.numel() else 0
        return _snapshot(layer, counts, counts, None, invalid, len(calls_CE), peak, padded)

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
