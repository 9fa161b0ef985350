"""Timing, the suite, and the scripts on top of it."""

from __future__ import annotations

import runpy
import subprocess
import sys
import time

import pytest
import torch

from moe_gpu.benchmark import MoEBenchmark, measure, run_full_benchmark, run_quick_benchmark, suite, timing
from moe_gpu.benchmark.problem import MemoryLimitError, estimate_bytes, make_problem
from moe_gpu.benchmark.providers import PROVIDERS, Built, Provider, route_by_torch
from moe_gpu.benchmark.table import print_rows, untimed
from moe_gpu.benchmark.timing import Job, Timer, attempt, describe_samples, sample_count, time_interleaved
from moe_gpu.moe_layer import MoELayer
from moe_gpu.results import BenchmarkRow, Ceiling, Machine, percentile, read_rows, select
from tests.benchmark_cases import CPU, PEERS, ROOT, SMALL, trace_of

# Timing


def test_jobs_are_interleaved_and_fewer_samples_are_spread_over_the_rounds():
    calls = []
    jobs = {name: Job(lambda _, name=name: calls.append(name)) for name in "ABC"}
    samples, failures = time_interleaved(jobs, Timer(CPU), {"A": 4, "B": 2, "C": 4})
    assert "".join(calls) == "ACABCACABC"
    assert {name: len(times) for name, times in samples.items()} == {"A": 4, "B": 2, "C": 4}
    assert failures == {}


def test_a_job_that_fails_midway_is_left_out_and_the_others_go_on():
    calls = iter(range(100))

    def fails_at_third(_):
        if next(calls) == 2:
            raise RuntimeError("broke\nwith more lines")

    jobs = {"bad": Job(fails_at_third), "good": Job(lambda _: None)}
    samples, failures = time_interleaved(jobs, Timer(CPU), {"bad": 5, "good": 5})
    assert failures == {"bad": "RuntimeError: broke"}
    assert list(samples) == ["good"]
    assert len(samples["good"]) == 5


def test_preparation_is_not_timed_and_its_result_is_handed_over():
    handed = []
    job = Job(handed.append, prepare=lambda: time.sleep(0.2) or "state")
    assert min(Timer(CPU)(job) for _ in range(3)) < 100
    assert handed == ["state"] * 3


def test_a_call_is_timed_in_milliseconds():
    assert 20 <= Timer(CPU)(Job(lambda _: time.sleep(0.02))) < 20_000  # milliseconds, not seconds or microseconds


@pytest.mark.parametrize(
    ("estimate_ms", "wanted", "budget_s", "expected"),
    [(1.0, 50, 1.0, 50), (100.0, 50, 1.0, 10), (1000.0, 50, 1.0, 5), (1000.0, 3, 1.0, 3), (0.0, 50, 1.0, 50)],
)
def test_samples_fit_the_time_budget(estimate_ms, wanted, budget_s, expected):
    assert sample_count(estimate_ms, wanted, budget_s) == expected


def test_statistics_of_samples():
    times = [4.0, 1.0, 2.0, 3.0]
    values = describe_samples(times)
    assert values == {
        "samples": 4, "mean_ms": 2.5, "min_ms": 1.0, "max_ms": 4.0, "std_ms": pytest.approx(1.2909944),
        "p20_ms": pytest.approx(1.6), "p50_ms": 2.5, "p80_ms": pytest.approx(3.4),
        "p95_ms": percentile(times, 0.95),
    }  # fmt: skip
    assert "std_ms" not in describe_samples([1.0])


def test_an_attempt_never_hides_an_interrupt():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted)


def test_ceilings_are_rates_of_plain_work():
    matmul, copy = timing.measure_ceilings(CPU, torch.float32)
    assert (matmul.name, matmul.unit, copy.name, copy.unit) == ("matmul", "FLOP/s", "copy", "B/s")
    assert 1e9 < matmul.value < 1e14
    assert 1e8 < copy.value < 1e13


# The suite


def small_benchmark(**changes) -> MoEBenchmark:
    settings = dict(batch_sizes=(3, 17), num_iterations=4, device="cpu", row_budget_s=0.05)
    return MoEBenchmark(16, 16, 32, 8, 2, **{**settings, **changes})


