"""The bookkeeping of a cache: who is in which slot, the waves of a step, what is prefetched, and every count.

Pure host arithmetic: the cache carries out what is decided here, and the simulator replays traces through the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_gpu.expert_cache.policies import ADAPTIVE, Contest, Follower, History, PrefetchGate, in_order, settle

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
    version: int = 0  # changes with every change of who is in which slot
    slot_of: dict[int, int] = field(init=False)  # of the resident experts
    expert_of_S: list[int] = field(init=False)
    unused: set[int] = field(init=False)  # prefetched and not used yet
    pushed: set[int] = field(init=False)  # evicted by a prefetch and not loaded since

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nothing is resident any more."""
        self.version += 1
        self.slot_of = {}
        self.expert_of_S = [NONE] * self.num_slots
        self.unused = set()
        self.pushed = set()

    @property
    def full(self) -> bool:
        """Whether every expert is resident."""
        return len(self.slot_of) == self.num_experts

    def free_slots(self) -> list[int]:
        if len(self.slot_of) == self.num_slots:
            return []
        return [slot for slot, expert in enumerate(self.expert_of_S) if expert == NONE]


class CacheBook:
    """The bookkeeping of all layers that share a budget: (experts, slots, bytes of an expert) each, in their order.

    Every step of a layer is `plan`, then `learn`, then, if wanted, `prefetch`, all with the same needed experts.
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
        ranked = ADAPTIVE if policy == "auto" else (policy,)
        self.layers = [
            LayerBook(experts, slots, size, History(experts, None if profile_LE is None else profile_LE[index], ranked))
            for index, (experts, slots, size) in enumerate(layers)
        ]
        self.contest = Contest([(layer.num_experts, layer.num_slots) for layer in self.layers], policy)
        self.gate = PrefetchGate(len(layers)) if prefetch and policy != "on-demand" else None
        self.counts = Counts()
        self._followers: dict[int, Follower] = {}
        self._before: tuple[int, Sequence[int]] | None = None

    def plan(self, index: int, needed: Sequence[int]) -> list[Wave]:
        """The waves that compute the needed experts, given in ascending order, recorded as if they were carried out.

        What is resident goes first, while the rest is on its way; every later wave takes what fits into the slots that
        are not kept, experts that stay last.
        """
        layer, counts = self.layers[index], self.counts
        layer.history.record(needed)
        if self.policy == "on-demand":
            layer.forget()
        slot_of = layer.slot_of
        hits = [expert for expert in needed if expert in slot_of]
        misses = len(needed) - len(hits)
        counts.steps += 1
        counts.hits += len(hits)
        counts.misses += misses
        if layer.unused or layer.pushed:
            self._judge_prefetches(layer, needed)
        waves = [Wave(hits, [slot_of[expert] for expert in hits], [])] if hits else []
        if misses:
            waves += self._load_missing(layer, needed)
        return waves

    def _load_missing(self, layer: LayerBook, needed: Sequence[int]) -> list[Wave]:
        """The waves of what is not resident, in the slots that are free or given up."""
        keys, slot_of = layer.history.keys(self.contest.serving), layer.slot_of
        leaving, passing = settle(slot_of.keys(), needed, keys, layer.num_slots)
        gone = {*slot_of, *passing}
        staying = in_order((expert for expert in needed if expert not in gone), keys)
        open_slots = [*layer.free_slots(), *(slot_of[expert] for expert in leaving)]
        groups = [passing[i : i + len(open_slots)] for i in range(0, len(passing), len(open_slots))]
        waves = []
        for experts in [*groups, staying]:
            slots = open_slots[: len(experts)]
            loads = [Load(expert, slot) for expert, slot in zip(experts, slots, strict=True)]
            for load in loads:
                self._load(layer, load)
            waves.append(Wave(experts, slots, loads))
        return waves

    def _judge_prefetches(self, layer: LayerBook, needed: Sequence[int]) -> None:
        used = layer.unused.intersection(needed)
        missed = layer.pushed.intersection(needed)  # these are not resident
        layer.unused -= used
        layer.pushed -= missed
        self.counts.prefetch_hits += len(used)
        self.counts.prefetch_victims += len(missed)
        if self.gate is not None:
            self.gate.gained += len(used) - len(missed)

    def _load(self, layer: LayerBook, load: Load, prefetch: bool = False) -> None:
        layer.version += 1
        old = layer.expert_of_S[load.slot]
        if old != NONE:
            self._evict(layer, old, prefetch)
        layer.expert_of_S[load.slot] = load.expert
        layer.slot_of[load.expert] = load.slot
        layer.pushed.discard(load.expert)
        self.counts.bytes_copied += layer.expert_bytes
        if prefetch:
            layer.unused.add(load.expert)
            self.counts.bytes_prefetched += layer.expert_bytes

    def _evict(self, layer: LayerBook, expert: int, prefetch: bool) -> None:
        self.counts.evictions += 1
        del layer.slot_of[expert]
        if prefetch:
            layer.pushed.add(expert)
        if expert in layer.unused:
            layer.unused.remove(expert)
            self.counts.bytes_wasted += layer.expert_bytes
            if self.gate is not None:
                self.gate.wasted += 1

    def learn(self, index: int, needed: Sequence[int]) -> None:
        """Replay the step in shadow; nothing of it is needed to serve the step."""
        self.contest.observe(index, needed, self.layers[index].history)

    def prefetch(self, index: int, needed: Sequence[int]) -> list[Load]:
        """What to load for the layer that follows `index` before it asks; nothing while that loses."""
        if self.gate is None:
            return []
        self.gate.tick()
        if not self.gate.listening:
            self._before = None
            return []
        if self._before is not None and self.following(self._before[0]) == index:
            self._follower(self._before[0]).record(self._before[1], needed)
        self._before = index, needed
        return self._look_ahead(index, needed) if self.gate.on and needed else []

    def _look_ahead(self, index: int, needed: Sequence[int]) -> list[Load]:
        """The prefetches that should save copies.

        A copy pays if the expert is used, p, and costs if it is not, 1 - p, or if the expert that it replaces is, q: so
        it is made where 2 p > 1 + q, of a free slot where 2 p > 1.
        """
        layer = self.layers[self.following(index)]
        if layer.num_slots >= layer.num_experts:
            return []  # `fill` sees to it
        chance_E = self._follower(index).expect(needed)
        likely = [expert for expert in np.flatnonzero(chance_E > 0.5).tolist() if expert not in layer.slot_of]
        if not likely:
            return []
        chances = chance_E.tolist()
        wanted = sorted(likely, key=lambda expert: (chances[expert], expert), reverse=True)[: self.PREFETCHES]
        free = layer.free_slots()
        leaving = sorted(layer.slot_of, key=lambda expert: (chances[expert], expert))
        loads = []
        for expert in wanted:
            if not free and not leaving:
                break
            cost = 0.0 if free else chances[leaving[0]]
            if 2 * chances[expert] <= 1 + cost:
                break
            slot = free.pop(0) if free else layer.slot_of[leaving.pop(0)]
            loads.append(Load(expert, slot))
            self._load(layer, loads[-1], prefetch=True)
        return loads

    def fill(self, index: int) -> list[Load]:
        """Load every expert of a layer that has a slot for each, expert e into slot e."""
        layer = self.layers[index]
        if layer.full:
            return []
        loads = [Load(expert, expert) for expert in range(layer.num_experts) if expert not in layer.slot_of]
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
