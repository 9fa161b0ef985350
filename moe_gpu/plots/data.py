"""Result rows arranged for figures and pages: runs, facets, comparisons and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_gpu.config import COLD, HOT
from moe_gpu.results import ABLATION, BenchmarkRow, ExpertLoadRow, Machine, Row, TrainingRow, select

OURS, BASELINE = "moe_gpu", "torch_loop"


@dataclass(frozen=True)
class Run:
    """The rows that follow one machine row: what one command recorded."""

    machine: Machine | None
    rows: list[Row]

    @property
    def device(self) -> str:
        return device_label(self.machine)

    @property
    def date(self) -> str:
        return self.machine.recorded_at[:10] if self.machine else "date not recorded"


class Facet(NamedTuple):
    """All that providers share when they are compared, except the number of tokens."""

    device: str
    model: str
    input_dim: int
    hidden_dim: int
    expert_dim: int
    num_experts: int
    top_k: int
    dtype: str
    scope: str
    mode: str
    routing: str

    @property
    def name(self) -> str:
        return f"{self.model} · {self.mode}"

    @property
    def detail(self) -> str:
        return " · ".join(filter(None, (f"{self.routing} routing", self.shape, self.part, self.dtype)))

    @property
    def part(self) -> str:
        """What was timed where that is not one whole layer; empty where it is."""
        if self.scope == "layer" or self.scope.endswith("layers"):
            return "" if self.scope == "layer" else self.scope
        return f"{self.scope} only"

    @property
    def shape(self) -> str:
        sizes = f"E={self.num_experts} K={self.top_k} H={self.input_dim} I={self.hidden_dim}"
        return sizes if self.expert_dim == self.input_dim else f"{sizes} O={self.expert_dim}"


class Series(NamedTuple):
    """One line of a chart: a provider and how its work is launched."""

    provider: str
    launch: str

    @property
    def label(self) -> str:
        return self.provider if self.launch == "eager" else f"{self.provider} + {self.launch}"


Table = dict[Facet, dict[Series, dict[int, BenchmarkRow]]]
"""Facet -> series -> number of tokens -> row; where a point was run again, the latest run's row."""


@dataclass(frozen=True)
class Comparison:
    """moe_gpu at one point against the baseline and the fastest other provider; each with its fastest launch."""

    facet: Facet
    num_tokens: int
    ours: BenchmarkRow
    baseline: BenchmarkRow | None
    rival: BenchmarkRow | None  # the baseline may be it, another variant of moe_gpu may not

    @property
    def over_baseline(self) -> float | None:
        """Speed of moe_gpu as a multiple of the baseline's; below 1 where it is slower."""
        return None if self.baseline is None else speed_ratio(self.ours, self.baseline)

    @property
    def over_rival(self) -> float | None:
        """Speed of moe_gpu as a multiple of the fastest other provider's; below 1 where it is slower."""
        return None if self.rival is None else speed_ratio(self.ours, self.rival)


@dataclass(frozen=True)
class Gap:
    """Points of one provider that have no time, all for one reason."""

    device: str
    provider: str
    status: str
    reason: str
    points: int
    where: str

    @property
    def text(self) -> str:
        return f"{self.provider}: {self.why} ({self.where})"

    @property
    def why(self) -> str:
        return self.reason if self.status == "unavailable" else f"{self.status}, {self.reason}"


@dataclass(frozen=True)
class Load:
    """Routes per expert of one source: counts[layer][window] is a list over experts."""

    device: str
    source: str
    num_experts: int
    layers: list[int]
    windows: list[int]
    counts: dict[int, dict[int, list[int]]]

    def total(self, layer: int) -> list[int]:
        """Routes of each expert of a layer over all windows."""
        return [sum(column) for column in zip(*self.counts[layer].values(), strict=True)]

    def relative(self, layer: int) -> list[float] | None:
        """Each expert's share of a layer's routes as a multiple of an even share; None without routes."""
        return relative_load(self.total(layer))


class ExpertAt(NamedTuple):
    """An expert of a layer and its share of the layer's routes over an even share."""

    load: float
    layer: int
    expert: int