@pytest.fixture(scope="module")
def comparison() -> MoEBenchmark:
    benchmark = small_benchmark(
        modes=("forward", "backward", "forward+backward"), routings=("uniform", "zipf-1.2"), launches=("eager", "graph")
    )
    benchmark.run_comparison()
    return benchmark


def test_a_comparison_has_a_row_for_every_case(comparison):
    machine, matmul, copy, *rows = comparison.rows
    assert isinstance(machine, Machine)
    assert isinstance(matmul, Ceiling)
    assert isinstance(copy, Ceiling)
    assert len(rows) == comparison.num_steps == 2 * 2 * (3 + 1) * len(PROVIDERS)
    for row in rows:
        expected = "unavailable" if row.launch == "graph" or row.provider in PEERS else "ok"
        if row.provider != "transformers_grouped_mm":
            assert row.status == expected, row
        assert (row.status == "ok") == (row.p50_ms is not None) == (row.reason is None)


def test_the_figures_of_a_row_follow_from_its_times(comparison):
    ceilings = {ceiling.name: ceiling.value for ceiling in select(comparison.rows, Ceiling)}
    timed = [row for row in select(comparison.rows, BenchmarkRow) if row.status == "ok"]
    assert {row.provider for row in timed} >= {"torch_loop", "torch_grouped_mm", "moe_gpu"}
    for row in timed:
        seconds = row.p50_ms / 1e3
        assert row.samples == 4
        assert row.min_ms <= row.p20_ms <= row.p50_ms <= row.p80_ms <= row.p95_ms <= row.max_ms
        assert row.tokens_per_s == pytest.approx(row.num_tokens / seconds)
        assert row.tflops * 1e12 == pytest.approx(row.flops / seconds)
        assert row.flops_share == pytest.approx(row.flops / seconds / ceilings["matmul"])
        assert row.bandwidth_share == pytest.approx(row.min_bytes / seconds / ceilings["copy"])
        assert 0 <= row.max_error <= row.allowed_error
        assert row.peak_memory_bytes is None
        assert row.power_w is None


def test_results_survive_the_file_and_are_printed(comparison, tmp_path, capsys):
    comparison.save_results(tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == comparison.rows
    comparison.print_results()
    printed = capsys.readouterr().out
    assert "T=17, zipf-1.2 routing, forward+backward" in printed
    assert sum("torch_loop" in line and "1.00x" in line for line in printed.splitlines()) == 2 * 2 * 3
    assert "not timed: moe_gpu unavailable: CUDA graphs need an NVIDIA GPU" in printed


def test_results_are_asked_for_after_the_run(tmp_path):
    for call in (small_benchmark().print_results, lambda: small_benchmark().save_results(tmp_path / "rows.jsonl")):
        with pytest.raises(ValueError, match="run_comparison"):
            call()
    assert not list(tmp_path.iterdir())


def with_provider(monkeypatch: pytest.MonkeyPatch, name: str, run, unavailable=lambda problem, mode: None) -> None:
    provider = Provider(name, unavailable, lambda problem: Built(lambda: run(problem), "test"))
    providers = {"torch_loop": PROVIDERS["torch_loop"], name: provider}
    monkeypatch.setattr(measure, "PROVIDERS", providers)
    monkeypatch.setattr(suite, "PROVIDERS", providers)


def only_row(rows: list, provider: str) -> BenchmarkRow:
    (row,) = (row for row in rows if row.provider == provider)
    return row


def test_a_wrong_provider_is_not_timed(monkeypatch):
    with_provider(monkeypatch, "zeros", lambda problem: torch.zeros_like(problem.grad_out_TO))
    rows = small_benchmark(batch_sizes=(9,)).measure()
    assert only_row(rows, "zeros").status == "wrong"
    assert only_row(rows, "zeros").samples is None
    assert only_row(rows, "zeros").reason.startswith("output is off by")
    assert only_row(rows, "torch_loop").status == "ok"


def test_a_provider_with_wrong_gradients_is_timed_forward_only(monkeypatch):
    def no_gradient_through_the_routing(problem):
        logits = problem.logits().detach()
        ids, weights = route_by_torch(logits, 2, problem.config.router, None)
        layer = MoELayer(problem.config)
        layer.gate_up_proj, layer.down_proj = problem.weights.up_EGH, problem.weights.down_EOI
        return layer.run_experts(problem.x_TH, ids, weights) + 0 * problem.router_weight_EH.sum()

    with_provider(monkeypatch, "cheat", no_gradient_through_the_routing)
    rows = small_benchmark(batch_sizes=(9,), modes=("forward", "backward"), providers=["cheat"]).measure()
    assert [row.status for row in rows] == ["ok", "wrong"]
    assert rows[1].reason.startswith("gradient of ")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate"), "out of memory: tried to allocate"),
        (AssertionError("bad\nshape"), "AssertionError: bad"),
        (KeyError("name"), "KeyError: 'name'"),
    ],
)
def test_a_provider_that_raises_is_a_row_and_the_run_goes_on(monkeypatch, error, reason):
    def raises(problem):
        raise error

    with_provider(monkeypatch, "broken", raises)
    rows = small_benchmark(batch_sizes=(9,)).measure()
    assert (only_row(rows, "broken").status, only_row(rows, "broken").reason) == ("failed", reason)
    assert only_row(rows, "torch_loop").status == "ok"
    assert untimed(rows) == [f"not timed: broken failed: {reason} (T=9 forward eager)"]


