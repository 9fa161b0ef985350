"""Made-up result rows for tests of plots and reports: test data, never a measurement."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from moe_gpu.results import BenchmarkRow, Ceiling, ExpertLoadRow, Machine, Row, TrainingRow

CPU = Machine(
    "Test CPU, not a real machine", "cpu", "3.11.2", "2.13.0+cpu", "Linux", "2026-11-01T09:00:00+00:00",
    commit="0123456789abcdef0123456789abcdef01234567", commit_dirty=False, num_threads=1,
)  # fmt: skip
GPU = replace(
    CPU, device="Test GPU, not a real machine", device_type="cuda", torch="2.13.0+cu130", triton="3.6.0",
    driver="600.00", cuda="13.0", compute_capability="9.0", num_sms=132, commit_dirty=True,
)  # fmt: skip
SPEED = {
    "torch_loop": 1.0,
    "torch_grouped_mm": 1.9,
    "transformers_grouped_mm": 1.7,
    "scattermoe": 2.2,
    "triton_kernels": 2.3,
    "moe_gpu": 2.6,
}
SHAPES = {  # input_dim, hidden_dim, expert_dim, num_experts, top_k
    "small": (512, 1024, 512, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 2048, 128, 8),
}


def benchmark_row(
    provider: str = "moe_gpu", num_tokens: int = 64, p50_ms: float | None = 2.0, *, model: str = "small", **changes
) -> BenchmarkRow:
    """A measured row; `p50_ms=None` leaves out every time."""
    times = {}
    if p50_ms is not None:
        times = dict(samples=20, p20_ms=p50_ms * 0.95, p50_ms=p50_ms, p80_ms=p50_ms * 1.2, mean_ms=p50_ms * 1.02)
        times |= dict(std_ms=0.1, min_ms=p50_ms * 0.9, max_ms=p50_ms * 1.5, p95_ms=p50_ms * 1.4)
        times |= dict(tokens_per_s=num_tokens / p50_ms * 1e3, flops_share=0.3 / p50_ms, bandwidth_share=0.5 / p50_ms)
    values = dict(dtype="float32", routing="uniform", mode="forward") | times | changes
    return BenchmarkRow(provider, values.pop("status", "ok"), model, num_tokens, *SHAPES[model], **values)


def missing(provider: str, reason: str, status: str = "unavailable", **changes) -> BenchmarkRow:
    return benchmark_row(provider, p50_ms=None, status=status, reason=reason, **changes)


def benchmark_rows(
    *,
    models=("small",),
    tokens=(1, 8, 64, 512),
    routings=("uniform", "zipf-1.2"),
    modes=("forward", "forward+backward"),
    graphs: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> list[BenchmarkRow]:
    """Every provider on every combination, with scattermoe uninstalled, sonicmoe failing and the odd wrong point."""
    chance, rows = random.Random(seed), []
    for model in models:
        for mode in modes:
            for routing in routings:
                for num_tokens in tokens:
                    common = dict(model=model, num_tokens=num_tokens, mode=mode, routing=routing, dtype=dtype)
                    work = (0.05 + num_tokens**0.85 * 0.01) * (3 if "backward" in mode else 1)
                    for provider, speed in SPEED.items():
                        time = 8 * work / speed / math.log2(2 + num_tokens / 8) * chance.uniform(0.85, 1.2)
                        shares = dict(
                            flops_share=min(0.9, 0.02 * num_tokens**0.4 / time**0.1), bandwidth_share=0.05 * speed
                        )
                        if provider == "scattermoe":
                            rows.append(missing(provider, "not installed: pip install scattermoe", **common))
                        elif provider == "triton_kernels" and num_tokens == tokens[-2]:
                            rows.append(missing(provider, "max error 0.31 above 0.02", "wrong", **common))
                        else:
                            rows.append(benchmark_row(provider, p50_ms=time, **{**common, **shares}))
                    rows.append(missing("sonicmoe", "needs an NVIDIA GPU of compute capability 9.0", **common))
                    if graphs and num_tokens <= 512:
                        rows.append(benchmark_row("moe_gpu", p50_ms=time * 0.6, **common, launch="graph"))
    return rows


def training_rows(run: str = "demo", steps: int = 300, every: int = 10) -> list[TrainingRow]:
    chance = random.Random(1)
    rows = []
    for step in range(0, steps + 1, every):
        loss = 2.4 + 3.1 * math.exp(-step / 80) + chance.uniform(-0.06, 0.06)
        held_out = 2.5 + 3.0 * math.exp(-step / 80) if step % 50 == 0 else None
        rows.append(
            TrainingRow(
                run,
                step,
                loss,
                step * 512,
                step * 0.11,
                4600 + chance.uniform(-200, 200),
                held_out,
                1e-3,
                1.05,
                0.32 - 0.12 * (1 - math.exp(-step / 60)),
                0.82 + 0.15 * (1 - math.exp(-step / 60)),
                "reference",
            )
        )
    return rows


def load_rows(source="training", layers=4, experts=8, windows=12, unused: bool = True) -> list[ExpertLoadRow]:
    """Skewed load; with `unused`, expert 3 of layer 1 gets no route."""
    chance, rows = random.Random(2), []
    for layer in range(layers):
        base = [chance.lognormvariate(0, 0.6) for _ in range(experts)]
        for window in range(windows):
            counts = [int(100 * weight * chance.uniform(0.7, 1.3)) for weight in base]
            if unused and layer == 1:
                counts[3] = 0
            rows.append(ExpertLoadRow(source, layer, window, sum(counts) // 2, counts))
    return rows


def ceilings(dtype: str = "float32") -> list[Ceiling]:
    matmul = Ceiling("matmul", dtype, 1.2e11, "FLOP/s", "a made-up product of 2048 x 2048 matrices")
    return [matmul, Ceiling("copy", dtype, 1.4e10, "B/s", "a made-up copy of 256 MiB")]


def demo_rows() -> list[Row]:
    """What a CPU demo would record."""
    return [
        CPU,
        *ceilings(),
        *benchmark_rows(),
        *training_rows(),
        *load_rows(),
        *load_rows("held-out trace", windows=1),
    ]


def full_rows() -> list[Row]:
    """What a large GPU run would record."""
    rows = benchmark_rows(
        models=("small", "qwen3-30b-a3b"),
        tokens=(1, 8, 64, 512, 4096, 16384),
        routings=("uniform", "zipf-1.2", "trace"),
        graphs=True,
        dtype="bfloat16",
    )
    rows = [
        replace(row, energy_j_per_token=None if row.p50_ms is None else row.p50_ms * 0.3 / row.num_tokens)
        for row in rows
    ]
    load = load_rows("held-out trace", layers=48, experts=128, windows=1)
    return [GPU, *ceilings("bfloat16"), *rows, *training_rows(), *load_rows(), *load]
