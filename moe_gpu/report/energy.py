"""The report's section on energy: joules with intervals, what experts are modelled to take, what experiments found."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from moe_gpu.plots.data import OURS, energy_notes, relative_load, short, times
from moe_gpu.report.charts import heat_map
from moe_gpu.report.tables import Cell, number, row, table
from moe_gpu.results import AttributionRow, AttributionSum, BenchmarkRow, EnergyMeasurement, Finding, Row, select

_NAMED = 12  # experts that the table shows


def energy(rows: Sequence[Row]) -> str:
    """An empty text where nothing set out to measure energy."""
    parts = [_by_provider(rows), _findings(rows), _experts(rows), _unmeasured(rows)]
    return "".join(part for part in parts if part)


def _by_provider(rows: Sequence[Row]) -> str:
    lines = []
    for one in select(rows, BenchmarkRow):
        if one.energy_quality is None:
            continue
        joules, error = one.energy_j_per_token, one.energy_stderr_j_per_token
        interval = None
        if joules is not None and error is not None:
            interval = f"{short(1000 * (joules - 1.96 * error))} to {short(1000 * (joules + 1.96 * error))}"
        cells = [
            Cell(one.provider if one.launch == "eager" else f"{one.provider} + {one.launch}"),
            Cell(one.model),
            Cell(one.mode),
            Cell(one.routing),
            Cell(one.dtype),
            number(one.num_tokens, f"{one.num_tokens:,}"),
            number(None if joules is None else 1000 * joules),
            number(error, interval),
            number(one.power_w),
            number(one.gpu_util_pct),
            Cell(one.energy_quality),
        ]
        lines.append(row(cells, "ours" if one.provider == OURS else ""))
    if not lines:
        return ""
    head = ["Energy of", "Model", "Pass", "Routing", "Type", "#Tokens", "#J per 1000 tokens", "#95 % interval"]
    notes = " ".join(energy_notes(rows))
    return f'<p class="note">{escape(notes)}</p>' + table([*head, "#W", "#Busy %", "Quality"], lines)


def _interval(one: Finding) -> Cell:
    if one.low is None or one.high is None:
        return number(None)
    return number(one.low, f"{short(one.low)} to {short(one.high)}")


def _findings(rows: Sequence[Row]) -> str:
    lines = [
        row(
            [
                Cell(one.name, look="wide"),
                number(one.value),
                Cell(one.unit),
                _interval(one),
                Cell(one.verdict or ""),
                Cell(one.reason or one.how or "", look="wide"),
            ]
        )
        for one in select(rows, Finding)
    ]
    if not lines:
        return ""
    return "<h3>Findings</h3>" + table(
        ["What", "#Value", "Unit", "#95 % interval", "Verdict", "How, or why not"], lines
    )


def _experts(rows: Sequence[Row]) -> str:
    """Of every attributed window: how it closes, joules by expert against an even share, and the costliest experts."""
    by_window: dict[tuple[str, str | None, int], list[AttributionRow]] = {}
    for one in select(rows, AttributionRow):
        by_window.setdefault((one.run_id, one.window, one.layer), []).append(one)
    return "".join(
        _window(total, by_window.get((total.run_id, total.window, total.layer), []))
        for total in select(rows, AttributionSum)
    )


def _window(total: AttributionSum, experts: Sequence[AttributionRow]) -> str:
    closure = "not measured" if total.closure is None else f"{total.closure:.1%}"
    held_out = "not known" if total.held_out_error is None else f"{total.held_out_error:.1%}"
    measured = "not measured" if total.measured_j is None else f"{short(total.measured_j)} J"
    note = (
        f"Modelled, since no meter sees one expert: experts {short(total.dynamic_j)} J, router and combine "
        f"{short(total.shared_j)} J, static {short(total.static_j)} J; measured {measured}; closure {closure}; the "
        f"calibration's held-out error {held_out} (calibration {total.calibration_id})."
    )
    loads = relative_load([one.dynamic_j for one in experts])
    tip = "layer {row}, expert {column}: {load} of an even share of the joules"
    chart = heat_map([(str(total.layer), loads)], x_label="expert", tip=tip, title="modelled joules by expert")
    costly = sorted(experts, key=lambda one: -one.dynamic_j)[:_NAMED]
    lines = [
        row(
            [
                number(one.expert, str(one.expert)),
                number(one.tokens),
                number(one.padded_tokens),
                number(one.dynamic_j),
                number(one.stderr_j),
                number(one.static_j),
                number(None if one.joules_per_token is None else 1000 * one.joules_per_token),
            ]
        )
        for one in costly
    ]
    head = ["#Expert", "#Tokens", "#Padded", "#Dynamic J", "#+- stderr", "#Static J", "#J per 1000 tokens"]
    over = "" if not loads else f" The costliest takes {times(max(loads))} an even share."
    where = f"layer {total.layer}" if total.window is None else f"{total.window}, layer {total.layer}"
    return (
        f'<h3>Joules by expert: {escape(where)}</h3><p class="note">{escape(note + over)}</p>'
        f'<figure class="heat"><figcaption>Joules by expert</figcaption>{chart}</figure>'
        f"<details><summary>The {len(costly)} costliest experts</summary>{table(head, lines)}</details>"
    )


def _unmeasured(rows: Sequence[Row]) -> str:
    windows = [one for one in select(rows, EnergyMeasurement) if one.energy_j is None]
    reasons = dict.fromkeys(one.reason or "no reason recorded" for one in windows)
    counts = {reason: sum((one.reason or "no reason recorded") == reason for one in windows) for reason in reasons}
    items = "".join(f"<li>{count} windows: {escape(reason)}</li>" for reason, count in counts.items())
    return f"<h3>Windows without energy</h3><ul>{items}</ul>" if items else ""
