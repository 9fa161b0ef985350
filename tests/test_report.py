"""The HTML report: its numbers are the rows' numbers, nothing is loaded, nothing from a row becomes markup."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from moe_gpu.report import write_report
from moe_gpu.results import (
    ABLATION,
    BenchmarkRow,
    ExpertCacheRow,
    ExpertLoadRow,
    SliceRow,
    SliceSeries,
    TileRow,
    TrainingRow,
    select,
)
from tests.result_rows import CPU, GPU, benchmark_row, ceilings, demo_rows, missing, training_rows

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "input", "img", "br"}


class Document(HTMLParser):
    """Elements with their attributes and text, and tables as rows of (text, data-v)."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.tables, self.unbalanced = [], [], [], []
        self.feed(text)
        assert not self.open
        assert not self.unbalanced

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append(["", dict(attributes).get("data-v")])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1][0] += text

    def table(self, first_heading):
        """The table whose first column is called so, as dictionaries of (text, value) by heading."""
        (found,) = [table for table in self.tables if table and table[0][0][0] == first_heading and len(table[0]) > 5]
        head = [text for text, _ in found[0]]
        return [dict(zip(head, row, strict=True)) for row in found[1:]]


@pytest.fixture
def report(tmp_path):
    def write(rows, **options):
        return write_report(rows, tmp_path / "report.html", **options).read_text(encoding="utf-8")

    return write


def test_every_benchmark_row_is_in_the_table_with_its_own_numbers(report):
    rows = demo_rows()
    table = Document(report(rows)).table("Provider")
    benchmark = select(rows, BenchmarkRow)
    assert len(table) == len(benchmark)
    shown = {(line["Provider"][0], line["Pass"][0], line["Routing"][0], int(line["Tokens"][1])): line for line in table}
    fields = {
        "Median ms": "p50_ms",
        "tokens/s": "tokens_per_s",
        "of matmul": "flops_share",
        "of copy": "bandwidth_share",
        "J/token": "energy_j_per_token",
    }
    for row in benchmark:
        line = shown[row.provider, row.mode, row.routing, row.num_tokens]
        for heading, field in fields.items():
            value = getattr(row, field)
            assert line[heading][1] == ("" if value is None else repr(value))
            assert (line[heading][0] == "—") == (value is None)
        assert line["Status"][0] == row.status
        assert line["Reason"][0] == (row.reason or "")


def test_speeds_are_computed_from_the_rows_and_slower_is_called_slower(report):
    rows = [
        CPU,
        benchmark_row("moe_gpu", 8, 2.0),
        benchmark_row("torch_loop", 8, 5.0),
        benchmark_row("scattermoe", 8, 1.0),
        benchmark_row("moe_gpu", 64, 4.0),
        benchmark_row("torch_loop", 64, 4.0),
    ]
    text = report(rows)
    first, second = Document(text).table("Model")
    assert first["Speed over it"] == ["0.50x (slower)", "0.5"]  # the last of the two columns: over the fastest other
    assert first["Fastest other"][0] == "scattermoe"
    assert second["Fastest other"][0] == "torch_loop"
    assert "1.58x" in text  # geometric mean of 2.5 and 1
    assert "moe_gpu is slower at 1 of them" in text


def test_nothing_is_loaded_from_anywhere(report, tmp_path):
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"\x89PNG made up")
    text = report(demo_rows(), figures=[figure])
    for tag, attributes in Document(text).elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/png;base64,", "#")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", text)
    assert base64.b64encode(b"\x89PNG made up").decode() in text


def test_the_policy_allows_only_the_pages_own_script(report):
    text = report(demo_rows())
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_names_from_rows_never_become_markup(report):
    machine = replace(CPU, device=EVIL, python=EVIL, commit=EVIL, driver=EVIL)
    everywhere = dict(dtype=EVIL, routing=EVIL, mode=EVIL, backend=EVIL)
    rows = [
        machine,
        *(replace(ceiling, name=EVIL, how=EVIL, dtype=EVIL) for ceiling in ceilings()),
        replace(benchmark_row("moe_gpu", 8, 2.0, **everywhere), model=EVIL),
        replace(benchmark_row(EVIL, 8, 3.0, **everywhere), model=EVIL),
        replace(missing(EVIL, EVIL, EVIL, num_tokens=8, launch=EVIL), model=EVIL),
        *training_rows(run=EVIL, steps=20),
        TrainingRow("{}" + EVIL, 1, 1.0, 1, 1.0, backend=EVIL),
        ExpertLoadRow(EVIL, 0, 0, 4, [1, 0, 3, 0]),
        ExpertLoadRow(EVIL, 0, 1, 4, [1, 0, 3, 0]),
        ExpertLoadRow('"' + EVIL + "{row}", 0, 0, 4, [1, 1, 3, 0]),
    ]
    text = report(rows, title=EVIL)
    assert text.count("<script>") == 1
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 20
    assert [tag for tag, _ in Document(text).elements].count("script") == 1


