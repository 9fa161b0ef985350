"""The benchmark: imposed routing, the float64 check, providers, timing, the suite, and the scripts on top."""

from __future__ import annotations

import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_gpu.benchmark import MoEBenchmark, measure, run_full_benchmark, run_quick_benchmark, suite, timing
from moe_gpu.benchmark.check import CHECKED_TOKENS, Checker, WrongOutputError
from moe_gpu.benchmark.problem import MemoryLimitError, Problem, estimate_bytes, make_problem, sample_choices
from moe_gpu.benchmark.providers import PROVIDERS, Built, Provider, route_by_torch
from moe_gpu.benchmark.table import print_rows, untimed
from moe_gpu.benchmark.timing import Job, Timer, attempt, describe_samples, sample_count, time_interleaved
from moe_gpu.config import MoEConfig, RouterConfig
from moe_gpu.model import MoELayer
from moe_gpu.profiler import RoutingTrace
from moe_gpu.reference import topk_reference
from moe_gpu.results import BenchmarkRow, Ceiling, Machine, percentile, read_rows, select

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = MoEConfig(24, 24, 32, 8, 2)
GROUPED = RouterConfig("sigmoid", routed_scaling_factor=2.5, n_group=4, topk_group=2)
CONFIGS = {
    "swiglu": SMALL,
    "every expert chosen": SMALL.with_(num_experts=3, top_k=3),
    "one choice": SMALL.with_(top_k=1, router=RouterConfig(norm_topk_prob=False)),
    "one renormalised choice": SMALL.with_(top_k=1),
    "biases, softmax after top-k": SMALL.with_(bias=True, router=RouterConfig(softmax_after_topk=True)),
    "sigmoid, groups, selection bias": SMALL.with_(num_experts=16, top_k=3, router=GROUPED, selection_bias=True),
    "three linear layers, odd sizes": MoEConfig(17, 9, 13, 5, 2, activation="gelu", depth=2, bias=True),
    "plain relu": SMALL.with_(activation="relu"),
}
ALIGNED = [name for name in CONFIGS if "odd" not in name]  # torch's grouped_mm wants rows of 16 bytes
DTYPES = (torch.float32, torch.bfloat16)


def sets(ids_TK: torch.Tensor) -> torch.Tensor:
    return ids_TK.long().sort(-1).values


def trace_of(ids_TK: list[list[int]], num_experts: int) -> RoutingTrace:
    return RoutingTrace(torch.tensor([ids_TK], dtype=torch.int16), num_experts, "test")


# Routing that a problem imposes


