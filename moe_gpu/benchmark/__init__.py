"""The benchmark: one layer, every provider, outputs checked before they are timed."""

from moe_gpu.benchmark.suite import MoEBenchmark, run_benchmarks, run_full_benchmark, run_quick_benchmark

__all__ = ["MoEBenchmark", "run_benchmarks", "run_full_benchmark", "run_quick_benchmark"]
