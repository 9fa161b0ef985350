"""How figures look in a terminal: rich renderables that the dashboard and `moe-gpu top --once` share.

A figure that is not known reads "not measured". Text that a job wrote is shown as text: no markup, no control codes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moe_gpu.console import SHADES, shade
from moe_gpu.live.figures import figures_of, job_tokens_per_s, tokens_of, tokens_per_s
from moe_gpu.live.status import GpuReading, JobStatus, LayerLoad

if TYPE_CHECKING:
    from moe_gpu.top import View

STATE_STYLES = {"running": "bold green", "silent": "bold yellow", "ended": "bold red"}
_SPARKS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"


def unknown() -> Text:
    """What stands where a figure is not known; new each time, since a Text is written on."""
    return Text("not measured", style="dim")


def plain(text: str, limit: int = 200) -> Text:
    """What a job wrote, without anything that a terminal would obey."""
    return Text("".join(char if char.isprintable() else "?" for char in text[:limit]))


def bar(share: float, width: int, style: str = "#3fb8c8") -> Text:
    """A bar of `width` cells, filled by a share from 0 to 1."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    filled = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return Text().append(filled, style=style).append("╌" * (width - len(filled)), style="bright_black")


def spark(values: Sequence[float | None], width: int) -> Text:
    """The newest `width` values as a line of columns from 0 to the highest; a gap where one is not known."""
    shown = list(values)[-width:]
    top = max((value for value in shown if value is not None), default=0.0)
    marks = ["·" if value is None else _SPARKS[min(7, int(8 * value / top))] if top else _SPARKS[0] for value in shown]
    return Text("".join(marks), style="#3fb8c8")


def number(value: float | None, unit: str = "", form: str = ",.0f") -> Text:
    return unknown() if value is None else Text(f"{value:{form}} {unit}".rstrip())


def gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.1f}"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _grid() -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(style="bright_black", no_wrap=True)
    grid.add_column(ratio=1)
    return grid


def head(view: View) -> Text:
    """One line: which job, its state, since when, and how many others there are."""
    job = view.job
    line = Text(no_wrap=True, overflow="ellipsis").append(" moe-gpu top ", style="bold reverse").append("  ")
    if job is None:
        return line.append("no job publishes here", style="bold yellow")
    state = job.state
    line.append_text(plain(job.name)).append(f"  pid {job.pid}  ", style="bright_black")
    line.append(state, style=STATE_STYLES[state])
    if state == "silent":
        line.append(f" for {time.time() - job.written_at:.0f} s", style="yellow")
    until = job.written_at if state == "ended" else time.time()
    line.append(f"  watched {clock(until - job.started_at)}")
    if job.rank is not None:
        line.append(f"  rank {job.rank}")
    if len(view.jobs) > 1:
        line.append(f"  1 of {len(view.jobs)} jobs", style="bright_black")
    return line


def gpu_table(gpu: GpuReading | None, reason: str | None, width: int = 12) -> RenderableType:
    """Name, power, clocks, utilisation, temperature and memory."""
    grid = _grid()
    if gpu is None:
        grid.add_row("GPU", unknown())
        grid.add_row("why", plain(reason or "no job has read one"))
        return grid
    name = plain(gpu.name)
    grid.add_row("GPU", name if gpu.scope == "gpu" else name.append(" (whole GPU of a MIG instance)", style="dim"))
    grid.add_row("power", number(gpu.power_w, "W"))
    clocks = number(gpu.sm_clock_mhz, "MHz").append("  memory ").append_text(number(gpu.mem_clock_mhz, "MHz"))
    grid.add_row("SM clock", clocks.append("  slowed", style="bold red") if gpu.slowed else clocks)
    for label, share in (("busy", gpu.gpu_util_pct), ("memory bus", gpu.mem_util_pct)):
        cells = unknown() if share is None else bar(share / 100, width).append(f" {share} %")
        grid.add_row(label, cells)
    grid.add_row("temperature", number(gpu.temperature_c, "C"))
    used, total = gpu.memory_used_bytes, gpu.memory_total_bytes
    if used is None or not total:
        grid.add_row("memory", unknown())
    else:
        grid.add_row("memory", bar(used / total, width).append(f" {gib(used)} of {gib(total)} GiB"))
    if gpu.error:
        grid.add_row("error", plain(gpu.error).append("", style="red"))
    return grid


