"""The commands `moe-gpu slices ...`: arguments only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_gpu.cli.options import Json, Seed, count, interruptible, many, one_of, print_rows, stdout_for_json
from moe_gpu.config import PRESETS

BACKENDS = ("device", "cta", "green_context")
POLICIES = ("static", "dynamic", "proportional", "adaptive")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def _top(context: typer.Context) -> None:
    """Divide a GPU by measured load."""
    if context.invoked_subcommand is None:
        print(context.get_help())


_MOST = 1e15  # a sum of such numbers keeps its precision


def number_from_0(value: Any) -> float:
    """A parser of numbers from 0 to _MOST."""
    try:
        number = float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not a number; give one of at least 0") from None
    if not 0 <= number <= _MOST:
        raise typer.BadParameter(f"{value} is not a number of at least 0 and at most {_MOST:g}; give one")
    return number


Described = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help='cuda, or a GPU that need not be here, as "NVIDIA H200". Default: the GPU.'
    ),
]
Backend = Annotated[
    str, typer.Option("--backend", parser=one_of(*BACKENDS), metavar="NAME", help=f"{', '.join(BACKENDS)}.")
]
TotalSlices = Annotated[int, count("--total-slices", "Slices at most.")]
Groups = Annotated[int, count("--groups", "Tenants: groups of consecutive experts.")]
Layer = Annotated[int, count("--layer", "Layer of the trace.", 0)]
Tokens = Annotated[int, count("--tokens", "Tokens a call, into which a trace is cut.")]
Costs = Annotated[
    Path | None,
    typer.Option("--costs", metavar="FILE", help="Measured costs. Default: what `slices bench` left for this GPU."),
]
Loads = Annotated[list[str] | None, many("--load", number_from_0, "N,...", "Load of each tenant, rows a call")]


@app.command()
def plan(
    loads: Loads = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="A routing trace instead of --load.")
    ] = None,
    layer: Layer = 0,
    tokens: Tokens = 256,
    groups: Groups = 4,
    utilization: Annotated[
        list[str] | None, many("--utilization", number_from_0, "N,...", "How busy each tenant is, 0 to 1, for dynamic")
    ] = None,
    policy: Annotated[str, typer.Option("--policy", metavar="NAME", help=f"{', '.join(POLICIES)}.")] = "proportional",
    device: Described = None,
    backend: Backend = "green_context",
    total_slices: TotalSlices = 8,
    costs: Costs = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Also write the plan here.")] = None,
    as_json: Json = False,
) -> None:
    """Plan slices of a GPU for given loads; nothing is carried out."""
    from moe_gpu.slice_runs import run_plan

    with stdout_for_json(as_json):
        made = run_plan(
            loads=loads or None,  # type: ignore[arg-type]  # parsed to numbers
            trace=trace,
            layer=layer,
            tokens=tokens,
            groups=groups,
            utilization=utilization or None,  # type: ignore[arg-type]
            policy=policy,
            device=device,
            backend=backend,
            total_slices=total_slices,
            costs=costs,
            output=output,
        )
    if as_json:
        print(json.dumps(made))


@app.command()
def show(
    plan_file: Annotated[Path | None, typer.Argument(metavar="PLAN", help="A plan to check and show.")] = None,
    device: Described = None,
    as_json: Json = False,
) -> None:
    """Show what a GPU can be cut into, or check a plan against it."""
    from moe_gpu.slice_runs import run_show

    with stdout_for_json(as_json):
        shown = run_show(plan_file, device=device)
    if as_json:
        print(json.dumps(shown))


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A routing trace, recorded by `moe-gpu demo`.")],
    layer: Layer = 0,
    tokens: Tokens = 256,
    calls: Annotated[int, count("--calls", "Calls between two decisions.")] = 8,
    groups: Groups = 4,
    device: Described = None,
    backend: Backend = "green_context",
    total_slices: TotalSlices = 8,
    costs: Costs = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Replay a recorded routing trace under all four policies."""
    from moe_gpu.slice_runs import run_simulate

    with stdout_for_json(as_json):
        results = run_simulate(
            trace,
            layer=layer,
            tokens=tokens,
            calls=calls,
            groups=groups,
            device=device,
            backend=backend,
            total_slices=total_slices,
            costs=costs,
            seed=seed,
        )
    if as_json:
        print("\n".join(json.dumps(result) for result in results))


@app.command()
def mig(
    gpu: Annotated[int, count("--gpu", "Number of the GPU, as nvidia-smi counts.", 0)] = 0,
    device: Described = None,
    loads: Loads = None,
    memory: Annotated[
        list[str] | None, many("--memory-gib", number_from_0, "N,...", "Least memory of each load, GiB")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Create the layout; only on an idle GPU.")] = False,
    as_json: Json = False,
) -> None:
    """Show MIG instances, or plan a layout for loads.

    The commands that make the layout are printed; --apply runs them.
    """
    from moe_gpu.slice_runs import run_mig

    with stdout_for_json(as_json):
        made = run_mig(
            gpu=gpu,
            device=device,
            loads=loads or None,  # type: ignore[arg-type]
            memory_gib=memory or None,  # type: ignore[arg-type]
            apply=apply,
        )
    if as_json:
        print(json.dumps(made))


@app.command()
def bench(
    preset: Annotated[
        str, typer.Option("--preset", parser=one_of(*PRESETS), metavar="NAME", help=f"Sizes: {', '.join(PRESETS)}.")
    ] = "qwen3-30b-a3b",
    seconds: Annotated[int, count("--seconds", "When to stop, about.")] = 480,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="A routing trace that the policies meet as well.")
    ] = None,
    layer: Layer = 0,
    tokens: Tokens = 256,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Also write every row here (JSON lines).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this GPU's slices and the policies over a shifting load.

    Device tables, interference, isolation, costs, and what every policy takes. The costs are kept in
    ~/.cache/moe_gpu/slices, or under the folder in MOE_GPU_CACHE. Exit status 1 without a GPU.
    """
    from moe_gpu.slice_bench import run_slice_bench, why_not

    reason = why_not()
    if reason:
        print(f"moe-gpu: {reason}", file=sys.stderr)
        raise typer.Exit(1)
    with interruptible("what was measured is kept"), stdout_for_json(as_json):
        rows = run_slice_bench(preset, seconds=seconds, output=output, trace=trace, layer=layer, tokens=tokens)
    if as_json:
        print_rows(rows)
