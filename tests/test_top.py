"""`moe-gpu top`: as text, as JSON and as a dashboard, on jobs that run, have ended, or are not there."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from dataclasses import replace

import pytest
from rich.console import Console

from moe_gpu.cli import main
from moe_gpu.live.status import (
    CacheStatus,
    Cost,
    Energy,
    GpuReading,
    GraphStatus,
    JobMemory,
    JobStatus,
    LayerLoad,
    Progress,
    SliceStatus,
    StatusError,
    process_ticks,
)
from moe_gpu.top import Source, view

GIB = 1 << 30


def make_job(**changes) -> JobStatus:
    """A job about which everything is known but that nothing runs."""
    now = time.time()
    job = JobStatus(
        os.getpid(),
        "a job",
        socket.gethostname(),
        now - 75,
        now,
        1.0,
        process_ticks(os.getpid()),
        progress=Progress(30, 40, 2.5),
        layers=[
            LayerLoad("even", 4, 2, "triton", [10, 10, 10, 10], [5, 5, 5, 5], 2.0, 5, 0, 0.1),
            LayerLoad("uneven", 4, 2, "triton", [37, 3, 0, 0], [17, 3, 0, 0], 2.0, 5, 0, 0.1),
            LayerLoad("unknown", 4, 2, "triton", reason="no profiler counts this layer"),
        ],
        slices=[SliceStatus("expert 0", "green_context", 66, 64, True), SliceStatus("expert 4", "cta", 32)],
        expert_cache=CacheStatus(75, 25, 3 * GIB, 5 * GIB),
        graphs=GraphStatus(90, 10),
        gpu=GpuReading("GPU-1", "Invented GPU", "gpu", 412.0, 10**6, 55, 1980, 3201, 97, 41, 20 * GIB, 80 * GIB, True),
        energy=Energy(1200.0, 60.0, 4000),
        memory=JobMemory(GIB, 2 * GIB),
        cost=Cost(0.3, 60.0, 60),
    )
    return replace(job, **changes)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "moe_gpu"
    folder.mkdir()
    return folder


@pytest.fixture
def job_file(own_folder):
    """The file of the job; `write(**changes)` replaces it."""

    def write(**changes):
        path = own_folder / "job.json"
        path.write_text(make_job(**changes).to_json())
        return path

    write()
    return write


def rendered(width: int = 110) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view.render(Source().read(), width))
    return console.export_text()


def test_everything_that_is_known_is_shown(job_file):
    shown = rendered(160)
    for said in (
        *("a job", "running", "0:01:15", "Invented GPU", "412 W", "1,980 MHz", "slowed", "97 %", "55 C"),
        *("20.0 of 80.0 GiB", "30 of 40", "2.5000", "1.0 GiB, peak 2.0", "0.50 %", "1,200 J", "20 W"),
        *("90.0 % of 100", "75.0 % of 100", "5.0 GiB held, 3.0 copied", "green_context", "66", "64", "enforced"),
        *("planned", "4 of 4", "2 of 4", "3.40", "no profiler counts this layer", "not measured"),
    ):
        assert said in shown, said
    assert f"{1000 * 1200 / 4000:.4g}" in shown
    assert "Layer 1, uneven" in shown, "the most uneven layer's experts are shown"


def test_what_is_not_known_is_not_measured_and_never_0(job_file):
    nothing = dict.fromkeys(["progress", "slices", "expert_cache", "graphs", "gpu", "energy", "memory", "cost"])
    job_file(**nothing, gpu_reason="no GPU here", energy_reason="no counter", layers=[])
    shown = rendered()
    assert shown.count("not measured") == 6  # GPU, tokens/s, tokens, energy, graphs, cache
    assert "no GPU here" in shown
    assert "no counter" in shown
    gpu = GpuReading("GPU-1", "Invented GPU", "parent_gpu")
    job_file(**{**nothing, "gpu": gpu})
    shown = rendered()
    assert not [said for said in ("0 W", "0 MHz", "0 %", "0 C", "0.0 of") if f" {said}" in shown]
    assert "MIG" in shown


@pytest.mark.parametrize("width", [20, 60, 80, 110, 200])
def test_it_fits_every_width(job_file, width):
    lines = rendered(width).splitlines()
    assert max(map(len, lines)) <= width


def test_names_are_shown_as_text(job_file):
    layer = LayerLoad("[bold]\x1b[31mred\x1b]0;title\x07", 2, 1, None, [1, 1], [1, 1], 1.0, 1, 0, 0.1)
    job_file(name="[red]job\x1b[2J", layers=[layer])
    shown = rendered(200)
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[red]job" in shown
    assert "[bold]" in shown


def test_many_experts_share_cells_and_the_busiest_is_seen():
    window = [1] * 512
    window[300] = 500
    layer = LayerLoad("wide", 512, 2, None, window, window, 1.0, 1, 0, 0.1)
    text = view.heatmap([layer], 60).plain
    assert len(text) <= 60
    assert text.count("█") == 1


def test_bars_and_sparks():
    assert view.bar(0.5, 10).plain == "█████╌╌╌╌╌"
    assert view.bar(2.0, 4).plain == "████"
    assert view.bar(-1.0, 4).plain == "╌╌╌╌"
    assert len(view.bar(0.33, 7).plain) == 7
    assert view.spark([0.0, 4.0, None, 8.0], 10).plain == "▁▅·█"
    assert view.spark([0.0, 0.0], 10).plain == "▁▁"
    assert view.spark([1.0] * 50, 10).plain == "█" * 10


def test_once_prints_text_or_json(job_file, capsys):
    assert main(["top", "--once"]) == 0
    assert "Invented GPU" in capsys.readouterr().out
    assert main(["top", "--once", "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert printed.err == ""
    assert (told["state"], told["tokens_per_s"], told["energy"]["j_per_1000_tokens"]) == ("running", 5.0, 300.0)
    assert told["layers"][1]["figures"]["max_over_mean"] == pytest.approx(3.4)
    assert main(["top", "--once", "--json", "--pid", str(os.getpid())]) == 0


def test_without_a_job_once_ends_with_status_1_and_says_how_to_get_one(capsys):
    assert main(["top", "--once"]) == 1
    assert "moe_gpu.publish(model)" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert main(["top", "--once", "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "moe_gpu.publish(model)" in printed.err


def test_an_ended_job_is_said_to_have_ended(job_file, capsys):
    job_file(ended=True)
    assert main(["top", "--once"]) == 0
    assert "ended" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pid", "1"], "no job with pid 1"),
        (["--file", "missing.json"], "missing.json: No such file"),
        (["--file", "missing.json", "--pid", "1"], "give one of them"),
        (["--interval", "0"], "0 is not above 0"),
        (["--pid", "x"], "'x' is not a whole number"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, said, job_file, capsys):
    assert main(["top", "--once", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_file_that_goes_leaves_the_last_figures(job_file):
    path = job_file()
    source = Source(path)
    path.unlink()
    seen = source.read()
    assert seen.job.name == "a job"
    assert "No such file" in seen.remarks[0]
    with pytest.raises(StatusError):
        Source(path)


def test_a_chosen_job_stays_when_its_file_goes(own_folder, job_file):
    source = Source(pid=os.getpid())
    job_file().unlink()
    assert source.read().job.name == "a job"


# The dashboard


def drive(act, size=(130, 45), source=None):
    """Run the dashboard without a terminal and let `act(app, pilot)` use it."""
    pytest.importorskip("textual", reason="textual is not installed")
    from moe_gpu.top.app import TopApp

    async def run() -> None:
        app = TopApp(source or Source(), 0.05)
        async with app.run_test(size=size) as pilot:
            await until(pilot, lambda: text_of(app, "head").strip())
            await act(app, pilot)

    asyncio.run(run())


async def until(pilot, condition) -> None:
    """Let the dashboard go on until `condition()`, or fail after far longer than it needs."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the dashboard does not show what was waited for"
        await pilot.pause(0.02)


