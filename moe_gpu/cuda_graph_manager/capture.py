"""How one call becomes a CUDA graph: rehearsed where nothing may wait for the device, then recorded."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

Output = TypeVar("Output")
Leaf = TypeVar("Leaf")
WAITED = "called a synchronizing CUDA operation"


class CaptureError(RuntimeError):
    """A call cannot become a graph, or not for fewer rows than its bucket; the message says why."""


@dataclass(frozen=True)
class Captured:
    """A recorded call: `replay()` runs it on the stream that was current and overwrites the tensors of `output`.

    memory_bytes: what the graph's pool took from the device, without the static input. `release()` waits for that
    stream and gives the memory back.
    """

    replay: Callable[[], None]
    release: Callable[[], None]
    output: Any
    memory_bytes: int


class Capturer(Protocol):
    """What a manager needs of a device; tests put a stand-in here."""

    def why_not(self, device: torch.device) -> str | None: ...

    def stream(self, device: torch.device) -> int: ...

    def rehearse(self, run: Callable[[], Output], device: torch.device) -> Output: ...

    def capture(self, run: Callable[[], Any], device: torch.device) -> Captured: ...

    def free(self) -> None: ...


# One stream a device for captures from the default stream, made when first needed: each stream costs a workspace of the
# matrix library, and every layer may have a manager. What is captured there is replayed on the default stream, so that
# no two graphs use that workspace at once. One thread at a time may rehearse or capture.
_STREAMS: dict[torch.device, torch.cuda.Stream] = {}
_ONE_AT_A_TIME = threading.RLock()


class CudaCapturer:
    """Captures on the current stream, so that a slice's graph stays in its slice, but never on the default one."""

    def why_not(self, device: torch.device) -> str | None:
        """Why no call on this device can be captured or replayed now; None where it can."""
        if device.type != "cuda":
            return f"CUDA graphs need an NVIDIA GPU, and the tensors are on {device.type}"
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.why_not(device)
        return "inside another capture" if torch.cuda.is_current_stream_capturing() else None

    def stream(self, device: torch.device) -> int:
        return torch.cuda.current_stream(device).cuda_stream

    @staticmethod
    def _capture_stream(device: torch.device) -> torch.cuda.Stream:
        current = torch.cuda.current_stream(device)
        if current != torch.cuda.default_stream(device):
            return current
        if device not in _STREAMS:
            _STREAMS[device] = torch.cuda.Stream(device)
        return _STREAMS[device]

    def rehearse(self, run: Callable[[], Output], device: torch.device) -> Output:
        """Run once where it will be captured, so that nothing is compiled later.

        Raises RuntimeError for a call that waits for the device. That is found out before the capture begins, since a
        capture that breaks off can leave the allocator and the random generators in a state of capture.
        """
        with _ONE_AT_A_TIME:
            outside, stream = torch.cuda.current_stream(device), self._capture_stream(device)
            stream.wait_stream(outside)
            try:
                with torch.cuda.stream(stream), waits_refused():
                    output = run()
            finally:
                outside.wait_stream(stream)
        record_use(output, outside)
        return output

    def capture(self, run: Callable[[], Any], device: torch.device) -> Captured:
        with _ONE_AT_A_TIME, torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph, output = record_graph(run, self._capture_stream(device))
            memory_bytes = max(0, torch.cuda.memory_reserved() - before)

        replayed_on = torch.cuda.current_stream(device)

        def release() -> None:
            replayed_on.synchronize()  # a device's synchronize does not wait for graphs in a green context
            graph.reset()

        return Captured(graph.replay, release, output, memory_bytes)

    def free(self) -> None:
        """Give back to the device what released graphs held."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def record_graph(run: Callable[[], Output], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Output]:
    """Record `run` on a stream that is not the default one; the output's tensors are overwritten by every replay."""
    outside = torch.cuda.current_stream(stream.device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = run()
    finally:
        # torch.cuda.graph leaves its stream current where ending the capture fails.
        torch.cuda.set_stream(outside)
    return graph, output


@contextmanager
def waits_refused() -> Iterator[None]:
    """RuntimeError at the end if PyTorch waited for the device inside.

    PyTorch's check concerns every thread: it is only asked to warn, so that no other thread's work fails by it.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        text = str(warning.message)
        if WAITED in text:
            raise RuntimeError(f"the call waits for the device ({text.splitlines()[0]})")
        if "prototype" not in text:  # torch calls this debug mode one on each use
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


_STATE = threading.local()


@contextmanager
def graph_in_the_making() -> Iterator[None]:
    """Inside, this thread rehearses or captures: other managers stand back, so that their work becomes part of it."""
    _STATE.making = True
    try:
        yield
    finally:
        _STATE.making = False


def making_a_graph() -> bool:
    return getattr(_STATE, "making", False)


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with every tensor replaced, in tuples, lists, dicts and dataclasses; other leaves stay as they are."""
    return map_leaves(value, torch.Tensor, function)


def map_leaves(value: Any, kind: type[Leaf], function: Callable[[Leaf], Any]) -> Any:
    """`map_tensors` for leaves of another kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, dict):
        return {name: map_leaves(item, kind, function) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return _like(value, [map_leaves(item, kind, function) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: map_leaves(getattr(value, field.name), kind, function) for field in fields(value)}
        return replace(value, **changed)
    return value


def record_use(value: Any, stream: torch.cuda.Stream) -> None:
    """Tell the allocator that every tensor in `value` is also used on a stream: it is not handed on before that."""

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            tensor.record_stream(stream)
        return tensor

    map_tensors(value, record)


def first_rows(value: Any, rows: int, keep: int) -> Any:
    """Views of an output's first `keep` of `rows` rows.

    Every tensor must have a row for each input row; an object with `first_tokens(keep)` says itself what remains of it,
    and one with `deferred(make)` says it when it is first looked at.
    CaptureError for anything else, since its padding would be taken for results.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or value.shape[0] != rows:
            raise CaptureError(f"an output of shape {tuple(value.shape)} has not a row for each of {rows} input rows")
        return value[:keep]
    if hasattr(type(value), "deferred"):
        return type(value).deferred(lambda: value.first_tokens(keep))
    if hasattr(type(value), "first_tokens"):
        return value.first_tokens(keep)
    if isinstance(value, dict):
        return {name: first_rows(item, rows, keep) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return _like(value, [first_rows(item, rows, keep) for item in value])
    if value is None or isinstance(value, str | int | float):
        return value
    raise CaptureError(f"an output of type {type(value).__name__} cannot be cut to fewer rows")


def _like(value: tuple[Any, ...] | list[Any], items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
