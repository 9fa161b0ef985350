"""Figures from made-up rows: what they say, what they leave out, and that they follow the data."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from moe_gpu import plots
from moe_gpu.plots import canvas
from moe_gpu.results import ABLATION, BenchmarkRow, ExpertLoadRow, TrainingRow
from tests.plot_cases import png_size, small_rows, texts_of_figures  # noqa: F401 a fixture
from tests.result_rows import (
    CPU,
    GPU,
    benchmark_row,
    benchmark_rows,
    ceilings,
    demo_rows,
    load_rows,
    missing,
    training_rows,
)

pytest.importorskip("matplotlib", reason="plots need the extra moe-gpu[viz]")
ALL = {**plots.FIGURES, "training_results.png": plots.draw_training}
BENCHMARK_FIGURES = [name for name in plots.FIGURES if name != "expert_utilization_heatmap.png"]


def test_all_six_figures_are_written(tmp_path):
    written = plots.draw_all(demo_rows(), tmp_path)
    assert [path.name for path in written] == list(plots.FIGURES)
    assert {path.name for path in tmp_path.iterdir()} == set(plots.FIGURES)
    for path in written:
        width, height = png_size(path)
        assert 900 < width < 4000
        assert 400 < height < 20000


@pytest.mark.parametrize("name", ALL)
def test_every_figure_names_its_device_date_and_that_it_is_a_cpu(name, texts, tmp_path):
    ALL[name]([CPU, *small_rows(), *training_rows(steps=30), *load_rows(windows=2)], tmp_path / name)
    assert "CPU" in texts.words
    for part in ("CPU · Test CPU, not a real machine", "2026-11-01", "float32", "torch 2.13.0+cpu"):
        assert part in texts.all


@pytest.mark.parametrize("name", ALL)
def test_a_gpu_is_not_called_a_cpu(name, texts, tmp_path):
    ALL[name]([GPU, *small_rows(), *training_rows(steps=30), *load_rows(windows=2)], tmp_path / name)
    assert "CPU" not in texts.all
    assert "Test GPU, not a real machine" in texts.all
    assert "local changes" in texts.all


@pytest.mark.parametrize("name", [*plots.FIGURES, "training_results.png"])
def test_a_figure_follows_its_data_and_nothing_else(name, tmp_path):
    def draw(rows, file):
        return ALL[name](rows, tmp_path / file).read_bytes()

    rows = [CPU, *ceilings(), *small_rows(energy_j_per_token=0.5), *training_rows(steps=30), *load_rows(windows=2)]
    changed = list(rows)
    for index, row in enumerate(rows):
        if isinstance(row, BenchmarkRow) and row.provider == "moe_gpu" and row.num_tokens == 8:
            fields = dict(p50_ms=9.0, tokens_per_s=8 / 9e-3, flops_share=0.02, bandwidth_share=0.03)
            changed[index] = replace(row, energy_j_per_token=0.9, **fields)
        elif isinstance(row, TrainingRow) and row.step == 20:
            changed[index] = replace(row, loss=9.0)
        elif isinstance(row, ExpertLoadRow) and row.layer == 0:
            changed[index] = replace(row, counts=row.counts[::-1])
    first = draw(rows, "first.png")
    assert draw(list(rows), "again.png") == first
    assert draw(changed, "changed.png") != first


def test_the_throughput_title_states_the_computed_finding(texts, tmp_path):
    rows = small_rows()
    rows[1] = benchmark_row("moe_gpu", 1, 8.0)  # twice as slow as the loop, then twice as fast at two points
    plots.draw_throughput([CPU, *rows], tmp_path / "t.png")
    assert (
        "moe_gpu runs at 1.26x the speed of torch_loop (geometric mean of 3 points, 0.50x to 2.00x; slower at 1)"
        in texts.all
    )


def test_no_finding_is_claimed_without_the_baseline(texts, tmp_path):
    plots.draw_throughput([CPU, *(row for row in small_rows() if row.provider == "moe_gpu")], tmp_path / "t.png")
    assert "speed of" not in texts.all
    assert "Throughput by provider" in texts.words


def test_whiskers_run_from_the_80th_to_the_20th_percentile_of_time(texts, tmp_path):
    plots.draw_throughput([CPU, benchmark_row("moe_gpu", 100, 10.0)], tmp_path / "t.png")
    bars = [collection for collection in texts.panels[0].collections if hasattr(collection, "get_segments")]
    ends = sorted(y for _, y in bars[0].get_segments()[0])
    assert ends == pytest.approx([100 / 12e-3, 100 / 9.5e-3])


def test_providers_stand_side_by_side_where_there_is_one_number_of_tokens(texts, tmp_path):
    rows = [CPU, benchmark_row("moe_gpu", 256, 2.0), benchmark_row("torch_loop", 256, 8.0, p20_ms=1.0, p80_ms=40.0)]
    plots.draw_throughput(rows, tmp_path / "t.png")
    (axis,) = texts.panels
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["256"]
    assert len({float(line.get_xdata()[0]) for line in axis.lines if len(line.get_xdata()) == 1}) == 2
    low, high = axis.get_ylim()
    assert low < 256 / 40e-3  # whiskers stay inside
    assert high > 256 / 1e-3


def test_a_failed_point_is_a_gap_with_its_reason_and_never_zero(texts, tmp_path):
    rows = small_rows()
    rows[3] = missing("moe_gpu", "RuntimeError: made-up failure", "failed", num_tokens=8)
    plots.draw_throughput([CPU, *rows, missing("sonicmoe", "no GPU here", num_tokens=8)], tmp_path / "t.png")
    (axis,) = texts.panels
    lines = [line for line in axis.lines if len(line.get_xdata()) == 3]  # not the caps of whiskers
    drawn = {line.get_color(): list(line.get_ydata()) for line in lines if line.get_linestyle() != "None"}
    ours = drawn[canvas.COLOURS["moe_gpu"]]
    assert ours[0] == pytest.approx(500)
    assert ours[1] != ours[1]  # NaN: the line breaks
    assert all(y > 0 for line in drawn.values() for y in line if y == y)
    assert canvas.COLOURS["sonicmoe"] not in drawn
    notes = " ".join(texts.words)
    assert "moe_gpu: failed, RuntimeError: made-up failure (small forward uniform T=8)" in notes
    assert "sonicmoe: no GPU here" in notes


def test_an_ok_row_without_a_time_is_not_measured(texts, tmp_path):
    plots.draw_throughput([CPU, *small_rows(), benchmark_row("scattermoe", 8, None)], tmp_path / "t.png")
    assert "scattermoe: no time recorded" in texts.all


@pytest.mark.parametrize("name", BENCHMARK_FIGURES)
def test_rows_without_any_time_are_drawn_as_not_measured(name, texts, tmp_path):
    rows = [missing(provider, f"{provider} is broken", "failed") for provider in ("moe_gpu", "torch_loop")]
    plots.FIGURES[name]([CPU, *rows], tmp_path / name)
    assert "not measured" in texts.all
    if name != "energy_efficiency.png":
        assert "moe_gpu is broken" in texts.all


@pytest.mark.parametrize("name", plots.FIGURES)
def test_results_without_rows_for_a_figure_say_so(name, texts, tmp_path):
    plots.FIGURES[name]([CPU], tmp_path / name)
    assert "not measured" in texts.all


def test_energy_says_why_it_was_not_measured(texts, tmp_path):
    plots.draw_energy([CPU, *small_rows()], tmp_path / "e.png")
    assert "this run was on a CPU" in texts.all
    plots.draw_energy([GPU, *small_rows()], tmp_path / "e.png")
    assert "No row of these results carries energy_j_per_token" in texts.all


def test_energy_draws_what_was_recorded(texts, tmp_path):
    plots.draw_energy([GPU, *small_rows(energy_j_per_token=0.25)], tmp_path / "e.png")
    assert "not measured" not in texts.all
    assert {float(y) for line in texts.panels[0].lines for y in line.get_ydata()} == {0.25}


def test_utilisation_is_named_for_its_device_and_quotes_the_ceiling(texts, tmp_path):
    plots.draw_utilization([CPU, *ceilings(), *small_rows()], tmp_path / "u.png")
    assert "CPU: share of the measured ceiling; moe_gpu reaches up to 25 % of copy" in texts.all
    assert "100 % = 120 GFLOP/s, a made-up product" in texts.all
    plots.draw_utilization([GPU, *small_rows()], tmp_path / "u.png")
    assert "GPU: share of the measured ceiling" in texts.all
    assert "matmul ceiling not recorded" in texts.words


def test_ablation_draws_recorded_ratios_and_invents_no_steps(texts, tmp_path):
    graphs = [benchmark_row("moe_gpu", tokens, 0.5 * tokens**0.5, launch="graph") for tokens in (1, 8)]
    plots.draw_ablation([GPU, *small_rows(), *graphs, missing("scattermoe", "not installed")], tmp_path / "a.png")
    assert "2.00x  n=3" in texts.words  # moe_gpu over the loop
    assert "8.00x  n=2" in texts.words  # replayed, over the loop
    assert texts.words.count("4.00x  n=1") == 2  # replayed over eager, at each number of tokens
    assert "not measured: not installed" in texts.words
    assert "No row records a part switched off: `moe-gpu bench --ablation` does." in texts.all


def part_rows(**times_ms):
    """An ablation's rows by variant, None where it has no time."""
    rows = []
    for name, ms in times_ms.items():
        row = missing(name, "no such GPU") if ms is None else benchmark_row(name, 64, ms)
        rows.append(replace(row, scope=ABLATION))
    return rows