@pytest.mark.parametrize("routing", ["uniform", "zipf-1.2", "one-expert", "trace"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_impose_the_sampled_choices(routing, name, dtype):
    config = CONFIGS[name]
    trace = None
    if routing == "trace":
        ids = sample_choices(config, 11, "uniform", torch.Generator().manual_seed(3))
        trace = trace_of(ids.tolist(), config.num_experts)
    problem = make_problem(config, 50, routing, dtype, trace=trace)
    ids_TK, _ = topk_reference(problem.logits().detach(), config.top_k, config.router, problem.selection_bias_E)
    if routing == "one-expert" and config.router.n_group > 1:
        return  # experts 0, 1, 2 may lie in groups that the limit allows or not; the router decides
    assert torch.equal(sets(ids_TK), sets(problem.topk_ids_TK))
    assert problem.router_weight_EH.count_nonzero() > 0


def test_choices_of_a_token_are_distinct_and_follow_their_distribution():
    config = MoEConfig(8, 8, 8, 16, 4)
    counts = {}
    for routing in ("uniform", "zipf-0.5", "zipf-2"):
        ids = sample_choices(config, 4000, routing, torch.Generator().manual_seed(0))
        assert all(len(set(row)) == 4 for row in ids.tolist())
        counts[routing] = torch.bincount(ids.flatten(), minlength=16)
    assert counts["uniform"].min() > 900
    assert counts["uniform"].max() < 1100
    assert counts["uniform"].max() < counts["zipf-0.5"].max() < counts["zipf-2"].max()
    assert counts["zipf-2"].max() <= 4000  # without replacement


def test_zipf_popularity_of_a_single_choice():
    config = MoEConfig(8, 8, 8, 4, 1)
    ids = sample_choices(config, 40000, "zipf-1", torch.Generator().manual_seed(1))
    share = torch.bincount(ids.flatten(), minlength=4).sort(descending=True).values / 40000
    expected = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)
    assert torch.allclose(share, expected, atol=0.01)


def test_a_trace_is_replayed_and_its_dropped_routes_impose_nothing():
    problem = make_problem(SMALL, 5, "trace", trace=trace_of([[3, 1], [0, -1]], 8))
    assert problem.topk_ids_TK.tolist() == [[3, 1], [0, -1], [3, 1], [0, -1], [3, 1]]
    logits = problem.logits().detach()
    assert ((logits > 3).sum(1) == torch.tensor([2, 1, 2, 1, 2])).all()
    assert problem.rows_E().sum() == 8


def test_a_seed_gives_the_same_problem_and_another_seed_another():
    first, same, other = (make_problem(SMALL, 6, "zipf-1.2", seed=seed) for seed in (1, 1, 2))
    for name, tensor in first.leaves.items():
        assert torch.equal(tensor, same.leaves[name])
        assert not torch.equal(tensor, other.leaves[name])
    assert torch.equal(first.logit_offset_TE, same.logit_offset_TE)


def test_work_and_bytes_of_a_pass():
    problem = make_problem(SMALL, 10, "one-expert")
    parameters, router = 3 * 24 * 32, 8 * 24
    assert problem.flops("forward") == 2 * 20 * parameters + 2 * 10 * router
    assert problem.flops("forward+backward") == problem.flops("forward") + problem.flops("backward")
    assert problem.flops("backward") == 2 * problem.flops("forward")
    assert problem.min_bytes("forward") == 4 * (2 * parameters + router + 10 * 48)  # two experts are hit
    capped = replace(problem, config=SMALL.with_(capacity_factor=1.0))
    assert capped.rows_E().tolist() == [3, 3] + [0] * 6


# The check against float64


def provider_gradients(problem: Problem, checker: Checker, out_TO: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = problem.leaves
    return dict(zip(leaves, torch.autograd.grad(out_TO, list(leaves.values()), checker.grad_out()), strict=True))


@pytest.mark.parametrize("name", [*CONFIGS, "capacity"])
def test_the_truth_is_the_layer_in_float64(name):
    config = SMALL.with_(capacity_factor=0.6) if name == "capacity" else CONFIGS[name]
    problem = make_problem(config, 90, "zipf-1.2", torch.float32)
    checker = Checker(problem, gradients=True)
    assert checker.token_N.numel() == CHECKED_TOKENS
    assert checker.token_N[0] == 0
    assert checker.token_N[-1] == 89
    layer = MoELayer(problem.config).double()
    names = {"router_weight": "router_weight", "gate_up_proj": "up", "down_proj": "down", "mid_proj": "mid"}
    names |= {"gate_up_bias": "up_bias", "mid_bias": "mid_bias", "down_bias": "down_bias"}
    with torch.no_grad():
        for attribute, leaf in names.items():
            if leaf in problem.leaves:
                getattr(layer, attribute).copy_(problem.leaves[leaf])
        if problem.selection_bias_E is not None:
            layer.selection_bias_E.copy_(problem.selection_bias_E)
    x = problem.x_TH.detach().double().requires_grad_()
    product = x @ layer.router_weight.t()
    out = layer(x, problem.logits().detach().double() + product - product.detach())
    out.backward(checker.grad_out().double())
    assert torch.allclose(checker.truth.out_NO, out.detach()[checker.token_N], atol=1e-12)
    expected = {"x": x.grad[checker.token_N], "router_weight": layer.router_weight.grad}
    for attribute, leaf in names.items():
        if leaf in problem.leaves and leaf != "router_weight":
            expected[leaf] = getattr(layer, attribute).grad[checker.expert]
    assert set(expected) == set(checker.truth.gradients)
    for leaf, gradient in expected.items():
        assert torch.allclose(checker.truth.gradients[leaf], gradient, atol=1e-12), leaf


def refused(checker: Checker, out_TO: torch.Tensor) -> bool:
    try:
        checker.check_output(out_TO)
    except WrongOutputError:
        return True
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wrong_outputs_are_refused(dtype):
    problem = make_problem(SMALL, 70, "uniform", dtype)
    checker = Checker(problem)
    out = PROVIDERS["torch_loop"].build(problem).run().detach()
    assert checker.check_output(out).sensitive
    nan_at_the_end = out.clone()
    nan_at_the_end[-1, -1] = torch.nan
    wrong = {
        "zeros": torch.zeros_like(out),
        "one unwritten row": torch.cat([out[:-1], torch.zeros_like(out[:1])]),
        "NaN": nan_at_the_end,
        "shifted tokens": out.roll(1, 0),
        "too large by a tenth": out * 1.1,
        "another dtype": out.double(),
        "another shape": out[:-1],
    }
    for name, tensor in wrong.items():
        assert refused(checker, tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_gradients_are_refused(dtype):
    problem = make_problem(SMALL.with_(num_experts=64), 4, "uniform", dtype)
    checker = Checker(problem, gradients=True)
    gradients = provider_gradients(problem, checker, PROVIDERS["torch_loop"].build(problem).run())
    assert all(result.sensitive for result in checker.check_gradients(gradients).values())
    for name, gradient in gradients.items():
        for bad in (torch.zeros_like(gradient), gradient * 1.2, gradient * torch.nan):
            with pytest.raises(WrongOutputError, match=name):
                checker.check_gradients({**gradients, name: bad})
    unwritten = gradients["up"].clone()
    unwritten[checker.idle_expert, 0, 0] = 1
    with pytest.raises(WrongOutputError, match="expert without rows"):
        checker.check_gradients({**gradients, "up": unwritten})


def test_tokens_whose_choice_hangs_on_rounding_are_not_checked():
    problem = make_problem(SMALL, 8, "uniform", torch.bfloat16)
    tied = problem.logit_offset_TE.clone()
    tied[2] = 1.0
    checker = Checker(replace(problem, logit_offset_TE=tied))
    assert 2 not in checker.token_N.tolist()
    assert checker.token_N.numel() == 7
    nothing = torch.nn.Parameter(torch.zeros_like(problem.router_weight_EH))
    with pytest.raises(ValueError, match="clear choice"):
        Checker(replace(problem, logit_offset_TE=torch.ones_like(tied), router_weight_EH=nothing))


# Providers


def check_provider(name: str, problem: Problem) -> None:
    checker = Checker(problem, gradients=True)
    out = PROVIDERS[name].build(problem).run()
    assert checker.check_output(out).sensitive
    for leaf, result in checker.check_gradients(provider_gradients(problem, checker, out)).items():
        if result.scale > 0:
            assert result.sensitive, leaf


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", ["torch_loop", "moe_gpu", "torch_grouped_mm"])
def test_providers_are_right(provider, name, dtype):
    if provider == "torch_grouped_mm" and name not in ALIGNED:
        pytest.skip("torch's grouped_mm wants rows of a multiple of 16 bytes")
    check_provider(provider, make_problem(CONFIGS[name], 40, "zipf-1.2", dtype))


@pytest.mark.parametrize("name", [name for name in ALIGNED if CONFIGS[name].depth == 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_is_right(name, dtype):
    pytest.importorskip("transformers.integrations.moe", reason="transformers>=5.7 is not installed")
    check_provider("transformers_grouped_mm", make_problem(CONFIGS[name], 40, "zipf-1.2", dtype))


@pytest.mark.parametrize("provider", ["torch_loop", "moe_gpu"])
def test_our_layers_drop_tokens_over_capacity_rightly(provider):
    check_provider(provider, make_problem(SMALL.with_(capacity_factor=0.6), 80, "zipf-1.2"))


@pytest.mark.parametrize("name", CONFIGS)
def test_routing_as_models_write_it_equals_the_reference(name):
    config = CONFIGS[name]
    problem = make_problem(config, 30)
    args = (problem.logits().detach(), config.top_k, config.router, problem.selection_bias_E)
    (ids, weights), (expected_ids, expected) = route_by_torch(*args), topk_reference(*args)
    assert torch.equal(ids, expected_ids.long())
    assert torch.allclose(weights, expected, atol=1e-6)


def test_a_model_with_a_shared_expert_is_timed_without_it():
    problem = make_problem(SMALL.with_(shared_hidden_dim=16), 4)
    assert problem.config.shared_hidden_dim == 0
    check_provider("moe_gpu", problem)


def test_backends_and_reasons_are_in_words():
    problem = make_problem(SMALL.with_(capacity_factor=1.0), 4)
    if not torch.cuda.is_available():
        assert PROVIDERS["moe_gpu"].build(problem).backend.startswith("reference: ")
    assert "capacity_factor=1.0" in PROVIDERS["torch_grouped_mm"].unavailable(problem, "forward")
    assert PROVIDERS["torch_loop"].unavailable(problem, "backward") is None


PEERS = ("scattermoe", "sonicmoe", "triton_kernels")


@pytest.mark.parametrize("provider", PEERS)
def test_a_peer_that_is_not_installed_says_so(provider, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "is not installed" in PROVIDERS[provider].unavailable(make_problem(SMALL, 4), "forward")


def test_the_unrelated_package_of_the_same_name_is_not_mistaken_for_triton_kernels(monkeypatch, tmp_path):
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), config=SMALL)
    reason = PROVIDERS["triton_kernels"].unavailable(on_a_gpu, "forward")
    assert "this triton_kernels has no triton_kernels.matmul.matmul" in reason
    sys.modules.pop("triton_kernels")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """A module, and the packages above it, that exists for one test."""
    module = ModuleType(name)
    vars(module).update(contents)
    parent, _, child = name.rpartition(".")
    if parent and parent not in sys.modules:
        install(monkeypatch, parent)
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    monkeypatch.setitem(sys.modules, name, module)


def grouped_product(rows: torch.Tensor, w_EKN: torch.Tensor, ends: list[int]) -> torch.Tensor:
    parts = zip([0, *ends[:-1]], ends, strict=True)
    return torch.cat([rows[a:b] @ w_EKN[e] for e, (a, b) in enumerate(parts)])


def test_the_scattermoe_adapter_against_its_interface_in_plain_torch(monkeypatch):
    def flatten_sort_count(ids, num_experts):
        experts, order = ids.flatten().sort()
        return experts, order, torch.bincount(experts, minlength=num_experts).cumsum(0)

    def parallel_linear(x, w_EKN, k, experts, order, ends, gates=None, grouped_in=False, grouped_out=False):
        rows = x if grouped_in else x[order // k]
        y = grouped_product(rows, w_EKN, ends.tolist())
        if not grouped_out:
            y = torch.empty_like(y).index_copy(0, order, y)
        return y if gates is None else (gates.unsqueeze(1) @ y.view(*gates.shape, -1)).squeeze(1)

    contents = dict(flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    install(monkeypatch, "scattermoe.parallel_experts", **contents)
    for config in (SMALL, SMALL.with_(activation="gelu", depth=2)):
        check_provider("scattermoe", make_problem(config, 30))


@pytest.mark.parametrize("flag", ["concat_layout", "is_concatenated_gate_up"])
def test_the_sonicmoe_adapter_against_its_interface_in_plain_torch(monkeypatch, flag):
    def entry(
        x, scores, token, expert, w1, b1, w2, b2, E, stream_id, activation_type, is_inference_mode_enabled, flags
    ):
        assert activation_type == "SWIGLU"
        assert flags == {flag: True}
        assert b1 is None
        assert b2 is None
        assert (token.diff() >= 0).all()
        assert token.dtype == expert.dtype == torch.int32
        out = x.new_zeros(x.shape)
        for route in range(token.numel()):
            e, t = expert[route], token[route].long()
            gate, up = (w1[:, :, e] @ x[t]).chunk(2)
            out = out.index_add(
                0, t[None], (scores[route] * (w2[:, :, e] @ (torch.nn.functional.silu(gate) * up)))[None]
            )
        return out, None

    if flag == "concat_layout":

        def general(*args, concat_layout, **named):
            return entry(*args, flags={"concat_layout": concat_layout}, **named)
    else:

        def general(*args, is_concatenated_gate_up, **named):
            return entry(*args, flags={"is_concatenated_gate_up": is_concatenated_gate_up}, **named)

    install(monkeypatch, "sonicmoe", moe_general_routing_inputs=general)
    install(monkeypatch, "sonicmoe.enums", ActivationType=SimpleNamespace(SWIGLU="SWIGLU"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    check_provider("sonicmoe", make_problem(SMALL, 12))


def test_the_triton_kernels_adapter_against_its_interface_in_plain_torch(monkeypatch):
    def matmul(a, b_EKN, bias, a_ragged_metadata=None, gather_indx=None, scatter_indx=None):
        counts = a_ragged_metadata.tolist()
        assert b_EKN.stride(1) == 1
        assert a_ragged_metadata.dtype == torch.int32
        rows = a if gather_indx is None else a[gather_indx.long()]
        y = grouped_product(rows, b_EKN, torch.tensor(counts).cumsum(0).tolist())
        if bias is not None:
            y = y + bias.repeat_interleave(a_ragged_metadata.long(), 0)
        return y if scatter_indx is None else torch.empty_like(y).index_copy(0, scatter_indx.long(), y)

    def make_ragged_tensor_metadata(slice_sizes, total):
        assert slice_sizes.sum() == total
        return slice_sizes

    install(monkeypatch, "triton_kernels.matmul", matmul=matmul)
    install(monkeypatch, "triton_kernels.tensor", make_ragged_tensor_metadata=make_ragged_tensor_metadata)
    for config in (SMALL, SMALL.with_(bias=True)):
        problem = make_problem(config, 30)
        with torch.no_grad():
            assert Checker(problem).check_output(PROVIDERS["triton_kernels"].build(problem).run()).sensitive


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
    job = Job(handed.append, prepare=lambda: time.sleep(0.05) or "state")
    assert Timer(CPU)(job) < 40
    assert handed == ["state"]


def test_a_call_is_timed_in_milliseconds():
    assert 20 <= Timer(CPU)(Job(lambda _: time.sleep(0.02))) < 200


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


def test_memory_is_estimated_before_anything_is_allocated():
    begin = time.perf_counter()
    with pytest.raises(MemoryLimitError, match=r"num_tokens=10000000 needs about .* GiB.*give at most num_tokens=\d+"):
        MoEBenchmark(batch_sizes=(10_000_000,), device="cpu")
    with pytest.raises(MemoryLimitError, match="choose fewer or smaller experts"):
        MoEBenchmark(8192, 8192, 65536, 4096, 2, batch_sizes=(1,), device="cpu")
    assert time.perf_counter() - begin < 1


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
    monkeypatch.setattr(sys, "argv", ["run_h200.py", "--quick", str(output)])
    assert load("benchmarks/run_h200.py")["main"]() == 0
    rows = select(read_rows(output), BenchmarkRow)
    assert {row.model for row in rows} == {"qwen3-30b-a3b", "mixtral-8x7b", "olmoe-1b-7b"}
    assert {row.mode for row in rows if row.status == "ok"} == {"forward", "forward+backward"}
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
