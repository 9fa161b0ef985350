"""What every registered operator must satisfy on any device: opcheck, tracing without breaks, routing to the bit."""

from __future__ import annotations

import torch

from moe_gpu import reference
from moe_gpu.config import MoEConfig, RouterConfig
from moe_gpu.model import AdvancedMoELayer
from moe_gpu.reference import load_state_size
from moe_gpu.triton_kernels.ops import TritonExpertOps
from tests.kernel_cases import ROUTERS, ExpertCase, check_close, check_routing, make_problem

ROUTE_SHAPES = {
    "no tokens": (0, 8, 2),
    "one token": (1, 8, 2),
    "one expert": (3, 1, 1),
    "k = 1": (5, 8, 1),
    "several blocks, prime E, k = E": (70, 13, 13),
    "several blocks": (300, 32, 6),
    "more experts than a warp": (90, 128, 8),
}


def routing_logits(num_tokens: int, num_experts: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random logits with a NaN row, a tied row, masked experts and a fully masked row where there is room."""
    generator = torch.Generator().manual_seed(num_tokens * 1000 + num_experts)
    logits = torch.randn(num_tokens, num_experts, generator=generator).to(dtype)
    if num_tokens >= 5:
        logits[0, 3] = float("nan")
        logits[1] = 0.25
        logits[2] = -float("inf")
        logits[3, 0] = -float("inf")
        logits[4, 1] = float("inf")
    return logits.to(device)


def check_route(shape: tuple[int, int, int], router: RouterConfig, biased: bool, dtype: torch.dtype, device: str):
    """Choices, weights, order, capacity and the gradient of the logits against the reference."""
    num_tokens, num_experts, top_k = shape
    if router.n_group > 1 and (num_experts % router.n_group or top_k > num_experts // router.n_group * 2):
        return
    logits = routing_logits(num_tokens, num_experts, dtype, device)
    bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(1)).to(device) if biased else None
    ops = TritonExpertOps(device)
    assert ops.backend.name == "triton", ops.backend.reason
    for capacity in (None, max(1, num_tokens * top_k // num_experts)):
        leaf = logits.clone().requires_grad_()
        wide = logits.double().requires_grad_()
        narrow = logits.clone().requires_grad_()
        got = ops.route(leaf, top_k, router, bias, capacity)
        check_routing(got, reference.route_reference(narrow.float(), top_k, router, bias, capacity))
        if num_tokens == 0:
            continue
        grad = torch.randn(got.topk_weights_TK.shape, generator=torch.Generator().manual_seed(2)).to(device)
        (got_grad,) = torch.autograd.grad(got.topk_weights_TK, leaf, grad)
        # The oracle differentiates the same choice; float64 scores could resolve a tie of float32 otherwise.
        truth = reference.topk_reference(wide, top_k, router, bias)
        same = reference.topk_reference(narrow, top_k, router, bias)
        agree = (truth[0] == got.topk_ids_TK).all(1, keepdim=True)
        (truth_grad,) = torch.autograd.grad(truth[1], wide, grad.double())
        (same_grad,) = torch.autograd.grad(same[1], narrow, grad)
        if top_k == 1 and router.norm_topk_prob:
            assert got_grad.abs().max() < 1e-5  # the one weight is constant
            continue
        zero = torch.zeros((), device=device)
        check_close(
            "gradient of the logits",
            torch.where(agree, got_grad, zero.to(dtype)),
            torch.where(agree, same_grad, zero.to(dtype)),
            torch.where(agree, truth_grad, zero.double()),
            dtype,
        )


def check_given_ids(num_tokens: int, num_experts: int, top_k: int, device: str) -> None:
    """Given choices, ids out of range among them and of int32, take the reference's rows."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(-2, num_experts + 3, (num_tokens, top_k), generator=generator, dtype=torch.int32).to(device)
    wide = ids.long()
    wide[ids == -2], wide[ids == num_experts + 1] = -(2**40), 2**32  # 0, if it were cut to 32 bits
    check_int64_ids(wide, ids, num_experts)
    for capacity in (None, 3):
        got = TritonExpertOps(device).sort_routes(ids, torch.ones(ids.shape, device=device), num_experts, capacity)
        expected = reference.sort_routes_reference(ids, num_experts, capacity)
        for value, truth in zip(
            (got.demand_P, got.offsets_P, got.row_route_R, got.row_of_route_TK), expected, strict=True
        ):
            assert torch.equal(value, truth)


def check_int64_ids(wide: torch.Tensor, ids: torch.Tensor, num_experts: int) -> None:
    """int64 choices take the rows of the same as int32, and are those but for what has no expert."""
    for capacity in (None, 3):
        got, same = (
            TritonExpertOps(ids.device).sort_routes(
                each, torch.ones(ids.shape, device=ids.device), num_experts, capacity
            )
            for each in (wide, ids)
        )
        for name, value in vars(got).items():
            if name != "topk_ids_TK":
                assert torch.equal(value, getattr(same, name)), name
        assert got.topk_ids_TK.dtype == torch.int32
        assert torch.equal(got.topk_ids_TK, ids.clamp(-1, num_experts))


def run_opcheck(device: str) -> None:
    """torch.library.opcheck on every public operator: schema, autograd registration, fake tensors, AOT dispatch."""
    ops = TritonExpertOps(device)
    case = ExpertCase("opcheck", 11, 16, 8, 3, 2, bias=True)
    problem = make_problem(case, torch.float32, device)
    x, routing_weights, weights, _ = problem.leaves(torch.float32)
    routing = ops.sort_routes(problem.ids_TK, routing_weights.detach(), case.experts)
    rows = (routing.row_route_R, routing.row_of_route_TK, routing.offsets_P)
    demand = routing.demand_P
    logits = torch.randn(11, 3, device=device, requires_grad=True)
    y = torch.randn(22, 16, device=device, requires_grad=True)
    w = torch.randn(3, 5, 16, device=device, requires_grad=True)
    bias = torch.randn(3, 5, device=device, requires_grad=True)
    names = ("up_EGH", "down_EOI", "mid_EII", "up_bias_EG", "mid_bias_EI", "down_bias_EO")
    stacked = [getattr(weights, name) for name in names]
    operators = torch.ops.moe_gpu
    checks = {
        operators.route.default: (logits, None, 2, "softmax", False, True, 1.0, 1, 1, None),
        operators.sort_routes.default: (problem.ids_TK.long(), 3, None),
        operators.experts.default: (x, routing_weights, problem.ids_TK, *rows, *stacked, "swiglu", None, True, False),
        operators.permute.default: (x, *rows),
        operators.combine.default: (y, routing_weights, *rows),
        operators.grouped_gemm.default: (y, w, bias, routing.offsets_P, None),
        operators.count_load.default: (torch.zeros(load_state_size(3), dtype=torch.int64, device=device), demand),
    }
    for operator, arguments in checks.items():
        torch.library.opcheck(operator, arguments)


def check_fullgraph(device: str, dtype: torch.dtype, backend: str = "aot_eager") -> None:
    """The whole layer traces into one graph and gives what eager gives, forward and backward."""
    torch.manual_seed(0)
    config = MoEConfig(32, 32, 24, 4, 2, shared_hidden_dim=16)
    layer = AdvancedMoELayer.from_config(config).to(device, dtype)
    x = torch.randn(6, 32, device=device, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for run in (layer, compiled):
        leaf = x.clone().requires_grad_()
        out, stats = run(leaf)
        loss = out.float().square().mean() + 0.01 * stats.load_balancing_loss
        results.append((out, stats.counts_E, *torch.autograd.grad(loss, [leaf, *layer.parameters()])))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def check_public_row_operators(device: str) -> None:
    """permute, combine and grouped_gemm with gradients, rows of dropped routes being zero."""
    ops = TritonExpertOps(device)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(-1, 4, (17, 3), generator=generator, dtype=torch.int32).to(device)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    x, w, bias, weights, grad = randn(17, 20), randn(4, 9, 20), randn(4, 9), randn(17, 3), randn(17, 9)
    results = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for plain in (True, False):
            if dtype == torch.float64 and not plain:
                continue
            leaves = [t.to(dtype).requires_grad_() for t in (x, w, bias)]
            leaves.append(weights.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_())
            run = TritonExpertOps(device, use_triton=False) if plain else ops
            routing = run.sort_routes(ids, leaves[3], 4, capacity=10)
            if dtype == torch.float64:
                routing = reference.Routing(
                    ids, leaves[3], routing.demand_P, routing.offsets_P, routing.row_route_R, routing.row_of_route_TK
                )
            rows = run.permute(leaves[0], routing)
            y = run.grouped_gemm(rows, leaves[1], routing.offsets_P, leaves[2])
            out = run.combine(y, routing)
            grads = torch.autograd.grad(out, leaves, grad.to(dtype))
            results[dtype, plain] = [rows, y, out, *grads]
    names = ["rows", "product", "combined", "grad x", "grad w", "grad bias", "grad weights"]
    for dtype in (torch.float32, torch.bfloat16):
        truths, sames, gots = results[torch.float64, True], results[dtype, True], results[dtype, False]
        for name, got, same, truth in zip(names, gots, sames, truths, strict=True):
            check_close(f"{name} {dtype}", got.detach(), same.detach(), truth.detach(), dtype)


def check_kept_rows_go_with_their_graph(device: str) -> None:
    """The rows of up, which autograd holds, are gone within a backward pass unless another may follow."""
    ops = TritonExpertOps(device)
    for depth in (1, 2):
        case = ExpertCase("kept rows", 9, 32, 24, 4, 2, activation="gelu", depth=depth, bias=True)
        problem = make_problem(case, torch.float32, device)
        x, routing_weights, weights, leaves = problem.leaves(torch.float32)
        out = ops.experts(x, ops.sort_routes(problem.ids_TK, routing_weights, case.experts), weights, case.activation)
        kept = [tensor.untyped_storage() for tensor in out.grad_fn.saved_tensors[-2:][:depth]]
        assert all(storage.nbytes() for storage in kept)
        first = torch.autograd.grad(out, leaves, problem.grad_TO, retain_graph=True)
        assert all(storage.nbytes() for storage in kept)
        with torch.autograd.profiler.profile():
            heard = torch.autograd.grad(out, leaves, problem.grad_TO, retain_graph=True)
        last = torch.autograd.grad(out, leaves, problem.grad_TO)
        assert not any(storage.nbytes() for storage in kept)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, heard, last, strict=True))


__all__ = ["ROUTERS", "ROUTE_SHAPES"]
