"""The dashboard of `moe-gpu top`; needs the extra `moe-gpu[live]`. It reads files and the driver, not the job."""

from __future__ import annotations

from collections import deque

from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Container, VerticalScroll
from textual.widget import Widget
from textual.widgets import Footer, Static

from moe_gpu.live.figures import job_tokens_per_s
from moe_gpu.live.status import StatusError
from moe_gpu.top import Source, View, no_job, view

HISTORY = 512  # columns of the line of tokens a second


class TopApp(App[None]):
    """One screen: GPU, job and energy above; heatmap and one layer's experts; layers and slices below."""

    CSS = """
    #head { height: 1; }
    #facts, #experts, #below { layout: horizontal; }
    #facts { height: 11; }
    #experts { height: 1fr; min-height: 10; }
    #below { height: auto; max-height: 40%; }
    #all #facts Static, #experts > VerticalScroll, #below > VerticalScroll {
        width: 1fr; height: 100%; border: round $primary; border-title-color: $accent;
        border-subtitle-color: $foreground; padding: 0 1;
    }
    #below > VerticalScroll { height: auto; max-height: 100%; }
    #all Static { width: 100%; }
    .-wide #all #map { width: 3fr; }
    .-wide #all #bars { width: 2fr; }
    .-wide #all #layers { width: 3fr; }
    .-wide #all #slices { width: 2fr; }
    .-narrow #facts, .-narrow #experts, .-narrow #below { layout: vertical; height: auto; max-height: 1000; }
    .-narrow #all #facts Static, .-narrow #all #experts > VerticalScroll, .-narrow #all #below > VerticalScroll {
        width: 100%; height: auto; max-height: 20;
    }
    """
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 as textual declares it
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = [  # noqa: RUF012
        Binding("q,ctrl+c", "quit", "Quit", key_display="q", priority=True),
        Binding("down,j", "layer(1)", "Next layer", key_display="↓"),
        Binding("up,k", "layer(-1)", "Layer before", key_display="↑"),
        Binding("u", "uneven", "Most uneven"),
        Binding("n", "job", "Next job"),
        Binding("p", "pause", "Pause"),
    ]

    def __init__(self, source: Source, interval_s: float = 1.0) -> None:
        super().__init__()
        self.source, self.interval_s = source, interval_s
        self.layer: int | None = None  # None: the most uneven one
        self.paused = False
        self._view = source.read()
        self._rates: deque[float | None] = deque(maxlen=HISTORY)
        self._seen: tuple[int, float] | None = None  # which job's which writing was drawn last

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        with VerticalScroll(id="all"):
            with Container(id="facts"):
                for name, title in (("gpu", "GPU"), ("job", "Job"), ("hits", "Energy and hits")):
                    yield _titled(Static(id=name), title)
            with Container(id="experts"):
                yield _titled(VerticalScroll(Static(id="map-text"), id="map"), "Experts by layer")
                yield _titled(VerticalScroll(Static(id="bars-text"), id="bars"), "Experts")
            with Container(id="below"):
                yield _titled(VerticalScroll(Static(id="layers-text"), id="layers"), "Layers")
                yield _titled(VerticalScroll(Static(id="slices-text"), id="slices"), "Slices")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.title = "moe-gpu top"
        self.query_one("#map").border_subtitle = view.legend().markup
        self.set_interval(self.interval_s, self.read)
        self.call_after_refresh(self.draw)

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw)

    def read(self) -> None:
        """Take in what the job has written since, and draw it."""
        if self.paused:
            return
        try:
            self._view = self.source.read()
        except StatusError as error:  # the chosen job's file is gone and there was never one to show
            self._view = View(None, [], None, str(error), [])
        self.draw()

    def draw(self) -> None:
        """Draw the newest figures."""
        if not self.is_running:  # closing: the widgets go before the timer does
            return
        job = self._view.job
        if job is not None and self._seen != (job.pid, job.written_at):
            if self._seen is None or self._seen[0] != job.pid:
                self._rates.clear()
            self._seen = job.pid, job.written_at
            self._rates.append(job_tokens_per_s(job))
        line = view.head(self._view)
        self._set("head", line.append("  paused", style="bold yellow") if self.paused else line)
        facts = self._width("gpu")
        self._set("gpu", view.gpu_table(self._view.gpu, self._view.gpu_reason, max(6, facts - 32)))
        self._set("job", view.job_table(job, self._rates, max(8, facts - 13)))
        self._set("hits", view.hits_table(job, max(6, facts - 36)))
        layers = [] if job is None else job.layers
        chosen = view.uneven_layer(layers) if self.layer is None else min(self.layer, max(0, len(layers) - 1))
        if not layers:
            self._set("map-text", view.plain(no_job()))
            self._set("bars-text", "")
            self._set("layers-text", "")
        else:
            bars, layer = self.query_one("#bars"), layers[chosen]
            automatic = " (most uneven)" if self.layer is None else ""
            bars.border_title = view.Text.assemble(f"Layer {chosen}{automatic}: ", view.plain(layer.name)).markup
            self._set("map-text", view.heatmap(layers, self._width("map-text"), chosen))
            self._set("bars-text", view.expert_bars(layer, self._width("bars-text")))
            self._set("layers-text", view.layer_table(layers, self._width("layers-text"), chosen))
        self._set("slices-text", view.slice_table(job))

    def _set(self, name: str, drawn: object) -> None:
        self.query_one(f"#{name}", Static).update(drawn)  # type: ignore[arg-type]

    def _width(self, name: str) -> int:
        return self.query_one(f"#{name}", Static).content_size.width

    def action_layer(self, step: int) -> None:
        """Choose another layer."""
        layers = [] if self._view.job is None else self._view.job.layers
        if layers:
            begin = view.uneven_layer(layers) if self.layer is None else self.layer
            self.layer = (begin + step) % len(layers)
            self.query_one("#map").scroll_to(y=self.layer - 3, animate=False)
            self.query_one("#layers").scroll_to(y=self.layer, animate=False)
            self.draw()

    def action_uneven(self) -> None:
        """Follow the most uneven layer again."""
        self.layer = None
        self.draw()

    def action_job(self) -> None:
        """Look at the next job."""
        jobs, job = self._view.jobs, self._view.job
        if job is not None and len(jobs) > 1:
            pids = [each.pid for each in jobs]
            self.source.choose(jobs[(pids.index(job.pid) + 1) % len(jobs) if job.pid in pids else 0])
            self.layer = None
            self._view = self.source.read()
            self.draw()

    def action_pause(self) -> None:
        """Stop reading, or go on."""
        self.paused = not self.paused
        self.draw()


def _titled(widget: Widget, title: str) -> Widget:
    widget.border_title = title
    return widget
