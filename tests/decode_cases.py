"""What the decode kernels must satisfy, on whatever device the caller names."""

from __future__ import annotations

import torch

from moe_gpu import reference
from moe_gpu.triton_kernels.decode import DecodeConfig, decode_forward
from moe_gpu.triton_kernels.gather_scatter import combine_forward
from tests.kernel_cases import ExpertCase, check_close, make_problem, reference_run

DECODE_CASES = [
    ExpertCase("no tokens", 0, 32, 16, 4, 2),
    ExpertCase("one token", 1, 32, 64, 4, 2),
    ExpertCase("odd widths", 7, 45, 37, 3, 2),
    ExpertCase("empty experts", 10, 32, 24, 8, 2, routing="few"),
    ExpertCase("several tiles of one expert", 40, 32, 24, 4, 1, routing="one"),
    ExpertCase("k = E, prime E", 3, 24, 16, 7, 7),
    ExpertCase("another output width", 6, 32, 24, 4, 2, output_dim=51),
    ExpertCase("capacity drops routes", 20, 32, 24, 4, 2, capacity=3, routing="few"),
    ExpertCase("ids out of range and -1", 12, 32, 24, 4, 2, routing="out of range"),
    ExpertCase("one expert", 4, 24, 16, 1, 1),
    ExpertCase("width one", 3, 1, 1, 3, 2, output_dim=1),
    ExpertCase("geglu with biases", 6, 32, 24, 4, 2, activation="geglu", bias=True),
    ExpertCase("tanh geglu", 6, 32, 24, 4, 2, activation="geglu_tanh"),
    ExpertCase("plain gelu with biases", 6, 32, 24, 4, 2, activation="gelu", bias=True),
    ExpertCase("strided", 6, 32, 24, 4, 2, strided=True),
    ExpertCase("strided, odd widths", 9, 27, 19, 3, 2, output_dim=13, strided=True, bias=True),
]


def check_decode(case: ExpertCase, config: DecodeConfig, dtype: torch.dtype, device: str, seed: int = 0) -> None:
    """The forward against the float64 oracle."""
    problem = make_problem(case, dtype, device, seed)
    truth, _ = reference_run(problem, torch.float64)
    same, _ = reference_run(problem, dtype)
    with torch.no_grad():
        x, routing_weights, w, _ = problem.leaves(dtype)
        _, offsets, row_route, row_of_route = reference.sort_routes_reference(
            problem.ids_TK, case.experts, case.capacity
        )
        products = (w.up_EGH, w.down_EOI, case.activation, config, w.up_bias_EG, w.down_bias_EO)
        y = decode_forward(x, row_route, offsets, case.top_k, *products)
        out = combine_forward(y, row_of_route, routing_weights, dtype)
    check_close(f"{case.name}: decode", out, same, truth, dtype)