def test_unmeasured_things_are_named_with_their_reason(report):
    rows = [CPU, benchmark_row("moe_gpu", 8, 2.0), missing("scattermoe", "no module named scattermoe", num_tokens=8)]
    text = report(rows)
    section = text[text.index('id="missing"') : text.index('id="machine"')]
    for part in (
        "scattermoe", "no module named scattermoe", "this run was on a CPU", "CUDA graphs", "no ceiling was recorded",
        "no training rows", "no expert_load rows",
    ):  # fmt: skip
        assert part in section
    assert "the two were never measured at the same point" in text


def test_hot_cold_and_dead_experts_are_named(report):
    text = report([CPU, ExpertLoadRow("trace", 3, 0, 8, [6, 1, 1, 0, 4, 4]), ExpertLoadRow("trace", 4, 0, 8, [1] * 6)])
    assert "1 hot (above 2x)</b>: layer 3 expert 0 (2.25x)." in text
    assert "2 cold (below 0.5x)</b>: layer 3 expert 1 (0.38x), layer 3 expert 2 (0.38x)." in text
    assert "1 dead (no route at all)</b>: layer 3 expert 3." in text
    assert text.count('class="dead"') == 1


def test_the_machine_is_described_and_a_cpu_labelled(report):
    text = report([CPU, benchmark_row()])
    assert '<span class="badge">CPU</span>' in text
    assert "commit 0123456789ab<" in text
    gpu = report([GPU, benchmark_row()])
    assert 'class="badge"' not in gpu
    assert "commit 0123456789ab with local changes" in gpu
    assert "not recorded" in gpu  # memory, L2, transformers


def test_a_file_without_machine_or_numbers_is_still_a_page(report):
    text = report([missing("moe_gpu", "no GPU")])
    Document(text)
    assert "Machine not recorded" in text
    assert "not measured" in text


def test_the_training_curve_carries_every_point(report):
    rows = training_rows(steps=100)
    text = report([CPU, *rows])
    table = Document(text).table("Step")
    assert [float(line["Loss"][1]) for line in table] == [row.loss for row in rows]
    assert [line["Held-out loss"][1] for line in table] == [
        "" if row.eval_loss is None else repr(row.eval_loss) for row in rows
    ]
    assert f"training loss: {rows[0].loss:.4g} to {rows[-1].loss:.4g}" in text


def test_it_is_readable_without_scripts_on_any_screen_and_paper(report):
    text = report(demo_rows())
    assert "<noscript>" in text
    for part in ("prefers-color-scheme: dark", "@media print", 'name="viewport"', "overflow-x: auto"):
        assert part in text


