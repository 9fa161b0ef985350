"""The command `moe-gpu`: arguments only. What they ask for is done by the library, imported when it is needed.

Exit status: 0 done; 1 the run failed or the machine cannot do it; 2 a wrong argument, input file or output folder
(one line on stderr says the value, the limit and the remedy, and nothing was overwritten); 130 interrupted by Ctrl-C.
MOE_GPU_TRACEBACK=1 shows the traceback behind an error line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_gpu.cli import cache, completion, slices
from moe_gpu.cli import energy as energy_commands
from moe_gpu.cli import top as top_commands
from moe_gpu.cli.options import (
    DEVICES,
    DTYPES,
    KINDS,
    LAUNCHES,
    PASSES,
    Data,
    Device,
    Experts,
    Interrupted,
    Json,
    OutputDir,
    Publish,
    Seed,
    TopK,
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

_USAGE_ERROR: Any = typer.BadParameter.__base__  # click's UsageError, wherever this typer keeps it
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

app.add_typer(slices.app, name="slices", help="Divide a GPU by measured load: plan, simulate, MIG, bench.")
app.add_typer(energy_commands.app, name="energy")
app.add_typer(cache.app, name="cache")


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Mixture-of-Experts layers on NVIDIA GPUs; every number is measured."""
    if version:
        from moe_gpu import __version__

        print(f"moe-gpu {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    output_dir: OutputDir = Path("moe-gpu-output"),
    data: Data = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and sizes: under a minute.")] = False,
    publish: Publish = False,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train, record routing, benchmark and report: the whole path."""
    from moe_gpu.demo import run_demo

    with interruptible(f"whole files of this run are in {output_dir}"), stdout_for_json(as_json):
        summary = run_demo(output_dir, device=device, data=tuple(data or ()), seed=seed, quick=quick, publish=publish)
    if as_json:
        print(json.dumps(summary))


@app.command()
def bench(
    preset: Annotated[
        str | None,
        typer.Option("--preset", parser=one_of(*PRESETS), metavar="NAME", help=f"Sizes: {', '.join(PRESETS)}."),
    ] = None,
    input_dim: Annotated[int | None, count("--input-dim", "H, the tokens' width.")] = None,
    hidden_dim: Annotated[int | None, count("--hidden-dim", "I, the experts' inner width.")] = None,
    expert_dim: Annotated[int | None, count("--expert-dim", "O, the experts' output width.")] = None,
    experts: Experts = None,
    top_k: TopK = None,
    tokens: Annotated[list[str] | None, many("--tokens", whole_number(1), "N,...", "Tokens a call")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", parser=one_of(*DTYPES), metavar="|".join(DTYPES), help="Data type.")
    ] = None,
    routings: Annotated[
        list[str] | None,
        many("--routing", str, "NAME,...", "uniform, zipf-S (as zipf-1.2), one-expert, trace (needs --trace)"),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="A routing trace, recorded by `moe-gpu demo`.")
    ] = None,
    modes: Annotated[list[str] | None, many("--mode", one_of(*PASSES), "NAME,...", " or ".join(PASSES))] = None,
    providers: Annotated[
        list[str] | None, many("--provider", str, "NAME,...", "moe_gpu, torch_loop or a peer; all by default")
    ] = None,
    launches: Annotated[list[str] | None, many("--launch", one_of(*LAUNCHES), "NAME,...", "eager or graph")] = None,
    iterations: Annotated[int | None, count("--iterations", "Timed calls of each provider.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Run nothing: print which kernel and tile would serve each product.")
    ] = False,
    sm_budget: Annotated[int | None, count("--sm-budget", "SMs to use (with --explain).")] = None,
    energy: Annotated[
        bool, typer.Option("--energy", help="Also measure joules per token, 20 s for each row (needs an NVIDIA GPU).")
    ] = False,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="Instead, what each part of the layer brings, and 4 to 256 experts.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The small preset, few sizes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every preset that fits this device. Takes long.")] = False,
    output_dir: OutputDir = Path("moe-gpu-output"),
    seed: Seed = 0,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="cpu|cuda", help='Default: the GPU if there is one. --explain takes "NVIDIA H200" too.'
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time one MoE layer against its peers.

    Providers: ours, the plain loop and every installed peer. Each output is checked before it is timed.
    """
    from moe_gpu.runs import run_bench, run_explain, timed

    sizes = dict(input_dim=input_dim, hidden_dim=hidden_dim, expert_dim=expert_dim, num_experts=experts, top_k=top_k)
    if explain:
        with stdout_for_json(as_json):
            steps = run_explain(
                preset=preset, sizes=sizes, tokens=whole(tokens), dtype=dtype, sm_budget=sm_budget, device=device
            )
        if as_json:
            print("\n".join(json.dumps(step) for step in steps))
        return
    if sm_budget is not None:
        raise typer.BadParameter(f"--sm-budget {sm_budget} needs --explain; leave one out or give both")
    try:
        device = None if device is None else DEVICES(device)
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint="'--device'") from None
    with interruptible("no results were written"), stdout_for_json(as_json):
        rows = run_bench(
            output_dir,
            preset=preset,
            sizes=sizes,
            quick=quick,
            full=full,
            routings=routings,
            trace=trace,
            batch_sizes=tokens or None,
            dtype=dtype,
            modes=modes or None,
            providers=providers or None,
            launches=launches or None,
            num_iterations=iterations,
            seed=seed,
            device=device,
            energy=energy,
            ablation=ablation,
        )
    if as_json:
        print_rows(rows)
    if not timed(rows):
        raise typer.Exit(1)


