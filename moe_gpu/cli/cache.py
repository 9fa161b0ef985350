"""`moe-gpu cache`: what an expert cache would do on a recorded routing trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_gpu.cli.options import Json, count, interruptible, many, one_of, print_rows, stdout_for_json

CACHE_POLICIES = ("auto", "lru", "lfu", "ewma", "static", "on-demand", "optimal")
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Experts beyond device memory: simulate the policies.",
)


@app.callback(invoke_without_command=True)
def _top(context: typer.Context) -> None:
    """Experts beyond device memory."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A routing trace, recorded by `moe-gpu demo`.")],
    budgets: Annotated[
        list[str] | None, many("--budget", str, "N,...", "Experts a layer in HBM: 8 or 25%; 25%, 50%, 75% by default")
    ] = None,
    policies: Annotated[
        list[str] | None, many("--policy", one_of(*CACHE_POLICIES), "NAME,...", "Policies; all by default")
    ] = None,
    tokens: Annotated[int, count("--tokens", "Tokens a step.")] = 1,
    prefetch: Annotated[bool, typer.Option("--prefetch/--no-prefetch", help="Load what probably comes next.")] = True,
    as_json: Json = False,
) -> None:
    """Replay a trace through every policy: hit rates and copies.

    Needs no weights and no GPU.
    """
    from moe_gpu.console import progress_bar
    from moe_gpu.expert_cache.simulate import run_simulation

    with interruptible("nothing was written"), stdout_for_json(as_json), progress_bar("simulating") as progress:
        rows = run_simulation(trace, budgets or ["25%", "50%", "75%"], policies or None, tokens, prefetch, progress)
    if as_json:
        print_rows(rows)
