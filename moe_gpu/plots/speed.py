"""Figures of benchmark rows: throughput, share of the ceilings, energy, scaling, and what each choice brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_gpu.plots.canvas import (
    INK,
    NOT_MEASURED,
    SOFT,
    End,
    Page,
    colour,
    draw_line,
    gap_notes,
    label_ends,
    label_margin,
    log_ticks,
    log_x,
    log_y,
    name_panel,
    page,
    say_nothing,
    shorten,
    styled,
)
from moe_gpu.plots.data import (
    BASELINE,
    OURS,
    Facet,
    Run,
    Series,
    Table,
    compare,
    energy_finding,
    energy_notes,
    energy_reason,
    finding,
    gaps,
    geometric_mean,
    points,
    short,
    short_tokens,
    side_by_side,
    speed_ratio,
    split_runs,
    tabulate,
    tabulate_ablation,
    times,
    values,
    with_unit,
)
from moe_gpu.results import BenchmarkRow, Ceiling, Row, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS = 24
_GRAPH_NOTE = "Dashed lines with open markers: replayed as a CUDA graph."
_PARTS_NOTE = "Parts: one layer with a shared expert; of slices and streams the fastest way that there is serves."
# How the variants of an ablation are called: with a part added to those before it, and with all parts but one.
ADDED, LEFT_OUT = "+ ", "all but "
_ONLY_SWEPT = "Every shape is one point of a row of layers that differ in experts alone: see scaling_analysis.png."
_NO_BENCHMARK = "These results hold no benchmark rows."
Lines = dict[Series, dict[int, BenchmarkRow]]


@styled
def draw_throughput(rows: Sequence[Row], path: str | Path) -> Path:
    """Tokens a second of every provider over tokens, a panel for each model, mode and routing; whiskers p20 to p80."""

    def whiskers(line: dict[int, BenchmarkRow]) -> dict[int, tuple[float, float]]:
        slow, fast = values(line, "p80_ms"), values(line, "p20_ms")
        return {tokens: (tokens / slow[tokens] * 1e3, tokens / fast[tokens] * 1e3) for tokens in slow if tokens in fast}

    table = tabulate(rows)
    title = finding(compare(table)) or "Throughput by provider"
    remark = "Tokens a second against tokens in a call; log axes; whiskers: 20th to 80th percentile."
    return _by_routing(rows, "tokens_per_s", "tokens/s", title, remark, whiskers).save(path)


@styled
def draw_energy(rows: Sequence[Row], path: str | Path) -> Path:
    """Joules a token of every provider over tokens; one panel that says why where no row carries energy."""
    if all(row.energy_j_per_token is None for row in select(rows, BenchmarkRow)):
        runs = split_runs(rows)
        blank = page((1, 1), "Energy per token", runs)
        say_nothing(blank.axes[0][0], energy_reason(runs))
        return blank.save(path)

    def whiskers(line: dict[int, BenchmarkRow]) -> dict[int, tuple[float, float]]:
        energy, error = values(line, "energy_j_per_token"), values(line, "energy_stderr_j_per_token")
        # On a log axis an interval that reaches 0 is cut at a tenth.
        return {x: (max(e / 10, e - 1.96 * error[x]), e + 1.96 * error[x]) for x, e in energy.items() if x in error}

    title = energy_finding(tabulate(rows)) or "Energy per token by provider"
    remark = "Joules a token against tokens in a call; log axes; whiskers: 95 % interval of the readings."
    sheet = _by_routing(rows, "energy_j_per_token", "J/token", title, remark, whiskers, energy_notes(rows))
    return sheet.save(path)


@styled
def draw_utilization(rows: Sequence[Row], path: str | Path) -> Path:
    """Share of the measured matmul and copy ceilings that every provider reaches, over tokens.

    Beside them, where it was measured, the share of the time in which the driver saw a kernel run.
    """
    table, runs = tabulate(rows), split_runs(rows)
    fields = {"flops_share": "matmul", "bandwidth_share": "copy"}
    shares = [
        (getattr(row, field), name)
        for _, _, at in points(table)
        for series, row in at.items()
        for field, name in fields.items()
        if series.provider == OURS and getattr(row, field) is not None
    ]
    devices = {run.machine.device_type for run in runs if run.machine}
    title = "CPU: share of the measured ceiling" if devices == {"cpu"} else "GPU: share of the measured ceiling"
    if shares:
        title += f"; {OURS} reaches up to {_percent(max(shares)[0])} of {max(shares)[1]}"
    remark = (
        "Least work of the pass over the time taken, as a share of what plain work reached on this device; log axes."
    )
    facets, notes = _shown(table)
    busy = any(row.gpu_util_pct is not None for row in select(rows, BenchmarkRow))
    if not busy:
        notes = [f"Share of the time in which a kernel ran: {NOT_MEASURED} (`moe-gpu bench --energy` does).", *notes]
    sheet = _sheet(facets, table, 3 if busy else 2, title, runs, remark, notes, grid=True)
    ceilings = {(run.device, row.name, row.dtype): row for run in runs for row in select(run.rows, Ceiling)}
    for axes, facet in zip(_in_groups(sheet, 3 if busy else 2, len(facets)), facets, strict=False):
        if busy:
            _panel(axes[2], table[facet], "gpu_util_pct", "time with a kernel, %", ceiling=100.0)
            name_panel(axes[2], f"{facet.name} · {facet.routing}", "as the driver counts it, calls back to back")
        for axis, (field, name) in zip(axes, fields.items(), strict=False):
            ceiling = ceilings.get((facet.device, name, facet.dtype))
            if ceiling is None:
                full = f"{name} ceiling not recorded"
            else:
                full = f"100 % = {with_unit(ceiling.value, ceiling.unit)}, {ceiling.how}"
            why = "" if ceiling else f"these results hold no {name} ceiling"
            _panel(axis, table[facet], field, f"share of {name}", _percent, ceiling=1.0, why=why)
            name_panel(axis, f"{facet.name} · {facet.routing}", full)
    return sheet.save(path)


@styled
def draw_scaling(rows: Sequence[Row], path: str | Path) -> Path:
    """Time and tokens a second against tokens, and against experts where rows differ in their number alone."""
    table, runs = tabulate(rows), split_runs(rows)
    sweeps = _expert_sweeps(table)
    facets, notes = _shown(table)
    if not sweeps:
        notes = [*notes, f"Against the number of experts: {NOT_MEASURED} (no two measurements differ in it alone)."]
    remark = "Median time of a call, and tokens a second; log axes."
    groups = len(facets) + len(sweeps)
    sheet = _sheet(facets, table, 2, "Scaling with tokens and experts", runs, remark, notes, len(sweeps), grid=True)
    cells = _in_groups(sheet, 2, groups)
    for axes, facet in zip(cells, facets, strict=False):
        for axis, (field, label) in zip(axes, (("p50_ms", "ms a call"), ("tokens_per_s", "tokens/s")), strict=True):
            _panel(axis, table[facet], field, label)
            name_panel(axis, facet.name, _detail(facet, table))
    for axes, (facet, num_tokens, by_experts) in zip(cells[len(facets) :], sweeps, strict=False):
        for axis, (field, label) in zip(axes, (("p50_ms", "ms a call"), ("tokens_per_s", "tokens/s")), strict=True):
            _panel(axis, by_experts, field, label, x_label="experts")
            detail = f"T={num_tokens} K={facet.top_k} H={facet.input_dim} I={facet.hidden_dim} {facet.dtype}"
            name_panel(axis, f"experts · {facet.mode} · {facet.routing}", detail)
    return sheet.save(path)


@styled
def draw_ablation(rows: Sequence[Row], path: str | Path) -> Path:
    """Speed over torch_loop of every provider and launch, and moe_gpu replayed as a graph over moe_gpu eager.

    Beside them moe_gpu's parts, added one by one and left out one by one (`moe-gpu bench --ablation`); where no row
    records that, it is said to be not measured.
    """
    table, runs = tabulate(rows), split_runs(rows)
    groups = list(dict.fromkeys((facet.device, facet.mode) for facet in table))
    several = len({device for device, _ in groups}) > 1
    strips: list[tuple[str, list[tuple[str, str, list[float], str]]]] = []
    for device, mode in groups:
        part = {facet: lines for facet, lines in table.items() if (facet.device, facet.mode) == (device, mode)}
        name = f"{mode} · {device}" if several else mode
        strips.append((f"Speed over {BASELINE}: {name}", _over_baseline(part)))
    strips.append((f"{OURS}: CUDA graph over eager", _graph_over_eager(table)))
    parts = tabulate_ablation(rows)
    if parts:
        strips.append(("Parts added one by one: speed over the baseline", _parts_strip(parts, ADDED, "baseline")))
        strips.append(("All parts but one: speed over all of them", _parts_strip(parts, LEFT_OUT, None)))
    tallest = max((len(strip) for _, strip in strips if any(ratios for _, _, ratios, _ in strip)), default=4)
    title, why = (
        f"{OURS} without one of its parts",
        "No row records a part switched off: `moe-gpu bench --ablation` does.",
    )
    room = len(strips) % 2 == 1 and not parts
    sheet = page(
        (-(-len(strips) // 2), 2),
        finding(compare(table)) or "What each choice brings",
        runs,
        remark="Small dots: single points (model, routing, tokens); large: their geometric mean; n: how many points.",
        notes=[
            *([] if room or parts else [f"{title}: {NOT_MEASURED}. {why}"]),
            *([_PARTS_NOTE] if parts else []),
            *gap_notes([*gaps(table), *gaps(parts)]),
        ],
        panel=(3.6, max(1.3, 0.3 * tallest + 0.3)),
        margins=(2.05, 1.0),
    )
    flat = [axis for line in sheet.axes for axis in line]
    for axis, (name, strip) in zip(flat, strips, strict=False):
        name_panel(axis, name)
        _strip(axis, strip)
    if room:
        name_panel(flat[-1], title)
        say_nothing(flat[-1], why)
    for axis in flat[len(strips) + room :]:
        axis.set_axis_off()
    return sheet.save(path)


def _parts_strip(table: Table, prefix: str, over: str | None) -> list[tuple[str, str, list[float], str]]:
    """(variant, provider, ratios, why empty) of the variants that begin with a prefix, in the order recorded.

    over: the variant that they are compared with; None: the one with all parts, which is the last that was added.
    """
    names = list(dict.fromkeys(series.provider for lines in table.values() for series in lines))
    added = [name for name in names if name.startswith(ADDED)]
    base = over or (added[-1] if added else "")
    ratios: dict[str, list[float]] = {name: [] for name in names if name.startswith(prefix)}
    for _, _, at in points(table):
        by_name = {series.provider: row for series, row in at.items()}
        for name in ratios:
            if name in by_name and base in by_name:
                ratios[name].append(speed_ratio(by_name[name], by_name[base]))
    reasons = {gap.provider: gap.why for gap in gaps(table)}
    without = reasons.get(base, f"{base} was not measured at the same points")
    return [(name, OURS, found, reasons.get(name, without)) for name, found in ratios.items()]


def _over_baseline(table: Table) -> list[tuple[str, str, list[float], str]]:
    """(label, provider, ratios, why empty) of every series, fastest first."""
    ratios: dict[Series, list[float]] = {series: [] for lines in table.values() for series in lines}
    for _, _, at in points(table):
        loops = [row for series, row in at.items() if series.provider == BASELINE]
        if loops:
            loop = min(loops, key=lambda row: row.p50_ms or 0)
            for series, row in at.items():
                ratios[series].append(speed_ratio(row, loop))
    reasons = {gap.provider: gap.why for gap in gaps(table)}
    without = f"{BASELINE} was not measured at the same points"
    strip = [
        (series.label, series.provider, found, reasons.get(series.provider, without))
        for series, found in ratios.items()
    ]
    return sorted(strip, key=lambda item: -geometric_mean(item[2]) if item[2] else 0)


def _graph_over_eager(table: Table) -> list[tuple[str, str, list[float], str]]:
    """(label, provider, ratios, why empty) by mode and number of tokens."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for facet, num_tokens, at in points(table):
        eager, graph = at.get(Series(OURS, "eager")), at.get(Series(OURS, "graph"))
        if eager and graph:
            ratios.setdefault((facet.mode, num_tokens), []).append(speed_ratio(graph, eager))
    return [(f"{mode} T={tokens}", OURS, found, "") for (mode, tokens), found in sorted(ratios.items())]