def test_ablation_draws_parts_added_and_left_out(texts, tmp_path):
    parts = part_rows(**{"baseline": 8.0, "+ kernels": 4.0, "+ graphs": 2.0, "all but kernels": None})
    parts += part_rows(**{"all but graphs": 4.0})
    plots.draw_ablation([GPU, *small_rows(), *parts], tmp_path / "a.png")
    added, left_out = texts.panels[-2:]
    words = [[text.get_text() for text in axis.texts] for axis in (added, left_out)]
    assert [label.get_text() for label in added.get_yticklabels()] == ["+ kernels", "+ graphs"]
    assert {"2.00x  n=1", "4.00x  n=1"} <= set(words[0])
    assert [label.get_text() for label in left_out.get_yticklabels()] == ["all but kernels", "all but graphs"]
    assert {"0.50x  n=1", "not measured: no such GPU"} <= set(words[1])
    assert "No row records a part switched off" not in texts.all


@pytest.mark.parametrize("name", [name for name in plots.FIGURES if name != "ablation_study.png"])
def test_an_ablations_variants_are_no_providers_elsewhere(name, texts, tmp_path):
    parts = part_rows(**{"baseline": 8.0, "+ kernels": 4.0})
    plots.FIGURES[name]([GPU, *small_rows(), *parts], tmp_path / name)
    assert "+ kernels" not in texts.all


