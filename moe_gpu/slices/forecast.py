"""LoadForecaster: the next window's load of each tenant, by moving average or by a small regression that learns."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy

_RIDGE = 1e-3  # keeps the regression at "as in the last window" until it has seen more
_FORGET = 0.98  # a window's weight in the regression falls to half in 34 windows
_NEWEST = 0.3  # of a window in the moving averages
_SLOW = 0.02  # of a window in how often the load shifts,
_SHIFTS_EXPECTED = 0.03  # which is taken to be so often before any was seen
_SHIFT = 0.3  # relative error of a forecast from which on a load may have shifted, and
_UNUSUAL = 3.0  # times the error of late, so that noise is no shift


class LoadForecaster:
    """Forecasts rows a call from the windows seen so far; what predicted better of late is used.

    EWMA: exponentially weighted moving average of each tenant's share. Ridge: one linear regression for all tenants
    of the next share on the newest share, the one before and the EWMA, learnt online with forgetting. A window that
    neither foresaw at all is a shift: the averages begin anew with it, so that no forecast lags behind a jump.
    """

    def __init__(self) -> None:
        self._shares: list[dict[int, float]] = []  # the newest two windows
        self._ewma: dict[int, float] = {}
        self._rows = 0.0  # EWMA of all rows a call
        self._gram = numpy.eye(3) * _RIDGE
        self._moment = numpy.array([_RIDGE, 0.0, 0.0])
        self._errors: dict[str, float] = {}
        self._forecasts: dict[str, dict[int, float]] = {}
        self._error = 0.0  # EWMA of the relative error of forecasts, shifts left out
        self.shift_share = _SHIFTS_EXPECTED  # of windows that were shifts

    def copy(self) -> LoadForecaster:
        """One that learns on from here by itself."""
        other = copy.copy(self)
        other._gram, other._moment, other._errors = self._gram.copy(), self._moment.copy(), dict(self._errors)
        return other

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
        if self._has_shifted(rows, total):
            self._ewma, self._rows = {}, 0.0
        else:
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

    def _has_shifted(self, rows: Mapping[int, float], total: float) -> bool:
        """Whether the window is nothing like its forecast."""
        forecast = self.forecast()
        if forecast is None:
            return False
        expected = sum(forecast.values())
        error = sum(abs(forecast.get(tenant, 0.0) - value) for tenant, value in rows.items()) / max(total, expected)
        shifted = error > max(_SHIFT, _UNUSUAL * self._error)
        if not shifted:
            self._error = self._smooth(self._error, error)
        self.shift_share = self._smooth(self.shift_share, float(shifted), _SLOW)
        return shifted

    @staticmethod
    def _smooth(old: float | None, new: float, newest: float = _NEWEST) -> float:
        return new if old is None else old + newest * (new - old)

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
