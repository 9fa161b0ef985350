"""Memory in which the programs of a launch count, between launches at zero without a launch that clears it."""

from __future__ import annotations

import threading

import torch


class Counters:
    """Zeroed memory for the counters of a kernel, which every launch leaves at zero.

    Launches of one stream share theirs. A captured launch has its own for good: its graph may run beside any stream.
    """

    SIZE, COUNT = 1024, 1024  # a claim and a tile for half a thousand experts and a tile of rows for each; 4 MiB

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[torch.Tensor] = []  # a captured launch does not keep its own
        self._fresh: dict[torch.device, list[torch.Tensor]] = {}
        self._of_stream: dict[tuple[torch.device, int], torch.Tensor] = {}

    def get(self, device: torch.device, count: int) -> torch.Tensor:
        """At least `count` int32 for a launch on the device's current stream; a launch clears more than SIZE."""
        if device.type != "cuda" or count > self.SIZE:
            return torch.zeros(count, dtype=torch.int32, device=device)
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.get(device, count)
        capturing = torch.cuda.is_current_stream_capturing()
        stream = device, torch.cuda.current_stream(device).cuda_stream
        with self._lock:
            if not capturing and stream in self._of_stream:
                return self._of_stream[stream]
            fresh = self._fresh.setdefault(device, [])
            if not fresh and capturing:  # zeroed by every replay then
                return torch.zeros(self.SIZE, dtype=torch.int32, device=device)
            if not fresh:
                self._kept.append(torch.zeros(self.COUNT, self.SIZE, dtype=torch.int32, device=device))
                zeroed = torch.cuda.Event()
                zeroed.record()
                zeroed.synchronize()  # once: other streams take some of it, and graphs
                fresh.extend(self._kept[-1].unbind())
            state = fresh.pop()
            if not capturing:
                self._of_stream[stream] = state
            return state