@pytest.mark.parametrize("name", ["gpu_utilization.png", "scaling_analysis.png"])
def test_many_shapes_make_a_grid_and_no_strip(name, texts, tmp_path):
    rows = [replace(row, input_dim=64 * width) for width in range(1, 9) for row in small_rows()]
    plots.FIGURES[name]([GPU, *rows], tmp_path / name)
    width, height = png_size(tmp_path / name)
    assert 0.5 < width / height < 2


def test_single_points_of_a_sweep_over_experts_are_drawn_as_a_line_alone(texts, tmp_path):
    swept = [
        replace(row, num_experts=experts, hidden_dim=96, model=f"{experts} experts")
        for experts in (4, 8, 16)
        for row in small_rows()[:2]
    ]
    plots.draw_scaling([GPU, *small_rows(), *swept], tmp_path / "s.png")
    assert "16 experts" not in texts.all
    line = next(axis for axis in texts.panels if axis.get_xlabel() == "experts").lines[0]
    assert list(line.get_xdata()) == [4, 8, 16]
    plots.draw_throughput([GPU, *swept], tmp_path / "t.png")
    assert "see scaling_analysis.png" in texts.all


def test_a_reason_that_all_parts_share_is_said_once(texts, tmp_path):
    parts = part_rows(**{"baseline": 8.0, "+ kernels": None, "+ graphs": None})
    plots.draw_ablation([CPU, *small_rows(), *parts], tmp_path / "a.png")
    (said,) = [text.get_text() for text in texts.panels[-2].texts if "no such GPU" in text.get_text()]
    assert said == "no such GPU"