def text_of(app, name: str) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(app.query_one(f"#{name}").content)
    return console.export_text()


@pytest.mark.parametrize("size", [(130, 45), (80, 24), (40, 10)])
def test_the_dashboard_shows_the_job(job_file, size):
    async def act(app, pilot):
        assert "a job" in text_of(app, "head")
        assert "412 W" in text_of(app, "gpu")
        assert "2.5000" in text_of(app, "job")
        assert "1,200 J" in text_of(app, "hits")
        assert "uneven" in text_of(app, "layers-text")
        assert "green_context" in text_of(app, "slices-text")
        assert "Layer 1 (most uneven)" in str(app.query_one("#bars").border_title)
        assert app.export_screenshot().startswith("<svg")

    drive(act, size)


def test_keys_choose_layers_pause_and_quit(job_file):
    async def act(app, pilot):
        await pilot.press("j")
        assert app.layer == 2
        await pilot.press("down")
        assert app.layer == 0
        await pilot.press("up")
        assert app.layer == 2
        assert "no profiler" in text_of(app, "bars-text")
        await pilot.press("u")
        assert app.layer is None
        await pilot.press("p")
        job_file(name="renamed")
        await pilot.pause(0.3)
        assert "renamed" not in text_of(app, "head")
        assert "paused" in text_of(app, "head")
        await pilot.press("p")
        await until(pilot, lambda: "renamed" in text_of(app, "head"))
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)

    drive(act)


