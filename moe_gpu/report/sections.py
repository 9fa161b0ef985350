"""The report's sections as HTML; an empty text where there is nothing to say."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from html import escape

from moe_gpu.plots.canvas import shorten
from moe_gpu.plots.data import (
    BASELINE,
    COLD,
    HOT,
    OURS,
    Comparison,
    ExpertAt,
    Facet,
    Load,
    Series,
    Table,
    energy_reason,
    expert_loads,
    gaps,
    measured,
    notable,
    relative_load,
    short,
    short_tokens,
    side_by_side,
    split_runs,
    tabulate_ablation,
    times,
    training_runs,
    values,
    with_unit,
)
from moe_gpu.report.charts import MARKS, Line, bar_chart, heat_map, line_chart
from moe_gpu.report.tables import Cell, number, row, table
from moe_gpu.results import BenchmarkRow, Ceiling, Machine, Row, SliceSeries, TrainingRow, select

_NAMED = 12  # experts that a sentence names before it counts the rest
_HEAT_ROWS = 128


def points(comparisons: Sequence[Comparison]) -> str:
    """A table of moe_gpu against the baseline and the fastest other provider at every point."""
    rows = []
    for item in comparisons:
        cells = [*_place(item.facet), number(item.num_tokens, f"{item.num_tokens:,}")]
        cells.append(_time(item.ours))
        cells += [_time(item.baseline), _ratio(item.over_baseline)]
        rival = Series(item.rival.provider, item.rival.launch).label if item.rival else "—"
        cells += [Cell(rival), _time(item.rival), _ratio(item.over_rival)]
        rows.append(row(cells))
    if not rows:
        return ""
    head = ["Model", "Pass", "Routing", "Type", "#Tokens", f"#{OURS} ms", f"#{BASELINE} ms", "#Speed over it"]
    note = "Median times; of every provider the fastest launch; a speed below 1x means that moe_gpu is slower."
    return f'<p class="note">{note}</p>' + table([*head, "Fastest other", "#Its ms", "#Speed over it"], rows)


def throughput(benchmarks: Table, classes: Mapping[str, str]) -> str:
    """Small charts of tokens a second over tokens, one for each facet, under a common legend."""
    if not benchmarks:
        return ""
    marks = {provider: index % len(MARKS) for index, provider in enumerate(classes)}
    several = len({facet.device for facet in benchmarks}) > 1
    charts: list[str] = []
    drawn: set[Series] = set()
    for facet, lines in benchmarks.items():
        asked = sorted({tokens for line in lines.values() for tokens in line})
        ordered = sorted(lines.items(), key=lambda item: item[0].provider == OURS)  # ours last, on top
        shown = [(series, line) for series, line in ordered if values(line, "tokens_per_s")]
        drawn |= {series for series, _ in shown}
        curves = []
        for index, (series, line) in enumerate(shown):
            curve = _curve(series, line, f"{classes[series.provider]}{_dress(series)}", marks)
            if len(asked) == 1:
                x = side_by_side(asked[0], index, len(shown))
                bars = [(x, low, high) for _, low, high in curve.whiskers]
                curve = replace(curve, points=[(x, y) for _, y in curve.points], whiskers=bars, asked=[x])
            curves.append(curve)
        caption = facet.detail + (f" · {facet.device}" if several else "")
        figcaption = f"<figcaption>{escape(facet.name)}<small>{escape(caption)}</small></figcaption>"
        if not curves:
            charts.append(f'<figure class="empty">{figcaption}not measured</figure>')
            continue
        title = f"{facet.name}, {caption}: tokens a second over tokens"
        chart = line_chart(curves, "tokens", x_text=lambda x: short_tokens(int(x)), x_ticks=asked, title=title)
        charts.append(f"<figure>{figcaption}{chart}</figure>")
    legend = "".join(_key(series, classes, marks) for series in sorted(drawn))
    note = "Tokens a second, over tokens in a call; log axes; bars from the 20th to the 80th percentile."
    return f'<p class="note">{note}</p><ul class="legend">{legend}</ul><div class="charts">{"".join(charts)}</div>'


def _dress(series: Series) -> str:
    return (" ours" if series.provider == OURS else "") + ("" if series.launch == "eager" else " graph")


def _curve(series: Series, line: dict[int, BenchmarkRow], looks: str, marks: Mapping[str, int]) -> Line:
    found = values(line, "tokens_per_s")
    slow, fast = values(line, "p80_ms"), values(line, "p20_ms")
    bars = [(x, x / slow[x] * 1e3, x / fast[x] * 1e3) for x in found if x in slow and x in fast]
    tips = [f"{short(found[x])} tokens/s\n{_detail(line[x])}" for x in found]
    return Line(looks, marks[series.provider], list(found.items()), tips, bars, list(line))


def _key(series: Series, classes: Mapping[str, str], marks: Mapping[str, int]) -> str:
    looks = f"{classes[series.provider]}{_dress(series)}"
    sample = (
        f'<svg viewBox="0 0 32 14" class="{looks}" aria-hidden="true"><path class="line {looks}" d="M0,7L32,7"/>'
        f'<path class="mark {looks}" d="{MARKS[marks[series.provider]]}" transform="translate(16,7)"/></svg>'
    )
    return f"<li>{sample}{escape(series.label)}</li>"


def results(benchmarks: Table) -> str:
    """Every benchmark row, those without a time included."""
    rows = []
    for facet, lines in benchmarks.items():
        for series, line in lines.items():
            for num_tokens, one in sorted(line.items()):
                ok = measured(one)
                share = [number(value, None if value is None else f"{value:.1%}") for value in _shares(one)]
                error = None if one.max_error is None else f"{one.max_error:.2g}"
                allowed = "" if one.allowed_error is None else f"allowed: {one.allowed_error:.3g}"
                memory = one.peak_memory_bytes
                cells = [
                    Cell(series.label, one.backend and f"backend {one.backend}"),
                    *_place(facet),
                    number(num_tokens, f"{num_tokens:,}"),
                    Cell("ok" if ok else one.status, one.reason),
                    _time(one if ok else None),
                    _spread(one),
                    number(one.tokens_per_s),
                    number(one.tflops),
                    number(one.gbps),
                    *share,
                    number(memory, None if memory is None else f"{memory / 2**20:.1f}"),
                    number(one.energy_j_per_token, tip="joules a token"),
                    number(one.max_error, error, allowed),
                    _why("" if ok else one.reason or "no reason recorded"),
                ]
                rows.append(row(cells, "gap" if not ok else "ours" if series.provider == OURS else ""))
    if not rows:
        return ""
    head = ["Provider", "Model", "Pass", "Routing", "Type", "#Tokens", "Status", "#Median ms", "#p20 to p80 ms"]
    head += [
        "#tokens/s",
        "#TFLOP/s",
        "#GB/s",
        "#of matmul",
        "#of copy",
        "#Peak MiB",
        "#J/token",
        "#Max error",
        "Reason",
    ]
    return table(head, rows, classes="sortable findable")


def memory(benchmarks: Table, classes: Mapping[str, str]) -> str:
    """Bars of peak memory by provider, for each facet at the most tokens for which it was recorded."""
    charts = []
    for facet, lines in benchmarks.items():
        held = {
            (series, tokens): one.peak_memory_bytes
            for series, line in lines.items()
            for tokens, one in line.items()
            if one.peak_memory_bytes
        }
        most = max((tokens for _, tokens in held), default=None)
        if most is None:
            continue
        bars = []
        for series in lines:
            held_bytes = held.get((series, most))
            if held_bytes is not None:
                text = f"{held_bytes / 2**20:,.1f} MiB"
                tip = f"{series.label}: {held_bytes:,} bytes\n{most:,} tokens"
                bars.append((series.label, classes[series.provider], float(held_bytes), text, tip))
        bars.sort(key=lambda bar: bar[2])
        left = len(lines) - len(bars)
        caption = f"{facet.detail} · {most:,} tokens" + (f" · {left} not measured" if left else "")
        title = f"{facet.name}, {caption}: peak memory"
        figcaption = f"<figcaption>{escape(facet.name)}<small>{escape(caption)}</small></figcaption>"
        charts.append(f"<figure>{figcaption}{bar_chart(bars, title=title)}</figure>")
    if not charts:
        return ""
    note = "The most that a call held at once beyond weights and input, at the largest number of tokens recorded."
    return f'<p class="note">{note}</p><div class="charts">{"".join(charts)}</div>'


def training(rows: Sequence[Row]) -> str:
    """Loss curves of every run, and the logged steps as a table."""
    parts = []
    for run, steps in training_runs(rows).items():
        backend = f", backend {steps[-1].backend}" if steps[-1].backend else ""
        seen = f"{steps[-1].tokens_seen:,} tokens in {steps[-1].elapsed_s:.0f} s{backend}"
        charts = [
            _over_steps(steps, {"training loss": "loss", "held-out loss": "eval_loss"}, "Loss, nats a token"),
            _over_steps(
                steps,
                {"busiest expert's share": "max_expert_share", "normalised entropy of the load": "normalised_entropy"},
                "Balance of the load",
            ),
            _over_steps(steps, {"tokens a second": "tokens_per_s"}, "Tokens a second"),
        ]
        logged = table(
            [
                *("#Step", "#Loss", "#Held-out loss", "#Bits/byte", "#Tokens/s", "#MFU", "#Busiest share", "#Entropy"),
                *("#Dead experts", "#Seconds"),
            ],
            [
                row(
                    [
                        number(one.step, str(one.step)),
                        number(one.loss, f"{one.loss:.4f}"),
                        number(one.eval_loss, None if one.eval_loss is None else f"{one.eval_loss:.4f}"),
                        number(one.eval_bits_per_byte),
                        number(one.tokens_per_s),
                        number(one.mfu, None if one.mfu is None else f"{one.mfu:.1%}"),
                        number(one.max_expert_share),
                        number(one.normalised_entropy),
                        number(*_dead(one), tip="experts without any route, in all layers"),
                        number(one.elapsed_s, f"{one.elapsed_s:.1f}"),
                    ]
                )
                for one in steps
            ],
        )
        parts.append(
            f'<h3>Run {escape(run)}</h3><p class="note">{escape(seen)}</p><div class="charts">{"".join(charts)}</div>'
            f"<details><summary>{len(steps)} logged steps</summary>{logged}</details>"
        )
    return "".join(parts)


def _dead(one: TrainingRow) -> tuple[int | None, str | None]:
    dead = None if one.dead_experts is None else sum(one.dead_experts)
    return dead, None if dead is None else str(dead)


def _over_steps(steps: Sequence[TrainingRow], wanted: Mapping[str, str], caption: str) -> str:
    """A figure of one or two fields over steps, with its own legend."""
    lines, keys = [], []
    for index, (name, field) in enumerate(wanted.items()):
        found = [(float(one.step), getattr(one, field)) for one in steps if getattr(one, field) is not None]
        if found:
            few = len(found) <= 15
            tips = [f"{name} {value:.4g}\nstep {step:.0f}" for step, value in found]
            lines.append(Line(f"t{index}", index, found, tips, marked=few))
            keys.append(f"{name}: {found[0][1]:.4g} to {found[-1][1]:.4g}")
    if not lines:
        return f'<figure class="empty"><figcaption>{escape(caption)}</figcaption>not measured</figure>'
    samples = "".join(
        f'<li><svg viewBox="0 0 32 14" class="{line.classes}" aria-hidden="true">'
        f'<path class="line {line.classes}" d="M0,7L32,7"/></svg>{escape(key)}</li>'
        for line, key in zip(lines, keys, strict=True)
    )
    chart = line_chart(lines, "step", log=False, title=caption)
    return f'<figure><figcaption>{escape(caption)}</figcaption><ul class="legend">{samples}</ul>{chart}</figure>'


def experts(rows: Sequence[Row]) -> str:
    """Heat maps of every source over layers, and over windows for its most uneven layer, with the extremes named."""
    parts = []
    for load in expert_loads(rows):
        found = notable(load)
        head = f"<h3>{escape(load.source)}</h3>"
        windows = "one window" if len(load.windows) == 1 else f"{len(load.windows)} windows"
        what = f"{len(load.layers)} layers of {load.num_experts} experts, {windows}, {load.device}"
        if not found:
            parts.append(f'{head}<p class="note">{escape(what)}: no route was recorded.</p>')
            continue
        lines = [(str(layer), load.relative(layer)) for layer in load.layers]
        note = f"{what}. Colour: an expert's share of its layer's routes over an even share."
        tip = "layer {row}, expert {column}: {load}"
        parts.append(
            f'{head}<p class="note">{escape(note)} <span class="hotkey">orange above</span>, '
            '<span class="coldkey">violet below</span>, full at 4x and 1/4x; solid: no route.</p>'
            f"<ul><li>{_named(found.hot, f'hot (above {HOT:g}x)')}</li>"
            f"<li>{_named(found.cold, f'cold (below {COLD:g}x)')}</li>"
            f"<li>{_named(found.unused, 'dead (no route at all)')}</li></ul>"
            f'<figure class="heat"><figcaption>Layers and experts</figcaption>'
            f"{heat_map(lines, x_label='expert', tip=tip, title='load by layer and expert')}</figure>"
        )
        if len(load.windows) > 1:
            parts.append(_windows(load, found.busiest.layer))
    return "".join(parts)


def _windows(load: Load, layer: int) -> str:
    kept = load.windows[-_HEAT_ROWS:]
    lines = [(str(window), relative_load(load.counts[layer].get(window, []))) for window in kept]
    tip = "window {row}, expert {column}: {load}"
    cut = f" (the last {len(kept)} of {len(load.windows)})" if len(kept) < len(load.windows) else ""
    chart = heat_map(lines, x_label="expert", tip=tip, title=f"load of layer {layer} by window and expert")
    caption = f"Layer {layer}, the one with the busiest expert, by window{cut}"
    return f'<figure class="heat"><figcaption>{caption}</figcaption>{chart}</figure>'


def _named(found: Sequence[ExpertAt], what: str) -> str:
    if not found:
        return f"No expert is {escape(what)}."
    names = [f"layer {at.layer} expert {at.expert}{f' ({times(at.load)})' if at.load else ''}" for at in found[:_NAMED]]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"<b>{len(found)} {escape(what)}</b>: {', '.join(names)}{more}."


def missing(rows: Sequence[Row], benchmarks: Table) -> str:
    """What has no number, and why: providers by reason, then whole kinds of row."""
    lines = [
        row([Cell(gap.provider), Cell(gap.status), Cell(gap.reason, look="wide"), Cell(gap.where, look="wide")])
        for gap in [*gaps(benchmarks), *gaps(tabulate_ablation(rows))]
    ]
    benchmark = select(rows, BenchmarkRow)
    said = []
    if not benchmark:
        said.append("Speed: these results hold no benchmark rows.")
    elif all(one.energy_j_per_token is None for one in benchmark):
        said.append(f"Energy per token. {energy_reason(split_runs(rows))}")
    if benchmark and not any(measured(one) for one in benchmark if one.launch == "graph"):
        said.append("CUDA graphs: no row was measured with this launch.")
    if benchmark and not select(rows, Ceiling):
        said.append("Share of the ceilings: no ceiling was recorded.")
    if benchmark and not any(one.peak_memory_bytes for one in benchmark):
        said.append("Peak memory: no row carries it; it is recorded on a GPU.")
    if not select(rows, SliceSeries):
        said.append("Slices over time: these results hold no slice_series rows.")
    if not training_runs(rows):
        said.append("Training: these results hold no training rows.")
    if not expert_loads(rows):
        said.append("Expert load: these results hold no expert_load rows.")
    reasons = table(["Provider", "Status", "Reason", "Where"], lines) if lines else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in said)
    return reasons + (f"<ul>{items}</ul>" if items else "")


def machine(rows: Sequence[Row]) -> str:
    """All that was recorded about each machine, and its measured ceilings."""
    parts = []
    for run in split_runs(rows):
        if run.machine:
            pairs = [(one.name.replace("_", " "), getattr(run.machine, one.name)) for one in fields(Machine)]
            lines = [row([Cell(name), Cell(_said(value), look="wide")]) for name, value in pairs]
            parts.append(f"<h3>{escape(run.device)}</h3>{table(['What', 'Value'], lines, classes='')}")
        ceilings = [
            row(
                [
                    Cell(one.name),
                    Cell(one.dtype),
                    number(one.value, with_unit(one.value, one.unit)),
                    Cell(one.how, look="wide"),
                ]
            )
            for one in select(run.rows, Ceiling)
        ]
        if ceilings:
            parts.append("<h3>Measured ceilings</h3>" + table(["Ceiling", "Type", "#Rate", "How"], ceilings))
    return "".join(parts)


def _said(value: object) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def figures(pictures: Iterable[tuple[str, bytes]]) -> str:
    """PNG pictures inside the page, folded."""
    parts = []
    for name, content in pictures:
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        parts.append(f'<details><summary>{escape(name)}</summary><img alt="{escape(name)}" src="{source}"></details>')
    return "".join(parts)


def _why(reason: str) -> Cell:
    """A reason beside numbers: a long one in full on hover, and in the list of what was not measured."""
    text = shorten(reason, 160)
    return Cell(text, reason if text != reason else None, look="wide")


def _place(facet: Facet) -> list[Cell]:
    """The cells that say where: model with its sizes on hover, pass, routing and data type."""
    model = f"{facet.model} ({facet.part})" if facet.part else facet.model
    return [Cell(model, f"{facet.shape}\n{facet.device}"), Cell(facet.mode), Cell(facet.routing), Cell(facet.dtype)]


def _time(one: BenchmarkRow | None) -> Cell:
    return number(None) if one is None else number(one.p50_ms, tip=_detail(one))


def _spread(one: BenchmarkRow) -> Cell:
    """The 20th to the 80th percentile, sorted by their distance."""
    if one.p20_ms is None or one.p80_ms is None:
        return number(None)
    return number(one.p80_ms - one.p20_ms, f"{short(one.p20_ms)} to {short(one.p80_ms)}")


def _ratio(ratio: float | None) -> Cell:
    if ratio is None:
        return number(None)
    slower = ratio < 1
    return number(ratio, f"{times(ratio)} (slower)" if slower else times(ratio), look="slower" if slower else "faster")


def _shares(one: BenchmarkRow) -> tuple[float | None, float | None]:
    return one.flops_share, one.bandwidth_share


def _detail(one: BenchmarkRow) -> str:
    """Everything about a row's time, for hovering."""
    parts = [f"{Series(one.provider, one.launch).label}, {one.num_tokens} tokens"]
    parts += [f"backend {one.backend}"] if one.backend else []
    found = [(name, getattr(one, f"{name}_ms")) for name in ("mean", "std", "min", "max", "p20", "p50", "p80", "p95")]
    parts += [f"{name} {value:.4g} ms" for name, value in found if value is not None]
    parts += [f"{one.samples} samples"] if one.samples is not None else []
    return "\n".join(parts)
