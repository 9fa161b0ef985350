"""LoadForecaster: the next window's load of each tenant, by moving average or by a small regression that learns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy

_RIDGE = 1e-3  # keeps the regression at "as in the last window" until it has seen more
_FORGET = 0.98  # a window's weight in the regression falls to half in 34 windows
_NEWEST = 0.3  # of a window in the moving averages


class LoadForecaster:
    """Forecasts rows a call from the windows seen so far; what predicted better of late is used.

    EWMA: exponentially weighted moving average of each tenant's share. Ridge: one linear regression for all tenants
    of the next share on the newest share, the one before and the EWMA, learnt online with forgetting.
    """

    def __init__(self) -> None:
        self._shares: list[dict[int, float]] = []  # the newest two windows
        self._ewma: dict[int, float] = {}
        self._rows = 0.0  # EWMA of all rows a call
        self._gram = numpy.eye(3) * _RIDGE
        self._moment = numpy.array([_RIDGE, 0.0, 0.0])
        self._errors: dict[str, float] = {}
        self._forecasts: dict[str, dict[int, float]] = {}

    @property
    def method(self) -> str:
        """`ewma` or `ridge`: whose recent forecasts were closer."""
        return min(self._errors, key=self._errors.__getitem__, default="ewma")

    def observe(self, rows: Mapping[int, float]) -> None:
        """Take in one window: rows a call of each tenant. A window without rows teaches nothing."""
        total = sum(rows.values())
        if total <= 0:
            return
        shares = {tenant: value / total for tenant, value in rows.items()}
        for name, forecast in self._forecasts.items():
            error = sum(abs(forecast.get(tenant, 0.0) - share) for tenant, share in shares.items())
            self._errors[name] = self._smooth(self._errors.get(name), error)
        self._learn(shares)
        self._ewma = {tenant: self._smooth(self._ewma.get(tenant), share) for tenant, share in shares.items()}
        self._rows = self._smooth(self._rows or None, total)
        self._shares = [*self._shares[-1:], shares]
        weights = numpy.linalg.solve(self._gram, self._moment)
        ridge = {tenant: max(0.0, float(self._features(tenant) @ weights)) for tenant in shares}
        known = sum(ridge.values())
        self._forecasts = {"ewma": dict(self._ewma)}
        if known > 0:
            self._forecasts["ridge"] = {tenant: value / known for tenant, value in ridge.items()}

    def forecast(self) -> dict[int, float] | None:
        """Expected rows a call of each tenant in the next window; None before the first."""
        chosen = self._forecasts.get(self.method)
        return None if chosen is None else {tenant: share * self._rows for tenant, share in chosen.items()}

    @staticmethod
    def _smooth(old: float | None, new: float) -> float:
        return new if old is None else old + _NEWEST * (new - old)

    def _features(self, tenant: int) -> numpy.ndarray:
        newest = self._shares[-1].get(tenant, 0.0)
        return numpy.array([newest, self._shares[0].get(tenant, 0.0), self._ewma.get(tenant, newest)])

    def _learn(self, shares: Mapping[int, float]) -> None:
        if len(self._shares) < 2:
            return
        self._gram *= _FORGET
        self._moment *= _FORGET
        for tenant, share in shares.items():
            features = self._features(tenant)
            self._gram += numpy.outer(features, features)
            self._moment += features * share
        self._gram[numpy.diag_indices(3)] += _RIDGE * (1 - _FORGET)
        self._moment[0] += _RIDGE * (1 - _FORGET)