@dataclass(frozen=True)
class Notable:
    """The busiest expert of a source, and those that are hot, cold (but used) and unused."""

    busiest: ExpertAt
    hot: list[ExpertAt]
    cold: list[ExpertAt]
    unused: list[ExpertAt]


def split_runs(rows: Iterable[Row]) -> list[Run]:
    """The rows, cut before every machine row, oldest run first."""
    runs: list[Run] = []
    for row in rows:
        if isinstance(row, Machine):
            runs.append(Run(row, []))
            continue
        if not runs:
            runs.append(Run(None, []))
        runs[-1].rows.append(row)
    return sorted(runs, key=lambda run: run.machine.recorded_at if run.machine else "")


def device_label(machine: Machine | None) -> str:
    if machine is None:
        return "device not recorded"
    return f"CPU · {machine.device}" if machine.device_type == "cpu" else machine.device


def measured(row: BenchmarkRow) -> bool:
    """Whether the row holds a time."""
    return row.status == "ok" and row.p50_ms is not None and row.p50_ms > 0


def is_ours(provider: str) -> bool:
    """Whether it is moe_gpu, or a variant of it such as "moe_gpu fp8", which is no other provider."""
    return provider == OURS or provider.startswith(f"{OURS} ")


def with_rate(row: BenchmarkRow) -> BenchmarkRow:
    """The row with tokens a second, which scripts that record times alone leave out."""
    if row.tokens_per_s is not None or not measured(row):
        return row
    assert row.p50_ms
    return replace(row, tokens_per_s=row.num_tokens / row.p50_ms * 1e3)


def speed_ratio(row: BenchmarkRow, other: BenchmarkRow) -> float:
    """The speed of `row` as a multiple of `other`'s, from the median times."""
    assert row.p50_ms
    assert other.p50_ms
    return other.p50_ms / row.p50_ms


def tabulate(rows: Iterable[Row]) -> Table:
    """Benchmark rows by facet, series and number of tokens; those of an ablation are another table's."""
    return _tabulate(rows, lambda row: row.scope != ABLATION)


def tabulate_ablation(rows: Iterable[Row]) -> Table:
    """As `tabulate`, of the rows that compare one layer with more or fewer of its parts."""
    return _tabulate(rows, lambda row: row.scope == ABLATION)


def _tabulate(rows: Iterable[Row], wanted: Callable[[BenchmarkRow], bool]) -> Table:
    table: Table = {}
    for run in split_runs(rows):
        for row in filter(wanted, select(run.rows, BenchmarkRow)):
            sizes = (row.model, row.input_dim, row.hidden_dim, row.expert_dim, row.num_experts, row.top_k)
            facet = Facet(run.device, *sizes, row.dtype, row.scope, row.mode, row.routing)
            table.setdefault(facet, {}).setdefault(Series(row.provider, row.launch), {})[row.num_tokens] = with_rate(
                row
            )
    return table


def points(table: Table) -> list[tuple[Facet, int, dict[Series, BenchmarkRow]]]:
    """Every facet and number of tokens with the measured rows there."""
    found = []
    for facet, lines in table.items():
        for num_tokens in sorted({tokens for line in lines.values() for tokens in line}):
            at = {series: line[num_tokens] for series, line in lines.items() if num_tokens in line}
            found.append((facet, num_tokens, {series: row for series, row in at.items() if measured(row)}))
    return found


