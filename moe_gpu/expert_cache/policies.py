"""Which experts keep their slots: rankings of requests, what is kept after a step, and which ranking serves.

Nothing here knows of tensors. A request is what one step of one layer needs, as ascending ids of experts. Steps are
many and need few experts, so these are sets and lists: a call of NumPy costs as much as ten ids do here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from heapq import nsmallest

import numpy as np

ADAPTIVE = ("lru", "lfu", "ewma")
"""What `auto` chooses among: by the last use, by the number of uses, by an average of uses that fades."""

POLICIES = ("auto", *ADAPTIVE, "static", "on-demand")
"""`static` ranks by a profile given beforehand; `on-demand` keeps nothing from one step to the next."""

EWMA_WEIGHT = 0.1
PASS_THROUGH = 4  # one in so many slots, at least, is given to a step that needs more experts than there are slots


Key = tuple[float, int, int]
"""An expert's score, last use and id. The lowest key is evicted first: ties go by the last use, then the lower id."""


class History:
    """What a layer's steps have asked for so far; every ranking is a function of it, whatever is resident.

    A ranking is a list of keys that change only with their own expert's use, so a step costs what it needs.
    """

    TOP_GAIN = 1e100

    def __init__(
        self,
        num_experts: int,
        profile_E: Sequence[float] | None = None,
        policies: Iterable[str] = (*ADAPTIVE, "static"),
    ) -> None:
        self.steps = 0
        self._keys: dict[str, list[Key]] = {p: [(0, -1, e) for e in range(num_experts)] for p in policies}
        # What a use adds. The others of an average do not fade: later uses weigh more, which orders them alike.
        self._gain = {policy: 1.0 if policy in ("lfu", "ewma") else 0.0 for policy in self._keys}
        if profile_E is not None:
            self.set_profile(profile_E)

    def set_profile(self, profile_E: Sequence[float]) -> None:
        """What `static` ranks by from now on."""
        self._keys["static"] = [(s, last, e) for s, (_, last, e) in zip(profile_E, self._keys["static"], strict=True)]

    def record(self, needed: Sequence[int]) -> None:
        now = self.steps
        for policy, keys in self._keys.items():
            gain = self._gain[policy]
            for e in needed:
                keys[e] = (keys[e][0] + gain, now, e)
        self.steps += 1
        if "ewma" in self._gain:
            self._gain["ewma"] /= 1 - EWMA_WEIGHT
            if self._gain["ewma"] > self.TOP_GAIN:
                self._rescale()

    def _rescale(self) -> None:
        gain, self._gain["ewma"] = self._gain["ewma"], 1.0
        keys = self._keys["ewma"]
        keys[:] = [(score / gain, last, e) for score, last, e in keys]

    def keys(self, policy: str) -> list[Key]:
        """Each expert's key; the list is the history's own."""
        return self._keys[policy]


def in_order(experts: Iterable[int], keys: Sequence[Key]) -> list[int]:
    """The experts in the order of eviction."""
    return sorted(experts, key=keys.__getitem__)


def settle(
    resident: AbstractSet[int], needed: Sequence[int], keys: Sequence[Key], slots: int
) -> tuple[list[int], list[int]]:
    """Who leaves and who passes through without staying, when experts are needed that are not resident.

    Both in the order of eviction, but of those that leave, needed ones come last. Every needed expert stays, beside the
    best of the others. Where there are more needed ones than slots, the rest pass through: a quarter of the slots, or
    fewer if fewer are missing, goes to the best of the missing and all else to the best of the needed, so that one
    large step does not sweep the cache.
    """
    asked = set(needed)
    others = resident - asked
    if len(asked) <= slots:
        return nsmallest(len(asked) + len(others) - slots, others, key=keys.__getitem__), []
    missing = in_order(asked - resident, keys)
    passing = min(len(missing), math.ceil(slots / PASS_THROUGH))
    keep = set(missing[len(missing) - passing :])
    rest = in_order(asked - keep, keys)
    keep.update(rest[len(rest) - (slots - passing) :])
    leaving = in_order(others, keys) + in_order((asked & resident) - keep, keys)
    return leaving, [expert for expert in missing if expert not in keep]


