"""CUDAGraphManager: calls whose shape repeats become CUDA graphs, in buckets of rows and a bounded pool."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_gpu.cuda_graph_manager.capture import (
    Captured,
    CaptureError,
    Capturer,
    CudaCapturer,
    first_rows,
    graph_in_the_making,
    making_a_graph,
)
from moe_gpu.cuda_graph_manager.packing import Packed, pack
from moe_gpu.reference import autocast_dtype

logger = logging.getLogger("moe_gpu")

DEFAULT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REMEMBERED = 1024  # shapes whose calls, or failures, are remembered
TOO_FEW = "fewer than min_calls calls of this shape"
FAILED = "a graph of this shape failed before"

_OWNERS = itertools.count()

Inputs = tuple[torch.Tensor, ...]  # of one call, a row of each for every token


class Survey(NamedTuple):
    """What a graph of some modules and tensors depends on besides its input, as of this call.

    facts: what modules, and other objects, with `graph_facts()` say of themselves; aware: those, in the same order.
    """

    training: bool
    addresses: tuple[int, ...]
    facts: tuple[Hashable, ...]
    aware: tuple[Any, ...]

    @classmethod
    def of(cls, watch: Sequence[Any]) -> Survey:
        training, addresses, facts, aware = False, [], [], []
        pending: list[Any] = list(watch)
        while pending:
            item = pending.pop()
            if isinstance(item, torch.Tensor):
                addresses.append(item.data_ptr())
                continue
            addresses.append(id(item))  # one without weights may have been replaced too
            if hasattr(type(item), "graph_facts"):
                facts.append(item.graph_facts())
                aware.append(item)
            own = item.__dict__  # a module's attributes are several times slower to ask for: this runs in every call
            if "_parameters" not in own:
                continue  # no module, but what speaks for one
            training = training or own["training"]
            for tensors in (own["_parameters"], own["_buffers"]):
                for tensor in tensors.values() if tensors else ():
                    if tensor is not None:
                        addresses.append(tensor.data_ptr())
            for child in own["_modules"].values() if own["_modules"] else ():
                if child is not None:
                    pending.append(child)
        return cls(training, tuple(addresses), tuple(facts), tuple(aware))

    def conflict(self, padded: bool) -> str | None:
        """Why a module cannot be captured, or not with padding; None where it can."""
        for module in self.aware:
            reason = module.graph_conflict() or (module.padding_conflict() if padded else None)
            if reason is not None:
                return str(reason)
        return None


class GraphKey(NamedTuple):
    """What one graph serves. inputs: shape of a row and dtype of each. stream: that it belongs to, and so the slice.

    A tuple, as `Survey` is: both are made anew in every call.
    """

    owner: int
    rows: int
    inputs: tuple[tuple[torch.Size, torch.dtype], ...]
    device: torch.device
    stream: int
    facts: tuple[Hashable, ...]


@dataclass
class _Graph:
    """A captured call with its static inputs: rows from `padded_from` on are padding.

    captured.output is Packed where results are the caller's to keep.
    """

    captured: Captured
    static: Inputs
    addresses: tuple[int, ...]
    padded_from: int
    unpaddable: str | None

    @property
    def memory_bytes(self) -> int:
        return self.captured.memory_bytes + sum(x.nbytes for x in self.static)

    def run(self, inputs: Inputs) -> Any:
        """The results of every row of the bucket."""
        rows = inputs[0].shape[0]
        for static_x, x in zip(self.static, inputs, strict=True):
            if rows == static_x.shape[0]:  # a slice would cost the host as much as the copy
                static_x.copy_(x)
                continue
            static_x[:rows].copy_(x)
            if rows < self.padded_from:
                _mark_as_padding(static_x[rows : self.padded_from])
        self.padded_from = rows
        self.captured.replay()
        output = self.captured.output
        return output.copies() if isinstance(output, Packed) else output


class CUDAGraphManager:
    """Replays calls as CUDA graphs, once `min_calls` calls of a shape were made; else calls as before.

    A call of x (rows first) is served by the smallest bucket with room. The rows between are NaN: the layers of this
    package route those nowhere, so that they read no weights and are counted nowhere. A callable must treat each row by
    itself; one of which a module says otherwise (`padding_conflict`) replays only where the rows fill the bucket.
    There is a graph for each bucket, dtype, device, stream and for what modules say of themselves (`graph_facts`, such
    as an SM budget); weights changed in place are seen, weights that lie elsewhere begin the count anew. Gradients,
    training mode, autocast, torch.compile and a capture of one's own are left alone. What cannot be captured stays
    eager, is logged once and not tried again for that shape.
    max_graphs, max_bytes: the pool's bounds; the least recently used graph goes first. clone: results are the caller's
    to keep; without it they are overwritten by the next replay of that graph. Raises ValueError for bounds below 1.
    """

    def __init__(
        self,
        min_calls: int = 10,
        buckets: Sequence[int] = DEFAULT_BUCKETS,
        max_graphs: int = 16,
        max_bytes: int | None = None,
        clone: bool = True,
        capturer: Capturer | None = None,
    ) -> None:
        if min_calls < 1 or max_graphs < 1 or (max_bytes is not None and max_bytes < 1):
            raise ValueError(
                f"min_calls={min_calls}, max_graphs={max_graphs} and max_bytes={max_bytes} must be at least 1"
            )
        if not buckets or any(not isinstance(rows, int) or rows < 1 for rows in buckets):
            raise ValueError(f"buckets={tuple(buckets)} must be one or more row counts of at least 1")
        self.min_calls, self.max_graphs, self.max_bytes, self.clone = min_calls, max_graphs, max_bytes, clone
        self.buckets = tuple(sorted(set(buckets)))
        self._capturer = capturer or CudaCapturer()
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._graphs: OrderedDict[GraphKey, _Graph] = OrderedDict()
        self._calls: OrderedDict[GraphKey, int] = OrderedDict()
        self._failures: OrderedDict[GraphKey, str] = OrderedDict()
        self._unpaddable: dict[int, str] = {}
        self._eager_calls: Counter[str] = Counter()
        self._hits = self._captures = self._evictions = self._moved = 0

    def __getstate__(self) -> dict[str, Any]:
        """Settings alone: a copy of a manager, in a copied or pickled layer, has no graphs yet."""
        names = ("min_calls", "max_graphs", "max_bytes", "clone", "buckets")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._capturer = CudaCapturer()
        self._reset()

    def __str__(self) -> str:
        return (
            f"calls of up to {self.buckets[-1]} rows are replayed once {self.min_calls} of a shape were made "
            f"(at most {self.max_graphs} graphs, {len(self._graphs)} now)"
        )

    def wrap(
        self, function: Callable[[torch.Tensor], Any], watch: Sequence[nn.Module | torch.Tensor] | None = None
    ) -> Callable[[torch.Tensor], Any]:
        """`function` served by graphs. watch: modules and tensors it reads besides x, so that new ones are noticed.

        By default the modules found in the callable: itself, its object, its closure, globals that it names, or a
        partial's arguments. Raises ValueError where there are none.
        """
        watched = tuple(_modules_of(function)) if watch is None else tuple(watch)
        if watch is None and not watched:
            raise ValueError(
                f"no module found in {function!r}: pass watch=[...] with the modules and tensors it reads, or watch=[]"
            )
        owner = self.new_owner()

        @functools.wraps(function, updated=())
        def served(x: torch.Tensor) -> Any:
            return self.call(function, x, watched, owner)

        return served

    @staticmethod
    def new_owner() -> int:
        """A number that tells one callable's graphs from another's, for `call`."""
        return next(_OWNERS)

    def call(
        self, function: Callable[..., Any], inputs: torch.Tensor | Inputs, watch: Sequence[Any], owner: int
    ) -> Any:
        """`function(x)`, replayed where it can be: what `wrap` does, for an `owner` that must not be kept alive.

        inputs: x, or several tensors of as many rows for `function(*inputs)`, the first of them floats. Integers beside
        it are padded by -1: ids of no expert. watch may also hold objects with what the manager asks of a module.
        """
        inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
        if torch.compiler.is_compiling():
            return function(*inputs)
        x = inputs[0]
        reason = self._why_eager(inputs)
        if reason is None:
            found = Survey.of(watch)
            rows = self.buckets[bisect_left(self.buckets, x.shape[0])]
            padded = x.shape[0] < rows
            if found.training:
                reason = "in training mode: call .eval()"
            elif padded and not x.is_floating_point():  # in the first input padding must show, whatever the others hold
                reason = f"rows of {x.dtype} cannot be marked as padding"
            elif padded and owner in self._unpaddable:
                reason = self._unpaddable[owner]
            else:
                reason = found.conflict(padded)
        if reason is None:
            stream = self._capturer.stream(x.device)
            rows_of = tuple([(each.shape[1:], each.dtype) for each in inputs])
            key = GraphKey(owner, rows, rows_of, x.device, stream, found.facts)
            with self._lock:
                graph = self._find(key, found.addresses)
                if graph is not None and not (padded and graph.unpaddable):
                    return self._replay(graph, inputs, found)
                reason = self._why_not_yet(key) if graph is None else graph.unpaddable
                if reason is None:
                    return self._begin(key, function, inputs, found)
        with self._lock:
            self._eager_calls[reason] += 1
        return function(*inputs)

    def _why_eager(self, inputs: Inputs) -> str | None:
        """What of a call, whatever is called, keeps it from graphs."""
        x = inputs[0]
        if making_a_graph():
            return "part of another graph"
        if torch.is_grad_enabled():
            return "gradients are enabled: call under torch.no_grad()"
        if x.dim() < 2 or x.shape[0] == 0:
            return "no rows"
        for other in inputs[1:]:
            if other.dim() < 1 or other.shape[0] != x.shape[0] or other.device != x.device:
                return "inputs of unlike rows or devices"
        if x.shape[0] > self.buckets[-1]:
            return "more rows than the largest bucket"
        if autocast_dtype(x.device) is not None:
            return "under autocast"
        return self._capturer.why_not(x.device)

    def _find(self, key: GraphKey, addresses: tuple[int, ...]) -> _Graph | None:
        graph = self._graphs.get(key)
        if graph is None:
            return None
        if graph.addresses != addresses:
            self._moved += 1
            self._drop(key)
            return None
        self._graphs.move_to_end(key)
        return graph

    def _why_not_yet(self, key: GraphKey) -> str | None:
        """Count a call of a shape without a graph; None when it is time to capture."""
        if key in self._failures:
            return FAILED
        calls = self._calls.pop(key, 0) + 1
        _remember(self._calls, key, calls)
        return TOO_FEW if calls < self.min_calls else None

    def _replay(self, graph: _Graph, inputs: Inputs, found: Survey) -> Any:
        output = graph.run(inputs)
        self._hits += 1
        return self._without_padding(output, graph.static[0].shape[0], inputs[0].shape[0], found)

    @staticmethod
    def _without_padding(output: Any, rows: int, keep: int, found: Survey) -> Any:
        if keep == rows:
            return output
        output = first_rows(output, rows, keep)
        for module in found.aware:
            module.discount_padding(rows - keep)
        return output

    def _begin(self, key: GraphKey, function: Callable[..., Any], inputs: Inputs, found: Survey) -> Any:
        """Serve this call from the static inputs, as a rehearsal, then capture; what fails is served as it came."""
        del self._calls[key]
        try:
            static, results = self._rehearse(key, function, inputs, found)
        except CaptureError as error:
            reason = self._unpaddable[key.owner] = str(error)
        except Exception as error:  # noqa: BLE001 a callable raises what it likes
            reason = f"rehearsal: {_in_one_line(error)}"
        else:
            self._capture(key, function, static, inputs[0].shape[0], found)
            return results
        self._capturer.free()
        self._eager_calls[reason] += 1
        # What it raises again is the caller's own mistake, and no reason to give the shape up.
        results = function(*inputs)
        if key.owner not in self._unpaddable:
            self._fail(key, reason)
        return results

    def _rehearse(
        self, key: GraphKey, function: Callable[..., Any], inputs: Inputs, found: Survey
    ) -> tuple[Inputs, Any]:
        """The static inputs, which hold this call's, and the results of `function` on them."""
        keep = inputs[0].shape[0]
        with torch.inference_mode(False), torch.no_grad():
            static = tuple(
                torch.empty((key.rows, *row_shape), dtype=dtype, device=key.device) for row_shape, dtype in key.inputs
            )
            for static_x, x in zip(static, inputs, strict=True):
                if keep < key.rows:
                    _mark_as_padding(static_x)
                static_x[:keep].copy_(x)
        with graph_in_the_making():
            output = self._capturer.rehearse(lambda: self._packed(function(*static)), key.device)
        output = output.copies() if isinstance(output, Packed) else output
        return static, self._without_padding(output, key.rows, keep, found)

    def _packed(self, output: Any) -> Any:
        return pack(output) if self.clone else output

    def _capture(self, key: GraphKey, function: Callable[..., Any], static: Inputs, rows: int, found: Survey) -> None:
        while len(self._graphs) >= self.max_graphs:
            self._evict()
        reason = None
        try:
            with graph_in_the_making():
                captured = self._capturer.capture(lambda: self._packed(function(*static)), key.device)
        except Exception as error:  # noqa: BLE001 whatever keeps a call from being captured, it works eagerly
            reason = f"capture: {_in_one_line(error)}"
        if reason is not None:
            self._capturer.free()
            self._fail(key, reason)
            return
        graph = _Graph(captured, static, found.addresses, rows, _why_unpaddable(captured.output, key.rows))
        if self.max_bytes is not None and graph.memory_bytes > self.max_bytes:
            needed = graph.memory_bytes
            captured.release()
            del graph, captured
            self._capturer.free()
            self._fail(key, f"needs {needed} bytes and max_bytes is {self.max_bytes}: raise it")
            return
        self._captures += 1
        self._graphs[key] = graph
        while self.max_bytes is not None and self.memory_bytes > self.max_bytes:
            self._evict()

    def _fail(self, key: GraphKey, reason: str) -> None:
        _remember(self._failures, key, reason)
        logger.warning("CUDA graph of %d rows not captured, calls of this shape stay eager: %s", key.rows, reason)

    def _evict(self) -> None:
        self._evictions += 1
        self._drop(next(iter(self._graphs)))

    def _drop(self, key: GraphKey) -> None:
        graph = self._graphs.pop(key)
        graph.captured.release()

    @property
    def memory_bytes(self) -> int:
        """Bytes that the graphs' pools took and their static inputs hold."""
        return sum(graph.memory_bytes for graph in self._graphs.values())

    def get_stats(self) -> dict[str, Any]:
        """Replays, captures, evictions, graphs dropped for moved weights, eager calls by reason, why shapes failed."""
        with self._lock:
            return {
                "hits": self._hits,
                "captures": self._captures,
                "evictions": self._evictions,
                "moved_weights": self._moved,
                "eager_calls": dict(self._eager_calls),
                "failures": sorted(set(self._failures.values())),
                "graphs": len(self._graphs),
                "memory_bytes": self.memory_bytes,
            }

    def clear(self) -> None:
        """Drop every graph, count and failure, so that what failed is tried again."""
        with self._lock:
            for key in list(self._graphs):
                self._drop(key)
            self._calls.clear()
            self._failures.clear()
            self._unpaddable.clear()
            self._capturer.free()

    def forget(self, owner: int) -> None:
        """Drop the graphs and counts of an owner that will not call again."""
        with self._lock:
            for key in [key for key in self._graphs if key.owner == owner]:
                self._drop(key)
            for table in (self._calls, self._failures):
                for key in [key for key in table if key.owner == owner]:
                    del table[key]
            self._unpaddable.pop(owner, None)

    def close(self) -> None:
        """Give all memory back. The manager can be used again: it begins anew."""
        self.clear()


