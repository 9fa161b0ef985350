"""The copy lane: host to device copies beside the computation, ordered by tokens on a GPU and by the call elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


class CopyLane:
    """Copies that have happened when `copy` returns: for a CPU, where everything already happens in order."""

    asynchronous = False

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Iterable[object]) -> object:
        """Copy each (destination, source) once all of `after` has been reached; a token of when it is done."""
        for destination, source in pairs:
            destination.copy_(source)
        return None

    def mark(self) -> object:
        """A token of what has been launched so far on the computation's stream."""
        return None

    def wait(self, tokens: Iterable[object]) -> None:
        """What the computation's stream is given from now on starts after these tokens."""

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copies will write to these: when they are freed, their memory is not given out before the copies are done."""

    def synchronize(self) -> None:
        """Wait on the host until no copy is under way."""

    def seconds(self, num_bytes: int) -> float | None:
        """What copying so much takes the lane; None as long as it is not known, or where the host itself copies."""
        return None


@dataclass(eq=False)
class Point:
    """A point on a stream. Once seen to be reached it is not asked again, which would cost the host each time."""

    event: torch.cuda.Event
    reached: bool = False


class CudaCopyLane(CopyLane):
    """A stream of its own; tokens are events. Nothing here waits on the host but `synchronize`."""

    asynchronous = True
    TIMED = 8  # copies, of which the fastest tells the pace

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event, int]] = []
        self._seconds_per_byte: float | None = None

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Iterable[object]) -> object:
        for event in _pending(after):
            self.stream.wait_event(event)
        timed = bool(pairs) and len(self._timed) < self.TIMED and self._seconds_per_byte is None
        begin = self.stream.record_event(torch.cuda.Event(enable_timing=True)) if timed else None
        with torch.cuda.stream(self.stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        end = self.stream.record_event(torch.cuda.Event(enable_timing=timed))
        if begin is not None:
            self._timed.append((begin, end, sum(source.nbytes for _, source in pairs)))
        return Point(end)

    def seconds(self, num_bytes: int) -> float | None:
        if self._seconds_per_byte is None:
            if len(self._timed) < self.TIMED or not self._timed[-1][1].query():
                return None
            self._seconds_per_byte = min(begin.elapsed_time(end) / size for begin, end, size in self._timed) / 1e3
            self._timed.clear()
        return num_bytes * self._seconds_per_byte

    def mark(self) -> object:
        return Point(torch.cuda.current_stream(self.device).record_event())

    def wait(self, tokens: Iterable[object]) -> None:
        events = _pending(tokens)
        if events:
            current = torch.cuda.current_stream(self.device)
            for event in events:
                current.wait_event(event)

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.record_stream(self.stream)

    def synchronize(self) -> None:
        self.stream.synchronize()


def _pending(tokens: Iterable[object]) -> list[torch.cuda.Event]:
    """The events of points among the tokens that have not been reached, each once."""
    points = {token for token in tokens if isinstance(token, Point) and not token.reached}
    for point in points:
        point.reached = point.event.query()
    return [point.event for point in points if not point.reached]


def make_lane(device: torch.device) -> CopyLane:
    return CudaCopyLane(device) if device.type == "cuda" else CopyLane()


def host_copy(tensor: torch.Tensor, pin: bool) -> tuple[torch.Tensor, str | None]:
    """The tensor in host memory, pinned if asked for and possible, and why it is not pinned where it should be."""
    host = tensor.detach().to("cpu")
    if not pin or host.is_pinned():
        return host, None
    try:
        return host.pin_memory(), None
    except RuntimeError as error:  # the operating system's limit, or the driver's
        return host, " ".join(str(error).split())[:200] or "pinning failed"
