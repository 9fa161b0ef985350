"""Record the experts alone on a Hopper GPU against SonicMoE: `python benchmarks/run_hopper.py FILE.jsonl`.

bf16, ids and weights given: sorting the routes, experts, combine. Three tables, each interleaved in this process with
a cold L2: `training` (forward and forward+backward, peak memory; beside them `bmm`, the two or six matrix products
over equal groups as cuBLAS batched products, without gather, activation or combine), `decode` (CUDA graphs that rotate
copies of the weights), and `budget` (the same products on fewer SMs). `--table` runs some of them only.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch

from moe_gpu import nvml
from moe_gpu.benchmark.problem import sample_choices
from moe_gpu.benchmark.timing import (
    Job,
    Timer,
    attempt,
    capture,
    describe_samples,
    measure_ceilings,
    peak_memory_bytes,
    sample_count,
    time_interleaved,
    warm_up,
)
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.reference import ExpertWeights
from moe_gpu.results import BenchmarkRow, Row, describe_machine, write_rows
from moe_gpu.triton_kernels.ops import TritonExpertOps

TABLES = ("training", "decode", "budget")
QWEN, MIXTRAL, OLMOE = "qwen3-30b-a3b", "mixtral-8x7b", "olmoe-1b-7b"
TRAINING = [
    (QWEN, PRESETS[QWEN], 16384),
    (QWEN, PRESETS[QWEN], 4096),
    (MIXTRAL, PRESETS[MIXTRAL], 8192),
    (OLMOE, PRESETS[OLMOE], 32768),
    ("h4096-i1024-e128-k8", MoEConfig(4096, 4096, 1024, 128, 8), 32768),
    ("h4096-i512-e256-k16", MoEConfig(4096, 4096, 512, 256, 16), 32768),
    ("h1536-i256-e128-k8", MoEConfig(1536, 1536, 256, 128, 8), 24576),
]
DECODE = [
    (QWEN, PRESETS[QWEN], (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)),
    (MIXTRAL, PRESETS[MIXTRAL], (1, 8, 64, 256, 1024)),
]
ROUTINGS = ("uniform", "zipf-1.2")
COPY_BYTES = 400 << 20  # weights that together leave nothing of each other in the L2


class Problem:
    """Inputs, stacked weights and given choices of one experts' problem, on the GPU in bf16."""

    def __init__(self, config: MoEConfig, num_tokens: int, routing: str) -> None:
        c, self.config, self.num_tokens, self.routing = config, config, num_tokens, routing
        generator = torch.Generator(device="cuda").manual_seed(0)
        new: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16, generator=generator)
        self.x = torch.randn(num_tokens, c.input_dim, **new).requires_grad_()
        self.up = (torch.randn(c.num_experts, c.up_rows, c.input_dim, **new) * c.input_dim**-0.5).requires_grad_()
        self.down = (
            torch.randn(c.num_experts, c.expert_dim, c.hidden_dim, **new) * c.hidden_dim**-0.5
        ).requires_grad_()
        self.ids = sample_choices(c, num_tokens, routing, torch.Generator().manual_seed(0)).int().cuda()
        scores = torch.rand(num_tokens, c.top_k, device="cuda", generator=generator)
        self.scores = (scores / scores.sum(1, keepdim=True)).requires_grad_()
        self.grad = torch.randn(num_tokens, c.expert_dim, **new)
        self.leaves = [self.x, self.up, self.down, self.scores]

    def flops(self, mode: str) -> int:
        return self.config.forward_flops(self.ids.numel()) * (1 if mode == "forward" else 3)

    def min_bytes(self) -> int:
        """Of a forward pass: the weights that are hit, input and output, once each."""
        hit = int(torch.bincount(self.ids.flatten().long(), minlength=self.config.num_experts).count_nonzero())
        rows = self.num_tokens * (self.config.input_dim + self.config.expert_dim)
        return 2 * (hit * self.config.parameters_per_expert + rows)

    @torch.no_grad()
    def check(self, out: torch.Tensor) -> tuple[float, float]:
        """Largest error over 64 tokens against float64, and twice PyTorch's own in bf16 plus a rounding."""
        at = torch.linspace(0, self.num_tokens - 1, min(64, self.num_tokens), device="cuda").long()

        def compute(dtype: torch.dtype) -> torch.Tensor:
            total = torch.zeros(len(at), self.config.expert_dim, device="cuda", dtype=torch.float64)
            for k in range(self.config.top_k):
                for t, (token, expert) in enumerate(zip(at.tolist(), self.ids[at, k].tolist(), strict=True)):
                    gate, up = (self.up[expert].to(dtype) @ self.x[token].to(dtype)).chunk(2)
                    y = self.down[expert].to(dtype) @ (torch.nn.functional.silu(gate) * up)
                    total[t] += y.double() * self.scores[token, k].double()
            return total.to(dtype).double()

        truth = compute(torch.float64)
        own = (compute(torch.bfloat16) - truth).abs().max().item()
        error = (out[at].double() - truth).abs().max().item()
        return error, 2 * own + torch.finfo(torch.bfloat16).eps * truth.abs().max().item()