@app.command()
def train(
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A run as JSON or YAML; see docs/training.md.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any field of the configuration (repeat); over --config."),
    ] = None,
    data: Data = None,
    steps: Annotated[int | None, count("--steps", "Optimiser steps.")] = None,
    experts: Experts = None,
    top_k: TopK = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in --output-dir.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Train nothing: print the whole configuration as JSON.")
    ] = False,
    publish: Publish = False,
    output_dir: OutputDir = Path("moe-gpu-output"),
    seed: Annotated[int | None, count("--seed", "Seed of weights, data order and samples.", 0)] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a MoE language model on text.

    Ctrl-C leaves a checkpoint that --resume goes on from; without --config with the configuration it began with.
    """
    from moe_gpu.runs import run_training, training_config

    with interruptible("nothing was trained"), stdout_for_json(as_json):
        config = training_config(
            device,
            config_file=config_file,
            resume_from=output_dir if resume else None,
            fields=fields or (),
            data=tuple(data) if data else None,
            steps=steps,
            num_experts=experts,
            top_k=top_k,
            seed=seed,
        )
        rows = [] if print_config else run_training(output_dir, config, resume=resume, publish=publish)
    if print_config:
        print(json.dumps(config.to_json(), indent=1))
    elif as_json:
        print_rows(rows)


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a training run.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Text to go on from; by default the run's own.")
    ] = None,
    tokens: Annotated[int, count("--tokens", "Tokens to generate.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", help="0 takes the likeliest token each time.")
    ] = 0.8,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint by held-out loss, not the newest.")] = False,
    seed: Annotated[int, count("--seed", "Seed of the drawing.", 0)] = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Go on from a prompt with a trained model."""
    from moe_gpu.runs import run_generate

    with interruptible("nothing was written"), stdout_for_json(as_json):
        generated = run_generate(
            directory, prompt=prompt, num_tokens=tokens, temperature=temperature, seed=seed, best=best, device=device
        )
    if as_json:
        print(json.dumps(generated))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.jsonl", help="Results files.")],
    output_dir: OutputDir = Path("moe-gpu-output"),
    as_json: Json = False,
) -> None:
    """Draw plots and write a report from results files."""
    from moe_gpu.runs import write_outputs

    with interruptible(f"whole files are in {output_dir}"), stdout_for_json(as_json):
        written = write_outputs(results, output_dir)
    if as_json:
        print(json.dumps([str(path) for path in written]))