def _strip(axis: Axes, strip: Sequence[tuple[str, str, list[float], str]]) -> None:
    """One line for each entry: its ratios as dots on a log axis around 1, their geometric mean and count as text."""
    found = [ratio for _, _, ratios, _ in strip for ratio in ratios]
    if not found:
        labels: dict[str, list[str]] = {}
        for label, _, _, why in strip:
            if why:
                labels.setdefault(why, []).append(label)
        reasons = [f"{named[0]}: {why}" if len(named) == 1 else why for why, named in labels.items()]
        say_nothing(axis, "; ".join(reasons) or "No row was launched both eagerly and as a CUDA graph.")
        return
    low, high = min([*found, 1.0]) / 1.15, max([*found, 1.0]) * 1.15
    axis.set(xscale="log", xlim=(low, high), ylim=(len(strip) - 0.4, -0.6))
    axis.set_xticks(log_ticks(low, high), [f"{tick:g}x" for tick in log_ticks(low, high)])
    axis.set_xticks([], minor=True)
    axis.grid(axis="x")
    axis.spines["left"].set_visible(False)
    axis.axvline(1, color=SOFT, linewidth=1)
    axis.set_yticks(range(len(strip)), [label for label, *_ in strip])
    for index, (tick, (_, provider, ratios, why)) in enumerate(zip(axis.get_yticklabels(), strip, strict=True)):
        ink, ours = colour(provider), provider == OURS
        tick.set(color=ink if ratios else SOFT, fontsize=8, weight="bold" if ours else "normal")
        if not ratios:
            box = dict(facecolor="white", edgecolor="none", pad=1)
            text = shorten(f"{NOT_MEASURED}: {why}", 58)
            axis.text(0.02, index, text, transform=axis.get_yaxis_transform(), fontsize=7.5, color=SOFT,
                      va="center", bbox=box, zorder=6)  # fmt: skip
            continue
        mean = geometric_mean(ratios)
        axis.plot([min(ratios), max(ratios)], [index, index], color=ink, alpha=0.3, linewidth=5, solid_capstyle="round")
        if len(ratios) > 1:
            axis.plot(ratios, [index] * len(ratios), "o", color=ink, markersize=2.6, alpha=0.7)
        axis.plot([mean], [index], "o", color=ink, markersize=8 if ours else 6, markeredgecolor="white", zorder=5)
        text = f"{times(mean)}  n={len(ratios)}"
        axis.text(1.03, index, text, transform=axis.get_yaxis_transform(), fontsize=8, color=ink, va="center",
                  weight="bold" if ours else "normal")  # fmt: skip