def test_a_failed_write_leaves_the_old_report(report, tmp_path, monkeypatch):
    old = tmp_path / "report.html"
    old.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report(demo_rows())
    assert old.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_report_needs_no_extra(tmp_path):
    code = (
        "import sys\nsys.modules['matplotlib'] = sys.modules['plotly'] = sys.modules['numpy.testing'] = None\n"
        "from moe_gpu.report import write_report\nfrom tests.result_rows import demo_rows\n"
        f"print(write_report(demo_rows(), {str(tmp_path / 'r.html')!r}).stat().st_size > 10000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_energy_is_shown_with_its_interval_and_what_was_found_and_not(report):
    from moe_gpu.results import AttributionRow, AttributionSum, EnergyMeasurement, Finding

    measured = dict(energy_j_per_token=0.002, energy_stderr_j_per_token=0.0001, energy_quality="ok", power_w=300.0)
    rows = [
        GPU,
        benchmark_row("moe_gpu", 8, 2.0, **measured),
        benchmark_row("torch_loop", 8, 4.0, energy_quality="invalid"),
        Finding("tick period", 0.1, "s", 0.09, 0.11, verdict="met", how="ticks of 10 s"),
        Finding(EVIL, None, "W", reason=f"failed {EVIL}"),
        EnergyMeasurement("r", "w", 5.0, reason=f"lost {EVIL}"),
        AttributionSum("r", 3, 1500.0, 600.0, 700.0, 50.0, 150.0, 820.0, 80.0, 0.1, 0.05, "abc"),
        AttributionRow("r", 3, 0, 10.0, 16.0, 1e9, 1e6, 500.0, 400.0, 5.0, 0.09, "modelled", "abc", 590.0),
        AttributionRow("r", 3, 1, 0.0, 0.0, 0.0, 0.0, 200.0, 200.0, 1.0, None, "modelled", "abc", 230.0),
    ]
    text = report(rows)
    assert EVIL not in text
    ours, loop = Document(text).table("Energy of")
    assert ours["J per 1000 tokens"] == ["2", "2.0"]
    assert ours["95 % interval"][0] == "1.8 to 2.2"
    assert loop["J per 1000 tokens"] == ["—", ""]
    assert loop["Quality"][0] == "invalid"
    found, failed = Document(text).table("What")
    assert (found["Value"][0], found["95 % interval"][0], found["Verdict"][0]) == ("0.1", "0.09 to 0.11", "met")
    assert failed["Value"] == ["—", ""]
    assert "closure 10.0%" in text
    assert "held-out error 5.0%" in text
    first, second = Document(text).table("Expert")
    assert (first["Expert"][0], first["J per 1000 tokens"][0]) == ("0", "90")
    assert second["J per 1000 tokens"] == ["—", ""]
    assert "expert 0: 1.43x of an even share of the joules" in text
    assert "1 windows: lost" in text
    assert '<section id="energy">' not in report(demo_rows())


def series(policy, sms, time_ms, changes, **facts):
    return SliceSeries("groups", policy, tenants=["a", EVIL], rows=[[8, 2]] * len(sms), sms=sms, time_ms=time_ms,
                       changes=changes, **facts)  # fmt: skip


def test_slices_over_time_are_drawn_from_their_rows_alone(report):
    rows = [
        GPU,
        series("static", [[64, 64]] * 4, [2.0, 2.0, 2.0, 4.0], [None] * 4),
        series("adaptive", [None, None, [96, 32], [96, 32]], [3.0, 3.0, 1.0, 1.0], [None, None, f"gain {EVIL}", None]),
        SliceSeries("groups", "dynamic", "failed", f"lost {EVIL}"),
        SliceSeries("jobs", "static", "unavailable", f"tried {EVIL}"),
    ]
    text = report(rows)
    assert "<script>alert" not in text
    by_policy = {line["Policy"][0]: line for line in Document(text).table("Policy")}
    assert by_policy["static"]["Total ms"][1] == "10.0"
    assert by_policy["adaptive"]["Over the best other"] == ["0.800", "0.8"]
    assert by_policy["adaptive"]["Plan changes"][1] == "1"
    assert by_policy["dynamic"]["Total ms"] == ["—", ""]
    assert f"lost {EVIL}" in by_policy["dynamic"]["Not measured because"][0]
    section = text[text.index('<section id="slices">') : text.index('<section id="missing">')]
    assert "not measured: tried" in section
    assert "<title>steps 0 to 1: not sliced</title>" in section
    assert "<title>a: 96 SMs\nsteps 2 to 3</title>" in section
    assert "<title>step 2: gain &lt;script&gt;" in section
    bars = re.findall(r'class="band b0" [^>]*height="([0-9.]+)"><title>a: (?:96|64)', section)
    heights = [float(height) for height in bars]
    assert heights[1] / heights[0] == pytest.approx(96 / 64, rel=0.01)
    assert section.count('class="change"') == 1
    bare = report(demo_rows())
    assert '<section id="slices">' not in bare
    assert "Slices over time: these results hold no slice_series rows" in bare


def test_peak_memory_is_a_bar_for_each_provider_at_the_most_tokens(report):
    rows = [
        GPU,
        benchmark_row("moe_gpu", 64, 2.0, peak_memory_bytes=2 << 20),
        benchmark_row("moe_gpu", 512, 2.0, peak_memory_bytes=3 << 20),
        benchmark_row("torch_loop", 512, 2.0, peak_memory_bytes=6 << 20),
        benchmark_row("scattermoe", 512, 2.0),
    ]
    text = report(rows)
    section = text[text.index('<section id="memory">') : text.index('<section id="results">')]
    widths = [float(width) for width in re.findall(r'class="band s\d" [^>]*width="([0-9.]+)"', section)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)
    assert "3.0 MiB" in section
    assert "2.0 MiB" not in section
    assert "512 tokens · 1 not measured" in section
    assert '<section id="memory">' not in report(demo_rows())
    assert "Peak memory: no row carries it" in report(demo_rows())


def section_of(text, name):
    return text.split(f'<section id="{name}">')[1].split("</section>")[0] if f'id="{name}"' in text else ""


def test_every_kind_of_recorded_row_is_shown(report):
    """What no chart shows stands in a table: parts of a layer, slices, the expert cache, tiles."""
    cache = dict(num_layers=4, num_experts=64, top_k=8, slots_per_layer=16, tokens_per_step=1)
    rows = [
        GPU,
        replace(benchmark_row("baseline", 64, 8.0), scope=ABLATION),
        replace(benchmark_row(f"+ {EVIL}", 64, 2.0), scope=ABLATION, launch="graph"),
        replace(missing("all but kernels", f"no {EVIL}"), scope=ABLATION),
        SliceRow("graphs", "replay", f"layer {EVIL}", samples=30, p50_ms=0.25, p99_ms=0.5, max_ms=1.0),
        SliceRow("graphs", "eager", "layer", "failed", f"lost {EVIL}"),
        ExpertCacheRow(
            f"text {EVIL}", "lru", simulated=False, hit_rate=0.376, copies=3991, p50_ms=1.69, bit_exact=True, **cache
        ),
        ExpertCacheRow("text", "optimal", simulated=True, hit_rate=0.5, copies=20, **cache),
        TileRow("up", f"qwen {EVIL}", {"block_m": 64}, 0.5, 200.0),
        TileRow("up", f"qwen {EVIL}", {"block_m": 128}, 0.4, 250.0),
        TileRow("up", f"qwen {EVIL}", {"block_m": 256}, error="too much shared memory"),
    ]
    text = report(rows)
    assert EVIL not in text
    document = Document(text)
    bare, graphs, without = document.table("Variant")
    assert bare["Speed over baseline"][0] == "1.00x"
    assert (graphs["Launch"][0], graphs["Speed over baseline"][0]) == ("graph", "4.00x")
    assert without["ms"] == ["—", ""]
    assert without["Served by, or why not measured"][0] == f"unavailable: no {EVIL}"
    replayed, failed = document.table("Arm")
    assert replayed["p50 ms"][1] == "0.25"
    assert failed["Not measured because"][0] == f"failed: lost {EVIL}"
    assert "Value" not in replayed, "a column that holds nothing"
    ran, simulated = section_of(text, "cache").split("<h3>")[1:]
    (lru,) = Document(f"<h3>{ran}").table("Policy")
    assert (lru["Slots"][0], lru["Hit rate"][0], lru["p50 ms"][0]) == ("16 of 64", "37.6%", "1.69")
    assert simulated.startswith("text, simulated</h3>")
    assert "optimal" in simulated
    (tile,) = document.table("Kernel")
    assert (tile["ms"][0], tile["Fastest tile"][0]) == ("0.4", "block_m 128")
    assert (tile["Tried"][1], tile["Could not run"][1]) == ("3", "1")
    bare = report(demo_rows())
    assert not any(section_of(bare, name) for name in ("parts", "measured-slices", "cache", "tiles"))


def test_headlines_keep_layers_and_models_apart(report):
    model = dict(scope="4 decoder layers")
    rows = [GPU, benchmark_row("moe_gpu", 8, 1.0), benchmark_row("torch_loop", 8, 2.0)]
    rows += [benchmark_row("moe_gpu", 8, 1.0, **model), benchmark_row("torch_loop", 8, 8.0, **model)]
    summary = section_of(report(rows), "summary")
    assert "2.00x" in summary
    assert "forward, 4 decoder layers: speed over torch_loop" in summary
    assert "8.00x" in summary
    assert "geometric mean" not in summary


def test_a_long_reason_makes_no_row_tall_and_stands_in_full_below(report):
    reason = "out of memory: " + "tried to allocate " * 40
    text = report([GPU, benchmark_row("torch_loop", 8, 2.0), missing("moe_gpu", reason, "failed", num_tokens=8)])
    _, line = Document(text).table("Provider")
    assert line["Reason"][0].endswith("…")
    assert len(line["Reason"][0]) <= 160
    assert reason in section_of(text, "missing")
    assert f'title="{reason}"' in section_of(text, "results")
