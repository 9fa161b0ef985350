"""Residuals: by how much predictions of ADAPTIVE err, learnt from the times that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy

from moe_gpu.slices.plan import SlicePlan

NOISE = 0.02  # relative, of one measured time
LEARNT = 0.3  # least share of a measured time in what is known of its plan under about its load
MOST_SURPRISE = math.log(2.0)  # that one measured time may be: a hiccup must not condemn a plan
_ERROR = 0.1  # relative, of predictions of which none was checked yet
_LEAST_ERROR = 0.02
_NEWEST = 0.2  # of a surprise in how large errors are
_ABOUT = 0.25  # octaves of every tenant's rows within which a load is about the same
_REACH = 2.0  # octaves of rows and SMs over which what was measured says e times less about another plan or load
_SHARED = 0.5  # share of the variance of errors that all plans of a kind have in common
_MEMORY = 300.0  # windows in which what was measured comes to say e times less
_MOST = 48  # plans and loads that are remembered

Work = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Residual:
    """Logarithm of measured over predicted time of a plan under about a load, averaged over `count` windows."""

    kind: str
    rows: tuple[float, ...]  # log2 of rows of each tenant
    sms: tuple[float, ...]  # log2 of SMs of each tenant; none while not sliced
    at: int  # the window in which it was last measured
    error: float = 0.0
    count: int = 0

    def repeats(self, other: Residual) -> bool:
        """Whether this is the same plan under about the same load."""
        near = all(abs(a - b) <= _ABOUT for a, b in zip(self.rows, other.rows, strict=True))
        return near and self.sms == other.sms


@dataclass(frozen=True)
class Residuals:
    """What was measured, and by kernel regression what it says about plans and loads that were not.

    Errors are taken to have a part that all sliced plans share, or all that are not sliced, and a part alike for close
    plans and loads. A measured plan under about its load is so known at once to within noise, and the others are moved
    in proportion. `spread`: relative size of errors of late.
    """

    seen: tuple[Residual, ...] = ()
    spread: float = _ERROR
    window: int = 0

    def expect(self, plan: SlicePlan, work: Work) -> tuple[float, float]:
        """Expected logarithm of measured over predicted time, and its standard deviation."""
        if not self.seen:
            return 0.0, self.spread
        inverse, weights = self._solved
        asked = self._covariance([_point(plan, work, self.window)], self.seen)[0]
        left = self.spread**2 - float(asked @ inverse @ asked)
        return float(asked @ weights), math.sqrt(max(0.0, left))

    def learn(self, plan: SlicePlan, work: Work, ratio: float) -> Residuals:
        """With one more measured over predicted time."""
        expected, _ = self.expect(plan, work)
        surprise = min(max(math.log(ratio) - expected, -MOST_SURPRISE), MOST_SURPRISE)
        point = _point(plan, work, self.window + 1)
        measured = expected + surprise
        old = next((one for one in self.seen if one.kind == point.kind and one.repeats(point)), None)
        if old is None:
            new = replace(point, error=measured, count=1)
            size = min(abs(surprise), 3 * self.spread)
            spread = math.sqrt((1 - _NEWEST) * self.spread**2 + _NEWEST * size**2)
        else:
            share = max(1 / (old.count + 1), LEARNT)
            error = old.error + share * (measured - old.error)
            new, spread = replace(old, error=error, count=old.count + 1, at=point.at), self.spread
        kept = [one for one in self.seen if one is not old][1 - _MOST :]
        return Residuals((*kept, new), max(spread, _LEAST_ERROR), self.window + 1)

    @cached_property
    def _solved(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        covariance = self._covariance(self.seen, self.seen)
        noise = [NOISE**2 / min(one.count, 1 / LEARNT) for one in self.seen]
        inverse = numpy.linalg.inv(covariance + numpy.diag(noise))
        return inverse, inverse @ numpy.array([one.error for one in self.seen])

    def _covariance(self, some: Sequence[Residual], others: Sequence[Residual]) -> numpy.ndarray:
        a, b = _columns(some), _columns(others)
        apart = numpy.sqrt(((a[:, None, 2:] - b[None, :, 2:]) ** 2).sum(-1)) / _REACH
        age = abs(a[:, None, 1] - b[None, :, 1]) / _MEMORY
        alike = _SHARED + (1 - _SHARED) * numpy.exp(-apart)
        return (a[:, None, 0] == b[None, :, 0]) * self.spread**2 * alike * numpy.exp(-age)


def _point(plan: SlicePlan, work: Work, window: int) -> Residual:
    sms = tuple(math.log2(size) for size in plan.sms) if plan.sliced else (0.0,) * len(work)
    return Residual(plan.kind, tuple(math.log2(max(rows, 1.0)) for _, rows in work), sms, window)


def _columns(points: Sequence[Residual]) -> numpy.ndarray:
    return numpy.array([(float(one.kind == "sliced"), one.at, *one.rows, *one.sms) for one in points])
