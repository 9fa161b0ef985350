"""EnergyModel: a GPU's joules per second, FLOP and byte, fitted to measurements, and what each expert took by them.

No meter sees one expert inside a kernel that runs them all, so its joules are modelled: E = static_w * t + j_per_flop *
FLOP + j_per_byte * bytes, with coefficients that cannot be negative, and no more than the board's power limit allows:
a board at its limit lowers clock and voltage, so that the same work takes longer and fewer joules. FLOPs are those
executed, padding to the serving tile included; an expert's weights come from memory once a call if any token visits it.
Calibrate per board, driver and dtype, at the clocks of the work to be attributed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from moe_gpu.energy_monitor import EnergyMonitor, EnergyTrials, measure_interleaved
from moe_gpu.energy_monitor.monitor import write_csv
from moe_gpu.energy_work import LayerWork
from moe_gpu.files import cache_directory, write_atomically
from moe_gpu.results import AttributionRow, AttributionSum, EnergyMeasurement

SCHEMA = 2
ATTRIBUTION_COLUMNS = (
    *("run_id", "layer", "expert", "tokens", "padded_tokens", "flops", "hbm_bytes", "dynamic_j", "static_j"),
    *("stderr_j", "joules_per_token", "method", "calibration_id"),
)
RESAMPLES = 400
AT_LIMIT = 0.97  # of the power limit: a window above it says what the limit is, not what its work costs
IDLE = "idle"


class CalibrationError(ValueError):
    """A calibration cannot be made, read or used here; the message says why and what to do."""


@dataclass(frozen=True)
class Workload:
    """A call to calibrate on and the work of one; `call=None` is the idle GPU. anchor: fixes one coefficient alone.

    Anchors are left out where the held-out error is judged: without them nothing else says that coefficient.
    """

    name: str
    call: Callable[[], object] | None
    flops: float = 0.0
    hbm_bytes: float = 0.0
    anchor: bool = False


@dataclass(frozen=True)
class CalibrationPoint:
    """One measured window of a workload."""

    workload: str
    duration_s: float
    energy_j: float
    flops: float
    hbm_bytes: float
    anchor: bool = False


def nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 of the least |a x - b|, exactly: the best of the fits to every subset of the few columns."""
    columns = a.shape[1]
    best, best_error = np.zeros(columns), float((b**2).sum())
    for size in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), size):
            part = a[:, chosen]
            scale = np.abs(part).max(0)
            if not (scale > 0).all():
                continue
            found = np.linalg.lstsq(part / scale, b, rcond=None)[0] / scale
            error = float(((part @ found - b) ** 2).sum())
            if (found >= 0).all() and error < best_error:
                best, best_error = np.zeros(columns), error
                best[list(chosen)] = found
    return best


def _fit(points: Sequence[CalibrationPoint], power_limit_w: float | None) -> np.ndarray:
    """(static_w, j_per_flop, j_per_byte) of the least relative errors.

    A window at the power limit whose work alone would have gone past it is left out: any such cost explains it.
    """
    energy = np.array([point.energy_j for point in points])
    terms = np.array([(point.duration_s, point.flops, point.hbm_bytes) for point in points])
    limit = np.inf if power_limit_w is None else power_limit_w * terms[:, 0]
    kept = np.ones(len(points), dtype=bool)
    tried: set[bytes] = set()
    while True:
        tried.add(kept.tobytes())
        found = nonnegative_least_squares((terms / energy[:, None])[kept], np.ones(int(kept.sum())))
        kept = (terms @ found < limit) | (energy < AT_LIMIT * limit)
        if kept.tobytes() in tried or np.linalg.matrix_rank(terms[kept] / terms.max(0)) < 3:
            return found


def _held_out(points: Sequence[CalibrationPoint], power_limit_w: float | None) -> dict[str, float]:
    """Relative error of each workload, anchors aside, predicted by a fit of all the others."""
    errors = {}
    for name in dict.fromkeys(point.workload for point in points if not point.anchor):
        coefficients = _fit([point for point in points if point.workload != name], power_limit_w)
        own = [point for point in points if point.workload == name]
        predicted = sum(
            _energy(coefficients, power_limit_w, point.duration_s, point.flops, point.hbm_bytes) for point in own
        )
        measured = sum(point.energy_j for point in own)
        errors[name] = abs(predicted - measured) / measured
    return errors