@app.command()
def profile(
    trace: Annotated[
        Path | None,
        typer.Argument(metavar="TRACE", help="A routing trace; without it a short training run on this machine."),
    ] = None,
    tokens: Annotated[int, count("--tokens", "Tokens a call, into which a trace is cut.")] = 256,
    steps: Annotated[int, count("--steps", "Training steps of the live run.")] = 20,
    windows: Annotated[int, count("--windows", "Columns of the heatmap over time.")] = 32,
    layer: Annotated[int | None, count("--layer", "The layer drawn over time; by default the most uneven.", 0)] = None,
    tile: Annotated[int, count("--tile", "Rows of a tile for the padding: 16, 32, 64 or 128.")] = 64,
    output_dir: OutputDir = Path("moe-gpu-output"),
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show the load of every expert, of a routing trace or live."""
    from moe_gpu.profile_runs import run_profile

    with interruptible("nothing was written"), stdout_for_json(as_json):
        layers = run_profile(
            output_dir,
            trace=trace,
            tokens=tokens,
            steps=steps,
            windows=windows,
            layer=layer,
            tile=tile,
            device=device,
            seed=seed,
        )
    if as_json:
        print("\n".join(json.dumps(figures) for figures in layers))


@app.command()
def tune(
    presets: Annotated[
        list[str] | None,
        many("--preset", one_of(*PRESETS), "NAME,...", f"Sizes: {', '.join(PRESETS)}; qwen3-30b-a3b by default"),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        many("--tokens", whole_number(1), "N,...", "Tokens a call; 8 to 2048 rows an expert by default"),
    ] = None,
    kinds: Annotated[list[str] | None, many("--kind", one_of(*KINDS), "NAME,...", "Products; all by default")] = None,
    sm_budgets: Annotated[
        list[str] | None, many("--sm-budget", whole_number(1), "N,...", "SMs to use; all by default")
    ] = None,
    routing: Annotated[
        str, typer.Option("--routing", metavar="NAME", help="The load to tune for: uniform or zipf-S.")
    ] = "uniform",
    seconds: Annotated[int, count("--seconds", "When to stop, about.")] = 600,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Also write a row for each candidate here (JSON lines)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be measured; measure nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the fastest tile of every product on this GPU.

    They serve from then on: the table is ~/.cache/moe_gpu/tiles, or under the folder in MOE_GPU_CACHE.
    """
    from moe_gpu.tune import run_tune

    with interruptible("what was measured is kept"), stdout_for_json(as_json):
        rows = run_tune(
            presets or ["qwen3-30b-a3b"],
            tokens=whole(tokens),
            kinds=kinds or None,
            sm_budgets=whole(sm_budgets),
            routing=routing,
            seconds=seconds,
            output=output,
            dry_run=dry_run,
        )
    if as_json:
        print_rows(rows)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can run, and how to fix it.

    Exit status 1 where the main job cannot run.
    """
    from moe_gpu.doctor import diagnose, render

    diagnosis = diagnose()
    print(json.dumps(diagnosis.to_dict()) if as_json else render(diagnosis))
    if not diagnosis.can_run:
        raise typer.Exit(1)


app.command()(top_commands.top)
app.command()(completion.completion)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; wrong arguments, files and folders are one line and status 2."""
    _print_any_name()
    try:
        status = app(args=arguments, prog_name="moe-gpu", standalone_mode=False)
    except _USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "moe-gpu"
        return _fail(f"{error.format_message()} (see `{command} --help`)")
    except Interrupted as stop:
        return _interrupted(str(stop))
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        # The reader, such as `head`, has seen enough; nothing may be written when Python closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("MOE_GPU_TRACEBACK") == "1":
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            return _fail(f"{error.filename}: {error.strerror}")
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        from moe_gpu.nvml import NvmlUnavailableError

        line = str(error) if isinstance(error, NvmlUnavailableError) else _out_of_memory(error)
        if line is None or os.environ.get("MOE_GPU_TRACEBACK") == "1":
            raise
        return _fail(line, status=1)
    except ImportError as error:
        from moe_gpu.extras import MissingExtraError

        if not isinstance(error, MissingExtraError):
            raise
        return _fail(str(error), status=1)
    return _interrupted("interrupted") if status == 130 else status or 0


def _interrupted(what: str) -> int:
    print(f"moe-gpu: {what}", file=sys.stderr)
    return 130


def _out_of_memory(error: BaseException) -> str | None:
    """The line for a machine without the memory, or None for another error: on a CPU PyTorch has no class for it."""
    said = str(error)
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        return f"out of memory ({said.splitlines()[0] if said else 'no more is known'}); ask for smaller sizes"
    return None


def _print_any_name() -> None:
    """Let stdout take file names that are not UTF-8, as stderr does: a name must not end a run that is done."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _fail(message: str, status: int = 2) -> int:
    print("moe-gpu: error:", " ".join(message.split()), file=sys.stderr)
    return status
