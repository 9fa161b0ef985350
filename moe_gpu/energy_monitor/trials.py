"""Steady loops measured again and again: joules per call with an interval, and one choice against another.

What is compared runs in turn (A B B A B A A B ...), so that a drifting temperature or clock hits all alike. An interval
is of 95 %, by Student's t over the repeats; where it holds 1, or is not known, the answer is "inconclusive".
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moe_gpu.energy_monitor.monitor import EnergyMonitor
from moe_gpu.results import EnergyMeasurement, Finding

Call = Callable[[], object]

# Student's t at 97.5 % by degrees of freedom; beyond the last, the last.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
CHUNK_S = 0.02  # how long calls go on between two looks at the clock
OBJECTIVES = ("joules_per_token", "energy_delay")


def student_t(degrees: int) -> float:
    """The factor of a two-sided 95 % interval; ValueError without a degree of freedom."""
    if degrees < 1:
        raise ValueError(f"degrees={degrees} must be at least 1: an interval needs two repeats")
    return _T[min(degrees, len(_T)) - 1]


@dataclass(frozen=True)
class EnergyTrials:
    """The windows of one loop and what they say together; None where no window could be measured."""

    name: str
    windows: list[EnergyMeasurement]
    tokens_per_call: int | None = None

    @property
    def valid(self) -> list[EnergyMeasurement]:
        return [window for window in self.windows if window.energy_j is not None and window.calls]

    @property
    def joules_per_call(self) -> float | None:
        """Mean over the windows that could be measured."""
        return statistics.fmean(_per_call(self.valid)) if self.valid else None

    @property
    def stderr_j_per_call(self) -> float | None:
        """Of the mean: from the scatter between windows, or within them where that is more; None if unknown."""
        per_call = _per_call(self.valid)
        inside = [w.stderr_j / w.calls for w in self.valid if w.stderr_j is not None and w.calls]
        parts = [statistics.stdev(per_call) / math.sqrt(len(per_call))] if len(per_call) > 1 else []
        if inside and len(inside) == len(per_call):
            parts.append(math.sqrt(sum(e * e for e in inside)) / len(inside))
        return max(parts, default=None)

    @property
    def joules_per_token(self) -> float | None:
        return _over(self.joules_per_call, self.tokens_per_call)

    @property
    def stderr_j_per_token(self) -> float | None:
        return _over(self.stderr_j_per_call, self.tokens_per_call)

    @property
    def interval_j_per_token(self) -> tuple[float, float] | None:
        """95 % interval, None without a standard error over at least two windows."""
        mean, error = self.joules_per_token, self.stderr_j_per_token
        if mean is None or error is None or len(self.valid) < 2:
            return None
        reach = student_t(len(self.valid) - 1) * error
        return mean - reach, mean + reach

    @property
    def seconds_per_call(self) -> float | None:
        calls = sum(window.calls or 0 for window in self.windows)
        return sum(window.duration_s for window in self.windows) / calls if calls else None

    @property
    def quality(self) -> str:
        """ "ok", or every word that a window carries; "invalid" where none could be measured."""
        words = {word for window in self.valid for word in window.quality.split("+")} - {"ok"}
        return ("+".join(sorted(words)) or "ok") if self.valid else "invalid"

    @property
    def reason(self) -> str | None:
        """Why a window could not be measured, None where all could."""
        return next((window.reason for window in self.windows if window.reason), None)

    def total(self) -> EnergyMeasurement:
        """The windows that could be measured, as one; ValueError where none could."""
        if not self.valid:
            raise ValueError(f"no window of {self.name} could be measured: {self.reason}")
        errors = [window.stderr_j for window in self.valid]
        energy, tokens = math.fsum(w.energy_j or 0.0 for w in self.valid), [w.tokens for w in self.valid]
        counted = sum(t for t in tokens if t is not None) if None not in tokens else None
        return replace(
            self.valid[0],
            duration_s=math.fsum(window.duration_s for window in self.valid),
            energy_j=energy,
            stderr_j=None if None in errors else math.sqrt(math.fsum(e * e for e in errors if e is not None)),
            net_energy_j=None,
            tokens=counted,
            calls=sum(window.calls or 0 for window in self.valid),
            joules_per_token=energy / counted if counted else None,
            tokens_per_joule=counted / energy if counted else None,
            temp_end_c=self.valid[-1].temp_end_c,
            n_ticks=sum(window.n_ticks for window in self.valid),
            quality=self.quality,
            failed_reads=sum(window.failed_reads for window in self.valid),
        )

    def mean(self, field: str) -> float | None:
        """Mean of a field over the windows that have it."""
        values = [getattr(window, field) for window in self.windows]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None


def _per_call(windows: Sequence[EnergyMeasurement]) -> list[float]:
    return [w.energy_j / w.calls for w in windows if w.energy_j is not None and w.calls]


def _over(value: float | None, count: int | None) -> float | None:
    return value / count if value is not None and count else None


def measure_interleaved(
    calls: Mapping[str, Call],
    *,
    monitor: EnergyMonitor,
    tokens: Mapping[str, int] | None = None,
    sm_counts: Mapping[str, int] | None = None,
    min_duration_s: float = 5.0,
    trials: int = 4,
    cooldown_s: float = 0.0,
    on_trial: Callable[[str], None] | None = None,
) -> dict[str, EnergyTrials]:
    """Each call's loop for `trials` windows of at least `min_duration_s`, in turn, every second round backwards.

    tokens, sm_counts: by name, of one call. cooldown_s: of rest before every window. on_trial: told before each window.
    Raises ValueError for nothing to run and for times and counts that make no sense.
    """
    if not calls:
        raise ValueError("there is nothing to measure; give at least one call")
    if not min_duration_s > 0 or trials < 1 or cooldown_s < 0:
        raise ValueError(
            f"min_duration_s={min_duration_s} must be positive, trials={trials} at least 1 and "
            f"cooldown_s={cooldown_s} not negative"
        )
    chunks = {name: _chunk(call, monitor) for name, call in calls.items()}
    windows: dict[str, list[EnergyMeasurement]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(trials):
        for name in order:
            if on_trial is not None:
                on_trial(name)
            if cooldown_s:
                monitor.clock.sleep(cooldown_s)
            per_call = (tokens or {}).get(name)
            window = _run_window(name, calls[name], chunks[name], min_duration_s, monitor, per_call, sm_counts)
            windows[name].append(window)
        order.reverse()
    return {name: EnergyTrials(name, found, (tokens or {}).get(name)) for name, found in windows.items()}


def _chunk(call: Call, monitor: EnergyMonitor) -> int:
    """How many calls fill CHUNK_S; runs some, which also compiles what they compile."""
    count, now = 1, monitor.clock.now_ns
    call()
    while True:
        monitor.wait_for_gpu()
        begin = now()
        for _ in range(count):
            call()
        monitor.wait_for_gpu()
        taken_s = (now() - begin) / 1e9
        if taken_s >= CHUNK_S / 4 or count >= 4096:
            return max(1, round(count * CHUNK_S / max(taken_s, 1e-9))) if taken_s < CHUNK_S else max(1, count // 2)
        count *= 4


def _run_window(
    name: str,
    call: Call,
    chunk: int,
    min_duration_s: float,
    monitor: EnergyMonitor,
    tokens: int | None,
    sm_counts: Mapping[str, int] | None,
) -> EnergyMeasurement:
    now = monitor.clock.now_ns
    with monitor.window(name) as window:
        # Launching runs ahead of the GPU only as far as its queue is long, so the clock is looked at without waiting.
        end, done = now() + int(min_duration_s * 1e9), 0
        while now() < end:
            for _ in range(chunk):
                call()
            done += chunk
        window.calls = done
        window.tokens = None if tokens is None else tokens * done
        window.sm_count = (sm_counts or {}).get(name)
    assert window.measurement is not None
    return window.measurement


def measure_energy(
    fn: Call,
    min_duration_s: float = 5.0,
    trials: int = 4,
    cooldown_s: float = 5.0,
    *,
    monitor: EnergyMonitor | None = None,
    tokens: int | None = None,
    name: str = "measure",
) -> EnergyTrials:
    """Joules per call of `fn` over `trials` windows of a steady loop, with rest before each.

    tokens: of one call. Without a monitor one is opened for the current GPU (EnergyUnavailableError where there is
    none). Give it random data: operands of zeros take up to 40 % less.
    """
    own = monitor or EnergyMonitor()
    try:
        found = measure_interleaved(
            {name: fn},
            monitor=own,
            tokens=None if tokens is None else {name: tokens},
            min_duration_s=min_duration_s,
            trials=trials,
            cooldown_s=cooldown_s,
        )
    finally:
        if monitor is None:
            own.close()
    return found[name]


@dataclass(frozen=True)
class Ratio:
    """The optimised over the baseline, with its 95 % interval; `value` None: not measured.

    verdict: "better", "worse" or "inconclusive"; for utilisation, which is neither good nor bad, "higher" or "lower".
    """

    value: float | None
    low: float | None
    high: float | None
    verdict: str

    @classmethod
    def of(cls, ratios: Sequence[float], above: str, below: str) -> Ratio:
        """From the ratio of every round: their geometric mean. above, below: what it is called on either side of 1."""
        if not ratios:
            return cls(None, None, None, "inconclusive")
        logs = [math.log(ratio) for ratio in ratios]
        mean = statistics.fmean(logs)
        if len(logs) < 2:
            return cls(math.exp(mean), None, None, "inconclusive")
        reach = student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        verdict = above if mean - reach > 0 else below if mean + reach < 0 else "inconclusive"
        return cls(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach), verdict)

    def inverse(self) -> Ratio:
        """Of rates the ratio of times; the verdict stays."""
        value, high, low = (None if bound is None else 1 / bound for bound in (self.value, self.low, self.high))
        return Ratio(value, low, high, self.verdict)

    def times(self, other: Ratio) -> Ratio:
        """The product of two ratios of which less is better, its interval by both at their ends: never too narrow."""
        value, low, high = (
            None if a is None or b is None else a * b
            for a, b in ((self.value, other.value), (self.low, other.low), (self.high, other.high))
        )
        worse, better = low is not None and low > 1, high is not None and high < 1
        return Ratio(value, low, high, "worse" if worse else "better" if better else "inconclusive")


@dataclass(frozen=True)
class PerformanceComparison:
    """Ratios of an optimised call over its baseline; `reason` says why energy is not among them where it is not."""

    baseline: EnergyTrials
    optimised: EnergyTrials
    throughput: Ratio
    energy: Ratio
    utilisation: Ratio

    @property
    def reason(self) -> str | None:
        return self.baseline.reason or self.optimised.reason

    def findings(self) -> list[Finding]:
        """A row for each ratio."""
        names = f"{self.optimised.name} over {self.baseline.name}"
        turns = len(self.baseline.windows)
        return [
            Finding(
                f"{what}, {names}",
                ratio.value,
                "ratio",
                ratio.low,
                ratio.high,
                turns,
                ratio.verdict,
                "interleaved ABBA, 95 % interval over turns",
                None if ratio.value is not None else self.reason or "the driver does not say",
            )
            for what, ratio in (
                ("throughput", self.throughput),
                ("energy per call", self.energy),
                ("utilisation", self.utilisation),
            )
        ]


class PerformanceComparator:
    """Compares two ways to do the same: throughput, energy and utilisation, in rounds of A B B A.

    rounds: of two turns, each of which gives one ratio. block_s: how long each block runs.
    """

    def __init__(
        self, monitor: EnergyMonitor, rounds: int = 4, block_s: float = 5.0, tokens_per_call: int | None = None
    ) -> None:
        if rounds < 2 or not block_s > 0:
            raise ValueError(f"rounds={rounds} must be at least 2 and block_s={block_s} positive")
        self.monitor, self.rounds, self.block_s, self.tokens_per_call = monitor, rounds, block_s, tokens_per_call

    def compare(
        self, baseline: Call, optimised: Call, names: tuple[str, str] = ("baseline", "optimised")
    ) -> PerformanceComparison:
        """Run both and say what differs."""
        first, second = names
        if first == second:
            raise ValueError(f"names={names!r} must differ")
        found = measure_interleaved(
            {first: baseline, second: optimised},
            monitor=self.monitor,
            tokens=None if self.tokens_per_call is None else dict.fromkeys(names, self.tokens_per_call),
            min_duration_s=self.block_s,
            trials=2 * self.rounds,
        )
        return compare_trials(found[first], found[second])


def compare_trials(baseline: EnergyTrials, optimised: EnergyTrials) -> PerformanceComparison:
    """The comparison of two loops that were measured in turn; a window of each, side by side, gives one ratio."""

    def ratios(value: Callable[[EnergyMeasurement], float | None]) -> list[float]:
        found = []
        for first, second in zip(baseline.windows, optimised.windows, strict=False):
            theirs, ours = value(first), value(second)
            if theirs is not None and ours is not None and theirs > 0 and ours > 0:
                found.append(ours / theirs)
        return found

    return PerformanceComparison(
        baseline,
        optimised,
        throughput=Ratio.of(ratios(lambda w: w.calls / w.duration_s if w.calls else None), "better", "worse"),
        energy=Ratio.of(ratios(lambda w: _over(w.energy_j, w.calls)), "worse", "better"),
        utilisation=Ratio.of(ratios(lambda w: w.gpu_util_pct), "higher", "lower"),
    )


@dataclass(frozen=True)
class SliceChoice:
    """How many SMs take the fewest joules, and why; `trials` and `ratios` by number of SMs, over the whole GPU's."""

    sm_count: int
    reason: str
    trials: dict[int, EnergyTrials]
    ratios: dict[int, tuple[Ratio, Ratio]]  # the objective's, and the seconds'