def _energy(
    coefficients: np.ndarray, power_limit_w: float | None, duration_s: float, flops: float, hbm_bytes: float
) -> float:
    joules = float(coefficients @ np.array([duration_s, flops, hbm_bytes]))
    return joules if power_limit_w is None else min(joules, power_limit_w * duration_s)


@dataclass(frozen=True)
class EnergyReport:
    """What each expert of a layer is modelled to have taken in a window, and the window as a whole."""

    experts: list[AttributionRow]
    total: AttributionSum

    @property
    def rows(self) -> list[AttributionRow | AttributionSum]:
        """As a results file keeps it: the sum, then the experts."""
        return [self.total, *self.experts]

    def to_csv(self, path: str | Path) -> None:
        """Write the experts as CSV, whole or not at all; what is unknown is empty."""
        write_csv(path, ATTRIBUTION_COLUMNS, self.experts)


@dataclass(frozen=True)
class EnergyModel:
    """A calibration of one board, driver and dtype; covariance: of the three coefficients, by bootstrap.

    held_out: relative error by workload, each predicted by a fit of the others. flops_per_s, bytes_per_s: the most that
    a calibration workload reached, which says how long an expert's work takes at least. power_limit_w: None: not known.
    """

    static_w: float
    j_per_flop: float
    j_per_byte: float
    covariance: list[list[float]]
    intervals: dict[str, tuple[float, float]]
    held_out: dict[str, float]
    flops_per_s: float
    bytes_per_s: float
    power_limit_w: float | None
    gpu_uuid: str
    driver: str | None
    dtype: str
    recorded_at: str
    points: list[CalibrationPoint] = field(repr=False)

    @classmethod
    def calibrate(
        cls,
        workloads: Sequence[Workload],
        dtype: str,
        *,
        monitor: EnergyMonitor,
        min_duration_s: float = 5.0,
        trials: int = 4,
        rest_s: float = 0.3,
        seed: int = 0,
        on_trial: Callable[[int, int, str], None] | None = None,
    ) -> EnergyModel:
        """Measure every workload `trials` times in shuffled order and fit.

        `moe_gpu.energy.standard_workloads` gives the workloads. on_trial: told (done, total, name) before each window.
        Raises CalibrationError where a window cannot be measured, or the workloads do not tell the coefficients apart.
        """
        if not monitor.available:
            raise CalibrationError(f"there is no energy to calibrate on: {monitor.reason}")
        order = [workload for workload in workloads for _ in range(trials)]
        random.Random(seed).shuffle(order)
        points = []
        for done, workload in enumerate(order):
            if on_trial is not None:
                on_trial(done, len(order), workload.name)
            points.append(_measure(workload, monitor, min_duration_s, rest_s))
        assert monitor.uuid is not None  # it is available
        return cls.fit(points, dtype, monitor.uuid, monitor.driver, monitor.power_limit_w)

    @classmethod
    def fit(
        cls,
        points: Sequence[CalibrationPoint],
        dtype: str,
        gpu_uuid: str,
        driver: str | None,
        power_limit_w: float | None = None,
        seed: int = 0,
    ) -> EnergyModel:
        """The model of measured points; the same points give the same model. Raises CalibrationError as `calibrate`."""
        a = np.array([(point.duration_s, point.flops, point.hbm_bytes) for point in points]).reshape(-1, 3)
        if len(points) < 3 or (a.max(0) <= 0).any() or np.linalg.matrix_rank(a / a.max(0)) < 3:
            raise CalibrationError(
                f"{len(points)} points do not tell time, FLOPs and bytes apart; calibrate on an idle GPU, a product "
                "and a copy at least"
            )
        coefficients = _fit(points, power_limit_w)
        groups: dict[str, list[CalibrationPoint]] = {}
        for point in points:
            groups.setdefault(point.workload, []).append(point)
        chance = random.Random(seed)
        fits = np.array(
            [
                _fit([p for group in groups.values() for p in chance.choices(group, k=len(group))], power_limit_w)
                for _ in range(RESAMPLES)
            ]
        )
        low, high = np.percentile(fits, [2.5, 97.5], axis=0)
        names = ("static_w", "j_per_flop", "j_per_byte")
        return cls(
            static_w=float(coefficients[0]),
            j_per_flop=float(coefficients[1]),
            j_per_byte=float(coefficients[2]),
            covariance=np.cov(fits, rowvar=False).tolist(),
            intervals={name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)},
            held_out=_held_out(points, power_limit_w),
            flops_per_s=max(point.flops / point.duration_s for point in points),
            bytes_per_s=max(point.hbm_bytes / point.duration_s for point in points),
            power_limit_w=power_limit_w,
            gpu_uuid=gpu_uuid,
            driver=driver,
            dtype=dtype,
            recorded_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            points=list(points),
        )

    @property
    def held_out_error(self) -> float | None:
        """The largest of `held_out`; None where every workload is an anchor."""
        return max(self.held_out.values(), default=None)

    @property
    def calibration_id(self) -> str:
        """Twelve digits that stand for this calibration."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def _coefficients(self) -> np.ndarray:
        return np.array([self.static_w, self.j_per_flop, self.j_per_byte])

    def _stderr(self, duration_s: float, flops: float, hbm_bytes: float) -> float:
        by = np.array([duration_s, flops, hbm_bytes])
        return math.sqrt(max(0.0, float(by @ np.array(self.covariance) @ by)))

    def save(self, path: str | Path | None = None) -> Path:
        """Write it, by default where `load` looks for this board, driver and dtype; whole or not at all."""
        path = calibration_path(self.gpu_uuid, self.driver, self.dtype) if path is None else Path(path)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1).encode())
        return path

    @classmethod
    def load(cls, gpu_uuid: str | None, driver: str | None, dtype: str, path: str | Path | None = None) -> EnergyModel:
        """The calibration of a board, driver and dtype; CalibrationError for none, a damaged one, or another's."""
        path = calibration_path(gpu_uuid, driver, dtype) if path is None else Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.pop("schema", None) != SCHEMA:
                raise CalibrationError(f"{path} is not a calibration that this version reads; {_CALIBRATE}")
            points = [CalibrationPoint(**point) for point in values.pop("points")]
            intervals = {name: (low, high) for name, (low, high) in values.pop("intervals").items()}
            model = cls(**values, intervals=intervals, points=points)
        except FileNotFoundError as error:
            raise CalibrationError(
                f"there is no calibration of {gpu_uuid} for {dtype} ({path}); {_CALIBRATE}"
            ) from error
        except OSError as error:
            raise CalibrationError(f"cannot read calibration {path}: {error.strerror}; {_CALIBRATE}") from error
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"calibration {path} is damaged; {_CALIBRATE}") from error
        model.require(gpu_uuid, driver, dtype)
        return model

    def require(self, gpu_uuid: str | None, driver: str | None, dtype: str) -> None:
        """Raise CalibrationError unless this is a calibration of that board, driver and dtype."""
        for what, own, other in (
            ("GPU", self.gpu_uuid, gpu_uuid),
            ("driver", self.driver, driver),
            ("dtype", self.dtype, dtype),
        ):
            if own != other:
                raise CalibrationError(f"the calibration is of {what} {own}, not of {other}; {_CALIBRATE}")

    def predict(self, work: LayerWork, counts: Any, duration_s: float, calls: float = 1.0) -> tuple[float, float]:
        """Joules, and their standard error, of `calls` calls that together take `duration_s`."""
        done = work.execute(counts, calls)
        terms = duration_s, done.flops_E.sum() + done.shared_flops, done.bytes_E.sum() + done.shared_bytes
        return _energy(self._coefficients, self.power_limit_w, *terms), self._stderr(*terms)

    def _throttle(self, duration_s: float, dynamic_j: float) -> float:
        """What share of the joules of work at full clocks the power limit leaves."""
        left = math.inf if self.power_limit_w is None else (self.power_limit_w - self.static_w) * duration_s
        return max(0.0, left) / dynamic_j if dynamic_j > left else 1.0

    def attribute(
        self,
        counts: Any,
        measurement: EnergyMeasurement,
        work: LayerWork,
        *,
        layer: int = 0,
        calls: float | None = None,
        alone: bool = True,
    ) -> EnergyReport:
        """What each expert took of a measured window in which the layer ran `calls` times (the window's own number).

        counts: as `LayerWork.execute`'s. Static joules are shared out by the time that each expert's work takes at
        least. Of a window without energy the prediction alone is given. alone=False: other work ran in the window
        too, so nothing is scaled to its joules, nothing closes, and no expert has a share of the static ones.
        Raises CalibrationError for a window of another board or driver, and for work in another dtype.
        """
        self.require(measurement.gpu_uuid, measurement.driver, work.dtype)
        calls = calls if calls is not None else measurement.calls if measurement.calls is not None else 1
        done = work.execute(counts, calls)
        dynamic_E = self.j_per_flop * done.flops_E + self.j_per_byte * done.bytes_E
        shared_j = self.j_per_flop * done.shared_flops + self.j_per_byte * done.shared_bytes
        static_j = self.static_w * measurement.duration_s
        throttle = self._throttle(measurement.duration_s, float(dynamic_E.sum()) + shared_j)
        dynamic_E, shared_j = throttle * dynamic_E, throttle * shared_j
        busy_E = np.maximum(done.flops_E / self.flops_per_s, done.bytes_E / self.bytes_per_s)
        static_E = static_j * busy_E / busy_E.sum() if busy_E.sum() > 0 else np.zeros_like(busy_E)
        measured = measurement.energy_j if alone else None
        raw = float(dynamic_E.sum()) + shared_j
        scale = None if measured is None or raw == 0 else max(0.0, measured - static_j) / raw
        unattributed = None if measured is None else measured - static_j - raw
        total = AttributionSum(
            run_id=measurement.run_id,
            layer=layer,
            measured_j=measured,
            static_j=static_j,
            dynamic_j=float(dynamic_E.sum()),
            shared_j=shared_j,
            unattributed_j=unattributed,
            rescaled_j=None if scale is None else scale * float(dynamic_E.sum()),
            rescaled_shared_j=None if scale is None else scale * shared_j,
            closure=None if measured is None or unattributed is None else abs(unattributed) / measured,
            held_out_error=self.held_out_error,
            calibration_id=self.calibration_id,
            window=measurement.window,
        )
        common: dict[str, Any] = dict(
            run_id=measurement.run_id,
            layer=layer,
            method="modelled",
            calibration_id=self.calibration_id,
            window=measurement.window,
        )
        experts = []
        for expert in range(work.num_experts):
            tokens, own = float(done.rows_E[expert]), float(dynamic_E[expert])
            best = own if scale is None else own * scale
            experts.append(
                AttributionRow(
                    **common,
                    expert=expert,
                    tokens=tokens,
                    padded_tokens=float(done.padded_E[expert]),
                    flops=float(done.flops_E[expert]),
                    hbm_bytes=float(done.bytes_E[expert]),
                    dynamic_j=own,
                    static_j=float(static_E[expert]) if alone else None,
                    stderr_j=throttle * self._stderr(0.0, float(done.flops_E[expert]), float(done.bytes_E[expert])),
                    joules_per_token=(best + alone * float(static_E[expert])) / tokens if tokens else None,
                    rescaled_j=None if scale is None else best,
                )
            )
        return EnergyReport(experts, total)


