"""The decode kernel for Hopper on a GPU: every edge, real widths, several at a time, and on fewer SMs than programs."""

from __future__ import annotations

import pytest
import torch

from moe_gpu import reference
from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.slices.plan import BackendUnavailableError
from moe_gpu.slices.policies import SliceAllocationPolicy
from moe_gpu.triton_kernels.gather_scatter import combine_forward
from moe_gpu.triton_kernels.ops import TritonExpertOps
from moe_gpu.triton_kernels.products import hopper_unavailable
from moe_gpu.triton_kernels.tuning import HopperDecodeConfig, hopper_decode_config
from tests.kernel_cases import ExpertCase, ExpertProblem, check_close, make_problem, reference_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or hopper_unavailable(torch.device("cuda")) is not None,
        reason="needs a GPU that the Gluon kernels serve",
    ),
]
CASES = [
    ExpertCase("no tokens", 0, 64, 64, 4, 2),
    ExpertCase("one token", 1, 64, 64, 4, 2),
    ExpertCase("widths of a few copies", 7, 40, 24, 3, 2, output_dim=51),
    ExpertCase("one copy, one column", 3, 8, 8, 3, 2, output_dim=1),
    ExpertCase("empty experts", 10, 320, 136, 8, 2, routing="few"),
    ExpertCase("several tiles of one expert", 100, 256, 512, 4, 1, routing="one"),
    ExpertCase("k = E, prime E", 30, 264, 256, 7, 7),
    ExpertCase("capacity drops routes", 20, 512, 256, 4, 2, capacity=3, routing="few"),
    ExpertCase("ids out of range and -1", 12, 512, 256, 4, 2, routing="out of range"),
    ExpertCase("one expert", 4, 1032, 520, 1, 1),
    ExpertCase("geglu with biases", 6, 512, 256, 4, 2, activation="geglu", bias=True),
    ExpertCase("plain gelu with biases", 6, 512, 264, 4, 2, activation="gelu", bias=True),
    ExpertCase("512 experts", 64, 256, 128, 512, 8),
]
# The widths of models, with fewer experts: references are in float64, and tests run beside each other.
REAL_CASES = [
    *(ExpertCase(f"Qwen3, {tokens} tokens", tokens, 2048, 768, 16, 8) for tokens in (1, 8, 32)),
    *(ExpertCase(f"Qwen3, {n} tokens to the same", n, 2048, 768, 16, 1, routing="one") for n in (100, 300)),
    ExpertCase("Mixtral", 3, 4096, 14336, 2, 1),
    ExpertCase("gpt-oss", 5, 2880, 2880, 4, 2, bias=True),
]
TILES = [
    *(hopper_decode_config(8 * tokens, tokens, 128, 2048, 768) for tokens in (1, 16, 64, 256, 384)),
    hopper_decode_config(2, 1, 8, 4096, 14336),
    hopper_decode_config(16, 8, 8, 4096, 14336),
    HopperDecodeConfig(rows=16, up_fold=4, down_fold=2, stages=2),
    HopperDecodeConfig(rows=32, up_fold=1, down_fold=1, stages=5, height=128),
    HopperDecodeConfig(rows=64, up_fold=1, down_fold=1, stages=3),
]


def rows_of(case: ExpertCase) -> int:
    return case.tokens * case.top_k


def check(case: ExpertCase, config: HopperDecodeConfig, dtype: torch.dtype, programs: int = 132) -> None:
    from moe_gpu.triton_kernels.hopper_decode import decode_forward_hopper

    problem = make_problem(case, dtype, "cuda")
    truth, same = (reference_run(problem, wanted)[0] for wanted in (torch.float64, dtype))
    torch.full((50_000_000,), float("nan"), device="cuda", dtype=dtype)  # what the allocator hands out next
    with torch.no_grad():
        x, routing_weights, w, _ = problem.leaves(dtype)
        _, offsets, row_route, row_of_route = reference.sort_routes_reference(
            problem.ids_TK, case.experts, case.capacity
        )
        y = decode_forward_hopper(
            x, row_route, offsets, case.top_k, w.up_EGH, w.down_EOI, case.activation, config, programs,
            w.up_bias_EG, w.down_bias_EO,
        )  # fmt: skip
        out = combine_forward(y, row_of_route, routing_weights, dtype)
    check_close(case.name, out, same, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *REAL_CASES], ids=lambda case: case.name)
