"""The command `moe-gpu`: arguments only. What they ask for is done by the library, imported when it is needed.

Exit status: 0 done; 1 the run failed or the machine cannot do it; 2 a wrong argument, input file or output folder
(one line on stderr says the value, the limit and the remedy, and nothing was overwritten); 130 interrupted by Ctrl-C.
MOE_GPU_TRACEBACK=1 shows the traceback behind an error line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_gpu.config import PRESETS

if TYPE_CHECKING:
    from moe_gpu.results import Row

_USAGE_ERROR: Any = typer.BadParameter.__base__  # click's UsageError, wherever this typer keeps it
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def whole_number(minimum: int) -> Callable[[Any], int]:
    """A parser of whole numbers of at least `minimum`."""

    def parse(value: Any) -> int:
        try:
            number = int(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not a whole number; give one of at least {minimum}") from None
        if number < minimum:
            raise typer.BadParameter(f"{number} is below the limit; give a whole number of at least {minimum}")
        return number

    return parse


def one_of(*choices: str) -> Callable[[Any], str]:
    """A parser of one word out of `choices`."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}; give one of these")
        return value

    return parse


def each(parse: Callable[[Any], Any]) -> Callable[[list[str] | None], list[Any]]:
    """A callback for an option that may be repeated and may hold several values divided by commas."""

    def parse_each(values: list[str] | None) -> list[Any]:
        return [parse(part.strip()) for value in values or [] for part in value.split(",")]

    return parse_each


def _whole(values: Any) -> list[int] | None:
    """What an option of whole numbers holds once parsed; None for nothing."""
    return values or None


def _count(flag: str, text: str, minimum: int = 1) -> Any:
    return typer.Option(flag, parser=whole_number(minimum), metavar="N", help=text)


def _many(flag: str, parse: Callable[[Any], Any], metavar: str, text: str) -> Any:
    return typer.Option(flag, callback=each(parse), metavar=metavar, help=f"{text} (repeat, or divide by commas)")


_PASSES = ("forward", "backward", "forward+backward")
_LAUNCHES = ("eager", "graph")
_DTYPES = ("fp32", "fp16", "bf16")
_DEVICES = one_of("cpu", "cuda")
_KINDS = ("up", "down", "grad_act", "grad_x", "grad_w", "grad_w_gather")

OutputDir = Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Folder for everything written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, all else on stderr.")]
Seed = Annotated[int, _count("--seed", "Seed of weights, data order and routing.", 0)]
Device = Annotated[
    str | None, typer.Option("--device", parser=_DEVICES, metavar="cpu|cuda", help="Default: the GPU if there is one.")
]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="FILE", help="Text to train on (repeat). Default: prose that ships with Python."),
]
Experts = Annotated[int | None, _count("--experts", "Experts.")]
TopK = Annotated[int | None, _count("--top-k", "Experts that each token visits.")]


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
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train, record routing, benchmark and report: the whole path."""
    from moe_gpu.demo import run_demo

    with _interruptible(f"whole files of this run are in {output_dir}"), _stdout_for_json(as_json):
        summary = run_demo(output_dir, device=device, data=tuple(data or ()), seed=seed, quick=quick)
    if as_json:
        print(json.dumps(summary))


@app.command()
def bench(
    preset: Annotated[
        str | None,
        typer.Option("--preset", parser=one_of(*PRESETS), metavar="NAME", help=f"Sizes: {', '.join(PRESETS)}."),
    ] = None,
    input_dim: Annotated[int | None, _count("--input-dim", "H, the tokens' width.")] = None,
    hidden_dim: Annotated[int | None, _count("--hidden-dim", "I, the experts' inner width.")] = None,
    expert_dim: Annotated[int | None, _count("--expert-dim", "O, the experts' output width.")] = None,
    experts: Experts = None,
    top_k: TopK = None,
    tokens: Annotated[list[str] | None, _many("--tokens", whole_number(1), "N,...", "Tokens a call")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", parser=one_of(*_DTYPES), metavar="|".join(_DTYPES), help="Data type.")
    ] = None,
    routings: Annotated[
        list[str] | None,
        _many("--routing", str, "NAME,...", "uniform, zipf-S (as zipf-1.2), one-expert, trace (needs --trace)"),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="A routing trace, recorded by `moe-gpu demo`.")
    ] = None,
    modes: Annotated[list[str] | None, _many("--mode", one_of(*_PASSES), "NAME,...", " or ".join(_PASSES))] = None,
    providers: Annotated[
        list[str] | None, _many("--provider", str, "NAME,...", "moe_gpu, torch_loop or a peer; all by default")
    ] = None,
    launches: Annotated[list[str] | None, _many("--launch", one_of(*_LAUNCHES), "NAME,...", "eager or graph")] = None,
    iterations: Annotated[int | None, _count("--iterations", "Timed calls of each provider.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Run nothing: print which kernel and tile would serve each product.")
    ] = False,
    sm_budget: Annotated[int | None, _count("--sm-budget", "SMs to use (with --explain).")] = None,
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
        with _stdout_for_json(as_json):
            steps = run_explain(
                preset=preset, sizes=sizes, tokens=_whole(tokens), dtype=dtype, sm_budget=sm_budget, device=device
            )
        if as_json:
            print("\n".join(json.dumps(step) for step in steps))
        return
    if sm_budget is not None:
        raise typer.BadParameter(f"--sm-budget {sm_budget} needs --explain; leave one out or give both")
    device = None if device is None else _DEVICES(device)
    with _interruptible("no results were written"), _stdout_for_json(as_json):
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
        )
    if as_json:
        _print_rows(rows)
    if not timed(rows):
        raise typer.Exit(1)


@app.command()
def train(
    data: Data = None,
    steps: Annotated[int | None, _count("--steps", "Optimiser steps.")] = None,
    experts: Experts = None,
    top_k: TopK = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --output-dir.")] = False,
    output_dir: OutputDir = Path("moe-gpu-output"),
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a small MoE language model on text.

    Ctrl-C leaves a checkpoint that --resume goes on from.
    """
    from moe_gpu.runs import run_training, training_config

    with _interruptible("nothing was trained"), _stdout_for_json(as_json):
        config = training_config(
            device, data=tuple(data) if data else None, steps=steps, num_experts=experts, top_k=top_k, seed=seed
        )
        rows = run_training(output_dir, config, resume=resume)
    if as_json:
        _print_rows(rows)


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.jsonl...", help="Results files.")],
    output_dir: OutputDir = Path("moe-gpu-output"),
    as_json: Json = False,
) -> None:
    """Draw plots and write a report from results files."""
    from moe_gpu.runs import write_outputs

    with _interruptible(f"whole files are in {output_dir}"), _stdout_for_json(as_json):
        written = write_outputs(results, output_dir)
    if as_json:
        print(json.dumps([str(path) for path in written]))