_CALIBRATE = "run `moe-gpu energy calibrate`"


def calibration_path(gpu_uuid: str | None, driver: str | None, dtype: str) -> Path:
    """Where the calibration of a board, driver and dtype is kept."""
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{gpu_uuid}-{driver or 'no-driver'}-{dtype}")
    return cache_directory() / "energy" / f"{name}.json"


def _measure(workload: Workload, monitor: EnergyMonitor, min_duration_s: float, rest_s: float) -> CalibrationPoint:
    if workload.call is None:
        monitor.wait_for_gpu()
        monitor.clock.sleep(2 * rest_s)
        with monitor.window(workload.name) as window:
            monitor.clock.sleep(min_duration_s)
        found = window.measurement
        calls = 0
    else:
        trials: EnergyTrials = measure_interleaved(
            {workload.name: workload.call}, monitor=monitor, min_duration_s=min_duration_s, trials=1, cooldown_s=rest_s
        )[workload.name]
        found = trials.windows[0]
        calls = found.calls or 0
    assert found is not None
    if found.energy_j is None:
        raise CalibrationError(f"workload {workload.name} could not be measured: {found.reason}; run it again")
    return CalibrationPoint(
        workload.name,
        found.duration_s,
        found.energy_j,
        calls * workload.flops,
        calls * workload.hbm_bytes,
        workload.anchor,
    )
