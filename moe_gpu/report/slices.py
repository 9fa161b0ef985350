"""The report's section on slices over time: what each policy gave each tenant over a load that shifts, and times."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moe_gpu.plots.data import Run, split_runs
from moe_gpu.report.charts import Line, band_chart, line_chart
from moe_gpu.report.tables import Cell, number, row, table
from moe_gpu.results import Row, SliceSeries, percentile, select

TENANT_COLOURS = ("#0072B2", "#009E73", "#C98A00", "#B8629A", "#5B3A8C", "#7A5230", "#3FA7DC", "#9A9A00")
OURS = "adaptive"


def slices(rows: Sequence[Row]) -> str:
    """Of every recorded load: SMs of each tenant over steps by policy, times, and a table; empty without such rows."""
    parts = []
    for run in split_runs(rows):
        found = select(run.rows, SliceSeries)
        for scenario in dict.fromkeys(one.scenario for one in found):
            parts.append(_scenario(run, scenario, [one for one in found if one.scenario == scenario]))
    return "".join(parts)


def _scenario(run: Run, scenario: str, found: Sequence[SliceSeries]) -> str:
    head = f"<h3>{escape(scenario)}, {escape(run.device)}</h3>"
    measured = [one for one in found if one.status == "ok" and one.time_ms]
    if not measured:
        reason = next((one.reason for one in found if one.reason), "no step was recorded")
        return f'{head}<figure class="empty">not measured: {escape(reason)}</figure>'
    tenants = measured[0].tenants
    num_sms = (run.machine.num_sms if run.machine else None) or _most_sms(measured)
    note = (
        f"SMs that each tenant got, of {num_sms}, step by step; grey: not sliced, everybody may use all. A triangle: "
        "the plan changed, the reason on hover. A step's time runs from its first launch until its last slice is done."
    )
    names = [*((f"band b{_place(index)}", name) for index, name in enumerate(tenants)), ("whole", "not sliced")]
    charts = [_bands(one, num_sms) for one in measured]
    return (
        f'{head}<p class="note">{escape(note)}</p><ul class="legend">{_boxes(names)}</ul>'
        f'<div class="charts">{"".join(charts)}{_loads(measured[0])}{_times(measured)}</div>{_totals(found, measured)}'
    )


def _most_sms(measured: Sequence[SliceSeries]) -> int:
    return max((sum(sms) for one in measured for sms in one.sms if sms), default=1)


def _place(index: int) -> int:
    return index % len(TENANT_COLOURS)


def _boxes(names: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f'<li><svg viewBox="0 0 32 14" aria-hidden="true"><path class="{look}" d="M0,1h32v12h-32z"/></svg>'
        f"{escape(name)}</li>"
        for look, name in names
    )


def _bands(one: SliceSeries, num_sms: int) -> str:
    changes = [(step, f"step {step}: {why}") for step, why in enumerate(one.changes) if why is not None]
    chart = band_chart(
        one.sms,
        num_sms,
        [f"b{_place(index)}" for index in range(len(one.tenants))],
        one.tenants,
        changes,
        title=f"{one.policy}: SMs of each tenant over steps",
    )
    count = f"{len(changes)} plan changes" if len(changes) != 1 else "1 plan change"
    return f"<figure><figcaption>{escape(one.policy)}<small>{count}</small></figcaption>{chart}</figure>"


def _loads(one: SliceSeries) -> str:
    lines = []
    for index, name in enumerate(one.tenants):
        found = [(float(step), float(rows[index])) for step, rows in enumerate(one.rows)]
        tips = [f"{name}: {rows:.0f} rows\nstep {step:.0f}" for step, rows in found]
        lines.append(Line(f"b{_place(index)}", index, found, tips, marked=False))
    chart = line_chart(lines, "step", log=False, title="rows a call of each tenant over steps")
    return f"<figure><figcaption>Load<small>rows a call of each tenant</small></figcaption>{chart}</figure>"


def _look(index: int, one: SliceSeries) -> str:
    return "t1 ours" if one.policy == OURS else f"b{_place(index)}"


def _times(measured: Sequence[SliceSeries]) -> str:
    lines, keys = [], []
    for index, one in enumerate(measured):
        found = [(float(step), time_ms) for step, time_ms in enumerate(one.time_ms)]
        tips = [f"{one.policy}: {time_ms:.4g} ms\nstep {step:.0f}" for step, time_ms in found]
        lines.append(Line(_look(index, one), index, found, tips, marked=False))
        look = _look(index, one)
        keys.append(
            f'<li><svg viewBox="0 0 32 14" aria-hidden="true"><path class="line {look}" d="M0,7L32,7"/></svg>'
            f"{escape(one.policy)}</li>"
        )
    lines.sort(key=lambda line: "ours" in line.classes)  # ours last, on top
    chart = line_chart(lines, "step", log=False, title="milliseconds of each step by policy")
    caption = "<figcaption>Time<small>ms of each step</small></figcaption>"
    return f'<figure>{caption}<ul class="legend">{"".join(keys)}</ul>{chart}</figure>'


def _totals(found: Sequence[SliceSeries], measured: Sequence[SliceSeries]) -> str:
    lines = []
    for one in found:
        if one not in measured:
            nothing = [number(None)] * 6
            lines.append(
                row([Cell(one.policy), *nothing, Cell(one.reason or "no reason recorded", look="wide")], "gap")
            )
            continue
        total = sum(one.time_ms)
        others = [sum(other.time_ms) for other in measured if other is not one]
        ratio = total / min(others) if others else None
        changes = sum(why is not None for why in one.changes)
        cells = [
            number(len(one.time_ms), str(len(one.time_ms))),
            number(total),
            number(percentile(one.time_ms, 0.5)),
            number(percentile(one.time_ms, 0.99)),
            number(changes, str(changes)),
            number(ratio, None if ratio is None else f"{ratio:.3f}"),
        ]
        lines.append(row([Cell(one.policy), *cells, Cell("")], "ours" if one.policy == OURS else ""))
    head = ["Policy", "#Steps", "#Total ms", "#p50 of steps, ms", "#p99 of steps, ms", "#Plan changes"]
    return table([*head, "#Over the best other", "Not measured because"], lines)
