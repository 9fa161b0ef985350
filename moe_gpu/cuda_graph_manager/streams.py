"""StreamManager: work on several streams at once, forked from the caller's stream and joined to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_gpu.cuda_graph_manager.capture import record_use


class StreamManager:
    """Streams of one device that `run` forks to and joins from, by events: also inside a graph's capture.

    priorities: of each stream, lower is more urgent (CUDA offers a few; 0 is the default one). On a CPU there are no
    streams: work runs in turn, and `reason` says so. Raises ValueError for fewer than one stream or other than one
    priority a stream.
    """

    def __init__(
        self, num_streams: int = 8, device: torch.device | str | None = None, priorities: Sequence[int] | None = None
    ) -> None:
        if num_streams < 1:
            raise ValueError(f"num_streams={num_streams} must be at least 1")
        if priorities is not None and len(priorities) != num_streams:
            raise ValueError(f"{len(priorities)} priorities for num_streams={num_streams}; give one for each")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.num_streams = num_streams
        self.priorities = tuple(priorities or (0,) * num_streams)
        self.reason = f"{num_streams} streams" if self.on_gpu else f"no streams on {self.device}: work runs in turn"
        self._streams: list[torch.cuda.Stream] = []

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def streams(self) -> tuple[torch.cuda.Stream, ...]:
        """All of them, made when first asked for; none on a CPU."""
        if self.on_gpu and not self._streams:
            self._streams = [torch.cuda.Stream(self.device, priority=priority) for priority in self.priorities]
        return tuple(self._streams)

    def run(
        self, tasks: Sequence[Callable[[], Any]], streams: Sequence[torch.cuda.Stream | None] | None = None
    ) -> list[Any]:
        """Each task's result, in order; the tasks may overlap on the device, and the current stream waits for all.

        Task i runs on stream i modulo their number, after everything that the current stream held before. Results are
        safe to use on the current stream, and to free. A task that raises ends the round, but the streams are joined.
        streams: others than the manager's own, such as a slice's; None among them means the current stream.
        """
        lanes: tuple[torch.cuda.Stream | None, ...] = self.streams if streams is None else tuple(streams)
        if not self.on_gpu or not lanes:
            return [task() for task in tasks]
        current = torch.cuda.current_stream(self.device)
        used = list(dict.fromkeys(lanes[index % len(lanes)] for index in range(len(tasks))))
        forked = [lane for lane in used if lane is not None and lane != current]
        start = current.record_event()
        for lane in forked:
            lane.wait_event(start)
        results = []
        try:
            for index, task in enumerate(tasks):
                with torch.cuda.stream(lanes[index % len(lanes)]):
                    results.append(task())
        finally:
            for lane in forked:
                current.wait_event(lane.record_event())
        # The allocator knows a tensor by the stream that it was made on; it is read, and freed, on this one.
        record_use(results, current)
        return results

    def close(self) -> None:
        """Wait for the streams' work and give them back; they are made anew when next asked for."""
        for stream in self._streams:
            stream.synchronize()
        self._streams.clear()
