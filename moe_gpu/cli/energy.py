"""`moe-gpu energy`: arguments only, as in commands.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from moe_gpu.cli.options import (
    DTYPES,
    Device,
    Json,
    OutputDir,
    Seed,
    above,
    count,
    interruptible,
    many,
    one_of,
    print_rows,
    stdout_for_json,
    whole,
    whole_number,
)
from moe_gpu.config import PRESETS

_MODES = ("forward", "forward+backward")


Dtype = Annotated[
    str | None, typer.Option("--dtype", parser=one_of(*DTYPES), metavar="|".join(DTYPES), help="Data type.")
]
Seconds = Annotated[float, typer.Option("--seconds", parser=above(0), metavar="S", help="Length of a window.")]
Trials = Annotated[int, count("--trials", "Windows of each.")]

app = typer.Typer(
    rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)


@app.callback(invoke_without_command=True)
def _top(context: typer.Context) -> None:
    """Joules of a GPU: measure a layer, calibrate, report, watch."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def measure(
    preset: Annotated[
        str | None,
        typer.Option("--preset", parser=one_of(*PRESETS), metavar="NAME", help=f"Sizes: {', '.join(PRESETS)}."),
    ] = None,
    tokens: Annotated[list[str] | None, many("--tokens", whole_number(1), "N,...", "Tokens a call")] = None,
    dtype: Dtype = None,
    providers: Annotated[
        list[str] | None,
        many("--provider", str, "NAME,...", "torch_loop, transformers_grouped_mm and moe_gpu by default"),
    ] = None,
    routing: Annotated[
        str | None, typer.Option("--routing", metavar="NAME", help="uniform, zipf-S (as zipf-1.2) or one-expert.")
    ] = None,
    modes: Annotated[list[str] | None, many("--mode", one_of(*_MODES), "NAME,...", " or ".join(_MODES))] = None,
    seconds: Seconds = 5.0,
    trials: Trials = 4,
    cooldown: Annotated[
        float, typer.Option("--cooldown", metavar="S", min=0.0, help="Rest before each window, seconds.")
    ] = 0.0,
    output_dir: OutputDir = Path("moe-gpu-output"),
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure joules per token of one layer, by provider.

    By expert too, as modelled, where `moe-gpu energy calibrate` has been run on this GPU.
    """
    from moe_gpu.energy import run_measure

    with interruptible("no results were written"), stdout_for_json(as_json):
        rows = run_measure(
            output_dir,
            preset=preset,
            tokens=whole(tokens),
            dtype=dtype,
            providers=providers or None,
            routing=routing,
            modes=modes or None,
            seconds=seconds,
            trials=trials,
            cooldown_s=cooldown,
            device=device,
            seed=seed,
        )
    if as_json:
        print_rows(rows)


@app.command()
def calibrate(
    dtype: Dtype = None,
    seconds: Seconds = 5.0,
    trials: Trials = 4,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write it here; by default where attribution looks for it."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fit this GPU's joules per second, FLOP and byte.

    Kept by board, driver and dtype under ~/.cache/moe_gpu/energy, or the folder in MOE_GPU_CACHE.
    """
    from moe_gpu.energy import run_calibrate

    with interruptible("nothing was calibrated"), stdout_for_json(as_json):
        model = run_calibrate(device=device, dtype=dtype, seconds=seconds, trials=trials, output=output)
    if as_json:
        print(json.dumps(asdict(model)))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.jsonl", help="Results files.")],
    as_json: Json = False,
) -> None:
    """Print the energy in results files, with intervals.

    `moe-gpu report` draws it.
    """
    from moe_gpu.energy import run_report

    with stdout_for_json(as_json):
        rows = run_report(results)
    if as_json:
        print_rows(rows)


@app.command()
def watch(
    hz: Annotated[float, typer.Option("--hz", parser=above(0), metavar="HZ", help="Samples a second.")] = 10.0,
    seconds: Annotated[
        float | None, typer.Option("--seconds", parser=above(0), metavar="S", help="When to stop; by default Ctrl-C.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the samples here (.csv, .json, .jsonl).")
    ] = None,
    metrics_port: Annotated[
        int | None, count("--metrics-port", "Also serve Prometheus at 127.0.0.1 on this port; 0 takes a free one.", 0)
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="UUID|cuda:N", help="Which GPU; by default the first.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show power, temperature, clocks and utilisation of a GPU."""
    from moe_gpu.energy import run_watch

    with interruptible("the samples so far are kept"), stdout_for_json(as_json):
        sampler = run_watch(device=gpu, hz=hz, seconds=seconds, output=output, metrics_port=metrics_port)
    if as_json:
        for sample in sampler.timeline():
            print(json.dumps(asdict(sample)))