def test_a_provider_without_a_gradient_is_a_failed_row(monkeypatch):
    with_provider(monkeypatch, "detached", lambda problem: PROVIDERS["torch_loop"].build(problem).run().detach())
    rows = small_benchmark(batch_sizes=(9,), modes=("forward+backward",)).measure()
    assert only_row(rows, "detached").status == "failed"


def test_progress_counts_every_row_up_to_the_total():
    seen = []
    benchmark = small_benchmark(on_progress=lambda *call: seen.append(call), providers=["torch_loop", "moe_gpu"])
    benchmark.run_comparison()
    assert [done for done, _, _ in seen] == [0, 1, 2, 3, 4]
    assert {total for _, total, _ in seen} == {4}
    assert seen[1][2] == "custom T=3 uniform forward eager moe_gpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (0,)}, "num_tokens=0"),
        ({"batch_sizes": (-1,)}, "num_tokens=-1"),
        ({"batch_sizes": (2.5,)}, "num_tokens=2.5"),
        ({"batch_sizes": ()}, "batch_sizes is empty"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"dtype": "fp7"}, "dtype='fp7' is not one of fp32, fp16, bf16"),
        ({"dtype": torch.int32}, "dtype='int32'"),
        ({"modes": ("sideways",)}, "'sideways' is not one of forward, backward"),
        ({"modes": "forward"}, "must be a sequence"),
        ({"launches": ("lazy",)}, "'lazy' is not one of eager, graph"),
        ({"launches": ("graph",), "modes": ("backward",)}, "add 'forward'"),
        ({"providers": ("vllm",)}, "'vllm' is not one of torch_loop"),
        ({"providers": ()}, "providers is empty"),
        ({"routings": ("zipf--1",)}, "zipf-S with S above 0"),
        ({"routings": ("zipf-nan",)}, "zipf-S"),
        ({"routings": ("best",)}, "routing='best' is not one of uniform"),
        ({"routings": ("trace",)}, "needs a recorded trace"),
        ({"routings": ("trace",), "trace": trace_of([[0, 1]], 4)}, "num_experts=4 and top_k=2"),
        ({"routings": ()}, "at least one name"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": "cuda:99"}, "PyTorch sees"),
        ({"row_budget_s": 0}, "row_budget_s=0"),
    ],
)
def test_mistakes_name_the_value_and_what_is_allowed(changes, message):
    with pytest.raises(ValueError, match=message):
        small_benchmark(**changes)