def run_ours(p: Problem, ops: TritonExpertOps, weights: ExpertWeights | None = None) -> torch.Tensor:
    routing = ops.sort_routes(p.ids, p.scores, p.config.num_experts)
    return ops.experts(p.x, routing, weights or ExpertWeights(p.up, p.down))


def run_sonicmoe(p: Problem) -> torch.Tensor:
    """As SonicMoE's own layer calls its kernels, from given ids."""
    functional = import_module("sonicmoe.functional")
    metadata = import_module("sonicmoe.functional.triton_kernels").TC_topk_router_metadata_triton
    swiglu = import_module("sonicmoe.enums").ActivationType.SWIGLU
    (t, k), e = p.ids.shape, p.config.num_experts
    new: dict[str, Any] = dict(dtype=torch.int32, device="cuda")
    frequency, offsets = torch.empty(e, **new), torch.empty(e + 1, **new)
    rows = [torch.empty(t * k, **new) for _ in range(3)]
    metadata(p.ids, e, frequency, offsets, *rows)
    up, down = p.up.permute(1, 2, 0), p.down.permute(1, 2, 0)
    a, h = functional._UpProjection.apply(
        p.x, up, None, offsets, t * k, k, *rows, None, False, swiglu, not torch.is_grad_enabled(), True
    )
    return functional._DownProjection.apply(a, h, down, None, p.scores, offsets, t, k, *rows, None, False, swiglu)


