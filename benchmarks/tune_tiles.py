"""Time tile candidates of every grouped product on this GPU; the tables in tuning.py come from its output.

    python benchmarks/tune_tiles.py --output tiles.jsonl [--kind up --kind grad_w ...] [--problem qwen3-16384 ...]

Candidates compile in parallel into Triton's cache first, then run one after another. Routing is uniform random.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import time
from dataclasses import asdict

import torch

from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.results import Row, TileRow, describe_machine, write_rows
from moe_gpu.triton_kernels import expert_mlp, grouped_gemm, grouped_gemm_grad
from moe_gpu.triton_kernels.ops import TritonExpertOps
from moe_gpu.triton_kernels.tuning import KINDS, GemmConfig, MlpConfig

PROBLEMS = {
    "qwen3-64": (PRESETS["qwen3-30b-a3b"], 64),
    "qwen3-512": (PRESETS["qwen3-30b-a3b"], 512),
    "qwen3-1024": (PRESETS["qwen3-30b-a3b"], 1024),
    "qwen3-4096": (PRESETS["qwen3-30b-a3b"], 4096),
    "qwen3-16384": (PRESETS["qwen3-30b-a3b"], 16384),
    "olmoe-32768": (PRESETS["olmoe-1b-7b"], 32768),
    "mixtral-8192": (PRESETS["mixtral-8x7b"], 8192),
    "qwen3-1": (PRESETS["qwen3-30b-a3b"], 1),
    "qwen3-8": (PRESETS["qwen3-30b-a3b"], 8),
}


def candidates(kind: str, rows_per_expert: float) -> list[GemmConfig | MlpConfig]:
    if kind == "mlp":
        return [
            MlpConfig(16, i, k, o, w, s)
            for i, k, o, w, s in itertools.product((32, 64, 128), (64, 128), (64, 128, 256), (4, 8), (3, 4))
            if i * k <= 128 * 128 and not (w == 8 and i == 32)
        ]
    found = []
    gated = kind == "up"
    if rows_per_expert > 96:
        shapes = {
            "up": [(128, 128, 64, 8), (64, 128, 64, 4), (128, 64, 64, 4), (128, 64, 64, 8), (256, 64, 64, 8)],
            "down": [(128, 256, 64, 8), (128, 128, 64, 4), (128, 128, 64, 8), (256, 128, 64, 8), (64, 256, 64, 4)],
            "grad_act": [(128, 128, 64, 8), (64, 128, 64, 4), (128, 256, 64, 8), (256, 128, 64, 8)],
            "grad_x": [(128, 256, 64, 8), (128, 128, 64, 4), (128, 128, 64, 8), (256, 128, 64, 8)],
            "grad_w": [(64, 128, 128, 4), (64, 128, 256, 8), (64, 256, 128, 8), (128, 128, 128, 8), (32, 128, 256, 8)],
        }[kind.removesuffix("_gather")]
        for (m, n, k, warps), stages, group in itertools.product(shapes, (3, 4, 5), (8, 16)):
            # Buffers in flight: a gathering loop spends two stages on the indices.
            buffers = stages - (2 if kind == "grad_w_gather" else 0)
            operands = m * (n + k) if kind.startswith("grad_w") else m * k + n * k * (2 if gated else 1)
            shared = operands * 2 * buffers
            if shared <= 225_000:
                programs = 2 if shared <= 110_000 and warps == 4 else 1
                found.append(GemmConfig(m, n, k, warps, stages, group, programs))
        return found
    rows = [16] if rows_per_expert <= 16 else [32, 64] if rows_per_expert <= 40 else [64, 128]
    if kind.startswith("grad_w"):
        return [
            GemmConfig(m, n, k, w, s, 8, p)
            for m, (n, k, w), s, p in itertools.product(
                (32, 64), ((128, 128, 4), (128, 256, 8), (64, 128, 4)), (2, 3), (1, 2)
            )
        ]
    for m, n, k, warps, stages in itertools.product(rows, (64, 128, 256), (64, 128), (4, 8), (3, 4, 5)):
        shared = (m * k + n * k * (2 if gated else 1)) * 2 * stages
        if shared <= 110_000 and n * m >= 1024 and not (gated and n > 128) and not (warps == 8 and n * m < 8192):
            found.append(GemmConfig(m, n, k, warps, stages, 8, 2))
    return found


def operand_shapes(kind: str, c: MoEConfig, tokens: int):
    rows = tokens * c.top_k
    gate_up = 2 * c.hidden_dim
    return {
        "up": ((tokens, c.input_dim), (c.num_experts, gate_up, c.input_dim)),
        "down": ((rows, c.hidden_dim), (c.num_experts, c.expert_dim, c.hidden_dim)),
        "grad_act": ((tokens, c.expert_dim), (c.num_experts, c.expert_dim, c.hidden_dim)),
        "grad_x": ((rows, gate_up), (c.num_experts, gate_up, c.input_dim)),
        "grad_w": ((rows, gate_up), (c.num_experts, gate_up, c.input_dim)),
        "grad_w_gather": ((rows, gate_up), (c.num_experts, gate_up, c.input_dim)),
        "mlp": ((tokens, c.input_dim), (c.num_experts, gate_up, c.input_dim)),
    }[kind]


class Problem:
    def __init__(self, kind: str, config: MoEConfig, tokens: int) -> None:
        torch.manual_seed(0)
        c, self.kind, self.config, self.tokens = config, kind, config, tokens
        a_shape, w_shape = operand_shapes(kind, c, tokens)
        new = dict(device="cuda", dtype=torch.bfloat16)
        self.a = torch.randn(a_shape, **new)
        self.w = torch.randn(w_shape, **new) * 0.03
        ids = torch.rand(tokens, c.num_experts, device="cuda").topk(c.top_k, dim=1).indices.int()
        self.weights = torch.rand(tokens, c.top_k, device="cuda")
        self.routing = TritonExpertOps("cuda").sort_routes(ids, self.weights, c.num_experts)
        self.rows = tokens * c.top_k
        if kind == "grad_act":
            self.h = torch.randn(self.rows, 2 * c.hidden_dim, **new)
        if kind.startswith("grad_w"):
            self.x = torch.randn(tokens if kind == "grad_w_gather" else self.rows, c.input_dim, **new)
            self.grad_w = torch.empty_like(self.w)
        if kind == "mlp":
            self.down = torch.randn(c.num_experts, c.expert_dim, c.hidden_dim, **new) * 0.03
        per_row = {"up": 4, "down": 2, "grad_act": 2, "grad_x": 4, "grad_w": 4, "grad_w_gather": 4, "mlp": 6}[kind]
        self.flops = per_row * self.rows * c.input_dim * c.hidden_dim

    def run(self, tile) -> None:
        r, c, gg = self.routing, self.config, grouped_gemm
        route = dict(route_R=r.row_route_R)
        if self.kind == "up":
            gg.grouped_gemm_forward(
                self.a, self.w, r.offsets_P, self.rows, tile, top_k=c.top_k, activation="swiglu", **route
            )
        elif self.kind == "down":
            gg.grouped_gemm_forward(self.a, self.w, r.offsets_P, self.rows, tile)
        elif self.kind == "grad_x":
            gg.grouped_gemm_forward(self.a, self.w.transpose(1, 2), r.offsets_P, self.rows, tile)
        elif self.kind == "grad_act":
            grouped_gemm_grad.grouped_gemm_grad_act(
                self.a,
                self.w.transpose(1, 2),
                self.h,
                "swiglu",
                r.offsets_P,
                tile,
                route_weight_TK=self.weights,
                **route,
            )
        elif self.kind == "grad_w":
            grouped_gemm_grad.grouped_gemm_grad_w(self.a, self.x, self.grad_w, r.offsets_P, tile)
        elif self.kind == "grad_w_gather":
            grouped_gemm_grad.grouped_gemm_grad_w(
                self.a, self.x, self.grad_w, r.offsets_P, tile, top_k=c.top_k, gather_a=True, **route
            )
        else:
            expert_mlp.expert_mlp_forward(
                self.a, r.row_route_R, r.offsets_P, c.top_k, self.w, self.down, "swiglu", tile
            )


_FLUSH: list[torch.Tensor] = []


def time_ms(run, repeats: int = 7) -> float:
    if not _FLUSH:
        _FLUSH.append(torch.empty(256 << 20, dtype=torch.int8, device="cuda"))
    run()
    samples = []
    for _ in range(repeats):
        _FLUSH[0].zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return sorted(samples)[len(samples) // 2]


def compile_one(job) -> None:
    kind, name, tile = job
    config, _ = PROBLEMS[name]
    problem = Problem(kind, config, 1)
    try:
        problem.run(tile)
    except Exception:  # noqa: BLE001 - an impossible tile shows again, with its reason, when it is timed
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--kind", action="append", choices=[*KINDS, "mlp"])
    parser.add_argument("--problem", action="append", choices=list(PROBLEMS))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seconds", type=float, default=400.0)
    options = parser.parse_args()
    started = time.monotonic()
    jobs = []
    for name in options.problem or PROBLEMS:
        config, tokens = PROBLEMS[name]
        rows_per_expert = tokens * config.top_k / config.num_experts
        for kind in options.kind or (*KINDS, "mlp"):
            if (kind == "mlp") == (rows_per_expert <= 4):
                jobs += [(kind, name, tile) for tile in candidates(kind, rows_per_expert)]
    unique = {}
    for kind, name, tile in jobs:
        unique.setdefault((kind, PROBLEMS[name][0].num_experts, tile), (kind, name, tile))
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        pool.map(compile_one, list(unique.values()), chunksize=4)
    print(f"{len(jobs)} candidates compiled in {time.monotonic() - started:.0f} s", flush=True)
    rows: list[Row] = [describe_machine(torch.device("cuda"))]
    for (kind, name), group in itertools.groupby(jobs, key=lambda job: job[:2]):
        problem = Problem(kind, *PROBLEMS[name])
        results = []
        for _, _, tile in group:
            if time.monotonic() - started > options.seconds:
                break
            try:
                ms = time_ms(functools.partial(problem.run, tile))
            except Exception as error:  # noqa: BLE001 - out of shared memory or registers: not a candidate here
                rows.append(TileRow(kind, name, asdict(tile), error=str(error)[:200]))
                continue
            results.append((ms, tile))
            rows.append(TileRow(kind, name, asdict(tile), ms, problem.flops / ms / 1e9))
        for ms, tile in sorted(results, key=lambda item: item[0])[:3]:
            print(f"{name:14s} {kind:9s} {ms:8.4f} ms {problem.flops / ms / 1e9:6.0f} TFLOP/s {tile}", flush=True)
        del problem
        torch.cuda.empty_cache()
        write_rows(options.output, rows)


if __name__ == "__main__":
    main()
