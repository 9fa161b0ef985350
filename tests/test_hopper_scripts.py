"""The scripts that record the experts beside their rivals: what of them can be seen without a GPU."""

from __future__ import annotations

import functools
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moe_gpu.benchmark.timing import Timer
from moe_gpu.config import MoEConfig
from moe_gpu.machine import describe_machine
from moe_gpu.reference import ExpertWeights
from moe_gpu.results import BenchmarkRow, Finding, read_rows, select
from moe_gpu.triton_kernels.ops import TritonExpertOps

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CONFIG = MoEConfig(64, 64, 32, 8, 3)


@pytest.fixture
def scripts(monkeypatch):
    """The modules as the script sees them: its folder is on the path, the peers' packages are not."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("vllm", "triton_kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    names = {"problem": "hopper_problem", "peers": "hopper_peers", "fp8": "hopper_fp8", "run": "run_hopper"}
    return SimpleNamespace(**{name: import_module(module) for name, module in names.items()})


@pytest.fixture
def recorder(scripts, tmp_path, monkeypatch):
    """A recorder of the CPU, where a graph is the call itself."""
    monkeypatch.setattr(scripts.run, "describe_machine", lambda device: describe_machine(torch.device("cpu")))
    monkeypatch.setattr(scripts.run, "measure_ceilings", lambda device, dtype: [])
    monkeypatch.setattr(scripts.run, "Timer", lambda device: Timer(torch.device("cpu")))
    monkeypatch.setattr(scripts.run, "capture", lambda run, device: SimpleNamespace(replay=run))
    monkeypatch.setattr(scripts.run, "make_weights", lambda config: scripts.problem.make_weights(config, "cpu"))
    on_cpu = functools.partial(scripts.problem.Problem, device="cpu")
    monkeypatch.setattr(scripts.run, "Problem", on_cpu)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="none"))
    monkeypatch.setattr(scripts.run, "PRESETS", {scripts.run.QWEN: CONFIG})
    monkeypatch.setattr(scripts.run, "COPY_BYTES", 0)
    return scripts.run.Recorder(tmp_path / "rows.jsonl")


@pytest.fixture
def problem(scripts):
    return scripts.problem.Problem(CONFIG, 40, "zipf-0.6", device="cpu")


def install(monkeypatch, name, **attributes):
    """A package of that dotted name, and those above it, that hold `attributes`."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        above = ".".join(parts[:depth])
        if not isinstance(sys.modules.get(above), ModuleType):
            monkeypatch.setitem(sys.modules, above, ModuleType(above))
    for key, value in attributes.items():
        setattr(sys.modules[name], key, value)