class Contest:
    """Chooses the policy: each is replayed in shadow on the real requests, and the one with the most hits serves.

    A shadow is the set of who would be resident; it holds no weights. At most WATCHED of the partly resident layers,
    evenly spread, have any, so that shadows take no more of a model's step the more layers it has. Hits and requests
    fade over about WINDOW watched steps. A policy takes over only if its hit rate is more than MARGIN above the serving
    one's, and not within DWELL watched steps of the last change. `chosen` other than "auto" serves always, and nothing
    is replayed.
    """

    WATCHED, WINDOW, MARGIN, DWELL = 8, 512, 0.02, 64

    def __init__(self, sizes: Sequence[tuple[int, int]], chosen: str = "auto") -> None:
        self.chosen = chosen
        self.serving = "lru" if chosen == "auto" else chosen
        self.switches = 0
        self._slots = [slots for _, slots in sizes]
        partly = [i for i, (experts, slots) in enumerate(sizes) if slots < experts and chosen == "auto"]
        every = max(1, math.ceil(len(partly) / self.WATCHED))
        watched = partly[every // 2 :: every]
        self._shadows: dict[int, dict[str, set[int]]] = {i: {policy: set() for policy in ADAPTIVE} for i in watched}
        self._hits = dict.fromkeys(ADAPTIVE, 0.0)
        self._requests = 0.0
        self._since_switch = 0

    def observe(self, layer: int, needed: Sequence[int], history: History) -> None:
        """Replay one step, already recorded in `history`, and choose anew."""
        shadows = self._shadows.get(layer)
        if shadows is None:
            return
        fade = 1 - 1 / self.WINDOW
        self._requests = self._requests * fade + len(needed)
        for policy, resident in shadows.items():
            hits = self._replay(resident, needed, history.keys(policy), self._slots[layer])
            self._hits[policy] = self._hits[policy] * fade + hits
        self._since_switch += 1
        if self._since_switch >= self.DWELL:
            self._choose()

    @staticmethod
    def _replay(resident: set[int], needed: Sequence[int], keys: Sequence[Key], slots: int) -> int:
        hits = len(resident.intersection(needed))
        if hits < len(needed):
            leaving, passing = settle(resident, needed, keys, slots)
            resident.update(needed)
            resident.difference_update(leaving, passing)
        return hits

    def _choose(self) -> None:
        leader = max(self._hits, key=self._hits.__getitem__)
        if self._hits[leader] > self._hits[self.serving] + self.MARGIN * self._requests:
            self.serving, self._since_switch = leader, 0
            self.switches += 1

    def scores(self) -> dict[str, float | None]:
        """The recent hit rate of each shadow; None before the first request, and where none is replayed."""
        return {policy: hits / self._requests if self._requests else None for policy, hits in self._hits.items()}


class PrefetchGate:
    """Whether prefetching pays: hits gained against copies wasted and host time; off while it loses, then tried again.

    gained: prefetched experts that were used, less misses on experts that a prefetch had evicted. wasted: prefetched
    experts that were evicted unused. host_s: seconds of the host that looking for what to prefetch has taken; of these
    `copy_s` are worth a copy of one expert, so that all can be compared. Where that is None, host time is not weighed.

    Judged are OUTCOMES, or TRIAL steps of every layer in which less has come in; what gains nothing loses, for looking
    is never free. Each pause in a row is twice as long, in steps of every layer too; at its end what follows what is
    noted again.
    """

    OUTCOMES, TRIAL, FIRST_PAUSE, LONGEST_PAUSE, WARM_UP = 32, 128, 256, 1 << 14, 64

    def __init__(self, num_layers: int = 1) -> None:
        self.on = True
        self.copy_s: float | None = None
        self._num_layers = num_layers
        self._pause = self.FIRST_PAUSE
        self._left = self.TRIAL * num_layers  # steps until the end of this trial or pause
        self._begin()

    def _begin(self) -> None:
        self.gained = self.wasted = 0
        self.host_s = 0.0

    @property
    def listening(self) -> bool:
        """Whether it is worth noting what follows what."""
        return self.on or self._left <= self.WARM_UP * self._num_layers

    def tick(self) -> None:
        """Once a step of a layer."""
        self._left -= 1
        if not self.on:
            if self._left <= 0:
                self.on, self._left = True, self.TRIAL * self._num_layers
                self.host_s = 0.0  # counting the pause down is no reason to lengthen it
        elif self._left <= 0 or abs(self.gained) + self.wasted >= self.OUTCOMES:
            self._judge()

    def _judge(self) -> None:
        price = self.wasted + (self.host_s / self.copy_s if self.copy_s else 0.0)
        self.on = self.gained > price
        self._left = (self.TRIAL if self.on else self._pause) * self._num_layers
        self._pause = self.FIRST_PAUSE if self.on else min(2 * self._pause, self.LONGEST_PAUSE)
        self._begin()


class Follower:
    """What the next layer needs given what this one needed: the share of steps in which each pair came together."""

    def __init__(self, num_experts: int, num_next: int) -> None:
        self._share_EN = np.zeros((num_experts, num_next), dtype=np.float32)

    def record(self, needed: Sequence[int], following: Sequence[int]) -> None:
        share_AN = self._share_EN[needed]
        share_AN *= 1 - EWMA_WEIGHT
        share_AN[:, following] += EWMA_WEIGHT
        self._share_EN[needed] = share_AN

    def expect(self, needed: Sequence[int]) -> np.ndarray:
        """The chance of each expert of the next layer to be needed; of at least one expert of this one."""
        return np.add.reduce(self._share_EN[needed]) / len(needed)
