"""What each part brings: the variants, their checks, and honest rows where a part cannot be had."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from moe_gpu.benchmark import ablation
from moe_gpu.benchmark.ablation import GRAPHS, KERNELS, PARTS, SLICES, STREAMS, Ablation, WithShared, variants
from moe_gpu.benchmark.check import WrongOutputError
from moe_gpu.benchmark.problem import make_problem
from moe_gpu.config import MoEConfig
from moe_gpu.cuda_graph_manager import Arm, BatchScheduler, StreamManager
from moe_gpu.cuda_graph_manager.scheduler import IN_TURN, Choice
from moe_gpu.results import ABLATION, BenchmarkRow, Machine, select

CONFIG = MoEConfig(32, 32, 32, 8, 2)


def small(**changes) -> Ablation:
    """One size, one routing, two numbers of experts, on the CPU."""
    options = dict(batch_sizes=(16,), routings=("uniform",), expert_counts=(4, 8), num_iterations=2, device="cpu")
    return Ablation(CONFIG, **{**options, **changes})


def test_every_part_is_added_once_and_left_out_once():
    found = {variant.name: variant.parts for variant in variants()}
    assert found["baseline"] == frozenset()
    added = [parts for name, parts in found.items() if name.startswith("+ ")]
    assert [len(parts) for parts in added] == [1, 2, 3, 4, 5]
    assert all(before < after for before, after in itertools.pairwise(added))
    for part in PARTS:
        assert found[f"all but {part}"] == frozenset(PARTS) - {part}


def test_a_cpu_measures_the_baseline_and_gives_reasons_for_the_rest():
    run = small()
    told = []
    rows = run.run(lambda done, total, text: told.append((done, total)))
    assert isinstance(rows[0], Machine)
    found = [row for row in select(rows, BenchmarkRow) if row.scope == ABLATION]
    assert [row.provider for row in found] == [variant.name for variant in variants()]
    assert (found[0].status, found[0].launch, found[0].flops) == ("ok", "eager", None)
    assert found[0].p50_ms > 0
    assert found[0].max_error <= found[0].allowed_error
    for row in found[1:]:
        assert (row.status, row.p50_ms) == ("unavailable", None)
        assert "Triton kernels" in row.reason
        assert row.launch == ("graph" if row.provider not in ("+ Triton kernels", "all but CUDA graphs") else "eager")
    sweep = [row for row in select(rows, BenchmarkRow) if row.scope == "layer"]
    assert {row.num_experts for row in sweep} == {4, 8}
    assert {row.top_k for row in sweep} == {2}
    assert len(sweep) + len(found) == run.num_steps
    assert told[-1] == (run.num_steps, run.num_steps)


def test_a_routers_groups_do_not_break_the_sweep_over_experts():
    grouped = replace(CONFIG.router, score_function="sigmoid", n_group=4, topk_group=2)
    run = Ablation(CONFIG.with_(router=grouped), batch_sizes=(8,), expert_counts=(4, 6), device="cpu")
    assert {benchmark.config.num_experts for benchmark in run._sweep} == {4, 6}


def test_the_shared_experts_output_is_taken_off_before_the_check():
    problem = make_problem(CONFIG, 32)
    shared = ablation.make_shared_expert(problem, 0)
    checker = WithShared(problem, shared)
    out = ablation._build(frozenset(), shared, [], problem).run
    with torch.no_grad():
        whole = out()
        checker.check_output(whole)
        for wrong in (whole - shared(problem.x_TH), whole * 1.1, whole[:8]):
            with pytest.raises(WrongOutputError):
                checker.check_output(wrong)


STREAMED, SLICED = Arm("streams"), Arm("cta 6+2", True, "cta", (6, 2))


def scheduler_after(times_ms: dict[str, float], arms=(IN_TURN, STREAMED, SLICED)) -> BatchScheduler:
    scheduler = BatchScheduler(StreamManager(1, device="cpu"), arms=arms)
    refused = {arm.name: "no such SMs" for arm in arms if arm.name not in times_ms}
    scheduler.choices[0] = Choice(0.0, 0, IN_TURN, "in turn is fastest of 3", times_ms, refused)
    return scheduler


def test_a_part_serves_even_where_it_loses_and_every_time_is_said():
    scheduler = scheduler_after({"in turn": 1.0, "streams": 1.5, "cta 6+2": 1.25})
    said = ablation._force(scheduler)
    assert scheduler.choices[0].arm == SLICED
    for text in ("cta 6+2 (the optimiser's choice: in turn;", "in turn 1000.0 us", "streams 1500.0 us"):
        assert text in said


def test_no_way_to_run_side_by_side_is_a_failure_with_its_reason():
    with pytest.raises(RuntimeError, match="no such SMs"):
        ablation._force(scheduler_after({"in turn": 1.0}))


def test_ways_belong_to_their_part():
    assert ablation._part_of(STREAMED) == STREAMS
    assert ablation._part_of(SLICED) == SLICES


def test_parts_without_the_kernels_are_refused():
    problem = make_problem(CONFIG, 8)
    assert ablation._unavailable(frozenset(), problem, "forward") is None
    assert "need Triton kernels" in ablation._unavailable(frozenset({GRAPHS}), problem, "forward")
    assert "no Triton kernels here" in ablation._unavailable(frozenset({KERNELS, GRAPHS}), problem, "forward")


def test_the_printed_table_names_every_variant(capsys):
    ablation.print_ablation(small(expert_counts=(4,)).run())
    printed = capsys.readouterr().out
    for variant in variants():
        assert variant.name in printed
    assert "1.00x" in printed
    assert "unavailable: no Triton kernels here" in printed