def compare(table: Table) -> list[Comparison]:
    """moe_gpu against the others wherever it was measured."""

    def fastest(rows: Iterable[BenchmarkRow]) -> BenchmarkRow | None:
        return min(rows, key=lambda row: row.p50_ms or math.inf, default=None)

    comparisons = []
    for facet, num_tokens, at in points(table):
        ours = fastest(row for row in at.values() if row.provider == OURS)
        if ours is not None:
            baseline = fastest(row for row in at.values() if row.provider == BASELINE)
            rival = fastest(row for row in at.values() if not is_ours(row.provider))
            comparisons.append(Comparison(facet, num_tokens, ours, baseline, rival))
    return comparisons


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def finding(comparisons: Sequence[Comparison]) -> str | None:
    """One sentence on moe_gpu's speed against the baseline.

    None if they were never measured together, or on several devices, or as several things (layers, models).
    """
    if len({(comparison.facet.device, comparison.facet.part) for comparison in comparisons}) > 1:
        return None
    both = [comparison for comparison in comparisons if comparison.baseline is not None]
    ratios = [ratio for ratio in (comparison.over_baseline for comparison in both) if ratio is not None]
    if not ratios:
        return None
    if len(ratios) == 1:
        return f"{OURS} runs at {times(ratios[0])} the speed of {BASELINE} (one point)"
    slower = sum(ratio < 1 for ratio in ratios)
    spread = f"{times(min(ratios))} to {times(max(ratios))}{f'; slower at {slower}' if slower else ''}"
    mean = times(geometric_mean(ratios))
    replayed = sum(comparison.ours.launch != comparison.baseline.launch for comparison in both if comparison.baseline)
    unlike = f"; {replayed} by a CUDA graph over eager" if replayed else ""
    return f"{OURS} runs at {mean} the speed of {BASELINE} (geometric mean of {len(ratios)} points, {spread}{unlike})"


def gaps(table: Table) -> list[Gap]:
    """What was asked for and has no time, grouped by device, provider and reason."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    asked: dict[tuple[str, str], int] = {}
    for facet, lines in table.items():
        for series, line in lines.items():
            for num_tokens, row in line.items():
                asked[facet.device, series.provider] = asked.get((facet.device, series.provider), 0) + 1
                if not measured(row):
                    status = "no time recorded" if row.status == "ok" else row.status
                    key = (facet.device, series.provider, status, row.reason or "no reason recorded")
                    launch = "" if series.launch == "eager" else f" {series.launch}"
                    place = f"{facet.model} {facet.mode}{launch} {facet.routing} T={num_tokens}"
                    found.setdefault(key, []).append(place)
    result = []
    for key, places in found.items():
        where = "; ".join(places[:2]) + (f" and {len(places) - 2} more" if len(places) > 2 else "")
        if len(places) > 1 and len(places) == asked[key[:2]]:
            where = f"all {len(places)} points"
        result.append(Gap(*key, points=len(places), where=where))
    return result


def expert_loads(rows: Iterable[Row]) -> list[Load]:
    """Expert load by run, source and number of experts; a window recorded twice in a run counts once, the last."""
    loads = []
    for run in split_runs(rows):
        by_source: dict[tuple[str, int], list[ExpertLoadRow]] = {}
        for row in select(run.rows, ExpertLoadRow):
            if row.counts:
                by_source.setdefault((row.source, len(row.counts)), []).append(row)
        for (source, num_experts), group in by_source.items():
            counts: dict[int, dict[int, list[int]]] = {}
            for row in sorted(group, key=lambda row: (row.layer, row.window)):
                counts.setdefault(row.layer, {})[row.window] = row.counts
            windows = sorted({row.window for row in group})
            loads.append(Load(run.device, source, num_experts, sorted(counts), windows, counts))
    return loads


def relative_load(counts: Sequence[float]) -> list[float] | None:
    """Counts (or joules) as multiples of an even share; None where there is none."""
    total = sum(counts)
    return [count * len(counts) / total for count in counts] if total else None


def notable(load: Load) -> Notable | None:
    """Which experts stand out over all windows, the hottest and the coldest first; None without any route."""
    found = [
        ExpertAt(ratio, layer, expert)
        for layer in load.layers
        for expert, ratio in enumerate(load.relative(layer) or ())
    ]
    if not found:
        return None
    hot = sorted((at for at in found if at.load > HOT), key=lambda at: -at.load)
    cold = sorted((at for at in found if 0 < at.load < COLD), key=lambda at: at.load)
    return Notable(max(found, key=lambda at: at.load), hot, cold, [at for at in found if at.load == 0])


def training_runs(rows: Iterable[Row]) -> dict[str, list[TrainingRow]]:
    """Training rows by run, in order of steps; runs of one name from several files are told apart by their time."""
    found: list[tuple[str, str, list[TrainingRow]]] = []
    for run in split_runs(rows):
        by_name: dict[str, dict[int, TrainingRow]] = {}
        for row in select(run.rows, TrainingRow):
            by_name.setdefault(row.run, {})[row.step] = row
        when = run.machine.recorded_at if run.machine else "no date"
        found += [(name, when, [steps[step] for step in sorted(steps)]) for name, steps in by_name.items()]
    names = [name for name, _, _ in found]
    return {name if names.count(name) == 1 else f"{name} ({when})": steps for name, when, steps in found}


def energy_reason(runs: Sequence[Run]) -> str:
    """Why no row carries energy."""
    machines = [run.machine for run in runs if run.machine and select(run.rows, BenchmarkRow)]
    if machines and all(machine.device_type == "cpu" for machine in machines):
        return "Energy is read from the NVIDIA driver, and this run was on a CPU."
    return "No row of these results carries energy_j_per_token."


def energy_finding(table: Table) -> str | None:
    """One sentence on moe_gpu's energy against the baseline's; None if never measured together, or on two devices."""
    if len({facet.device for facet in table}) > 1:
        return None
    ratios = []
    for _, _, at in points(table):
        found = [(series.provider, row.energy_j_per_token) for series, row in at.items() if row.energy_j_per_token]
        ours, baseline = ([joules for name, joules in found if name == wanted] for wanted in (OURS, BASELINE))
        if ours and baseline:
            ratios.append(min(ours) / min(baseline))
    if not ratios:
        return None
    if len(ratios) == 1:
        return f"{OURS} takes {times(ratios[0])} the energy of {BASELINE} (one point)"
    more = sum(ratio > 1 for ratio in ratios)
    spread = f"{times(min(ratios))} to {times(max(ratios))}{f'; more at {more}' if more else ''}"
    mean = times(geometric_mean(ratios))
    return f"{OURS} takes {mean} the energy of {BASELINE} (geometric mean of {len(ratios)} points, {spread})"


def energy_notes(rows: Iterable[Row]) -> list[str]:
    """What must be known of the energy shown: the meter's gain, and points whose windows were not good."""
    notes = ["The meter's own gain, up to 5 % a board, is in no interval; comparisons on one board are free of it."]
    doubtful: dict[str, int] = {}
    for row in select(rows, BenchmarkRow):
        if row.energy_j_per_token is not None and row.energy_quality not in (None, "ok"):
            doubtful[row.energy_quality] = doubtful.get(row.energy_quality, 0) + 1
    notes += [f"Of these points {count} are {quality.replace('+', ' and ')}." for quality, count in doubtful.items()]
    return notes


