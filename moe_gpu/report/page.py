"""The report's page: style, script, header, headline numbers, and the sections in order.

Every text that comes from a row passes through `escape`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from moe_gpu.plots.canvas import colour
from moe_gpu.plots.data import (
    BASELINE,
    HOT,
    OURS,
    Comparison,
    Table,
    compare,
    device_label,
    expert_loads,
    geometric_mean,
    notable,
    tabulate,
    times,
    training_runs,
)
from moe_gpu.report import recorded, sections
from moe_gpu.report.energy import energy
from moe_gpu.report.slices import TENANT_COLOURS, slices
from moe_gpu.results import Machine, Row, select

_NOTHING = "<p>These results hold no benchmark, training or expert load to sum up; what they hold stands below.</p>"


def build_page(rows: Sequence[Row], title: str, pictures: Sequence[tuple[str, bytes]] = ()) -> str:
    """The whole page as HTML text; `pictures` are names and PNG contents."""
    table = tabulate(rows)
    comparisons = compare(table)
    classes = _classes(table)
    parts = [
        ("summary", "Summary", _summary(rows, table, comparisons)),
        ("points", f"{OURS} at every point", sections.points(comparisons)),
        ("charts", "Throughput", sections.throughput(table, classes)),
        ("memory", "Peak memory", sections.memory(table, classes)),
        ("results", "All results", sections.results(table)),
        ("parts", "What each part brings", recorded.parts(rows)),
        ("energy", "Energy", energy(rows)),
        ("slices", "Slices over time", slices(rows)),
        ("measured-slices", "Slices, streams and graphs", recorded.slice_tables(rows)),
        ("cache", "Expert cache", recorded.expert_cache(rows)),
        ("tiles", "Kernel tiles", recorded.tiles(rows)),
        ("training", "Training", sections.training(rows)),
        ("experts", "Experts", sections.experts(rows)),
        ("missing", "Not measured", sections.missing(rows, table)),
        ("machine", "Machine", sections.machine(rows)),
        ("figures", "Figures", sections.figures(pictures)),
    ]
    parts = [part for part in parts if part[2]]
    body = "".join(f'<section id="{name}"><h2>{escape(head)}</h2>{html}</section>' for name, head, html in parts)
    links = "".join(f'<a href="#{name}">{escape(head)}</a>' for name, head, _ in parts)
    style, script = _asset("report.css") + _colours(classes), _asset("report.js")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(title)}{_badge(rows)}</h1>{_provenance(rows)}</header><nav>{links}</nav>"
        '<noscript><p class="note">Sorting, filtering and hover need JavaScript; every number stands in the tables.'
        f"</p></noscript><main>{body}</main><script>{script}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("moe_gpu.report").joinpath(name).read_text(encoding="utf-8")


def _classes(table: Table) -> dict[str, str]:
    """A class name for each provider, moe_gpu first."""
    found = dict.fromkeys(series.provider for lines in table.values() for series in lines)
    providers = sorted(found, key=lambda provider: provider != OURS)
    return {provider: f"s{index}" for index, provider in enumerate(providers)}


def _colours(classes: dict[str, str]) -> str:
    """A colour for each provider, lighter on a dark ground; two for the training curves, and tenants'."""
    shades = {name: colour(provider) for provider, name in classes.items()}
    shades |= {"t0": "#0072B2", "t1": "#D1380F"}
    shades |= {f"b{index}": shade for index, shade in enumerate(TENANT_COLOURS)}

    def lighter(shade: str) -> str:
        parts = [int(shade[start : start + 2], 16) for start in (1, 3, 5)]
        return "#" + "".join(f"{round(part + (255 - part) * 0.35):02x}" for part in parts)

    light = "".join(f".{name}{{--c:{shade}}}" for name, shade in shades.items())
    dark = "".join(f".{name}{{--c:{lighter(shade)}}}" for name, shade in shades.items())
    return f"{light}@media screen and (prefers-color-scheme: dark){{{dark}}}"


def _badge(rows: Sequence[Row]) -> str:
    cpu = any(machine.device_type == "cpu" for machine in select(rows, Machine))
    return '<span class="badge">CPU</span>' if cpu else ""


def _provenance(rows: Sequence[Row]) -> str:
    lines = []
    for machine in select(rows, Machine):
        changes = {True: " with local changes", False: "", None: " (local changes not recorded)"}[machine.commit_dirty]
        commit = f"commit {machine.commit[:12]}{changes}" if machine.commit else "commit not recorded"
        versions = [f"Python {machine.python}", f"torch {machine.torch}"]
        versions += [f"Triton {machine.triton}"] if machine.triton else []
        versions += [f"driver {machine.driver}"] if machine.driver else []
        when = machine.recorded_at[:16].replace("T", " ")
        lines.append(" · ".join([device_label(machine), when, *versions, commit]))
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in lines or ["Machine not recorded"])


def _summary(rows: Sequence[Row], table: Table, comparisons: Sequence[Comparison]) -> str:
    """Headline numbers, each computed here from the rows."""
    cards = []
    for device, mode, part in dict.fromkeys((facet.device, facet.mode, facet.part) for facet in table):
        here = [
            item
            for item in comparisons
            if (item.facet.device, item.facet.mode, item.facet.part) == (device, mode, part)
        ]
        several = len({facet.device for facet in table}) > 1
        where = ", ".join(filter(None, (mode, part, device if several else "")))
        over_baseline = [ratio for ratio in (item.over_baseline for item in here) if ratio is not None]
        over_rival = [ratio for ratio in (item.over_rival for item in here) if ratio is not None]
        cards.append(_ratio_card(f"{where}: speed over {BASELINE}", over_baseline))
        cards.append(_ratio_card(f"{where}: speed over the fastest other provider at each point", over_rival))
    for run, steps in training_runs(rows).items():
        held_out = [row for row in steps if row.eval_loss is not None]
        loss = f"{held_out[-1].eval_loss:.3f}" if held_out else f"{steps[-1].loss:.3f}"
        what = f"{'held-out' if held_out else 'training'} loss, nats a token"
        seen = (
            f"after {steps[-1].tokens_seen:,} tokens in {steps[-1].elapsed_s:.0f} s; first logged {steps[0].loss:.3f}"
        )
        cards.append(_card(f"Training ({run})", loss, [what, seen]))
    for load in expert_loads(rows):
        if found := notable(load):
            hot, unused = found.hot, found.unused
            lines = [f"the busiest expert's share over an even one; {len(hot)} above {HOT:g}x, {len(unused)} unused"]
            cards.append(_card(f"Experts ({load.source})", times(found.busiest[0]), lines))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else _NOTHING


def _card(what: str, big: str, lines: Iterable[str], look: str = "") -> str:
    small = "".join(f"<span>{escape(line)}</span>" for line in lines)
    return f'<div class="card"><span class="what">{escape(what)}</span><b class="{look}">{escape(big)}</b>{small}</div>'


def _ratio_card(what: str, ratios: Sequence[float]) -> str:
    if not ratios:
        return _card(what, "not measured", ["the two were never measured at the same point"], "none")
    mean, slower = geometric_mean(ratios), sum(ratio < 1 for ratio in ratios)
    spread = f"geometric mean of {len(ratios)} points, {times(min(ratios))} to {times(max(ratios))}"
    if len(ratios) == 1:
        spread = "one point"
    honest = f"{OURS} is slower at {slower} of them" if slower else f"{OURS} is slower at none"
    return _card(what, times(mean), [spread, honest], "slower" if mean < 1 else "")
