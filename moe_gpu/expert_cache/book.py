"""The bookkeeping of a cache: who is in which slot, the waves of a step, what is prefetched, and every count.

Pure host arithmetic: the cache carries out what is decided here, and the simulator replays traces through the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_gpu.expert_cache.policies import Contest, Follower, History, PrefetchGate, best, count, settle

NONE = -1


@dataclass(frozen=True)
class Load:
    """Copy an expert's weights into a slot."""

    expert: int
    slot: int


@dataclass(frozen=True)
class Wave:
    """Experts computed together, each in its slot, once `loads` have arrived."""

    experts: list[int]
    slots: list[int]
    loads: list[Load]


@dataclass
class Counts:
    """What a cache has done so far. A request is one expert needed by one step of one layer."""

    steps: int = 0
    unread_steps: int = 0  # of wholly resident layers, whose requests are not read back
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_copied: int = 0  # host to device, prefetches included
    bytes_prefetched: int = 0
    bytes_wasted: int = 0  # of prefetched experts that were evicted unused
    prefetch_hits: int = 0  # first uses of prefetched experts
    prefetch_victims: int = 0  # misses on experts that a prefetch had evicted


@dataclass
class LayerBook:
    """One layer's slots."""

    num_experts: int
    num_slots: int
    expert_bytes: int
    history: History
    slot_of_E: np.ndarray = field(init=False)
    expert_of_S: np.ndarray = field(init=False)
    unused_E: np.ndarray = field(init=False)  # prefetched and not used yet
    pushed_E: np.ndarray = field(init=False)  # evicted by a prefetch and not loaded since

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is resident any more."""
        self.slot_of_E = np.full(self.num_experts, NONE, dtype=np.int32)
        self.expert_of_S = np.full(self.num_slots, NONE, dtype=np.int32)
        self.unused_E = np.zeros(self.num_experts, dtype=bool)
        self.pushed_E = np.zeros(self.num_experts, dtype=bool)

    @property
    def resident_E(self) -> np.ndarray:
        return self.slot_of_E != NONE


class CacheBook:
    """The bookkeeping of all layers that share a budget: (experts, slots, bytes of an expert) each, in their order.

    Every step of a layer is `plan`, then `learn`, then, if wanted, `prefetch`.
    """

    PREFETCHES = 2  # experts a step, at most

    def __init__(
        self,
        layers: Sequence[tuple[int, int, int]],
        policy: str = "auto",
        prefetch: bool = True,
        profile_LE: Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.policy = policy
        self.layers = [
            LayerBook(experts, slots, size, History(experts, None if profile_LE is None else profile_LE[index]))
            for index, (experts, slots, size) in enumerate(layers)
        ]
        self.contest = Contest([(layer.num_experts, layer.num_slots) for layer in self.layers], policy)
        self.gate = PrefetchGate() if prefetch and policy != "on-demand" else None
        self.counts = Counts()
        self._followers: dict[int, Follower] = {}
        self._before: tuple[int, np.ndarray] | None = None

    def plan(self, index: int, needed_E: np.ndarray) -> list[Wave]:
        """The waves that compute the needed experts, recorded as if they had been carried out.

        What is resident goes first, while the rest is on its way; every later wave takes what fits into the slots that
        are not kept, experts that stay last.
        """
        layer, counts = self.layers[index], self.counts
        layer.history.record(needed_E)
        if self.policy == "on-demand":
            layer.forget()
        resident_E = layer.resident_E
        hits = np.flatnonzero(needed_E & resident_E)
        missing_E = needed_E & ~resident_E
        misses = count(missing_E)
        counts.steps += 1
        counts.hits += len(hits)
        counts.misses += misses
        self._judge_prefetches(layer, needed_E, missing_E)
        waves = [Wave(hits.tolist(), layer.slot_of_E[hits].tolist(), [])] if len(hits) else []
        if not misses:
            return waves
        rank_E = layer.history.rank(self.contest.serving)
        keep_E = settle(resident_E, needed_E, rank_E, layer.num_slots)
        free = np.flatnonzero(layer.expert_of_S == NONE).tolist()
        leaving = [*best(resident_E & ~needed_E & ~keep_E, rank_E, layer.num_experts)]
        leaving += [*best(resident_E & needed_E & ~keep_E, rank_E, layer.num_experts)]
        open_slots = [*free, *layer.slot_of_E[leaving].tolist()]
        passing = best(missing_E & ~keep_E, rank_E, layer.num_experts).tolist()
        staying = best(missing_E & keep_E, rank_E, layer.num_experts).tolist()
        groups = [passing[i : i + len(open_slots)] for i in range(0, len(passing), len(open_slots))]
        for experts in [*groups, staying]:
            slots = open_slots[: len(experts)]
            loads = [Load(expert, slot) for expert, slot in zip(experts, slots, strict=True)]
            for load in loads:
                self._load(layer, load)
            waves.append(Wave(experts, slots, loads))
        return waves

    def _judge_prefetches(self, layer: LayerBook, needed_E: np.ndarray, missing_E: np.ndarray) -> None:
        used = count(layer.unused_E & needed_E)
        missed = count(layer.pushed_E & missing_E)
        layer.unused_E &= ~needed_E
        layer.pushed_E &= ~missing_E
        self.counts.prefetch_hits += used
        self.counts.prefetch_victims += missed
        if self.gate is not None:
            self.gate.gained += used - missed

    def _load(self, layer: LayerBook, load: Load, prefetch: bool = False) -> None:
        old = int(layer.expert_of_S[load.slot])
        if old != NONE:
            self.counts.evictions += 1
            layer.slot_of_E[old] = NONE
            layer.pushed_E[old] = prefetch
            if layer.unused_E[old]:
                layer.unused_E[old] = False
                self.counts.bytes_wasted += layer.expert_bytes
                if self.gate is not None:
                    self.gate.wasted += 1
        layer.expert_of_S[load.slot] = load.expert
        layer.slot_of_E[load.expert] = load.slot
        layer.unused_E[load.expert] = prefetch
        layer.pushed_E[load.expert] = False
        self.counts.bytes_copied += layer.expert_bytes
        if prefetch:
            self.counts.bytes_prefetched += layer.expert_bytes

    def learn(self, index: int, needed_E: np.ndarray) -> None:
        """Replay the step in shadow and note what followed what; nothing of it is needed to serve the step."""
        self.contest.observe(index, needed_E, self.layers[index].history)
        if self.gate is None:
            return
        self.gate.tick()
        if self._before is not None and self.following(self._before[0]) == index:
            self._follower(self._before[0]).record(self._before[1], needed_E)
        self._before = index, needed_E

    def prefetch(self, index: int) -> list[Load]:
        """What to load for the layer that follows `index` before it asks; nothing while that loses.

        A copy pays if the expert is used, p, and costs if it is not, 1 - p, or if the expert that it replaces is, q: so
        it is made where 2 p > 1 + q, of a free slot where 2 p > 1.
        """
        if self.gate is None or not self.gate.on or self._before is None or self._before[0] != index:
            return []
        layer = self.layers[self.following(index)]
        if layer.num_slots >= layer.num_experts:
            return []  # `fill` sees to it
        chance_E = self._follower(index).expect(self._before[1])
        resident_E = layer.resident_E
        wanted = best(~resident_E, np.argsort(np.argsort(chance_E, kind="stable")), self.PREFETCHES)[::-1]
        free = np.flatnonzero(layer.expert_of_S == NONE).tolist()
        leaving = np.flatnonzero(resident_E)
        leaving = leaving[np.argsort(chance_E[leaving], kind="stable")].tolist()
        loads = []
        for expert in wanted.tolist():
            if not free and not leaving:
                break
            cost = 0.0 if free else float(chance_E[leaving[0]])
            if 2 * float(chance_E[expert]) <= 1 + cost:
                break
            slot = free.pop(0) if free else int(layer.slot_of_E[leaving.pop(0)])
            loads.append(Load(expert, slot))
            self._load(layer, loads[-1], prefetch=True)
        return loads

    def fill(self, index: int) -> list[Load]:
        """Load every expert of a layer that has a slot for each, expert e into slot e."""
        layer = self.layers[index]
        loads = [Load(expert, expert) for expert in np.flatnonzero(~layer.resident_E).tolist()]
        for load in loads:
            self._load(layer, load)
        return loads

    def following(self, index: int) -> int:
        """The layer that runs after this one; after the last, the first, in the next step."""
        return (index + 1) % len(self.layers)

    def _follower(self, index: int) -> Follower:
        if index not in self._followers:
            sizes = self.layers[index].num_experts, self.layers[self.following(index)].num_experts
            self._followers[index] = Follower(*sizes)
        return self._followers[index]