def dtypes(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.dtype for row in select(rows, BenchmarkRow)))


def times(ratio: float) -> str:
    """A ratio for people: 0.83x, 2.31x, 14.2x, 130x."""
    return f"{ratio:.{max(0, 2 - max(0, math.floor(math.log10(ratio))))}f}x" if ratio > 0 else "0x"


def short(value: float) -> str:
    """A number of any size in few letters: 0.031, 950, 1.5k, 2.4M."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def with_unit(value: float, unit: str) -> str:
    """120 GFLOP/s, 1.4 TB/s."""
    text = short(value)
    return f"{text[:-1]} {text[-1]}{unit}" if text[-1].isalpha() else f"{text} {unit}"


def short_tokens(num_tokens: int) -> str:
    """512, 4k, 16k: k is 1024 where it divides; otherwise the plain number."""
    return f"{num_tokens // 1024}k" if num_tokens % 1024 == 0 and num_tokens else str(num_tokens)


def side_by_side(x: float, index: int, count: int) -> float:
    """Where the `index`th of `count` points at the same x stands on a log axis: within a factor of 1.5 of x."""
    return x * 1.5 ** (2 * (index + 0.5) / count - 1)


def values(mapping: Mapping[int, BenchmarkRow], field: str) -> dict[int, float]:
    """Number of tokens -> a field's value, in order of tokens, for measured rows that have one."""
    picked = {tokens: getattr(row, field) for tokens, row in sorted(mapping.items()) if measured(row)}
    return {tokens: value for tokens, value in picked.items() if value is not None}
