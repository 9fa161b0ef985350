"""ExpertCache and LayerCache: carry out on tensors what the bookkeeping decides."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch

from moe_gpu.expert_cache.book import CacheBook, Counts, Load, Wave
from moe_gpu.expert_cache.budget import HbmBudgetError, HbmMemoryError, parse_budget, split_budget
from moe_gpu.expert_cache.lane import CopyLane, host_copy, make_lane
from moe_gpu.expert_cache.policies import POLICIES, PrefetchGate
from moe_gpu.profiler import AsyncCopy
from moe_gpu.reference import INVALID, ExpertWeights, Routing

logger = logging.getLogger("moe_gpu")


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Ops(Protocol):
    """What the cache asks of `TritonExpertOps`."""

    def experts(
        self, x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: str
    ) -> torch.Tensor: ...

    def sort_routes(self, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, num_experts: int) -> Routing: ...

    def expert_rows(
        self,
        x_TH: torch.Tensor,
        routing: Routing,
        weights: ExpertWeights,
        activation: str,
        first_bin: int,
        num_experts: int,
        out_RO: torch.Tensor | None,
    ) -> torch.Tensor: ...

    def combine_rows(self, y_RO: torch.Tensor, routing: Routing, dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True)
class ExpertCacheStats:
    """What a cache holds and has done; every figure is the host's own, nothing is read from the device.

    hit_rate: None before the first request that was read; requests of wholly resident layers are not read
    (`counts.unread_steps`). policy: which one serves now; shadow_hit_rates: the recent hit rate that each would have
    had. prefetch: None if not asked for, else whether it is on at present. host_memory: "pinned", or why it is not.
    """

    budget: int | float
    budget_bytes: int
    used_bytes: int
    slots_by_layer: list[int]
    resident_by_layer: list[list[int]]
    hit_rate: float | None
    policy: str
    policy_switches: int
    shadow_hit_rates: dict[str, float | None]
    prefetch: bool | None
    host_memory: str
    counts: Counts


class ExpertCache:
    """Slots in device memory for the experts of one layer or of a whole model, within one budget.

    hbm_budget: bytes, "8GiB", or a share of all experts' bytes (0.5 or "50%"). policy: "auto" chooses among "lru",
    "lfu" and "ewma" by shadow simulation; each can be fixed; "static" ranks by `profile_LE` (uses of each expert in
    each layer, such as `RoutingTrace.counts_LE()`); "on-demand" keeps nothing. prefetch: load what the next layer will
    probably need; it turns itself off while that loses. Raises HbmBudgetError or ValueError for what it cannot read.
    """

    def __init__(
        self,
        hbm_budget: int | float | str,
        policy: str = "auto",
        prefetch: bool = True,
        profile_LE: torch.Tensor | Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.budget = parse_budget(hbm_budget)
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not one of {', '.join(POLICIES)}")
        if (policy == "static") != (profile_LE is not None):
            raise ValueError(f"policy={policy!r}: a profile_LE goes with policy='static', and only with it")
        self.policy, self.prefetch = policy, prefetch
        self._profile_LE = profile_LE.tolist() if isinstance(profile_LE, torch.Tensor) else profile_LE
        self._members: list[weakref.ref[LayerCache]] = []
        self._lost_member = False
        self._book: CacheBook | None = None
        self._counts = Counts()
        self._lanes: dict[torch.device, CopyLane] = {}
        self._pageable: str | None = None
        self.one_at_a_time = threading.RLock()  # what one thread's step reads from slots, another's may replace

    @property
    def layers(self) -> list[LayerCache]:
        """The layers that share the budget, in the order of registration."""
        return [layer for layer in (member() for member in self._members) if layer is not None]

    def register(self, num_experts: int, expert_bytes: int) -> LayerCache:
        """One more layer under this budget, which is divided anew. Raises HbmBudgetError if it does not suffice."""
        layer = LayerCache(self, num_experts, expert_bytes)
        self._divide([*self.layers, layer])  # refuse before anything changes
        self._members.append(weakref.ref(layer, self._forget_member))
        self.reset()
        return layer

    def _forget_member(self, member: weakref.ref[LayerCache]) -> None:
        self._members.remove(member)
        self._lost_member = True  # its slots are divided among the others when they are next asked for

    def _divide(self, layers: Sequence[LayerCache]) -> list[int]:
        return split_budget(self.budget, [(layer.num_experts, layer.expert_bytes) for layer in layers])

    def reset(self) -> None:
        """Free every slot, and divide the budget again at the next step; counts go on."""
        self.synchronize()
        for layer in self.layers:
            layer.free()
        self._book, self._lost_member = None, False

    def book(self) -> CacheBook:
        """The bookkeeping of the present division of the budget."""
        if self._lost_member:
            self.reset()
        if self._book is None:
            layers = self.layers
            if self._profile_LE is not None and [len(row) for row in self._profile_LE] != [
                x.num_experts for x in layers
            ]:
                raise ValueError(
                    f"profile_LE has {len(self._profile_LE)} rows; give one for each of {len(layers)} layers, "
                    "a number for each of its experts"
                )
            slots = self._divide(layers)
            sizes = [(x.num_experts, n, x.expert_bytes) for x, n in zip(layers, slots, strict=True)]
            self._book = CacheBook(sizes, self.policy, self.prefetch, self._profile_LE)
            self._book.counts = self._counts
            for index, layer in enumerate(layers):
                layer.index = index
        return self._book

    def following(self, index: int) -> LayerCache | None:
        """The layer that runs after this one; None while layers come and go."""
        if self._book is None or self._lost_member:
            return None
        return self._members[self._book.following(index)]()

    def lane(self, device: torch.device) -> CopyLane:
        if device not in self._lanes:
            self._lanes[device] = make_lane(device)
        return self._lanes[device]

    def synchronize(self) -> None:
        """Wait until no copy is under way. Call it before host weights are written to in place."""
        for lane in self._lanes.values():
            lane.synchronize()

    def to_host(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The tensor in host memory, pinned where the device is a GPU and the system allows it."""
        host, reason = host_copy(tensor, pin=device.type == "cuda")
        if reason is not None and self._pageable is None:
            self._pageable = reason
            logger.warning("expert cache: host memory cannot be pinned, copies will be slower: %s", reason)
        return host

    @property
    def host_memory(self) -> str:
        """ "pinned", or why it is not."""
        if not any(lane.asynchronous for lane in self._lanes.values()):
            return "not pinned: no GPU is used"
        return "pinned" if self._pageable is None else f"pageable: {self._pageable}"

    def counts(self) -> Counts:
        """What the cache has done so far; any thread may ask."""
        return Counts(**asdict(self._counts))

    def stats(self) -> ExpertCacheStats:
        """Figures of now. Raises HbmBudgetError where the layers have grown beyond the budget."""
        book, counts = self.book(), self._counts
        requests = counts.hits + counts.misses
        total = sum(layer.num_experts * layer.expert_bytes for layer in self.layers)
        return ExpertCacheStats(
            budget=self.budget,
            budget_bytes=int(self.budget * total) if isinstance(self.budget, float) else self.budget,
            used_bytes=sum(layer.allocated_bytes for layer in self.layers),
            slots_by_layer=[layer.num_slots for layer in book.layers],
            resident_by_layer=[sorted(layer.slot_of) for layer in book.layers],
            hit_rate=counts.hits / requests if requests else None,
            policy=book.contest.serving,
            policy_switches=book.contest.switches,
            shadow_hit_rates=book.contest.scores(),
            prefetch=None if book.gate is None else book.gate.on,
            host_memory=self.host_memory,
            counts=self.counts(),
        )