def job_table(job: JobStatus | None, rates: Sequence[float | None] = (), width: int = 24) -> RenderableType:
    """Tokens a second, progress and loss, and what publishing costs."""
    grid = _grid()
    if job is None:
        grid.add_row("job", Text("call moe_gpu.publish(model), or `moe-gpu train --publish`"))
        return grid
    grid.add_row("tokens/s", number(job_tokens_per_s(job)))
    if rates:
        grid.add_row("", spark(rates, width))
    grid.add_row("tokens", number(tokens_of(job.layers)))
    progress = job.progress
    if progress is not None and progress.step is not None:
        text = Text(f"{progress.step:,}")
        if progress.steps:
            text = bar(progress.step / progress.steps, width // 3).append(f" {progress.step:,} of {progress.steps:,}")
        grid.add_row("step", text)
    if progress is not None and progress.loss is not None:
        grid.add_row("loss", number(progress.loss, form=".4f"))
    backends = sorted({layer.backend for layer in job.layers if layer.backend})
    if backends:
        grid.add_row("backend", plain(", ".join(backends)))
    if job.memory is not None:
        grid.add_row("its memory", Text(f"{gib(job.memory.allocated_bytes)} GiB, peak {gib(job.memory.peak_bytes)}"))
    if job.cost is not None and job.cost.seconds > 0:
        grid.add_row("publishing", Text(f"{100 * job.cost.cpu_s / job.cost.seconds:.2f} % of one core"))
    ages = [layer.age_s for layer in job.layers if layer.age_s is not None]
    if ages and max(ages) > max(5.0, 3 * job.interval_s):
        grid.add_row("counts", Text(f"{max(ages):.0f} s old: call profiler.poll()", style="yellow"))
    return grid


def hits_table(job: JobStatus | None, width: int = 12) -> RenderableType:
    """Energy since publishing began, and how often graphs and the expert cache served."""
    grid = _grid()
    energy = None if job is None else job.energy
    if energy is None:
        grid.add_row("energy", unknown())
        if job is not None and job.energy_reason:
            grid.add_row("why", plain(job.energy_reason))
    else:
        grid.add_row("energy", Text(f"{energy.energy_j:,.0f} J in {clock(energy.seconds)}"))
        grid.add_row("mean power", number(energy.energy_j / energy.seconds if energy.seconds else None, "W"))
        grid.add_row("J/1000 tokens", number(energy.j_per_1000_tokens, form=".4g"))
        grid.add_row("", Text("of the whole GPU", style="dim"))
    graphs = None if job is None else job.graphs
    grid.add_row("graph hits", _hits((graphs.replays, graphs.eager_calls) if graphs else None, width))
    cache = None if job is None else job.expert_cache
    grid.add_row("cache hits", _hits((cache.hits, cache.misses) if cache else None, width))
    if cache is not None:
        grid.add_row("", Text(f"{gib(cache.used_bytes)} GiB held, {gib(cache.bytes_copied)} copied", style="dim"))
    return grid


def _hits(hits_and_misses: tuple[int, int] | None, width: int) -> Text:
    if hits_and_misses is None or not sum(hits_and_misses):
        return unknown()
    hits, total = hits_and_misses[0], sum(hits_and_misses)
    return bar(hits / total, width, "#57ab5a").append(f" {100 * hits / total:.1f} % of {total:,}")


def heatmap(layers: Sequence[LayerLoad], width: int, selected: int | None = None) -> Text:
    """A line a layer, a cell an expert (or the busiest of neighbours): load over an even share."""
    text = Text()
    for index, layer in enumerate(layers):
        text.append(f"{index:>3} ", style="bold reverse" if index == selected else "bright_black")
        figures = figures_of(layer)
        if figures is None:
            text.append_text(unknown())
            text.append(f": {layer.reason or 'no route in the window'}", style="dim")
        else:
            loads, room = figures.load_E, max(1, width - 4)
            together = -(-len(loads) // room)
            cell = min(4, room // -(-len(loads) // together))
            for begin in range(0, len(loads), together):
                mark, style = shade(max(loads[begin : begin + together]))
                text.append(mark * cell, style=style)
        text.append("\n" if index + 1 < len(layers) else "")
    return text


def legend() -> Text:
    text = Text("load over an even one: ", style="bright_black")
    for (limit, mark, style), said in zip(SHADES, ("none", *("to {:g}x",) * (len(SHADES) - 2), "above"), strict=True):
        text.append(mark, style=style).append(f" {said.format(limit)} ", style="bright_black")
    return text


def expert_bars(layer: LayerLoad, width: int, limit: int | None = None) -> Text:
    """A bar for each expert of a layer in order, or for the `limit` busiest; bars are relative to the busiest."""
    figures = figures_of(layer)
    if figures is None:
        return unknown().append(f": {layer.reason or 'no route in the window'}", style="dim")
    order = list(range(len(figures.load_E)))
    if limit is not None and limit < len(order):
        order = sorted(order, key=lambda expert: -figures.load_E[expert])[:limit]
    text = Text(no_wrap=True)
    for expert in order:
        load = figures.load_E[expert]
        text.append(f"{expert:>4} ", style="bright_black")
        text.append_text(bar(load / figures.max_over_mean, max(4, width - 14), shade(load)[1]))
        text.append(f" {load:5.2f}x\n")
    text.rstrip()
    return text


def layer_table(layers: Sequence[LayerLoad], width: int, selected: int | None = None) -> Table:
    """A row a layer: speed, and how even its load is; hot and cold experts by name where there is room."""
    named, barred = width >= 100, width >= 76
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=True)
    for name, least in (("", 3), ("tokens/s", 8), ("active", 9), ("max/mean", 8), ("entropy", 7)):
        table.add_column(name, justify="right", no_wrap=True, min_width=least)
    if barred:
        table.add_column("uneven", no_wrap=True, min_width=8)
    for name in ("hot", "cold"):
        table.add_column(name, justify="left" if named else "right", no_wrap=True, min_width=4)
    table.add_column("layer", no_wrap=True, overflow="ellipsis", min_width=6)
    for index, layer in enumerate(layers):
        figures, rate = figures_of(layer), tokens_per_s(layer)
        cells: list[Text] = [Text(f"{'▸' if index == selected else ' '}{index}"), number(rate)]
        if figures is None:
            cells += [Text("-"), Text("-"), Text("-"), *[unknown()] * barred, Text("-"), Text("-")]
        else:
            active = f"{figures.active_experts} of {len(figures.load_E)}"
            cells += [Text(active), number(figures.max_over_mean, form=".2f")]
            cells.append(Text("-") if figures.normalised_entropy is None else Text(f"{figures.normalised_entropy:.3f}"))
            cells += [bar((figures.max_over_mean - 1) / 3, 8, shade(figures.max_over_mean)[1])] * barred
            cells += [_names(experts) if named else Text(str(len(experts))) for experts in (figures.hot, figures.cold)]
        table.add_row(*cells, plain(layer.name), style="bold" if index == selected else None)
    return table


def _names(experts: Sequence[int]) -> Text:
    more = f" +{len(experts) - 4}" if len(experts) > 4 else ""
    return Text(", ".join(map(str, experts[:4])) + more) if experts else Text("none", style="dim")


def slice_table(job: JobStatus | None) -> RenderableType:
    """Slices with the SMs that were asked for and that the device gave."""
    if job is None or job.slices is None:
        return Text("no slices are published: pass slices=manager", style="dim")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("slice of", "by"):
        table.add_column(name, no_wrap=True)
    for name in ("asked", "got"):
        table.add_column(name, justify="right", no_wrap=True, min_width=5)
    table.add_column("SMs", no_wrap=True, overflow="ellipsis")
    most = max((item.got_sms or item.asked_sms for item in job.slices), default=1) or 1
    for item in job.slices:
        got = Text("planned", style="dim") if item.got_sms is None else Text(str(item.got_sms))
        sms = bar((item.got_sms or 0) / most, 4).append(" enforced" if item.enforced else " budget")
        table.add_row(plain(item.holder), plain(item.backend), str(item.asked_sms), got, sms)
    return table


def uneven_layer(layers: Sequence[LayerLoad]) -> int:
    """The layer whose busiest expert stands out most; 0 where none is known."""
    found = [figures_of(layer) for layer in layers]
    return max(range(len(found)), key=lambda index: ((one := found[index]) and one.max_over_mean) or 0.0, default=0)


def render(view: View, width: int) -> RenderableType:
    """Everything at once, for `--once`."""
    job = view.job
    panels = Table.grid(expand=True)
    for _ in range(3):
        panels.add_column(ratio=1)
    gpu_reason = view.gpu_reason
    panels.add_row(
        Panel(gpu_table(view.gpu, gpu_reason), title="GPU"),
        Panel(job_table(job), title="Job"),
        Panel(hits_table(job), title="Energy and hits"),
    )
    parts: list[RenderableType] = [head(view), panels]
    if job is not None:
        shown = uneven_layer(job.layers)
        parts += [
            layer_table(job.layers, width),
            Panel(Group(heatmap(job.layers, width - 4), legend()), title="Experts"),
        ]
        if job.layers:
            title = Text.assemble(f"Layer {shown}, ", plain(job.layers[shown].name), ", busiest experts")
            parts.append(Panel(expert_bars(job.layers[shown], width - 4, 8), title=title))
        parts.append(slice_table(job))
    parts += [plain(remark, 300) for remark in view.remarks]
    return Group(*parts)