def test_ablation_without_graphs_says_so(texts, tmp_path):
    plots.draw_ablation([CPU, *small_rows()], tmp_path / "a.png")
    assert "No row was launched both eagerly and as a CUDA graph." in texts.all


def test_scaling_with_experts_needs_rows_that_differ_in_nothing_else(texts, tmp_path):
    plots.draw_scaling([CPU, *small_rows()], tmp_path / "s.png")
    assert "Against the number of experts: not measured" in texts.all
    other = [replace(row, num_experts=16, p50_ms=row.p50_ms * 1.5, model="custom") for row in small_rows()]
    plots.draw_scaling([CPU, *small_rows(), *other], tmp_path / "s.png")
    assert "Against the number of experts" not in texts.all
    experts = [axis for axis in texts.panels if axis.get_xlabel() == "experts"]
    assert list(experts[0].lines[0].get_xdata()) == [8, 16]
    wider = [replace(row, hidden_dim=4096) for row in other]
    plots.draw_scaling([CPU, *small_rows(), *wider], tmp_path / "s.png")
    assert "Against the number of experts: not measured" in texts.all


def test_the_busiest_and_the_unused_experts_are_named(texts, tmp_path):
    rows = [ExpertLoadRow("trace", 0, 0, 8, [1, 1, 6, 0]), ExpertLoadRow("trace", 5, 0, 8, [2, 2, 2, 2])]
    plots.draw_expert_utilization([CPU, *rows], tmp_path / "x.png")
    assert "The busiest expert takes 3.00x an even share (layer 0, expert 2, trace)" in texts.all
    assert "1 above 2x, 0 below 0.5x; without any route (layer.expert): 0.3." in texts.all
    pixels = texts.panels[0].images[0].get_array()
    assert pixels.shape == (2, 4, 4)
    assert tuple(pixels[0, 3]) == pytest.approx((0.12, 0.14, 0.16, 1.0))  # unused is black, not merely cold
    assert pixels[1].std(0).max() == pytest.approx(0)


def test_expert_shares_are_drawn_over_windows(texts, tmp_path):
    plots.draw_expert_utilization([CPU, *load_rows(layers=3, experts=8, windows=5)], tmp_path / "x.png")
    assert [axis.images[0].get_array().shape[:2] for axis in texts.panels] == [(3, 8), (8, 5), (8, 5)]


def test_training_has_four_panels_and_states_the_loss(texts, tmp_path):
    rows = [CPU, *training_rows(), *load_rows("demo", layers=2, experts=8, windows=6)]
    path = plots.draw_training(rows, tmp_path / "training_results.png")
    assert path.name == "training_results.png"
    assert "The held-out loss falls from 5.50 (step 0) to 2.57 (step 300)" in texts.words
    loss, load, balance, speed = texts.panels
    assert len(loss.lines) == 2
    assert load.images[0].get_array().shape[:2] == (16, 6)
    assert balance.get_ylim() == (0, 1.05)
    assert speed.get_ylim()[0] == 0


def test_training_without_optional_values_says_not_measured(texts, tmp_path):
    plots.draw_training([TrainingRow("run", 1, 3.0, 10, 1.0), TrainingRow("run", 2, 3.5, 20, 2.0)], tmp_path / "t.png")
    assert "The training loss rises from 3.00 (step 1) to 3.50 (step 2)" in texts.words
    assert texts.words.count("not measured") == 3
    assert "device not recorded" in texts.all


