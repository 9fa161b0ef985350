"""What figures conclude: findings from rows beside each other, energy, and the script that draws recorded files."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_gpu import plots
from moe_gpu.plots import data
from moe_gpu.results import write_rows
from tests.plot_cases import png_size, small_rows, texts_of_figures  # noqa: F401 a fixture
from tests.result_rows import CPU, GPU, benchmark_row, missing, training_rows

pytest.importorskip("matplotlib", reason="plots need the extra moe-gpu[viz]")
SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "visualize_results.py"


def test_no_finding_joins_layers_with_models():
    rows = [CPU, *small_rows(), *small_rows(scope="4 decoder layers")]
    assert data.finding(data.compare(data.tabulate(rows))) is None


def test_a_finding_says_that_graphs_stand_against_eager_calls():
    rows = [CPU, *small_rows(), benchmark_row("moe_gpu", 8, 0.1, launch="graph")]
    assert "; 1 by a CUDA graph over eager)" in data.finding(data.compare(data.tabulate(rows)))
    assert "graph" not in data.finding(data.compare(data.tabulate([CPU, *small_rows()])))


def test_a_variant_of_moe_gpu_is_no_rival():
    rows = [CPU, benchmark_row("moe_gpu", 8, 2.0), benchmark_row("moe_gpu fp8", 8, 1.0)]
    (alone,) = data.compare(data.tabulate(rows))
    assert alone.rival is None
    (beside,) = data.compare(data.tabulate([*rows, benchmark_row("scattermoe", 8, 3.0)]))
    assert beside.rival.provider == "scattermoe"


def test_the_latest_run_of_a_point_counts_and_devices_stay_apart():
    early = [CPU, benchmark_row("moe_gpu", 8, 2.0)]
    late = [replace(CPU, recorded_at="2026-12-01T00:00:00+00:00"), benchmark_row("moe_gpu", 8, 3.0)]
    ((_, lines),) = data.tabulate([*late, *early]).items()
    assert lines[data.Series("moe_gpu", "eager")][8].p50_ms == 3.0
    table = data.tabulate([*early, GPU, benchmark_row("moe_gpu", 8, 1.0)])
    assert {facet.device for facet in table} == {"CPU · Test CPU, not a real machine", "Test GPU, not a real machine"}


def test_comparisons_take_the_fastest_launch_and_the_fastest_rival():
    rows = [
        CPU,
        benchmark_row("moe_gpu", 8, 4.0),
        benchmark_row("moe_gpu", 8, 2.0, launch="graph"),
        benchmark_row("torch_loop", 8, 3.0),
        benchmark_row("scattermoe", 8, 1.0),
        missing("sonicmoe", "no", num_tokens=8),
    ]
    (item,) = data.compare(data.tabulate(rows))
    assert (item.ours.launch, item.rival.provider) == ("graph", "scattermoe")
    assert item.over_baseline == pytest.approx(1.5)
    assert item.over_rival == pytest.approx(0.5)


def test_matplotlib_settings_are_left_as_they_were(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.draw_throughput([CPU, *small_rows()], tmp_path / "t.png")
    assert dict(matplotlib.rcParams) == before


def run_script(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_script_draws_several_files_and_prints_the_paths(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_rows(first, [CPU, *small_rows()])
    write_rows(second, [CPU, *training_rows(steps=30)])
    done = run_script("--results", first, second, "--output", tmp_path / "new" / "figures")
    assert done.returncode == 0, done.stderr
    printed = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in printed] == [*plots.FIGURES, "training_results.png"]
    assert all(path.is_file() for path in printed)
    assert len(list((tmp_path / "new" / "figures").iterdir())) == 7


def test_script_mistakes_are_one_line_and_status_2(tmp_path, capsys):
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import visualize_results
    finally:
        sys.path.remove(str(SCRIPT.parent))
    good, bad, empty = tmp_path / "good.jsonl", tmp_path / "bad.jsonl", tmp_path / "empty.jsonl"
    write_rows(good, [CPU, *small_rows()])
    bad.write_text(good.read_text()[:-30])
    empty.touch()
    figures = tmp_path / "figures"
    figures.mkdir()
    old = figures / "throughput_comparison.png"
    old.write_bytes(b"old")
    cases = {
        ("--results", tmp_path / "none.jsonl", "--output", figures): "No such file",
        ("--results", good, bad, "--output", figures): f"{bad}:7: not JSON",
        ("--results", empty, "--output", figures): "holds no rows",
        ("--results", tmp_path, "--output", figures): "directory",
        ("--results", good, "--output", good): f"cannot write to {good}",
        ("--results", good, "--output", good / "below"): "cannot write to",
        ("--results", good): "--output",
        ("--results", good, "--output", figures, "--colour"): "--colour",
    }
    for arguments, message in cases.items():
        try:
            status = visualize_results.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            status = stopped.code
        captured = capsys.readouterr()
        assert (status, captured.out) == (2, "")
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert old.read_bytes() == b"old"
    assert list(figures.iterdir()) == [old]


def test_a_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plots.MissingExtraError, match=r"moe-gpu\[viz\]") as caught:
        plots.draw_all([CPU, *small_rows()], tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def energy_rows():
    """Three sizes with energy, one of them from short windows, and what the driver saw of the GPU."""
    rows = small_rows(gpu_util_pct=80.0, energy_quality="ok")
    return [
        replace(
            row,
            energy_j_per_token=row.p50_ms / 100,
            energy_stderr_j_per_token=row.p50_ms / 1000,
            energy_quality="short" if row.num_tokens == 1 else "ok",
        )
        for row in rows
    ]


def test_energy_states_the_finding_with_intervals_and_what_is_doubtful(texts, tmp_path):
    plots.draw_energy([GPU, *energy_rows()], tmp_path / "e.png")
    assert "moe_gpu takes 0.50x the energy of torch_loop (geometric mean of 3 points, 0.50x to 0.50x)" in texts.all
    assert "Of these points 2 are short." in texts.all
    assert "gain, up to 5 % a board" in texts.all
    _, high = next(
        segment[:, 1]
        for bars in texts.panels[0].collections
        for segment in bars.get_segments()
        if segment[:, 1].min() == pytest.approx(0.02 * (1 - 0.196))
    )
    assert high == pytest.approx(0.02 * 1.196)


def test_energy_of_one_point_or_of_two_devices_claims_no_mean(texts, tmp_path):
    rows = [row for row in energy_rows() if row.num_tokens == 8]
    plots.draw_energy([GPU, *rows], tmp_path / "e.png")
    assert "(one point)" in texts.all
    plots.draw_energy([GPU, *rows, CPU, *rows], tmp_path / "e.png")
    assert "Energy per token by provider" in texts.words


def test_an_interval_that_reaches_nought_is_cut_on_the_log_axis(tmp_path):
    rows = [replace(row, energy_stderr_j_per_token=10 * row.energy_j_per_token) for row in energy_rows()]
    assert png_size(plots.draw_energy([GPU, *rows], tmp_path / "e.png"))


def test_utilisation_shows_what_the_driver_saw_where_it_was_measured(texts, tmp_path):
    plots.draw_utilization([GPU, *energy_rows()], tmp_path / "u.png")
    assert len(texts.panels) == 3
    assert "as the driver counts it, calls back to back" in texts.words
    assert {float(y) for line in texts.panels[2].lines for y in line.get_ydata()} == {80.0, 100.0}
    plots.draw_utilization([GPU, *small_rows()], tmp_path / "u.png")
    assert "Share of the time in which a kernel ran: not measured" in texts.all
