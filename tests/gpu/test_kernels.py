"""The kernels on a real GPU: the interpreter's cases, real widths, graphs, repeatability, no synchronisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_gpu.config import MoEConfig
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.moe_layer import MoELayer
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.reference import ExpertWeights
from moe_gpu.triton_kernels.ops import TritonExpertOps
from tests import operator_cases as cases
from tests.kernel_cases import EXPERT_CASES, STRIDED_CASES, ExpertCase, check_experts

capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not capable, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]

REAL_CASES = [
    ExpertCase("one token of a wide layer", 1, 2048, 768, 128, 8),
    ExpertCase("few rows an expert", 64, 2048, 768, 128, 8),
    ExpertCase("16 to 32 rows an expert", 400, 1024, 768, 128, 8),
    ExpertCase("33 to 96 rows an expert", 1100, 1024, 512, 128, 8),
    ExpertCase("full tiles and remainders", 3000, 1024, 768, 16, 4),
    ExpertCase("skewed", 2000, 512, 384, 16, 4, routing="few"),
    ExpertCase("all tokens to one expert", 1500, 512, 384, 8, 1, routing="one"),
    ExpertCase("width not a multiple of the tile", 700, 1000, 328, 8, 2),
    ExpertCase("odd widths", 333, 771, 515, 7, 3),
    ExpertCase("biases, wide", 900, 720, 720, 8, 4, bias=True),
    ExpertCase("three linear layers, wide", 900, 512, 384, 8, 2, activation="gelu", depth=2, bias=True),
    ExpertCase("capacity", 2000, 512, 384, 8, 2, routing="few", capacity=100),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*EXPERT_CASES, *STRIDED_CASES, *REAL_CASES], ids=lambda case: case.name)
def test_experts(case, dtype):
    check_experts(case, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("router", cases.ROUTERS)
@pytest.mark.parametrize(
    "shape", [*cases.ROUTE_SHAPES.values(), (5000, 128, 8), (3000, 256, 8), (64, 512, 10)], ids=str
)
def test_route(shape, router, biased, dtype):
    cases.check_route(shape, cases.ROUTERS[router], biased, dtype, "cuda")


@pytest.mark.parametrize("num_tokens", [1, 50, 400, 30000])
def test_given_ids(num_tokens):
    cases.check_given_ids(num_tokens, 11, 3, "cuda")


def test_row_operators():
    cases.check_public_row_operators("cuda")


def test_kept_rows_go_with_their_graph():
    cases.check_kept_rows_go_with_their_graph("cuda")


def test_opcheck():
    cases.run_opcheck("cuda")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_whole_layer_traces_without_a_break(backend):
    cases.check_fullgraph("cuda", torch.float32, backend)


def make_layer(dtype: torch.dtype = torch.bfloat16, **changes) -> AdvancedMoELayer:
    torch.manual_seed(0)
    config = MoEConfig(256, 256, 192, 16, 4).with_(**changes)
    return AdvancedMoELayer.from_config(config).to("cuda", dtype)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 256, 3000])
def test_whole_layer_in_a_graph_replays_with_other_routing(num_tokens):
    layer = make_layer()
    layer.profiler = ExpertProfiler(16)
    layer.profiler.attach("cuda")
    static = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                layer(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, stats = layer(static)
        for seed in range(5):
            generator = torch.Generator(device="cuda").manual_seed(seed)
            static.copy_(torch.randn(static.shape, generator=generator, device="cuda") * 3)
            graph.replay()
            expected, expected_stats = layer(static)
            assert torch.equal(stats.counts_E, expected_stats.counts_E)
            assert torch.equal(out, expected)
        static.fill_(float("nan"))
        graph.replay()
        assert int(stats.invalid_routes) == num_tokens * 4
        assert (out == 0).all()


@pytest.mark.parametrize("num_tokens", [5, 700])
def test_repeats_are_bitwise_equal(num_tokens):
    layer = make_layer()
    x = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16)
    first = None
    for _ in range(100):
        leaf = x.clone().requires_grad_()
        out, _ = layer(leaf)
        results = [out, *torch.autograd.grad(out.float().square().sum(), [leaf, *layer.parameters()])]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 64, 2000])
def test_no_host_synchronisation(num_tokens):
    layer = make_layer(shared_hidden_dim=64, capacity_factor=1.25)
    x = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        out, stats = layer(x)
        (out.float().sum() + stats.load_balancing_loss + stats.router_z_loss).backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with torch.no_grad():
            layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_both_layers_agree():
    config = MoEConfig(256, 256, 192, 16, 4, shared_hidden_dim=64)
    torch.manual_seed(0)
    plain = MoELayer(config).cuda()
    fast = AdvancedMoELayer.from_config(config).cuda()
    fast.load_state_dict(plain.state_dict())
    assert fast.features["triton"].active
    x = torch.randn(2, 300, 256, device="cuda")
    torch.testing.assert_close(fast(x)[0], plain(x), atol=1e-5, rtol=1e-4)


def test_autocast_with_float32_weights():
    layer = make_layer(torch.float32)
    x = torch.randn(40, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        out, _ = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.gate_up_proj.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x)[0], atol=0.05, rtol=0.05)


def check_tokens(x, ids, routing_weights, w, out, tokens) -> None:
    """A few tokens of a layer too large for the reference, each against its own experts in float64."""
    for token in tokens:
        truth = torch.zeros(w.down_EOI.shape[1], dtype=torch.float64, device="cuda")
        for expert, weight in zip(ids[token].tolist(), routing_weights[token].double(), strict=True):
            gate, up = (w.up_EGH[expert].double() @ x[token].double()).chunk(2)
            truth += weight * (w.down_EOI[expert].double() @ (torch.nn.functional.silu(gate) * up))
        error = (out[token].double() - truth).abs().max()
        assert error < 0.02 * truth.abs().max(), f"token {token}: {error}"


@pytest.mark.parametrize(
    ("num_tokens", "width", "hidden", "experts", "top_k"),
    [
        pytest.param(131072 + 24, 2048, 64, 16, 8, id="routed rows x width beyond 2^31"),
        pytest.param(64, 4096, 4352, 128, 4, id="weights beyond 2^31"),
    ],
)
def test_offsets_beyond_int32(num_tokens, width, hidden, experts, top_k):
    assert max(num_tokens * top_k * width, experts * 2 * hidden * width) > 2**31
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    generator = torch.Generator(device="cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x = randn(num_tokens, width).requires_grad_()
    w = ExpertWeights(randn(experts, 2 * hidden, width) * width**-0.5, randn(experts, width, hidden) * hidden**-0.5)
    ids = torch.rand(num_tokens, experts, generator=generator, device="cuda").topk(top_k).indices.int()
    routing_weights = torch.rand(num_tokens, top_k, generator=generator, device="cuda")
    ops = TritonExpertOps("cuda")
    routing = ops.sort_routes(ids, routing_weights, experts)
    tokens = [0, num_tokens // 2, num_tokens - 1]
    with torch.no_grad():
        check_tokens(x, ids, routing_weights, w, ops.experts(x, routing, w), tokens)
    out = ops.experts(x, routing, w)
    check_tokens(x, ids, routing_weights, w, out, tokens)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    small = x[tokens].detach().requires_grad_()
    alone = ops.experts(small, ops.sort_routes(ids[tokens], routing_weights[tokens], experts), w)
    (small_grad,) = torch.autograd.grad(alone, small, torch.ones_like(alone))
    torch.testing.assert_close(grad[tokens], small_grad, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("num_tokens", [1, 64, 1024])
@torch.no_grad()
def test_a_tensor_in_the_hosts_memory_is_one_line_at_every_call(num_tokens):
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    ops, x, w = TritonExpertOps("cuda"), randn(num_tokens, 128), ExpertWeights(randn(8, 128, 128), randn(8, 128, 64))
    ids, weights = torch.randint(0, 8, (num_tokens, 2), device="cuda"), torch.rand(num_tokens, 2, device="cuda")
    routing = ops.sort_routes(ids, weights, 8)
    expected = ops.experts(x, routing, w)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be accessed"):
            ops.experts(x, replace(routing, offsets_P=routing.offsets_P.cpu()), w)
    assert torch.equal(ops.experts(x, routing, w), expected)