def test_training_needs_training_rows(tmp_path):
    with pytest.raises(ValueError, match="no training rows"):
        plots.draw_training([CPU, *small_rows()], tmp_path / "t.png")
    assert not list(tmp_path.iterdir())


def test_a_name_with_dollars_is_drawn_as_it_is(texts, tmp_path):
    plots.draw_throughput([CPU, replace(benchmark_row(), model="$\\bad{$")], tmp_path / "t.png")
    assert "$\\bad{$ · forward" in texts.words


def test_labels_do_not_overlap_and_stay_on_the_page(texts, tmp_path):
    rows = [CPU, *benchmark_rows(graphs=True)]
    plots.draw_throughput(rows, tmp_path / "t.png")
    assert len(texts.label_boxes) == 4
    for boxes in texts.label_boxes:
        assert len(boxes) == 6
        for index, box in enumerate(boxes):
            assert box.x1 < texts.page_box.x1
            assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_apart_moves_only_what_is_too_close():
    assert canvas._apart([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert canvas._apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    moved = canvas._apart([0.0, 0.01, 0.9, 0.95], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(moved))


def test_within_keeps_names_on_the_panel_and_apart():
    assert canvas._within([0.2, 0.5], 0.1) == pytest.approx([0.2, 0.5])
    assert canvas._within([0.95, 1.05, 1.15], 0.1) == pytest.approx([0.8, 0.9, 1.0])
    assert canvas._within([-0.15, -0.05], 0.1) == pytest.approx([0.0, 0.1])
    assert canvas._within([0.0, 0.6, 1.2], 0.6) == pytest.approx([-0.2, 0.4, 1.0])


@pytest.mark.parametrize("name", ["throughput_comparison.png", "scaling_analysis.png"])
def test_rows_that_record_times_alone_are_drawn_as_throughput_too(name, texts, tmp_path):
    rows = [replace(row, tokens_per_s=None) for row in small_rows()]
    plots.FIGURES[name]([GPU, *rows], tmp_path / name)
    assert canvas.NOT_MEASURED not in texts.words
    rate = next(axis for axis in texts.panels if axis.get_ylabel() == "tokens/s")
    assert any(line.get_ydata()[0] == pytest.approx(1 / 4.0 * 1e3) for line in rate.lines)


def test_shapes_that_ran_with_one_routing_alone_leave_no_empty_panels(texts, tmp_path):
    rows = [replace(row, input_dim=64 * width) for width in range(1, 5) for row in small_rows()]
    plots.draw_throughput([GPU, *rows, *small_rows(routing="zipf-1.2")], tmp_path / "t.png")
    assert "was not run for this shape" not in texts.all
    assert texts.all.count("zipf-1.2 routing") == 1


def test_a_long_reason_stays_in_its_panel(texts, tmp_path):
    rows = [missing("transformers_grouped_mm", "out of memory: " + "tried to allocate " * 40, "failed")]
    plots.draw_ablation([GPU, *rows], tmp_path / "a.png")
    panel = texts.panels[0]
    headline, why = (text for text in panel.texts if "not measured" in text.get_text() or "memory" in text.get_text())
    assert why.get_text().endswith("…")
    assert why.get_window_extent().y0 > panel.get_window_extent().y0
    assert not why.get_window_extent().overlaps(headline.get_window_extent())


def test_providers_that_are_not_drawn_make_no_panel_taller(tmp_path):
    rows = [benchmark_row(f"tile {number}", 64, 1.0 + number) for number in range(30)]
    plots.draw_ablation([GPU, *rows], tmp_path / "a.png")
    assert png_size(tmp_path / "a.png")[1] < 600


def test_what_was_timed_is_named_where_it_is_not_a_layer(texts, tmp_path):
    plots.draw_throughput([GPU, *small_rows(scope="4 decoder layers")], tmp_path / "t.png")
    assert "4 decoder layers" in texts.all
    assert "4 decoder layers only" not in texts.all
    plots.draw_throughput([GPU, *small_rows(scope="experts")], tmp_path / "t.png")
    assert "experts only" in texts.all
