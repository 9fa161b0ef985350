"""Benchmark rows as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from moe_gpu.benchmark.providers import BASELINE
from moe_gpu.results import BenchmarkRow, Ceiling, Machine, Row, select


def case_of(row: BenchmarkRow) -> tuple[object, ...]:
    """What rows that may be compared have in common: all but the provider and the launch mode."""
    sizes = (row.input_dim, row.hidden_dim, row.expert_dim, row.num_experts, row.top_k)
    return (row.model, *sizes, row.dtype, row.num_tokens, row.routing, row.mode)


def baseline_times(rows: Sequence[BenchmarkRow], provider: str = BASELINE) -> dict[tuple[object, ...], float]:
    """Median eager milliseconds of one provider by case, where it was timed."""
    return {
        case_of(row): row.p50_ms
        for row in rows
        if row.provider == provider and row.launch == "eager" and row.p50_ms is not None
    }


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _quantity(value: float) -> str:
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {suffix}"
    return f"{value:.0f}"


def print_rows(rows: Sequence[Row]) -> None:
    """Print machine, ceilings, a table for each case, and what was not timed and why; `-` is not measured."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for machine in select(rows, Machine):
        commit = (machine.commit or "unknown")[:12]
        console.print(f"{machine.device}, torch {machine.torch}, commit {commit}", highlight=False, soft_wrap=True)
    for ceiling in select(rows, Ceiling):
        text = f"ceiling {ceiling.name} {ceiling.dtype}: {_quantity(ceiling.value)}{ceiling.unit} ({ceiling.how})"
        console.print(text, highlight=False, soft_wrap=True)
    measured = [row for row in select(rows, BenchmarkRow) if row.p50_ms is not None]
    baseline = baseline_times(measured)
    for case in dict.fromkeys(case_of(row) for row in measured):
        group = [row for row in measured if case_of(row) == case]
        first = group[0]
        title = f"{first.model} {first.dtype}, T={first.num_tokens}, {first.routing} routing, {first.mode}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("provider", min_width=23)
        for name in ("ms", "vs loop", "tokens/s", "FLOP/s", "of matmul", "of copy"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in group:
            loop_ms = baseline.get(case)
            table.add_row(
                row.provider if row.launch == "eager" else f"{row.provider} ({row.launch})",
                f"{row.p50_ms:.3f}",
                "-" if loop_ms is None else f"{loop_ms / row.p50_ms:.2f}x",
                _quantity(row.tokens_per_s),
                _quantity(row.tflops * 1e12),
                _share(row.flops_share),
                _share(row.bandwidth_share),
            )
        console.print(table)
    for line in untimed(rows):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def untimed(rows: Sequence[Row]) -> list[str]:
    """One line for each provider and reason that left rows without times."""
    reasons: dict[tuple[str, str, str], list[BenchmarkRow]] = {}
    for row in select(rows, BenchmarkRow):
        if row.p50_ms is None:
            reasons.setdefault((row.provider, row.status, row.reason or "no reason given"), []).append(row)
    total = len(select(rows, BenchmarkRow))
    lines = []
    for (provider, status, reason), group in reasons.items():
        cases = sorted({f"T={row.num_tokens} {row.mode} {row.launch}" for row in group})
        where = f" ({', '.join(cases)})" if len(group) < total and status != "unavailable" else ""
        lines.append(f"not timed: {provider} {status}: {reason}{where}")
    return lines