def _expert_sweeps(table: Table) -> list[tuple[Facet, int, Lines]]:
    """Groups of facets that differ in the number of experts alone, at the most tokens that two of them share."""
    groups: dict[Facet, dict[int, Lines]] = {}
    for facet, lines in table.items():
        groups.setdefault(facet._replace(model="", num_experts=0), {})[facet.num_experts] = lines
    sweeps = []
    for facet, by_experts in groups.items():
        counts: dict[int, set[int]] = {}
        for experts, lines in by_experts.items():
            for line in lines.values():
                for tokens in values(line, "p50_ms"):
                    counts.setdefault(tokens, set()).add(experts)
        shared = [tokens for tokens, experts in counts.items() if len(experts) > 1]
        if shared:
            num_tokens = max(shared)
            picked: Lines = {}
            for experts, lines in sorted(by_experts.items()):
                for series, line in lines.items():
                    if num_tokens in line:
                        picked.setdefault(series, {})[experts] = line[num_tokens]
            sweeps.append((facet, num_tokens, picked))
    return sweeps


def _by_routing(
    rows: Sequence[Row],
    field: str,
    unit: str,
    title: str,
    remark: str,
    whiskers: Callable[[dict[int, BenchmarkRow]], dict[int, tuple[float, float]]] | None = None,
    more_notes: Sequence[str] = (),
) -> Page:
    """A page with a row of panels for each model and mode and a column for each routing.

    Where most shapes ran with one routing alone, that table would be mostly empty: then a panel for each that was run.
    """
    table, runs = tabulate(rows), split_runs(rows)
    routings = list(dict.fromkeys(facet.routing for facet in table)) or [""]
    facets, notes = _shown(table, join_routings=True)
    ran, _ = _shown(table)
    sparse = 3 * len(ran) < 2 * len(facets) * len(routings)
    if sparse:
        sheet = _sheet(ran, table, 1, title, runs, remark, [*more_notes, *notes], grid=True)
        cells = [(axes[0], facet) for axes, facet in zip(_in_groups(sheet, 1, len(ran)), ran, strict=False)]
    else:
        sheet = _sheet(facets, table, len(routings), title, runs, remark, [*more_notes, *notes])
        cells = [
            (axis, facet._replace(routing=routing))
            for axes, facet in zip(sheet.axes, facets, strict=False)
            for axis, routing in zip(axes, routings, strict=True)
        ]
    for axis, facet in cells:
        why = f"Routing {facet.routing} was not run for this shape."
        _panel(axis, table.get(facet, {}), field, unit, whiskers=whiskers, why=why)
        name_panel(axis, facet.name, _detail(facet, table))
    return sheet