def batched_products(p: Problem, mode: str) -> Job:
    """The matrix products of a pass over equal groups, by torch.bmm."""
    c, groups = p.config, p.ids.numel() // p.config.num_experts
    x = torch.randn(c.num_experts, groups, c.input_dim, device="cuda", dtype=torch.bfloat16)
    a = torch.randn(c.num_experts, groups, c.hidden_dim, device="cuda", dtype=torch.bfloat16)
    h = torch.randn(c.num_experts, groups, c.up_rows, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(c.num_experts, groups, c.expert_dim, device="cuda", dtype=torch.bfloat16)
    up, down = p.up.detach(), p.down.detach()

    def run(_: None) -> None:
        torch.bmm(x, up.mT)
        torch.bmm(a, down.mT)
        if mode != "forward":
            torch.bmm(y, down)
            torch.bmm(y.mT, a)
            torch.bmm(h.mT, x)
            torch.bmm(h, up)

    return Job(run)


class Recorder:
    """Times jobs of one problem in turn and keeps their rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.device = torch.device("cuda")
        self.timer = Timer(self.device)
        self.rows: list[Row] = [describe_machine(self.device), *measure_ceilings(self.device, torch.bfloat16)]
        self.begin = time.monotonic()

    def record(
        self,
        model: str,
        p: Problem,
        mode: str,
        launch: str,
        builds: dict[str, Callable[[], tuple[Job, dict[str, Any]]]],
        calls: int = 1,
        budget_s: float = 0.5,
    ) -> None:
        """Build each provider (which checks it), time all in turn; `calls`: problems that one job computes."""
        jobs: dict[str, Job] = {}
        known: dict[str, dict[str, Any]] = {}
        counts: dict[str, int] = {}
        for name, build in builds.items():
            outcome = attempt(build)
            if outcome.reason is None:
                job, known[name] = outcome.value
                outcome = attempt(functools.partial(warm_up, job, self.timer, budget_s))
                if outcome.reason is None:
                    jobs[name], counts[name] = job, sample_count(outcome.value, 60, budget_s)
            if outcome.reason is not None:
                known[name] = {"status": "failed", "reason": outcome.reason}
        samples, failures = time_interleaved(jobs, self.timer, counts)
        uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        power, clock = nvml.power_w(uuid), nvml.sm_clock_mhz(uuid)  # of all the jobs just timed in turn
        c = p.config
        for name in builds:
            facts = {"status": "ok", **known[name]}
            if name in failures:
                facts = {"status": "failed", "reason": failures[name]}
            if name in samples:
                facts.update(
                    describe_samples([time_ms / calls for time_ms in samples[name]]), sm_clock_mhz=clock, power_w=power
                )
                seconds = facts["p50_ms"] / 1e3
                facts.update(flops=p.flops(mode), tflops=p.flops(mode) / seconds / 1e12)
                if mode == "forward":
                    facts.update(min_bytes=p.min_bytes(), gbps=p.min_bytes() / seconds / 1e9)
            row = BenchmarkRow(
                provider=name,
                model=model,
                num_tokens=p.num_tokens,
                input_dim=c.input_dim,
                hidden_dim=c.hidden_dim,
                expert_dim=c.expert_dim,
                num_experts=c.num_experts,
                top_k=c.top_k,
                dtype="bfloat16",
                routing=p.routing,
                mode=mode,
                launch=launch,
                scope="experts",
                **facts,
            )
            self.rows.append(row)
            shown = row.reason if row.p50_ms is None else f"{row.p50_ms:9.4f} ms {row.tflops or 0:6.0f} TFLOP/s"
            at = f"{time.monotonic() - self.begin:6.1f} s  {model} T={p.num_tokens} {p.routing} {mode} {launch}"
            print(f"{at:72} {name:20} {shown}", flush=True)
        write_rows(self.path, self.rows)


def pass_job(p: Problem, run: Callable[[], torch.Tensor], mode: str) -> tuple[Job, dict[str, Any]]:
    """The timed call of a pass, its output checked first."""
    with torch.no_grad():
        error, allowed = p.check(run())
    if not error <= allowed:
        raise RuntimeError(f"wrong output: error {error:.3g}, allowed {allowed:.3g}")

    def forward(_: None) -> torch.Tensor:
        with torch.no_grad():
            return run()

    job = Job(forward) if mode == "forward" else Job(lambda _: torch.autograd.grad(run(), p.leaves, p.grad))
    warm_up(job, Timer(p.x.device), 0.0)
    memory = peak_memory_bytes(job, p.x.device)
    return job, dict(max_error=error, allowed_error=allowed, peak_memory_bytes=memory)


def training(recorder: Recorder, ops: TritonExpertOps) -> None:
    for model, config, num_tokens in TRAINING:
        for routing in ROUTINGS if model == QWEN else ROUTINGS[:1]:
            p = Problem(config, num_tokens, routing)
            for mode in ("forward", "forward+backward"):
                builds: dict[str, Callable[[], tuple[Job, dict[str, Any]]]] = {
                    "moe_gpu": lambda p=p, mode=mode: pass_job(p, lambda: run_ours(p, ops), mode)
                }
                if util.find_spec("sonicmoe") is not None:
                    builds["sonicmoe"] = lambda p=p, mode=mode: pass_job(p, lambda: run_sonicmoe(p), mode)
                if routing == "uniform":
                    builds["bmm"] = lambda p=p, mode=mode: (batched_products(p, mode), {})
                recorder.record(model, p, mode, "eager", builds)
            del p, builds
            torch.cuda.empty_cache()


def decode(recorder: Recorder, ops: TritonExpertOps) -> None:
    for model, config, sizes in DECODE:
        weight_bytes = 2 * config.num_experts * config.parameters_per_expert
        copies = 3 if weight_bytes < 4 << 30 else 2
        assert copies * weight_bytes > COPY_BYTES
        for num_tokens in sizes:
            for routing in ROUTINGS if num_tokens >= 256 and model == QWEN else ROUTINGS[:1]:
                p = Problem(config, num_tokens, routing)
                stacked = [ExpertWeights(p.up.detach().clone(), p.down.detach().clone()) for _ in range(copies)]

                def build(p: Problem = p, stacked: list[ExpertWeights] = stacked) -> tuple[Job, dict[str, Any]]:
                    with torch.no_grad():
                        error, allowed = p.check(run_ours(p, ops))
                        captured = capture(lambda: [run_ours(p, ops, w) for w in stacked][-1], p.x.device)
                    if not error <= allowed:
                        raise RuntimeError(f"wrong output: error {error:.3g}, allowed {allowed:.3g}")
                    return Job(lambda _: captured.replay()), dict(max_error=error, allowed_error=allowed)

                recorder.record(model, p, "forward", "graph", {"moe_gpu": build}, calls=copies, budget_s=0.2)
                del p, stacked, build
        torch.cuda.empty_cache()


def budget(recorder: Recorder, _: TritonExpertOps) -> None:
    for num_tokens in (4096, 16384):
        p = Problem(PRESETS[QWEN], num_tokens, "uniform")
        builds = {}
        for sms in (132, 100, 66, 32):
            ops = TritonExpertOps("cuda", sm_budget=sms)
            builds[f"moe_gpu {sms} SMs"] = lambda ops=ops, p=p: pass_job(p, lambda: run_ours(p, ops), "forward")
        recorder.record(QWEN, p, "forward", "eager", builds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("output", type=Path, metavar="FILE.jsonl", help="where the rows go")
    parser.add_argument("--table", action="append", choices=TABLES, help="run this table; all without it")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: error: needs an NVIDIA GPU of compute capability 9.0\n")
    recorder = Recorder(arguments.output)
    ops = TritonExpertOps("cuda")
    for name in arguments.table or TABLES:
        globals()[name](recorder, ops)
    print(f"{time.monotonic() - recorder.begin:.0f} s; results: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