def test_memory_is_estimated_before_anything_is_allocated(monkeypatch):
    for name in ("empty", "zeros", "randn", "rand"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a tensor was made first"))
    with pytest.raises(MemoryLimitError, match=r"num_tokens=10000000 needs about .* GiB.*give at most num_tokens=\d+"):
        MoEBenchmark(batch_sizes=(10_000_000,), device="cpu")
    with pytest.raises(MemoryLimitError, match="choose fewer or smaller experts"):
        MoEBenchmark(8192, 8192, 65536, 4096, 2, batch_sizes=(1,), device="cpu")


def test_the_memory_that_is_advised_is_accepted():
    with pytest.raises(MemoryLimitError) as refused:
        MoEBenchmark(batch_sizes=(10_000_000,), device="cpu")
    most = int(str(refused.value).rsplit("=", 1)[1])
    MoEBenchmark(batch_sizes=(most // 2,), device="cpu")


def test_the_estimate_covers_what_a_problem_holds():
    for gradients in (False, True):
        problem = make_problem(SMALL, 1000)
        held = sum(tensor.nbytes for tensor in problem.leaves.values()) + problem.logit_offset_TE.nbytes
        held += problem.grad_out_TO.nbytes + problem.topk_ids_TK.nbytes
        assert estimate_bytes(SMALL, 1000, torch.float32, gradients) > held


def test_quick_and_full_take_overrides():
    tiny = dict(input_dim=16, expert_dim=16, hidden_dim=32, device="cpu", batch_sizes=(2,), num_iterations=1)
    tiny |= dict(providers=["moe_gpu"], row_budget_s=0.01)
    rows = select(run_quick_benchmark(**tiny), BenchmarkRow)
    assert [(row.model, row.hidden_dim, row.num_experts, row.samples) for row in rows] == [("custom", 32, 8, 1)]
    rows = run_full_benchmark(**tiny, presets=["small", "olmoe-1b-7b"])
    assert len(select(rows, Machine)) == 1
    assert len(select(rows, Ceiling)) == 2
    assert [row.num_experts for row in select(rows, BenchmarkRow)] == [8] * 4 + [64] * 4
    with pytest.raises(ValueError, match="'huge' is not one of small"):
        run_full_benchmark(presets=["huge"])


def test_a_preset_that_does_not_fit_is_a_row_and_the_others_run(monkeypatch):
    monkeypatch.setattr("moe_gpu.benchmark.problem.free_memory_bytes", lambda device: 1 << 28)
    settings = dict(device="cpu", batch_sizes=(2,), modes=("forward",), routings=("uniform",), num_iterations=1)
    rows = run_full_benchmark(presets=["small", "deepseek-v3"], providers=["moe_gpu"], **settings)
    fits, misfit = select(rows, BenchmarkRow)
    assert (fits.model, fits.status) == ("small", "ok")
    assert (misfit.model, misfit.status, misfit.p50_ms) == ("deepseek-v3", "unavailable", None)
    assert "GiB" in misfit.reason


def test_there_must_be_something_to_run():
    with pytest.raises(ValueError, match="no benchmark to run"):
        suite.run_benchmarks([])


# The scripts


def load(script: str) -> dict:
    return runpy.run_path(str(ROOT / script), run_name="script")


def test_bad_flags_of_the_example_leave_no_traceback():
    command = [sys.executable, str(ROOT / "examples" / "run_benchmark.py"), "--tokens", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "-1"], "-1 is below the limit"),
        (["--quick", "--full"], "not allowed with"),
        (["--experts", "8", "--top-k", "9"], "top_k=9 exceeds num_experts=8"),
        (["--dtype", "fp7"], "fp7"),
        (["--tokens", "10000000"], "give at most num_tokens="),
        (["--bogus"], "--bogus"),
        (["--output", "no/such/folder/rows.jsonl"], "cannot write"),
    ],
)
def test_bad_flags_of_the_example_are_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        load("examples/run_benchmark.py")["main"](arguments)
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_the_example_runs_from_flags(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    arguments = ["--tokens", "2", "3", "--experts", "4", "--top-k", "1", "--hidden-dim", "16", "--dtype", "fp32"]
    assert load("examples/run_benchmark.py")["main"]([*arguments, "--output", str(output)]) == 0
    rows = select(read_rows(output), BenchmarkRow)
    assert {(row.num_tokens, row.num_experts, row.top_k, row.hidden_dim) for row in rows} == {
        (2, 4, 1, 16),
        (3, 4, 1, 16),
    }
    assert str(output) in capsys.readouterr().out


def test_the_example_asks_at_a_terminal(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    answers = iter(["slow", "custom", "x", "4", "4", "2", "16", "fp32", str(output)])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert load("examples/run_benchmark.py")["main"]([]) == 0
    assert {row.num_tokens for row in select(read_rows(output), BenchmarkRow)} == {4}
    assert "'slow' is not one of quick, full, custom" in capsys.readouterr().out


def test_the_h200_script_runs_anywhere_when_quick(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.jsonl"
    rates = {"matmul": (1e12, "FLOP/s"), "copy": (1e10, "B/s")}
    ceilings = [Ceiling(name, "bfloat16", *rate, "given") for name, rate in rates.items()]
    monkeypatch.setattr(timing, "measure_ceilings", lambda *_: ceilings)  # CPUs take seconds a product of bfloat16
    monkeypatch.setattr(sys, "argv", ["run_h200.py", "--quick", str(output)])
    assert load("benchmarks/run_h200.py")["main"]() == 0
    rows = select(read_rows(output), BenchmarkRow)
    assert {row.model for row in rows} == {"qwen3-30b-a3b", "mixtral-8x7b", "olmoe-1b-7b"}
    assert {row.mode for row in rows if row.status == "ok"} == {"forward", "forward+backward"}
    assert select(read_rows(output), Ceiling) == ceilings
    printed = capsys.readouterr().out
    assert "goals: at least 3x torch_loop" in printed


def h200_rows(ours_ms: float, loop_ms: float, peer_ms: float | None) -> list[BenchmarkRow]:
    def row(provider: str, p50_ms: float | None, launch: str = "eager") -> BenchmarkRow:
        sizes = (2048, 768, 2048, 128, 8)
        status = "unavailable" if p50_ms is None else "ok"
        shape = (*sizes, "bfloat16", "uniform", "forward", launch)
        return BenchmarkRow(provider, status, "qwen3-30b-a3b", 64, *shape, p50_ms=p50_ms)

    rows = [row("torch_loop", loop_ms), row("moe_gpu", ours_ms), row("transformers_grouped_mm", peer_ms)]
    return [*rows, row("moe_gpu", ours_ms / 2, "graph")]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((1.0, 3.1, 1.2), ["all hold", "500.0"]),
        ((1.0, 2.9, 1.2), ["missed: qwen3-30b-a3b T=64 forward: 2.90x torch_loop, wanted 3x"]),
        ((1.0, 4.0, 0.9), ["missed: qwen3-30b-a3b T=64 forward: 0.90x transformers_grouped_mm, wanted 1x"]),
        (
            (1.0, 4.0, None),
            ["not measured: qwen3-30b-a3b T=64 forward against transformers", "that was measured holds"],
        ),
    ],
)
def test_the_h200_summary_says_which_goals_hold(times, expected, capsys):
    load("benchmarks/run_h200.py")["print_summary"](h200_rows(*times))
    printed = capsys.readouterr().out
    for text in expected:
        assert text in printed
    if "missed" in expected[0]:
        assert "hold" not in printed.split("goals:")[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graphs_on_a_gpu_and_a_failed_capture_leaves_nothing_behind():
    benchmark = MoEBenchmark(
        64, 64, 128, 8, 2, (16,), 5, launches=("eager", "graph"), providers=["torch_loop", "moe_gpu"], row_budget_s=0.1
    )
    for _ in range(2):
        rows = benchmark.measure()
        assert [(row.provider, row.launch, row.status) for row in rows] == [
            ("torch_loop", "eager", "ok"),
            ("moe_gpu", "eager", "ok"),
            ("torch_loop", "graph", "failed"),
            ("moe_gpu", "graph", "ok"),
        ]
        assert rows[1].peak_memory_bytes > 0
    print_rows(rows)
