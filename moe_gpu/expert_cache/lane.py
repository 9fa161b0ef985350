"""The copy lane: host to device copies beside the computation, ordered by tokens on a GPU and by the call elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


class CudaCopyLane(CopyLane):
    """A stream of its own; tokens are events. Nothing here waits on the host but `synchronize`."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Iterable[object]) -> object:
        for event in _pending(after):
            self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def mark(self) -> object:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, tokens: Iterable[object]) -> None:
        current = torch.cuda.current_stream(self.device)
        for event in _pending(tokens):
            current.wait_event(event)

    def adopt(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.record_stream(self.stream)

    def synchronize(self) -> None:
        self.stream.synchronize()


def _pending(tokens: Iterable[object]) -> list[torch.cuda.Event]:
    """The events among the tokens that have not been reached, each once."""
    unique = {id(token): token for token in tokens if isinstance(token, torch.cuda.Event)}
    return [event for event in unique.values() if not event.query()]


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