def test_arguments_and_a_machine_without_a_gpu_end_in_one_line(scripts, tmp_path, monkeypatch, capsys):
    assert scripts.run.TABLES == (
        "training",
        "decode",
        "others",
        "skew",
        "large_skew",
        "fp8",
        "budget",
        "precision",
        "routing",
    )
    assert all(callable(getattr(scripts.run, name)) for name in scripts.run.TABLES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in (([], "needs an NVIDIA GPU"), (["--table", "encode"], "invalid choice: 'encode'")):
        monkeypatch.setattr(sys, "argv", ["run_hopper.py", str(tmp_path / "rows.jsonl"), *arguments])
        with pytest.raises(SystemExit) as end:
            scripts.run.main()
        assert end.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_problem_passes_the_reference_and_refuses_what_is_wrong(scripts, problem):
    with torch.no_grad():
        out = scripts.problem.run_ours(problem, TritonExpertOps("cpu"))
    errors = problem.check(out)
    assert errors["max_error"] <= errors["allowed_error"] < 0.1 * out.float().abs().max()
    for wrong in (torch.zeros_like(out), out.roll(1, 0), torch.full_like(out, torch.nan)):
        with pytest.raises(RuntimeError, match="wrong output"):
            problem.check(wrong)


def test_problems_of_one_model_share_its_weights(scripts):
    weights = scripts.problem.make_weights(CONFIG, "cpu")
    first, second = (scripts.problem.Problem(CONFIG, t, "uniform", weights, "cpu") for t in (4, 9))
    assert first.up.data_ptr() == second.up.data_ptr() == weights.up_EGH.data_ptr()
    assert first.down.data_ptr() == weights.down_EOI.data_ptr()
    assert first.up.requires_grad
    assert not weights.up_EGH.requires_grad


def test_peers_that_are_not_here_say_why(scripts, monkeypatch):
    vllm, triton_kernels = scripts.peers.PEERS
    assert (vllm.name, triton_kernels.name) == ("vllm", "triton_kernels")
    assert vllm.unavailable().startswith("vllm.model_executor.layers.fused_moe.fused_moe cannot be imported")
    install(monkeypatch, "triton_kernels.matmul")
    assert triton_kernels.unavailable() == (
        "triton_kernels.matmul has no matmul: another version, or another package of that name"
    )


def swiglu_plus_one(h):
    """What triton_kernels' activation computes of interleaved columns, with alpha = 1 and no limit."""
    return F.silu(h[..., ::2]) * (h[..., 1::2] + 1)


def test_interleaved_weights_and_their_bias_make_swiglu(scripts, problem):
    weights = ExpertWeights(problem.up.detach(), problem.down.detach())
    converted = scripts.peers.interleave(weights)
    x = problem.x.detach().double()
    for expert in range(CONFIG.num_experts):
        gate, up = (x @ weights.up_EGH[expert].double().T).chunk(2, dim=-1)
        h = x @ converted.up_EHG[expert].double() + converted.bias_EG[expert]
        torch.testing.assert_close(swiglu_plus_one(h), F.silu(gate) * up)
    assert converted.up_EHG.stride(1) == 1  # the layout of its products: the axis that is summed lies together
    assert converted.down_EIO.stride(1) == 1


def test_triton_kernels_is_given_routes_that_compute_the_problem(scripts, problem, monkeypatch):
    """Its documented semantics in plain PyTorch: rows sorted by expert are gathered, scattered and scaled."""

    def matmul(a, b, bias, a_ragged_metadata, gather_indx=None, scatter_indx=None, gammas=None, fused_activation=None):
        rows = a if gather_indx is None else a[gather_indx]
        expert_R = torch.repeat_interleave(torch.arange(len(b)), a_ragged_metadata)
        out = torch.einsum("rk,rkn->rn", rows.float(), b[expert_R].float())
        out = out if bias is None else out + bias[expert_R]
        if fused_activation is not None:
            assert fused_activation.specs.reduction_n == 2
            out = swiglu_plus_one(out)
        out = out if gammas is None else out * gammas[:, None]
        if scatter_indx is not None:
            out = torch.full_like(out, torch.nan).index_copy(0, scatter_indx.long(), out)
        return out.to(a.dtype)

    install(
        monkeypatch,
        "triton_kernels.matmul",
        matmul=matmul,
        FnSpecs=lambda name, fn, arguments, reduction_n: SimpleNamespace(reduction_n=reduction_n),
        FusedActivation=lambda specs, arguments: SimpleNamespace(specs=specs),
    )
    install(monkeypatch, "triton_kernels.tensor", make_ragged_tensor_metadata=lambda counts, rows: counts)
    install(monkeypatch, "triton_kernels.swiglu", swiglu_fn=None)
    peer = scripts.peers.PEERS[1]
    assert peer.unavailable() is None
    call = peer.bind(problem, peer.convert(ExpertWeights(problem.up.detach(), problem.down.detach())))
    problem.check(call())


def test_vllm_is_given_the_problem_as_its_experts_take_it(scripts, problem, monkeypatch):
    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
        assert topk_weights.dtype == torch.float32
        assert topk_ids.dtype == torch.int32
        out = torch.zeros(hidden_states.shape)
        for k in range(topk_ids.shape[1]):
            gate, up = torch.einsum("th,tgh->tg", hidden_states, w1[topk_ids[:, k]]).float().chunk(2, dim=-1)
            y = torch.einsum("ti,thi->th", F.silu(gate) * up, w2[topk_ids[:, k]].float())
            out += y * topk_weights[:, k, None]
        return out.to(hidden_states.dtype)

    install(monkeypatch, "vllm.model_executor.layers.fused_moe.fused_moe", fused_experts=fused_experts)
    peer = scripts.peers.PEERS[0]
    assert peer.unavailable() is None
    call = peer.bind(problem, peer.convert(ExpertWeights(problem.up.detach(), problem.down.detach())))
    problem.check(call())


def test_decode_and_skew_record_every_provider_of_every_problem(scripts, recorder, monkeypatch, capsys):
    run, ops = scripts.run, TritonExpertOps("cpu")
    monkeypatch.setattr(run, "DECODE", [(run.QWEN, CONFIG, (1, 2, 8)), (run.DEEPSEEK, CONFIG, (8,))])
    monkeypatch.setattr(run, "SKEW", [(run.QWEN, CONFIG, [(256, routing) for routing in run.SKEWS])])
    monkeypatch.setattr(run, "SKEW_EAGER_SIZES", (300,))

    def broken(p, weights):
        return lambda: torch.zeros_like(p.x)

    twin = scripts.peers.Peer("twin", "ours again", (), lambda w: w, lambda p, w: lambda: run.run_ours(p, ops, w))
    zeros = scripts.peers.Peer("zeros", "nothing", (), lambda w: w, broken)
    missing = scripts.peers.Peer("missing", "absent", (("triton_kernels.matmul", "matmul"),), lambda w: w, broken)
    monkeypatch.setattr(run, "PEERS", (twin, zeros, missing))
    run.decode(recorder, ops)
    run.skew(recorder, ops)
    run.large_skew(recorder, ops)
    rows = select(read_rows(recorder.path), BenchmarkRow)
    names = ["moe_gpu", "twin", "zeros", "missing"]
    graph = [row for row in rows if row.launch == "graph"]
    problems = [(run.QWEN, 1, "uniform"), (run.QWEN, 8, "uniform"), (run.DEEPSEEK, 8, "uniform")]
    problems += [(run.QWEN, 256, routing) for routing in ("zipf-0.6", "zipf-1.2", "one-expert")]
    for problem in problems:
        here = [row for row in graph if (row.model, row.num_tokens, row.routing) == problem]
        assert [row.provider for row in here] == names
        assert [row.status for row in here] == ["ok", "ok", "failed", "unavailable"]
        assert "wrong output" in here[2].reason
        assert here[3].reason.startswith("triton_kernels.matmul cannot be imported")
        assert here[2].p50_ms is None
        assert here[3].p50_ms is None
        assert here[1].backend == "ours again"
        assert here[1].p50_ms > 0
        assert here[1].max_error <= here[1].allowed_error
    alone = [row for row in graph if (row.model, row.num_tokens) == (run.QWEN, 2)]
    assert [row.provider for row in alone] == ["moe_gpu"]
    eager = [row for row in rows if row.launch == "eager"]
    assert [row.routing for row in eager] == ["uniform", "zipf-0.6", "zipf-1.2", "one-expert"]
    assert {(row.provider, row.status, row.num_tokens) for row in eager} == {("moe_gpu", "ok", 300)}
    assert "unavailable" not in capsys.readouterr().err


def test_fp8_records_every_way_beside_bfloat16(scripts, recorder, monkeypatch):
    run, ops = scripts.run, TritonExpertOps("cpu")
    monkeypatch.setattr(run, "FP8_SIZES", (1, 8))

    def wrong(p, ops, weights):
        return torch.zeros_like(p.x)

    rules = run.WAYS["moe_gpu fp8"]
    monkeypatch.setattr(run, "WAYS", {"moe_gpu fp8": rules, "twin": lambda p, ops, w: rules(p, ops, w), "wrong": wrong})
    run.fp8(recorder, ops)
    rows = select(read_rows(recorder.path), BenchmarkRow)
    assert [(row.num_tokens, row.provider, row.status) for row in rows] == [
        (t, *outcome)
        for t in (1, 8)
        for outcome in (("moe_gpu", "ok"), ("moe_gpu fp8", "ok"), ("twin", "ok"), ("wrong", "failed"))
    ]
    assert {row.launch for row in rows} == {"graph"}
    plain, fp8 = rows[:2]
    weights = 3 * CONFIG.parameters_per_expert  # of the experts that one token hits
    assert plain.min_bytes - fp8.min_bytes == weights
    assert fp8.min_bytes == weights + 2 * 2 * CONFIG.input_dim


def test_fp8_weights_by_powers_of_two_are_exact_in_bfloat16(scripts):
    weights = scripts.problem.make_weights(CONFIG, "cpu")
    quantised = scripts.fp8.quantise(weights)
    plain = scripts.fp8.dequantised(quantised)
    for stack, w, before in zip(
        (quantised.up_EGH, quantised.down_EOI),
        (plain.up_EGH, plain.down_EOI),
        (weights.up_EGH, weights.down_EOI),
        strict=True,
    ):
        exact = scripts.fp8.dequantise_reference(stack.values_ENK, stack.scales_EBC, torch.float64)
        assert torch.equal(w.double(), exact)
        assert stack.values_ENK.float().abs().max() > 224  # the range is used, and not overrun
        torch.testing.assert_close(w, before, rtol=2**-3, atol=2.0**-9 * stack.scales_EBC.max().item())
    copied = scripts.fp8.copy_of(quantised)
    assert copied.up_EGH.values_ENK.data_ptr() != quantised.up_EGH.values_ENK.data_ptr()


def test_repeats_are_compared_bit_for_bit(scripts, problem):
    out = problem.compute(torch.bfloat16).bfloat16()
    assert len(out) == problem.num_tokens
    calls = iter(range(100))

    def run():
        tensor = out.clone()
        if next(calls) in (4, 7):
            tensor.view(torch.int16)[3, 5] ^= 1
        return (tensor,)

    assert scripts.run.count_unequal(problem, run, 10) == 2
    with pytest.raises(RuntimeError, match="wrong output"):
        scripts.run.count_unequal(problem, lambda: (torch.full_like(out, torch.nan),), 1)


def test_precision_says_how_many_repeats_differ(scripts, recorder, monkeypatch):
    monkeypatch.setattr(scripts.run, "PRECISION", ((1, "forward"), (8, "forward+backward")))
    monkeypatch.setattr(scripts.run, "REPEATS", 3)
    ops = TritonExpertOps("cpu")
    scripts.run.precision(recorder, ops)
    monkeypatch.setattr(scripts.run, "run_ours", lambda p, ops: 0 * sum(leaf.sum() for leaf in p.leaves) + 0 * p.x)
    scripts.run.precision(recorder, ops)
    same, both, *wrong = select(read_rows(recorder.path), Finding)
    assert [(one.value, one.verdict, one.samples) for one in (same, both)] == [(0, "met", 3)] * 2
    assert "T=8 forward+backward" in both.name
    assert [(one.value, one.verdict) for one in wrong] == [(None, None)] * 2
    assert all("wrong output" in one.reason for one in wrong)


def test_routing_is_timed_beside_the_whole_and_only_if_it_sorts_right(scripts, recorder, monkeypatch):
    monkeypatch.setattr(scripts.run, "ROUTING_SIZES", (3, 4096))
    monkeypatch.setattr(scripts.run, "PRESETS", {scripts.run.QWEN: CONFIG})
    scripts.run.routing(recorder, TritonExpertOps("cpu"))
    found = {one.name.removeprefix(f"{scripts.run.QWEN} "): one for one in select(read_rows(recorder.path), Finding)}
    assert len(found) == 8
    for tokens in (3, 4096):
        route, ids, whole, share = (found[name] for name in found if name.startswith(f"T={tokens}:"))
        assert (route.unit, ids.unit, whole.unit, share.unit) == ("us", "us", "us", "ratio")
        assert route.samples == 60
        assert share.value == pytest.approx(route.value / whole.value)
        goal = {3: None, 4096: "met" if share.value <= 0.05 else "missed"}
        assert share.verdict == goal[tokens]
    monkeypatch.setattr(scripts.run, "sort_routes_reference", lambda ids, experts, capacity: [torch.zeros(1)] * 4)
    scripts.run.routing(recorder, TritonExpertOps("cpu"))
    wrong = select(read_rows(recorder.path), Finding)[8:]
    assert [(one.value, one.reason) for one in wrong] == [
        (None, "RuntimeError: the routes are not sorted as by the reference")
    ] * 2


def test_budgets_are_set_against_the_clock_that_each_ran_at(scripts, recorder, monkeypatch):
    run = scripts.run
    clocks = dict(zip(run.BUDGETS, (1200, 1500, 1980, None), strict=True))
    times = dict(zip(run.BUDGETS, (1.0, 1.0, 1.5, 3.0), strict=True))
    served = []
    monkeypatch.setattr(run, "TritonExpertOps", lambda device, sm_budget: served.append(sm_budget) or ops_of(scripts))
    monkeypatch.setattr(
        run,
        "sustained",
        lambda call, uuid: {"p50_ms": times[served[-1]], "sm_clock_mhz": clocks[served[-1]], "power_w": None},
    )
    run.budget(recorder, None)
    rows = read_rows(recorder.path)
    assert [row.p50_ms for row in select(rows, BenchmarkRow)] == [*times.values()] * 2
    found = select(rows, Finding)[: len(run.BUDGETS)]
    expected = [1.0, 132 * 1200 / (100 * 1500), 132 * 1200 / (1.5 * 66 * 1980), None]
    assert [one.value for one in found] == [None if value is None else pytest.approx(value) for value in expected]
    assert [one.verdict for one in found] == ["met", "met", "missed", None]
    assert found[-1].reason == "the driver tells no clock"


def ops_of(scripts):
    return TritonExpertOps("cpu")
