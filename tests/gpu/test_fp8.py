"""Experts whose weights kernels read as FP8, on a GPU: the interpreter's cases, real widths, graphs, who serves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moe_gpu import reference
from moe_gpu.reference import QuantisedStack
from moe_gpu.triton_kernels.decode import MIN_CAPABILITY as DECODE_CAPABILITY
from moe_gpu.triton_kernels.decode import decode_forward, fp8_decode_config
from moe_gpu.triton_kernels.fp8 import FP8, MIN_CAPABILITY, dequantise, fp8_unavailable
from moe_gpu.triton_kernels.gather_scatter import combine_forward
from moe_gpu.triton_kernels.grouped_gemm import shared_bytes
from moe_gpu.triton_kernels.ops import TritonExpertOps
from moe_gpu.triton_kernels.products import Products
from moe_gpu.triton_kernels.tuning import FP8_MAX_ROWS_PER_EXPERT, HOPPER_SHARED_BYTES
from tests.fp8_cases import FP8_CASES, Fp8Case, Fp8Problem, check_fp8, make_fp8_problem
from tests.kernel_cases import ExpertCase

capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(capability < MIN_CAPABILITY, reason="needs an NVIDIA GPU of compute capability 8.9 or newer"),
]
DECODES = capability >= DECODE_CAPABILITY and shared_bytes(torch.device("cuda")) >= HOPPER_SHARED_BYTES
decodes = pytest.mark.skipif(not DECODES, reason="needs a GPU that the decode kernels serve")
hopper = pytest.mark.skipif(capability != (9, 0), reason="needs a GPU of compute capability 9.0")

BLOCK = (128, 128)
REAL_CASES = [
    Fp8Case(ExpertCase(f"Qwen3's widths, {tokens} tokens", tokens, 2048, 768, 32, 8), BLOCK, exponents=tokens == 8)
    for tokens in (1, 4, 8, 64, 256)
]


def run(problem: Fp8Problem) -> torch.Tensor:
    with torch.no_grad():
        ops = TritonExpertOps("cuda")
        return ops.experts(problem.x_TH, problem.routing(), problem.weights, problem.case.experts.activation)


def decode(problem: Fp8Problem) -> torch.Tensor:
    """By the decode kernels, whatever the rows."""
    w, routing = problem.weights, problem.routing()
    up, down = w.up_EGH, w.down_EOI
    y = decode_forward(
        problem.x_TH,
        routing.row_route_R,
        routing.offsets_P,
        routing.top_k,
        up.values_ENK,
        down.values_ENK,
        problem.case.experts.activation,
        fp8_decode_config(32, 32) if problem.case.block != BLOCK else fp8_decode_config(128, 128),
        w.up_bias_EG,
        w.down_bias_EO,
        up_scales_EBC=up.scales_EBC,
        down_scales_EBC=down.scales_EBC,
    )
    return combine_forward(y, routing.row_of_route_TK, routing.topk_weights_TK, problem.x_TH.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*FP8_CASES, *REAL_CASES], ids=lambda case: case.name)
def test_experts(case, dtype):
    torch.full((50_000_000,), float("nan"), device="cuda", dtype=dtype)  # what the allocator hands out next
    check_fp8(make_fp8_problem(case, dtype, "cuda"), run)


@decodes
@pytest.mark.parametrize("case", [*FP8_CASES, *REAL_CASES], ids=lambda case: case.name)
def test_the_decode_kernels(case):
    check_fp8(make_fp8_problem(case, torch.bfloat16, "cuda"), decode)


@hopper
def test_many_rows_are_dequantised_for_the_kernels_for_hopper():
    case = Fp8Case(ExpertCase("many rows", 2048, 256, 128, 8, 2), BLOCK)
    problem = make_fp8_problem(case, torch.bfloat16, "cuda")
    assert case.experts.tokens * 2 >= FP8_MAX_ROWS_PER_EXPERT * 8
    check_fp8(problem, run)
    names = kernels_of(problem)
    assert any("_dequantise_kernel" in name for name in names), names
    assert not any("_grouped_gemm_fwd_kernel" in name for name in names), names


@pytest.mark.parametrize("tokens", [1, 64])
def test_few_rows_make_no_wider_weights(tokens):
    problem = make_fp8_problem(Fp8Case(ExpertCase("few", tokens, 1024, 512, 32, 2), BLOCK), torch.bfloat16, "cuda")
    run(problem)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(problem)
    weights = sum(s.values_ENK.numel() for s in (problem.weights.up_EGH, problem.weights.down_EOI))
    assert torch.cuda.max_memory_allocated() - before < weights / 10
    names = kernels_of(problem)
    assert not any("_dequantise_kernel" in name for name in names), names
    assert any("_grouped_gemm_fwd_kernel" in name for name in names), names


@decodes
def test_the_decode_kernels_serve_between_few_rows_and_many():
    problem = make_fp8_problem(Fp8Case(ExpertCase("between", 256, 512, 256, 8, 2), BLOCK), torch.bfloat16, "cuda")
    check_fp8(problem, run)
    assert "_decode_up_kernel" in kernels_of(problem)


def kernels_of(problem: Fp8Problem) -> set[str]:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run(problem)
        torch.cuda.synchronize()
    return {event.key for event in trace.key_averages()}


@pytest.mark.parametrize("tokens", [4, 64])
def test_graph_replays_with_other_routing(tokens):
    case = Fp8Case(ExpertCase("graph", tokens, 512, 256, 64, 8), BLOCK)
    first = make_fp8_problem(case, torch.bfloat16, "cuda")
    ids, scores, x = (tensor.clone() for tensor in (first.ids_TK, first.topk_weights_TK, first.x_TH))
    ops = TritonExpertOps("cuda")

    def call() -> torch.Tensor:
        return ops.experts(x, ops.sort_routes(ids, scores, 64), first.weights)

    with torch.no_grad():
        call()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()
        for shift in (1, 0):
            ids.copy_((first.ids_TK + shift) % 64)
            graph.replay()
            assert torch.equal(out, call())


@pytest.mark.parametrize("where", ["value", "scale"])
def test_nan_stays_with_the_rows_of_its_expert(where):
    problem = make_fp8_problem(REAL_CASES[2], torch.bfloat16, "cuda")
    clean = run(problem)
    values, scales = problem.weights.up_EGH.values_ENK.clone(), problem.weights.up_EGH.scales_EBC.clone()
    bits = values if where == "value" else scales
    bits.view(torch.uint8)[1, 3, 5] = 0xFF
    out = run(replace(problem, weights=replace(problem.weights, up_EGH=QuantisedStack(values, scales))))
    hit = (problem.ids_TK == 1).any(1)
    assert 0 < hit.sum() < len(hit)
    assert out[hit].isnan().any(1).all()
    assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("exponents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantising_kernel_equals_the_reference(dtype, exponents):
    values = torch.arange(256).to(torch.uint8).view(FP8).repeat(3, 70, 1).cuda()
    scales = (torch.arange(3 * 7 * 4).view(3, 7, 4) % 12 - 6.0).exp2().cuda()
    scales = scales.to(torch.float8_e8m0fnu) if exponents else scales * 1.37
    got, expected = dequantise(values, scales, dtype), reference.dequantise_reference(values, scales, dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


def test_this_gpu_reads_fp8():
    assert fp8_unavailable(torch.device("cuda")) is None
    problem = make_fp8_problem(REAL_CASES[0], torch.bfloat16, "cuda")
    up, offsets = problem.weights.up_EGH, problem.routing().offsets_P
    assert Products.of((problem.x_TH,), (up.values_ENK,), offsets, 8).reads_fp8(up.values_ENK, up.scales_EBC)
