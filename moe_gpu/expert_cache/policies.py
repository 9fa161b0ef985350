"""Which experts keep their slots: rankings of requests, what is kept after a step, and which ranking serves.

Nothing here knows of tensors. A request is the set of experts that one step of one layer needs, as a mask (E,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ADAPTIVE = ("lru", "lfu", "ewma")
"""What `auto` chooses among: by the last use, by the number of uses, by an average of uses that fades."""

POLICIES = ("auto", *ADAPTIVE, "static", "on-demand")
"""`static` ranks by a profile given beforehand; `on-demand` keeps nothing from one step to the next."""

EWMA_WEIGHT = 0.1
PASS_THROUGH = 4  # one in so many slots, at least, is given to a step that needs more experts than there are slots


def count(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask))


class History:
    """What a layer's steps have asked for so far; every ranking is a function of it, whatever is resident."""

    def __init__(self, num_experts: int, profile_E: Sequence[float] | None = None) -> None:
        self.steps = 0
        self.last_E = np.full(num_experts, -1, dtype=np.int64)
        self.count_E = np.zeros(num_experts, dtype=np.int64)
        self.ewma_E = np.zeros(num_experts)
        self.profile_E = np.zeros(num_experts) if profile_E is None else np.asarray(profile_E, dtype=np.float64)

    def record(self, needed_E: np.ndarray) -> None:
        self.last_E[needed_E] = self.steps
        self.count_E[needed_E] += 1
        self.ewma_E *= 1 - EWMA_WEIGHT
        self.ewma_E[needed_E] += EWMA_WEIGHT
        self.steps += 1

    def rank(self, policy: str) -> np.ndarray:
        """Each expert's place in the order of eviction, 0 first; ties go by the last use, then the lower id first."""
        scores = {"lru": self.last_E, "lfu": self.count_E, "ewma": self.ewma_E}.get(policy, self.profile_E)
        order = np.lexsort((self.last_E, scores))
        rank_E = np.empty_like(order)
        rank_E[order] = np.arange(len(order))
        return rank_E


def best(candidates_E: np.ndarray, rank_E: np.ndarray, limit: int) -> np.ndarray:
    """The ids of the `limit` candidates that are evicted last, in the order of eviction."""
    ids = np.flatnonzero(candidates_E)
    ids = ids[np.argsort(rank_E[ids])]
    return ids[max(0, len(ids) - limit) :]


def settle(resident_E: np.ndarray, needed_E: np.ndarray, rank_E: np.ndarray, slots: int) -> np.ndarray:
    """Who is resident after a step: at most `slots` experts, of those that were and those that the step needed.

    Every needed expert stays, beside the best of the others. Where there are more needed ones than slots, the rest pass
    through: a quarter of the slots, or fewer if fewer are missing, goes to the best of the missing and all else to the
    best of the needed, so that one large step does not sweep the cache.
    """
    keep_E = np.zeros_like(needed_E)
    needed = count(needed_E)
    if needed <= slots:
        keep_E[needed_E] = True
        keep_E[best(resident_E & ~needed_E, rank_E, slots - needed)] = True
        return keep_E
    missing_E = needed_E & ~resident_E
    passing = min(count(missing_E), math.ceil(slots / PASS_THROUGH))
    keep_E[best(missing_E, rank_E, passing)] = True
    keep_E[best(needed_E & ~keep_E, rank_E, slots - passing)] = True
    return keep_E


class Contest:
    """Chooses the policy: each is replayed in shadow on the real requests, and the one with the most hits serves.

    A shadow is a mask of who would be resident; it holds no weights. Hits and requests fade over about WINDOW steps. A
    policy takes over only if its hit rate is more than MARGIN above the serving one's, and not within DWELL steps of
    the last change. `chosen` other than "auto" serves always, and nothing is replayed.
    """

    WINDOW, MARGIN, DWELL = 512, 0.02, 64

    def __init__(self, sizes: Sequence[tuple[int, int]], chosen: str = "auto") -> None:
        self.chosen = chosen
        self.serving = "lru" if chosen == "auto" else chosen
        self.switches = 0
        self._slots = [slots for _, slots in sizes]
        self._shadows = {policy: [np.zeros(experts, dtype=bool) for experts, _ in sizes] for policy in ADAPTIVE}
        self._hits = dict.fromkeys(ADAPTIVE, 0.0)
        self._requests = 0.0
        self._since_switch = 0

    def observe(self, layer: int, needed_E: np.ndarray, history: History) -> None:
        """Replay one step, already recorded in `history`, and choose anew."""
        if self.chosen != "auto":
            return
        fade = 1 - 1 / self.WINDOW
        self._requests = self._requests * fade + count(needed_E)
        for policy, shadows in self._shadows.items():
            resident_E = shadows[layer]
            hits = count(resident_E & needed_E)
            self._hits[policy] = self._hits[policy] * fade + hits
            if hits < count(needed_E):
                shadows[layer] = settle(resident_E, needed_E, history.rank(policy), self._slots[layer])
        self._since_switch += 1
        if self._since_switch >= self.DWELL:
            rates = self.scores()
            leader = max(ADAPTIVE, key=lambda policy: rates[policy] or 0.0)
            if (rates[leader] or 0.0) > (rates[self.serving] or 0.0) + self.MARGIN:
                self.serving, self._since_switch = leader, 0
                self.switches += 1

    def scores(self) -> dict[str, float | None]:
        """The recent hit rate of each shadow; None before the first request, and where none is replayed."""
        return {policy: hits / self._requests if self._requests else None for policy, hits in self._hits.items()}


class PrefetchGate:
    """Whether prefetching pays: hits gained against copies wasted; off while it loses, tried again ever more rarely.

    gained: prefetched experts that were used, less misses on experts that a prefetch had evicted. wasted: prefetched
    experts that were evicted unused. All are copies of one expert, so they can be compared.
    """

    OUTCOMES, FIRST_PAUSE, LONGEST_PAUSE = 32, 256, 1 << 16

    def __init__(self) -> None:
        self.on = True
        self.gained = self.wasted = 0
        self._pause = self.FIRST_PAUSE
        self._resume_in = 0

    def tick(self) -> None:
        """Once a step: judge what has come in, or count the pause down."""
        if not self.on:
            self._resume_in -= 1
            self.on = self._resume_in <= 0
        elif abs(self.gained) + self.wasted >= self.OUTCOMES:
            if self.gained < self.wasted:
                self.on, self._resume_in = False, self._pause
                self._pause = min(2 * self._pause, self.LONGEST_PAUSE)
            else:
                self._pause = self.FIRST_PAUSE
            self.gained = self.wasted = 0


class Follower:
    """What the next layer needs given what this one needed: the share of steps in which each pair came together."""

    def __init__(self, num_experts: int, num_next: int) -> None:
        self._share_EN = np.zeros((num_experts, num_next), dtype=np.float32)

    def record(self, needed_E: np.ndarray, next_N: np.ndarray) -> None:
        rows = np.flatnonzero(needed_E)
        self._share_EN[rows] += EWMA_WEIGHT * (next_N - self._share_EN[rows])

    def expect(self, needed_E: np.ndarray) -> np.ndarray:
        """The chance of each expert of the next layer to be needed."""
        rows = np.flatnonzero(needed_E)
        return self._share_EN[rows].mean(0) if len(rows) else np.zeros(self._share_EN.shape[1], dtype=np.float32)