class LayerCache:
    """One layer's slots: runs its experts from them. Made by `ExpertCache.register`, owned by the layer."""

    def __init__(self, cache: ExpertCache, num_experts: int, expert_bytes: int) -> None:
        self.cache, self.num_experts, self.expert_bytes = cache, num_experts, expert_bytes
        self.index = -1
        self.free()

    def __deepcopy__(self, memo: dict) -> LayerCache:
        """A copied layer shares the budget."""
        return self.cache.register(self.num_experts, self.expert_bytes)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None where it is unpickled: another process has device memory of its own to divide."""
        return type(None), ()

    def resize(self, expert_bytes: int) -> None:
        """An expert takes another number of bytes; HbmBudgetError, and nothing changed, if the budget is too small."""
        if expert_bytes == self.expert_bytes:
            return
        old, self.expert_bytes = self.expert_bytes, expert_bytes
        try:
            self.cache._divide(self.cache.layers)
        except HbmBudgetError:
            self.expert_bytes = old
            raise
        self.cache.reset()

    def __str__(self) -> str:
        book = self.cache.book()
        layer = book.layers[self.index]
        place = f"{layer.num_slots} of {self.num_experts} experts have slots of {self.expert_bytes} bytes"
        if self.whole:
            return f"{place}: the budget holds them all"
        return f"{place}, policy {self.cache.policy} ({book.contest.serving} now); host memory {self.cache.host_memory}"

    def free(self) -> None:
        """Give the slots' memory back; the bookkeeping is the caller's to reset."""
        self._slots: ExpertWeights | None = None
        # An expert's tensors by slot and by expert: to index the stacks anew costs the host as much as to start a copy.
        self._slot_tensors: list[tuple[torch.Tensor, ...]] = []
        self._host_tensors: list[tuple[torch.Tensor, ...]] = []
        self._seen: object = None
        self._ready: list[object] = []  # by slot: when its weights have arrived
        self._last_use: list[object] = []  # by slot: when the last computation that reads them is done
        self._table: tuple[int, torch.Tensor] | None = None  # expert -> slot, and of which version of the book

    @property
    def _device(self) -> torch.device | None:
        """Where the slots are; None before there are any."""
        return None if self._slots is None else self._slots.up_EGH.device

    @property
    def allocated_bytes(self) -> int:
        return 0 if self._slots is None else sum(t.nbytes for t in self._slots.tensors() if t is not None)

    @property
    def whole(self) -> bool:
        """Whether there is a slot for every expert, so that nothing is ever missing once all are loaded."""
        book = self.cache.book()
        return book.layers[self.index].num_slots >= self.num_experts and self.cache.policy != "on-demand"

    def run(
        self, x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: str, ops: Ops
    ) -> torch.Tensor:
        """The routed experts' weighted output (T, O), to the bit that of `ops.experts` with all weights on x's device.

        weights: the layer's parameters, which live in host memory; they are moved and pinned in place if they do not.
        Threads take turns under one budget; on a GPU all of them must use one stream.
        Raises ValueError where a gradient is asked for or a partly resident layer is captured in a graph, and
        HbmMemoryError if the slots do not fit into the device's memory.
        """
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x_TH, routing.topk_weights_TK, *weights.tensors())
        ):
            raise ValueError("hbm_budget serves inference only and a gradient is asked for; run under torch.no_grad()")
        with self.cache.one_at_a_time:
            return self._run(x_TH, routing, weights, activation, ops)

    def _run(
        self, x_TH: torch.Tensor, routing: Routing, weights: ExpertWeights, activation: str, ops: Ops
    ) -> torch.Tensor:
        layer = self.cache.book().layers[self.index]
        stale = self._seen != self._identity(weights, x_TH.device)
        if is_capturing(x_TH.device) and (not self.whole or stale or not layer.full):
            held = f"{len(layer.slot_of)} of {self.num_experts} experts are resident"
            raise ValueError(
                f"a CUDA graph cannot capture this layer: {held}, and which others a replay needs is known to the host "
                "only while it runs; give an hbm_budget that holds all experts and call the layer once before capture"
            )
        if stale:
            self._take_in(weights, x_TH.device)
        try:
            if self.whole:
                return self._run_whole(x_TH, routing, activation, ops)
            return self._run_waves(x_TH, routing, activation, ops)
        except BaseException:
            # What has been copied and what has not is unknown: nothing counts as resident.
            layer.forget()
            raise

    @staticmethod
    def _identity(weights: ExpertWeights, device: torch.device) -> object:
        """What changes whenever the weights do: writing in place raises a version, replacing moves them."""
        versions = [
            (t.data_ptr(), t.dtype, t.shape, 0 if t.is_inference() else t._version)
            for t in weights.tensors()
            if t is not None
        ]
        return device, versions

    def _take_in(self, weights: ExpertWeights, device: torch.device) -> None:
        """Home the weights in host memory, make slots of their shapes, and forget what was resident."""
        cache, layer = self.cache, self.cache.book().layers[self.index]
        lane = cache.lane(device)
        lane.synchronize()  # no copy may read weights that are being replaced
        for tensor in weights.tensors():
            if tensor is not None and (tensor.device.type != "cpu" or (lane.asynchronous and not tensor.is_pinned())):
                tensor.data = cache.to_host(tensor, device)
        shapes = [None if t is None else ((layer.num_slots, *t.shape[1:]), t.dtype) for t in weights.tensors()]
        slots = self._slots
        if (
            slots is None
            or slots.up_EGH.device != device
            or shapes != [None if t is None else (tuple(t.shape), t.dtype) for t in slots.tensors()]
        ):
            layer.forget()
            self.free()
            try:
                made = [None if s is None else torch.empty(s[0], dtype=s[1], device=device) for s in shapes]
            except torch.OutOfMemoryError as error:
                asked = layer.num_slots * self.expert_bytes
                raise HbmMemoryError(
                    f"no memory for {layer.num_slots} slots of {self.expert_bytes} bytes ({asked}) on {device}; "
                    "give a smaller hbm_budget"
                ) from error
            self._slots = ExpertWeights(*made)  # type: ignore[arg-type]
            lane.adopt(slot for slot in made if slot is not None)
        layer.forget()
        assert self._slots is not None
        self._slot_tensors = _by_expert(self._slots)
        self._host_tensors = _by_expert(weights)
        self._ready = [None] * layer.num_slots
        self._last_use = [lane.mark()] * layer.num_slots  # fresh memory may still be in use by what freed it
        self._seen = self._identity(weights, device)

    def _copy(self, lane: CopyLane, loads: Sequence[Load]) -> None:
        """Start copying experts into their slots, each slot after its last use."""
        if not loads:
            return
        pairs = [
            pair
            for load in loads
            for pair in zip(self._slot_tensors[load.slot], self._host_tensors[load.expert], strict=True)
        ]
        token = lane.copy(pairs, [self._last_use[load.slot] for load in loads])
        for load in loads:
            self._ready[load.slot] = token

    def _run_whole(self, x_TH: torch.Tensor, routing: Routing, activation: str, ops: Ops) -> torch.Tensor:
        """Expert e lies in slot e: nothing to read, nothing to look up; once loaded this captures in a graph."""
        cache = self.cache
        book, lane = cache.book(), cache.lane(x_TH.device)
        loads = book.fill(self.index)
        self._copy(lane, loads)
        if loads:
            # Later calls, and graphs, must find the weights in place without waiting for an event.
            lane.synchronize()
        book.counts.steps += 1
        book.counts.unread_steps += 1
        assert self._slots is not None
        return ops.experts(x_TH, routing, self._slots.to(x_TH.dtype), activation)

    def _run_waves(self, x_TH: torch.Tensor, routing: Routing, activation: str, ops: Ops) -> torch.Tensor:
        book, lane = self.cache.book(), self.cache.lane(x_TH.device)
        assert self._slots is not None
        waves: list[Wave] = []
        if x_TH.shape[0]:
            bounds_P = AsyncCopy(routing.offsets_P)
            # Launched before the wait, since it needs no answer: the ids, with one that is no expert's where dropped.
            kept_R = torch.where(routing.row_of_route_TK < 0, self.num_experts, routing.topk_ids_TK).flatten()
            # The one thing that the host waits for: E + 1 numbers, which are there as soon as the routing is.
            bounds = bounds_P.result().numpy()
            needed = (bounds[1:] > bounds[:-1]).nonzero()[0].tolist()
            waves = book.plan(self.index, needed)
        if not waves:
            return x_TH.new_zeros(x_TH.shape[0], self._slots.down_EOI.shape[1])
        bins = self._sort(routing, kept_R, waves, ops)
        out_TO = self._compute(x_TH, bins, activation, ops, waves, lane)
        # From here on the host works while the device computes.
        book.learn(self.index, needed)
        if book.gate is not None:
            self._prefetch(book, book.gate, needed, lane)
        return out_TO

    def _prefetch(self, book: CacheBook, gate: PrefetchGate, needed: list[int], lane: CopyLane) -> None:
        """Copy what the next layer will probably need; the gate weighs what that takes the host."""
        begin = time.perf_counter()
        following = self.cache.following(self.index)
        if following is not None and following._device == self._device:
            following._copy(lane, book.prefetch(self.index, needed))
        if gate.copy_s is None:
            gate.copy_s = lane.seconds(self.expert_bytes)
        gate.host_s += time.perf_counter() - begin

    def _compute(
        self, x_TH: torch.Tensor, bins: Routing, activation: str, ops: Ops, waves: list[Wave], lane: CopyLane
    ) -> torch.Tensor:
        """Every wave's rows into one buffer, then one sum over each token's rows, as if there had been one wave."""
        assert self._slots is not None
        num_slots = len(self._ready)
        y_RO: torch.Tensor | None = None
        self._copy(lane, waves[0].loads)
        for number, wave in enumerate(waves):
            upcoming = waves[number + 1].loads if number + 1 < len(waves) else []
            # What goes into slots that this wave does not read can be on its way before this wave is launched.
            self._copy(lane, [load for load in upcoming if load.slot not in wave.slots])
            lane.wait(self._ready[slot] for slot in wave.slots)
            weights = self._slots.to(x_TH.dtype)  # under autocast this reads the slots
            y_RO = ops.expert_rows(x_TH, bins, weights, activation, number * num_slots, self.num_experts, y_RO)
            token = lane.mark()
            for slot in wave.slots:
                self._last_use[slot] = token
            self._copy(lane, [load for load in upcoming if load.slot in wave.slots])
        assert y_RO is not None
        return ops.combine_rows(y_RO, bins, x_TH.dtype)

    def _sort(self, routing: Routing, kept_R: torch.Tensor, waves: list[Wave], ops: Ops) -> Routing:
        """The routes sorted by wave, then slot: the table expert -> bin is looked up on the device."""
        ids_TK = routing.topk_ids_TK
        table_E = self._table_of(waves, ids_TK.device)
        bins_TK = table_E.index_select(0, kept_R).view_as(ids_TK)
        bins = ops.sort_routes(bins_TK, routing.topk_weights_TK, len(waves) * len(self._ready))
        if bins.topk_weights_TK is routing.topk_weights_TK:
            return bins
        return replace(bins, topk_weights_TK=routing.topk_weights_TK)

    def _table_of(self, waves: list[Wave], device: torch.device) -> torch.Tensor:
        """(E + 1,): each expert's bin, the last for dropped routes; without loads the same until there are some."""
        layer = self.cache.book().layers[self.index]
        settled = len(waves) == 1 and not waves[0].loads
        if settled and self._table is not None and self._table[0] == layer.version:
            return self._table[1]
        bin_E = [INVALID] * (self.num_experts + 1)
        if settled:
            for expert, slot in layer.slot_of.items():
                bin_E[expert] = slot
        for number, wave in enumerate(waves):
            for expert, slot in zip(wave.experts, wave.slots, strict=True):
                bin_E[expert] = slot + number * layer.num_slots
        host_E = torch.tensor(bin_E, dtype=torch.int32, pin_memory=device.type == "cuda")
        table_E = host_E.to(device, non_blocking=True)
        if settled:
            self._table = layer.version, table_E
        return table_E


def _by_expert(weights: ExpertWeights) -> list[tuple[torch.Tensor, ...]]:
    """Each expert's own tensors."""
    return list(zip(*(t.detach().unbind() for t in weights.tensors() if t is not None), strict=True))