def _detail(facet: Facet, table: Table) -> str:
    """What the facet is, with its device where there are several."""
    several = len({other.device for other in table}) > 1
    return f"{facet.detail} · {facet.device}" if several else facet.detail


def _shown(table: Table, *, join_routings: bool = False) -> tuple[list[Facet], list[str]]:
    """The facets that get panels (one for all routings, if joined) and the footnotes.

    Single points of a sweep over experts get none: `draw_scaling` joins them.
    """
    swept = _swept(table)
    kept = [facet for facet in table if facet not in swept]
    facets = list(dict.fromkeys(facet._replace(routing="") if join_routings else facet for facet in kept))
    if any(series.launch == "graph" for lines in table.values() for series in lines):
        notes = [_GRAPH_NOTE]
    else:
        notes = []
    if len({facet.device for facet in facets}) > 1:
        facets.sort(key=lambda facet: facet.device)
    if len(facets) > MAX_ROWS:
        left = ", ".join(dict.fromkeys(f"{facet.model} {facet.mode}" for facet in facets[MAX_ROWS:]))
        notes.append(f"Recorded but not drawn, for room: {left}.")
    return facets[:MAX_ROWS], notes + gap_notes(gaps(table))


def _sheet(
    facets: Sequence[Facet],
    table: Table,
    columns: int,
    title: str,
    runs: Sequence[Run],
    remark: str,
    notes: Iterable[str],
    extra: int = 0,
    grid: bool = False,
) -> Page:
    """A page of line panels, `columns` for each facet and `extra`; without any benchmark row, one that says so.

    grid: facets stand side by side as well as under each other, so that many of them are no strip.
    """
    if not facets and not extra:
        blank = page((1, 1), title, runs, notes=notes)
        say_nothing(blank.axes[0][0], _ONLY_SWEPT if table else _NO_BENCHMARK)
        return blank
    labels = {series.label for lines in table.values() for series in lines}
    margins = (0.75, label_margin(labels))
    groups = len(facets) + extra
    abreast = 2 if grid and groups > 2 else 1
    shape = (-(-groups // abreast), abreast * columns)
    return page(shape, title, runs, remark=remark, notes=notes, margins=margins)


def _in_groups(sheet: Page, size: int, count: int) -> list[list[Axes]]:
    """The panels of a page by facet, `size` each; those that are left over are blanked."""
    groups = [line[at : at + size] for line in sheet.axes for at in range(0, len(line), size)]
    for axis in (axis for group in groups[count:] for axis in group if count):
        axis.set_axis_off()
    return groups


def _swept(table: Table) -> set[Facet]:
    """Facets that are single points of a sweep over experts, which the scaling figure draws as a line."""
    swept = {facet for facet, _, _ in _expert_sweeps(table)}
    return {
        facet
        for facet, lines in table.items()
        if facet._replace(model="", num_experts=0) in swept
        and len({tokens for line in lines.values() for tokens in line}) == 1
    }


def _panel(
    axis: Axes,
    lines: Lines,
    field: str,
    y_label: str,
    format_y: Callable[[float], str] = short,
    *,
    x_label: str = "tokens",
    whiskers: Callable[[dict[int, BenchmarkRow]], dict[int, tuple[float, float]]] | None = None,
    ceiling: float | None = None,
    why: str = "",
) -> None:
    """Lines of a field over tokens (or experts) on log axes that reach to the ceiling, named at the right edge."""
    drawn = {series: values(line, field) for series, line in lines.items()}
    drawn = {series: {x: y for x, y in line.items() if y > 0} for series, line in drawn.items()}
    found = [y for line in drawn.values() for y in line.values()]
    if not found:
        rows = [row for line in lines.values() for row in line.values()]
        timed = any(row.p50_ms is not None for row in rows)  # then a row that failed does not say why the rest lack it
        reasons = [] if timed else dict.fromkeys(row.reason for row in rows if row.reason)
        say_nothing(axis, "; ".join(reasons) or why or f"No row carries {field}.")
        return
    asked = sorted({x for line in lines.values() for x in line})
    bars = {series: whiskers(lines[series]) if whiskers else {} for series in drawn}
    ends = [end for bar in bars.values() for pair in bar.values() for end in pair]
    log_x(axis, asked, str if x_label == "experts" else short_tokens)
    log_y(axis, [*found, *ends, *([] if ceiling is None else [ceiling])], format_y)
    if ceiling is not None:
        axis.axhline(ceiling, color=INK, linewidth=1, linestyle=":")
    axis.set_xlabel(x_label, labelpad=2)
    axis.set_ylabel(y_label, labelpad=4)
    names = []
    drawn = {series: line for series, line in drawn.items() if line}
    for index, (series, found_at) in enumerate(drawn.items()):
        alone = len(asked) == 1
        place = {x: side_by_side(x, index, len(drawn)) if alone else float(x) for x in asked}
        bar = {place[x]: ends for x, ends in bars[series].items()}
        line = {place[x]: y for x, y in found_at.items()}
        draw_line(axis, series, line, place.values(), bar)
        names.append(End(series.label, colour(series.provider), max(line), line[max(line)], series.provider == OURS))
    label_ends(axis, names)


def _percent(share: float) -> str:
    return f"{share * 100:.3g} %"