def test_tile_by_rule(case, dtype):
    check(case, hopper_decode_config(rows_of(case), case.tokens, case.experts, case.input_dim, case.hidden_dim), dtype)


@pytest.mark.parametrize("config", TILES, ids=str)
def test_every_tile(config):
    for case in CASES:
        check(case, config, torch.bfloat16)


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_any_number_of_programs(programs):
    for case in (*CASES, REAL_CASES[1]):
        check(case, TILES[1], torch.bfloat16, programs)


def test_thousands_of_launches_by_two_warps_that_wait_for_one_count():
    """What a warp has counted must not let the last program clear the count before the other has looked: it hung."""
    from moe_gpu.triton_kernels.hopper_decode import decode_forward_hopper

    problem = make_problem(ExpertCase("Qwen3", 1, 2048, 768, 32, 8), torch.bfloat16, "cuda")
    _, offsets, row_route, _ = reference.sort_routes_reference(problem.ids_TK, 32, None)
    w, config = problem.weights, hopper_decode_config(8 * 256, 256, 128, 2048, 768)
    assert config.rows > 16
    outs = [
        decode_forward_hopper(
            problem.x_TH, row_route, offsets, 8, w.up_EGH, w.down_EOI, problem.case.activation, config, 132
        )
        for _ in range(3000)
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_more_row_tiles_than_counters_are_kept_for():
    check(ExpertCase("512 experts, many rows", 1200, 64, 64, 512, 8), HopperDecodeConfig(8, 1, 1, 5), torch.bfloat16)


def qwen(tokens: int, seed: int) -> ExpertProblem:
    return make_problem(ExpertCase("Qwen3", tokens, 2048, 768, 32, 4), torch.bfloat16, "cuda", seed)


def compute(ops: TritonExpertOps, problem: ExpertProblem) -> torch.Tensor:
    with torch.no_grad():
        x, routing_weights, weights, _ = problem.leaves(torch.bfloat16)
        return ops.experts(x, ops.sort_routes(problem.ids_TK, routing_weights, problem.case.experts), weights)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "in graphs"])
def test_several_at_a_time_and_again_and_again(graphs):
    """Together they are more programs than SMs, so that some start when others have ended; counters must not mix."""
    ops = TritonExpertOps("cuda")
    problems = [qwen(tokens, seed) for seed, tokens in enumerate((1, 4, 32, 100, 192))]
    expected = [compute(ops, problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    runs = []
    for problem, stream in zip(problems, streams, strict=True):
        with torch.cuda.stream(stream):
            compute(ops, problem)
            stream.synchronize()
            if not graphs:
                runs.append(lambda problem=problem: compute(ops, problem))
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = compute(ops, problem)
            runs.append(lambda graph=graph, out=out: (graph.replay(), out)[1])
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run())
        torch.cuda.synchronize()
        wrong += sum((got != want).any() for got, want in zip(found, expected, strict=True))
        torch.cuda.synchronize()  # what was found is compared before its memory is written again
    assert int(wrong) == 0


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "in a graph"])
def test_in_a_partition_of_fewer_sms_than_programs(graph):
    problem, ops = qwen(16, 0), TritonExpertOps("cuda")
    expected = compute(ops, problem)
    torch.cuda.synchronize()
    try:
        manager = AdvancedGPUSliceManager(8, SliceAllocationPolicy.STATIC, "cuda", "green_context")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    try:
        manager.allocate_slices(0, 1)
        with manager.enter(0) as entered:
            got = compute(ops, problem)
            if graph:
                entered.stream.synchronize()
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured, stream=entered.stream):
                    got = compute(ops, problem)
                captured.replay()
            entered.stream.synchronize()
        assert torch.equal(got, expected)
    finally:
        manager.close()


def test_captures_beyond_the_memory_kept_for_them_clear_their_own(monkeypatch):
    from moe_gpu.triton_kernels import hopper_decode
    from moe_gpu.triton_kernels.counters import Counters

    monkeypatch.setattr(Counters, "COUNT", 2)
    monkeypatch.setattr(hopper_decode, "_COUNTERS", Counters())
    problem, ops = qwen(2, 0), TritonExpertOps("cuda")
    expected = compute(ops, problem)  # takes the first
    graphs = []
    for _ in range(3):  # the second, then none is left
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = compute(ops, problem)
        graphs.append((graph, out))
    for graph, out in (*graphs, *graphs):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