@app.command()
def tune(
    presets: Annotated[
        list[str] | None,
        _many("--preset", one_of(*PRESETS), "NAME,...", f"Sizes: {', '.join(PRESETS)}; qwen3-30b-a3b by default"),
    ] = None,
    tokens: Annotated[
        list[str] | None,
        _many("--tokens", whole_number(1), "N,...", "Tokens a call; 8 to 2048 rows an expert by default"),
    ] = None,
    kinds: Annotated[list[str] | None, _many("--kind", one_of(*_KINDS), "NAME,...", "Products; all by default")] = None,
    sm_budgets: Annotated[
        list[str] | None, _many("--sm-budget", whole_number(1), "N,...", "SMs to use; all by default")
    ] = None,
    seconds: Annotated[int, _count("--seconds", "When to stop, about.")] = 600,
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

    with _interruptible("what was measured is kept"), _stdout_for_json(as_json):
        rows = run_tune(
            presets or ["qwen3-30b-a3b"],
            tokens=_whole(tokens),
            kinds=kinds or None,
            sm_budgets=_whole(sm_budgets),
            seconds=seconds,
            output=output,
            dry_run=dry_run,
        )
    if as_json:
        _print_rows(rows)


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


def _print_rows(rows: Sequence[Row]) -> None:
    from moe_gpu.results import to_json

    for row in rows:
        print(to_json(row))


@contextmanager
def _interruptible(kept: str) -> Iterator[None]:
    """Ctrl-C ends the command with status 130 and one line: what the library kept, or else `kept`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"moe-gpu: {str(stop) or f'interrupted; {kept}'}", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def _stdout_for_json(as_json: bool) -> Iterator[None]:
    """With --json, tables and remarks go to stderr, so that stdout holds JSON and nothing else."""
    stdout = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; wrong arguments, files and folders are one line and status 2."""
    try:
        status = app(args=arguments, prog_name="moe-gpu", standalone_mode=False)
    except _USAGE_ERROR as error:
        command = error.ctx.command_path if error.ctx else "moe-gpu"
        return _fail(f"{error.format_message()} (see `{command} --help`)")
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing may be written when Python closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("MOE_GPU_TRACEBACK") == "1":
            raise
        return _fail(str(error))
    except ImportError as error:
        from moe_gpu.plots import MissingExtraError

        if not isinstance(error, MissingExtraError):
            raise
        return _fail(str(error), status=1)
    return status or 0


def _fail(message: str, status: int = 2) -> int:
    print("moe-gpu: error:", " ".join(message.split()), file=sys.stderr)
    return status