def test_ctrl_c_ends_the_dashboard(job_file):
    async def act(app, pilot):
        await pilot.press("ctrl+c")
        await until(pilot, lambda: not app.is_running)

    drive(act)


def test_the_dashboard_waits_for_a_job_and_stays_with_it_to_its_end(own_folder):
    path = own_folder / "job.json"

    async def act(app, pilot):
        assert "no job publishes here" in text_of(app, "head")
        path.write_text(make_job().to_json())
        await until(pilot, lambda: "running" in text_of(app, "head"))
        path.write_text(make_job(ended=True).to_json())
        await until(pilot, lambda: "ended" in text_of(app, "head"))
        path.write_text("{")
        await pilot.pause(0.3)
        assert "a job" in text_of(app, "head")

    drive(act)


def test_another_job_can_be_looked_at(own_folder, job_file):
    other = make_job(name="other", pid=os.getppid(), process_ticks=None, started_at=1.0)
    (own_folder / "other.json").write_text(other.to_json())

    async def act(app, pilot):
        assert "a job" in text_of(app, "head")
        await pilot.press("n")
        await until(pilot, lambda: "other" in text_of(app, "head"))
        await pilot.press("n")
        await until(pilot, lambda: "a job" in text_of(app, "head"))

    drive(act)


def test_the_dashboard_without_textual_names_the_extra(job_file, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "textual", None)
    assert main(["top"]) == 1
    assert "moe-gpu[live]" in capsys.readouterr().err


def test_the_metrics_of_a_job_are_served_while_it_is_watched(job_file, monkeypatch, capsys):
    pytest.importorskip("prometheus_client", reason="prometheus-client is not installed")
    import urllib.request

    from moe_gpu import top

    pages = []

    def sleep(seconds: float) -> None:
        url = capsys.readouterr().err.split("metrics: ")[1].split()[0]
        pages.append(urllib.request.urlopen(url).read().decode())
        raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    assert main(["top", "--json", "--metrics-port", "0"]) == 130
    assert 'moe_gpu_expert_cache_requests_total{result="hit"} 75.0' in pages[0]
    assert main(["top", "--once", "--metrics-port", "0"]) == 2