def select_sm_slice(
    fn: Callable[[int], object],
    candidates: Sequence[int],
    max_slowdown: float = 1.1,
    objective: str = "joules_per_token",
    *,
    monitor: EnergyMonitor,
    tokens: int | None = None,
    rounds: int = 3,
    block_s: float = 5.0,
) -> SliceChoice:
    """The SMs on which `fn(sm_count)` takes the fewest joules, no slower than `max_slowdown` times the whole GPU.

    candidates: numbers of SMs; the largest is the whole GPU, which stays unless another's interval lies below it.
    objective: joules_per_token, or energy_delay (joules x seconds). A slice whose slowdown may, by its interval, exceed
    the bound is not taken.
    """
    sizes = sorted(set(candidates), reverse=True)
    if len(sizes) < 2 or sizes[-1] < 1:
        raise ValueError(f"candidates={list(candidates)} must hold the whole GPU and a smaller number of SMs")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is not one of {', '.join(OBJECTIVES)}")
    if not max_slowdown >= 1:
        raise ValueError(f"max_slowdown={max_slowdown} must be at least 1, as fast as the whole GPU")
    if rounds < 2:
        raise ValueError(f"rounds={rounds} must be at least 2: an interval needs two")
    found = measure_interleaved(
        {str(size): lambda size=size: fn(size) for size in sizes},  # type: ignore[misc]
        monitor=monitor,
        tokens=None if tokens is None else {str(size): tokens for size in sizes},
        sm_counts={str(size): size for size in sizes},
        min_duration_s=block_s,
        trials=2 * rounds,
    )
    trials = {size: found[str(size)] for size in sizes}
    full = sizes[0]
    ratios: dict[int, tuple[Ratio, Ratio]] = {}
    for size in sizes[1:]:
        compared = compare_trials(trials[full], trials[size])
        slower = compared.throughput.inverse()
        cost = compared.energy if objective == "joules_per_token" else compared.energy.times(slower)
        ratios[size] = (cost, slower)
    best = min(
        (size for size, (cost, slower) in ratios.items() if _below(cost.high, 1) and _below(slower.high, max_slowdown)),
        key=lambda size: ratios[size][0].value or math.inf,
        default=None,
    )
    if best is not None:
        cost, slower = ratios[best]
        reason = f"{cost.value:.3g} of the whole GPU's {objective} at {slower.value:.3g} of its time"
        return SliceChoice(best, reason, trials, ratios)
    if all(cost.value is None for cost, _ in ratios.values()):
        reason = f"energy is not measured: {trials[full].reason}"
    else:
        reason = f"no slice is surely below the whole GPU's {objective} within {max_slowdown:g} of its time"
    return SliceChoice(full, reason, trials, ratios)


def _below(value: float | None, limit: float) -> bool:
    return value is not None and value < limit
