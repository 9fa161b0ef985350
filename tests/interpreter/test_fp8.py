"""Experts whose weights kernels read as FP8, on the interpreter: every edge, both kinds of kernels, what is refused."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

from moe_gpu import reference
from moe_gpu.config import MoEConfig
from moe_gpu.reference import QuantisedExperts, QuantisedStack
from moe_gpu.triton_kernels import custom_ops, products, tuning
from moe_gpu.triton_kernels.decode import DecodeConfig, DecodeTile, decode_forward
from moe_gpu.triton_kernels.fp8 import FP8, LEAST_STEP, dequantise, fp8_unfit
from moe_gpu.triton_kernels.gather_scatter import combine_forward
from moe_gpu.triton_kernels.ops import TritonExpertOps
from tests.fp8_cases import FP8_CASES, Fp8Case, Fp8Problem, check_fp8, make_fp8_problem, quantise
from tests.kernel_cases import ExpertCase, check_close

DECODE = DecodeConfig(DecodeTile(32, 32, 4, 2), DecodeTile(32, 32, 4, 2))
PLAIN = Fp8Case(ExpertCase("plain", 20, 64, 32, 4, 2))


@pytest.fixture
def dequantised(monkeypatch):
    """Counts the calls that make wider weights of FP8 ones."""
    calls = mock.Mock(side_effect=dequantise)
    monkeypatch.setattr(products, "dequantise", calls)
    monkeypatch.setattr(custom_ops, "dequantise", calls)
    monkeypatch.setattr(reference, "dequantise_reference", mock.Mock(side_effect=AssertionError("dequantised")))
    return calls


def grouped(problem: Fp8Problem) -> torch.Tensor:
    with torch.no_grad():
        ops = TritonExpertOps("cpu")
        return ops.experts(problem.x_TH, problem.routing(), problem.weights, problem.case.experts.activation)


def decode(problem: Fp8Problem) -> torch.Tensor:
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
        DECODE,
        w.up_bias_EG,
        w.down_bias_EO,
        up_scales_EBC=up.scales_EBC,
        down_scales_EBC=down.scales_EBC,
    )
    return combine_forward(y, routing.row_of_route_TK, routing.topk_weights_TK, problem.x_TH.dtype)


@pytest.mark.parametrize("run", [grouped, decode])
@pytest.mark.parametrize("case", FP8_CASES, ids=lambda case: case.name)
def test_experts(case, run):
    problem = make_fp8_problem(case, torch.bfloat16, "cpu")
    check_fp8(problem, run)


@pytest.mark.parametrize("run", [grouped, decode])
def test_float16(run):
    check_fp8(make_fp8_problem(FP8_CASES[2], torch.float16, "cpu"), run)


def test_kernels_make_no_wider_weights(dequantised):
    problem = make_fp8_problem(PLAIN, torch.bfloat16, "cpu")
    assert grouped(problem).isfinite().all()
    assert dequantised.call_count == 0


def test_exact_weights_are_closer_than_rounded_ones():
    """A weight times its scale has more digits than bfloat16: what the kernels do not lose."""
    problem = make_fp8_problem(Fp8Case(ExpertCase("one layer", 40, 256, 64, 2, 1), (32, 64)), torch.float32, "cpu")
    stack = problem.weights.up_EGH
    x = problem.x_TH.bfloat16()
    bounds = torch.tensor([0, 20, 40], dtype=torch.int32)
    got = custom_ops._grouped_gemm_quantised(x, stack.values_ENK, stack.scales_EBC, None, bounds, None)
    exact = reference.dequantise_reference(stack.values_ENK, stack.scales_EBC, torch.float64)
    rounded = exact.bfloat16().double()
    truth, other = (reference.grouped_gemm_reference(x.double(), w, bounds) for w in (exact, rounded))
    error = [(out.bfloat16().double() - truth).square().mean() for out in (got, other)]
    assert error[0] < 0.7 * error[1]


@pytest.mark.parametrize("run", [grouped, decode])
@pytest.mark.parametrize("scale", ["float", "exponent"])
@pytest.mark.parametrize("where", ["value", "scale"])
def test_nan_stays_with_the_rows_of_its_expert(run, scale, where):
    case = replace(PLAIN, exponents=scale == "exponent")
    problem = make_fp8_problem(case, torch.bfloat16, "cpu")
    clean = run(problem)
    stack = problem.weights.up_EGH
    values, scales = stack.values_ENK.clone(), stack.scales_EBC.clone()
    if where == "value":
        values.view(torch.uint8)[1, 3, 5] = 0xFF
    elif scale == "float":
        scales[1, 0, 1] = torch.nan
    else:
        scales.view(torch.uint8)[1, 0, 1] = 0xFF
    problem = replace(problem, weights=replace(problem.weights, up_EGH=QuantisedStack(values, scales)))
    out = run(problem)
    hit = (problem.ids_TK == 1).any(1)
    assert 0 < hit.sum() < len(hit)
    assert out[hit].isnan().any(1).all()
    assert torch.equal(out[~hit], clean[~hit])


@pytest.mark.parametrize("exponents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dequantising_kernel(dtype, exponents):
    """Every value there is, under scales from the least exponent to large ones, to the bit."""
    values = torch.arange(256).to(torch.uint8).view(FP8).repeat(3, 70, 1)
    exponent = torch.arange(3 * 7 * 4).view(3, 7, 4) % 12 - 6.0
    exponent[0, 0, 0] = -127
    scales = exponent.exp2() if exponents else exponent.exp2() * 1.37
    scales = scales.to(torch.float8_e8m0fnu) if exponents else scales
    if exponents:
        scales.view(torch.uint8)[2, 0, 0] = 0xFF  # NaN
    got = dequantise(values, scales, dtype)
    expected = reference.dequantise_reference(values, scales, dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got.isnan().sum() == 3 * 70 * 2 + (10 * 64 if exponents else 0)
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(got.nan_to_num(7).double(), (values.double() * _spread(scales)).to(dtype).nan_to_num(7).double())


def _spread(scales: torch.Tensor) -> torch.Tensor:
    return scales.float().double().repeat_interleave(10, 1).repeat_interleave(64, 2)


def test_what_kernels_do_not_read_is_dequantised(monkeypatch):
    calls = mock.Mock(side_effect=dequantise)
    monkeypatch.setattr(products, "dequantise", calls)
    shallow = Fp8Case(ExpertCase("shallow blocks", 20, 64, 32, 4, 2), (16, 16))
    check_fp8(make_fp8_problem(shallow, torch.bfloat16, "cpu"), grouped, least_step=16)
    assert calls.call_count == 2
    check_fp8(make_fp8_problem(PLAIN, torch.float32, "cpu"), grouped)
    assert calls.call_count == 4


def test_decode_kernels_serve_where_they_can(dequantised, monkeypatch):
    served = mock.Mock(side_effect=decode_forward)
    monkeypatch.setattr(custom_ops, "decode_forward", served)
    monkeypatch.setattr(custom_ops, "decode_unsupported", lambda *arguments: None)
    monkeypatch.setattr(custom_ops, "FP8_GROUPED_ROWS_PER_EXPERT", 2)
    for tokens in (4, 6, 20, 40):  # the first has just too few rows
        check_fp8(
            make_fp8_problem(Fp8Case(ExpertCase("few", tokens, 64, 32, 4, 2, bias=True)), torch.bfloat16, "cpu"),
            grouped,
        )
    assert served.call_count == 3
    assert dequantised.call_count == 0


def test_many_rows_are_dequantised_where_the_kernels_for_hopper_then_serve():
    stack = quantise(torch.randn(4, 64, 64), (32, 32), False)
    offsets = torch.zeros(5, dtype=torch.int32)

    def reads(rows_per_expert: int, hopper: bool, dtype: torch.dtype = torch.bfloat16) -> bool:
        some = products.Products(dtype, torch.device("cpu"), offsets, 4 * rows_per_expert, None, hopper, 4)
        return some.reads_fp8(stack.values_ENK, stack.scales_EBC)

    most = tuning.FP8_MAX_ROWS_PER_EXPERT
    assert reads(most - 1, hopper=True)
    assert not reads(most, hopper=True)
    assert reads(most, hopper=False)
    assert not reads(1, hopper=False, dtype=torch.float32)


def test_reasons():
    ops = TritonExpertOps("cpu")
    stack = quantise(torch.randn(2, 64, 64), (32, 32), False)
    assert ops.fp8_reason(stack) is None
    assert f"steps of {LEAST_STEP}" in ops.fp8_reason(quantise(torch.randn(2, 64, 64), (32, 16), False))
    assert "16 deep" in ops.fp8_reason(quantise(torch.randn(2, 64, 48), (32, 16), False))
    turned = QuantisedStack(stack.values_ENK.transpose(1, 2), stack.scales_EBC)
    assert fp8_unfit(turned.values_ENK, turned.scales_EBC) == "kernels read FP8 weights that are contiguous"


def test_gradients_of_x_and_of_the_routing_go_by_dequantised_weights():
    problem = make_fp8_problem(PLAIN, torch.bfloat16, "cpu")
    ops = TritonExpertOps("cpu")
    results = []
    for dtype, weights in (
        (torch.bfloat16, problem.weights),
        (torch.bfloat16, problem.plain(torch.bfloat16)),
        (torch.float64, problem.plain(torch.float64)),
    ):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x = problem.x_TH.to(dtype).requires_grad_()
        scores = problem.topk_weights_TK.to(wide).requires_grad_()
        routing = replace(problem.routing(), topk_weights_TK=scores)
        call = reference.experts_reference if weights is not problem.weights else ops.experts
        out = call(x, routing, weights, "swiglu")
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        results.append([out.detach(), *torch.autograd.grad(out, (x, scores), grad.to(dtype))])
    for name, got, same, truth in zip(("output", "x", "routing weights"), *results, strict=True):
        check_close(name, got, same, truth, torch.bfloat16)


def test_grouped_gemm_reads_fp8(dequantised):
    problem = make_fp8_problem(replace(PLAIN, exponents=True), torch.bfloat16, "cpu")
    stack, routing = problem.weights.up_EGH, problem.routing()
    rows = problem.x_TH[routing.row_token_R.long()]
    with torch.no_grad():
        got = TritonExpertOps("cpu").grouped_gemm(rows, stack, routing.offsets_P)
    assert dequantised.call_count == 0
    both = [problem.plain(dtype).up_EGH for dtype in (torch.bfloat16, torch.float64)]
    same, truth = (reference.grouped_gemm_reference(rows.to(w.dtype), w, routing.offsets_P) for w in both)
    check_close("grouped_gemm", got, same, truth, torch.bfloat16)


def test_operators_trace(dequantised):
    problem = make_fp8_problem(PLAIN, torch.bfloat16, "cpu")
    ops, stack = TritonExpertOps("cpu"), problem.weights.up_EGH

    def run(x, routing, weights):
        out = ops.experts(x, routing, weights)
        rows = ops.permute(x, routing)
        return out, ops.grouped_gemm(rows, weights.up_EGH, routing.offsets_P), ops.dequantise(stack, torch.float16)

    routing = problem.routing()
    with torch.no_grad():
        expected = run(problem.x_TH, routing, problem.weights)
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(problem.x_TH, routing, problem.weights)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_operators_pass_opcheck():
    """But its check of schemas, which multiplies FP8 numbers: PyTorch has no product for them."""
    problem = make_fp8_problem(replace(PLAIN, exponents=True), torch.bfloat16, "cpu")
    TritonExpertOps("cpu")
    up, down, r = problem.weights.up_EGH, problem.weights.down_EOI, problem.routing()
    rows = r.row_route_R, r.row_of_route_TK, r.offsets_P
    experts = (up.values_ENK, down.values_ENK, up.scales_EBC, down.scales_EBC, None, None, "swiglu", None)
    gathered = problem.x_TH[r.row_token_R.long()]
    arguments = {
        "experts_quantised": (problem.x_TH, r.topk_weights_TK, r.topk_ids_TK, *rows, *experts),
        "grouped_gemm_quantised": (gathered, up.values_ENK, up.scales_EBC, None, r.offsets_P, None),
        "dequantise": (up.values_ENK, up.scales_EBC, torch.float16),
    }
    for name, values in arguments.items():
        operator = getattr(torch.ops.moe_gpu, name).default
        torch.library.opcheck(operator, values, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))


def test_mistakes_are_refused():
    problem = make_fp8_problem(PLAIN, torch.bfloat16, "cpu")
    ops, w = TritonExpertOps("cpu"), problem.weights
    wrong = {
        "up_EGH has torch.float8_e5m2 values": replace(
            w.up_EGH, values_ENK=w.up_EGH.values_ENK.float().to(torch.float8_e5m2)
        ),
        "torch.float64 scales": replace(w.up_EGH, scales_EBC=w.up_EGH.scales_EBC.double()),
        "not made of whole blocks": replace(w.up_EGH, scales_EBC=w.up_EGH.scales_EBC[:, :, :1].expand(-1, -1, 3)),
    }
    for said, stack in wrong.items():
        with pytest.raises(ValueError, match=said):
            ops.experts(problem.x_TH, problem.routing(), QuantisedExperts(stack, w.down_EOI))
        with pytest.raises(ValueError, match=said.replace("up_EGH", "w")):
            ops.grouped_gemm(problem.x_TH, stack, problem.routing().offsets_P)
    with pytest.raises(ValueError, match="down weights"):
        ops.experts(problem.x_TH, problem.routing(), QuantisedExperts(w.up_EGH, w.up_EGH))


def test_every_way_of_the_benchmark_computes_its_problem(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    problem, fp8 = import_module("hopper_problem"), import_module("hopper_fp8")
    config = MoEConfig(128, 128, 64, 4, 2)
    weights = fp8.quantise(problem.make_weights(config, "cpu"))
    ops = TritonExpertOps("cpu")
    for num_tokens in (2, 40):
        p = problem.Problem(config, num_tokens, "uniform", fp8.dequantised(weights), "cpu")
        for way in fp8.WAYS.values():
            with torch.no_grad():
                p.check(way(p, ops, weights))