def _mark_as_padding(rows: torch.Tensor) -> None:
    rows.fill_(float("nan") if rows.is_floating_point() else -1)


def _remember(table: OrderedDict[GraphKey, Any], key: GraphKey, value: Any) -> None:
    table[key] = value
    while len(table) > REMEMBERED:
        table.popitem(last=False)


def _why_unpaddable(output: Any, rows: int) -> str | None:
    try:
        first_rows(output.views() if isinstance(output, Packed) else output, rows, rows)
    except CaptureError as error:
        return str(error)
    return None


def _in_one_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


def _modules_of(function: Any) -> Iterator[nn.Module]:
    """Modules that a callable is, belongs to, closes over, names globally or was given as a partial's argument."""
    if isinstance(function, nn.Module):
        yield function
        return
    held = [getattr(function, "__self__", None)]
    held += [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    held += [names[name] for name in (code.co_names if code else ()) if isinstance(names.get(name), nn.Module)]
    if isinstance(function, functools.partial):
        held += [function.func, *function.args, *function.keywords.values()]
    for item in held:
        if isinstance(item, nn.Module):
            yield item
        elif isinstance(item, functools.partial) or hasattr(item, "__closure__"):
            yield from _modules_of(item)
        elif isinstance(item, tuple | list):
            yield from (each for each in item if isinstance(each, nn.Module))
