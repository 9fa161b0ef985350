"""What the commands do: benchmark, train and draw, each into a folder proved writable before the work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe_gpu.benchmark import MoEBenchmark, run_full_benchmark, run_quick_benchmark
from moe_gpu.benchmark.ablation import Ablation, default_preset, print_ablation
from moe_gpu.benchmark.problem import parse_dtype
from moe_gpu.benchmark.suite import choose_device
from moe_gpu.benchmark.table import print_rows
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.console import progress_bar
from moe_gpu.energy import energy_plan, print_energy
from moe_gpu.extras import MissingExtraError
from moe_gpu.files import writable_directory
from moe_gpu.plots import FIGURES, draw_training, require_matplotlib
from moe_gpu.profiler import RoutingTrace
from moe_gpu.report import write_report
from moe_gpu.results import ABLATION, BenchmarkRow, Row, TrainingRow, read_rows, select, write_rows
from moe_gpu.training import (
    TrainConfig,
    TrainResult,
    assignments,
    generate,
    load_checkpoint,
    read_config,
    train,
    with_fields,
)
from moe_gpu.training.config_file import CONFIG_FILE
from moe_gpu.training.run_files import RESULTS_FILE as TRAINING_FILE

RESULTS_FILE = "results.jsonl"
TRAINING_FIGURE = "training_results.png"
REPORT_FILE = "report.html"


def timed(rows: Sequence[Row]) -> bool:
    """Whether any provider was timed."""
    return any(row.status == "ok" for row in select(rows, BenchmarkRow))


def run_bench(
    output_dir: str | Path,
    *,
    preset: str | None = None,
    sizes: Mapping[str, int | None],
    quick: bool = False,
    full: bool = False,
    routings: Sequence[str] | None = None,
    trace: str | Path | None = None,
    energy: bool = False,
    ablation: bool = False,
    **options: Any,
) -> list[Row]:
    """Benchmark a layer, print the table and write `results.jsonl`.

    preset: `small` by default; sizes (`input_dim`, ...) replace its own. quick, full: the ready-made suites. trace: a
    file, replayed by default where it is given. energy: measure it too; EnergyUnavailableError, before any work, where
    there is none to measure. ablation: what each part of the layer brings, instead. options: MoEBenchmark's; None
    leaves its default.
    Raises ValueError before any work for what cannot run.
    """
    if quick and (full or preset):
        raise ValueError(f"--quick chooses its own preset; leave out {'--full' if full else f'--preset {preset}'}")
    chosen = {name: value for name, value in options.items() if value is not None}
    if ablation:
        others = {"--quick": quick, "--full": full, "--energy": energy, "--trace": trace, "--mode": chosen.get("modes")}
        others |= {"--provider": chosen.get("providers"), "--launch": chosen.get("launches")}
        clashing = [name for name, value in others.items() if value]
        if clashing:
            raise ValueError(f"--ablation does not go with {' and '.join(clashing)}; leave one of them out")
        return _run_ablation(output_dir, preset, _given(sizes), routings, chosen)
    if routings or trace:
        chosen["routings"] = list(routings or ["trace"])
    if trace:
        chosen["trace"] = RoutingTrace.load(trace)
    elif "trace" in chosen.get("routings", ()):
        raise ValueError("--routing trace replays a file; name it with --trace FILE (`moe-gpu demo` records one)")
    attributions = None
    if energy:
        _, chosen["energy"], attributions = energy_plan(
            options.get("device"), seed=chosen.get("seed", 0), trace=chosen.get("trace")
        )
    given = _given(sizes)
    if full:
        presets = [preset] if preset else None
        directory = writable_directory(output_dir)
        with progress_bar("benchmark") as progress:
            rows = run_full_benchmark(presets=presets, on_progress=progress, **given, **chosen)
    elif quick:
        directory = writable_directory(output_dir)
        with progress_bar("benchmark") as progress:
            rows = run_quick_benchmark(on_progress=progress, **given, **chosen)
    else:
        name, config = _named_config(preset or "small", given)
        benchmark = MoEBenchmark(config=config, model=name, **chosen)
        directory = writable_directory(output_dir)
        with progress_bar("benchmark") as progress:
            benchmark.on_progress = progress
            rows = benchmark.run_comparison()
    if attributions is not None:
        rows += attributions.rows
    write_rows(directory / RESULTS_FILE, rows)
    print_rows(rows)
    if attributions is not None:
        print_energy(rows)
        for remark in attributions.remarks:
            print(remark)
    print(f"results: {directory / RESULTS_FILE}")
    return rows


def _run_ablation(
    output_dir: str | Path,
    preset: str | None,
    sizes: Mapping[str, int],
    routings: Sequence[str] | None,
    options: Mapping[str, Any],
) -> list[Row]:
    named = _named_config(preset or default_preset(options.get("device")), sizes)
    chosen = {**options, **({"routings": list(routings)} if routings else {})}
    ablation = Ablation(named[1], model=named[0], **chosen)
    directory = writable_directory(output_dir)
    with progress_bar("ablation") as progress:
        rows = ablation.run(progress)
    write_rows(directory / RESULTS_FILE, rows)
    print_rows([row for row in rows if getattr(row, "scope", None) != ABLATION])
    print_ablation(rows)
    print(f"results: {directory / RESULTS_FILE}")
    return rows


def run_explain(
    *,
    preset: str | None = None,
    sizes: Mapping[str, int | None],
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    sm_budget: int | None = None,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """Print which kernel and tile serves each product of a layer, and return it; nothing is run.

    device: `cpu`, `cuda`, or the name of a GPU that need not be present; by default the GPU if there is one.
    Raises ValueError for a GPU that is not known, or `cuda` where there is none.
    """
    from moe_gpu.explain import described_gpu, explain_layer, present_gpu, print_explanations
    from moe_gpu.triton_kernels.ops import choose_backend

    name, config = _named_config(preset or "small", _given(sizes))
    torch_dtype = parse_dtype(dtype or "bf16")
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        reason = choose_backend("cpu").reason
        print(f'every step: plain PyTorch ({reason}); describe a GPU with --device "NVIDIA H200"')
        return [{"step": "layer", "path": "reference", "why": reason}]
    gpu = present_gpu() if device in (None, "cuda") else described_gpu(device)
    steps = []
    for count in tokens or (4096,):
        explanations = explain_layer(gpu, config, count, torch_dtype, sm_budget)
        print_explanations(gpu, f"{name} {dtype or 'bf16'}, T={count}", explanations)
        steps += [{"device": gpu.name, "model": name, "num_tokens": count, **e.to_dict()} for e in explanations]
    return steps


def _given(sizes: Mapping[str, int | None]) -> dict[str, Any]:
    """The sizes that are not None; a given input width is the output's too unless that is given."""
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if "input_dim" in given:
        given.setdefault("expert_dim", given["input_dim"])
    return given


def _named_config(preset: str, sizes: Mapping[str, Any]) -> tuple[str, MoEConfig]:
    """A preset with some sizes changed, and its name: `custom` where that makes it another layer."""
    config = PRESETS[preset].with_(**sizes)
    return (preset if config == PRESETS[preset] else "custom"), config


def training_config(
    device: str | None,
    *,
    config_file: str | Path | None = None,
    resume_from: str | Path | None = None,
    fields: Sequence[str] = (),
    **changes: Any,
) -> TrainConfig:
    """The run that a file asks for; without one that of the folder to resume; else the one that suits the device.

    fields: NAME=VALUE, over all of these; changes: over `fields` too, where they are not None.
    """
    changes["device"] = None if device is None else str(choose_device(device))
    given = {**assignments(fields), **{name: value for name, value in changes.items() if value is not None}}
    if config_file is not None:
        return read_config(config_file, TrainConfig(device=str(choose_device(device))), given)
    if resume_from is not None and (Path(resume_from) / CONFIG_FILE).exists():
        return read_config(Path(resume_from) / CONFIG_FILE, changes=given)
    return with_fields(TrainConfig.for_device(choose_device(device)), given)


def run_training(
    output_dir: str | Path, config: TrainConfig, *, resume: bool = False, publish: bool = False
) -> list[Row]:
    """Train; leave what `train` leaves and, where matplotlib is installed, `training_results.png`."""
    directory = Path(output_dir)
    result = train_with_progress(config, directory, resume=resume, publish=publish)
    rows = read_rows(directory / TRAINING_FILE)
    unit = result.text.tokenizer.name
    bits = result.text.bits_per_byte(result.eval_loss)
    print(f"held-out loss: {result.eval_loss:.3f} nats a {unit}, {bits:.3f} bits a byte, on {result.text.source}")
    if result.samples:
        newest = result.samples[-1]
        print(f"sample of step {newest['step']}: {newest['prompt']}{newest['text']}")
    print(f"results: {directory / TRAINING_FILE}\ncheckpoint: {result.checkpoint}")
    try:
        print(f"figure: {draw_training(rows, directory / TRAINING_FIGURE)}")
    except MissingExtraError as error:  # no reason to call the training a failure
        print(f"figure: not drawn, {error}")
    return rows


def run_generate(
    directory: str | Path,
    *,
    prompt: str | None = None,
    num_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    best: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Go on from a prompt with the newest or the best checkpoint of a folder; print the text and return it.

    prompt: by default the run's own `sample_prompt`. Raises ValueError for a folder without a whole checkpoint.
    """
    checkpoint = load_checkpoint(directory, best)
    model = checkpoint.build_model(choose_device(device), directory)
    prompt = checkpoint.config.sample_prompt if prompt is None else prompt
    text = generate(model, checkpoint.build_tokenizer(), prompt, num_tokens, temperature, seed)
    print(f"{prompt}{text}")
    return {"prompt": prompt, "text": text, "step": checkpoint.step, "seed": seed, "temperature": temperature}


def train_with_progress(
    config: TrainConfig, directory: Path, *, resume: bool = False, publish: bool = False
) -> TrainResult:
    """`train` under a progress bar that shows the newest loss and speed."""
    with progress_bar("training") as progress:

        def on_step(step: int, row: TrainingRow | None) -> None:
            speed = f", {row.tokens_per_s:,.0f} tokens/s" if row and row.tokens_per_s else ""
            progress(step, config.steps, "" if row is None else f"loss {row.loss:.3f}{speed}")

        return train(config, directory, resume=resume, on_step=on_step, publish=publish)


def draw_files(rows: Sequence[Row], directory: Path) -> list[Path]:
    """The six figures, `training_results.png` where there was a training, and `report.html`; returns their paths."""
    figures = dict(FIGURES)
    if select(rows, TrainingRow):
        figures[TRAINING_FIGURE] = draw_training
    written = []
    with progress_bar("figures") as progress:
        for done, (name, draw) in enumerate(figures.items()):
            progress(done, len(figures) + 1, name)
            written.append(draw(rows, directory / name))
        progress(len(figures), len(figures) + 1, REPORT_FILE)
        written.append(write_report(rows, directory / REPORT_FILE))
        progress(len(figures) + 1, len(figures) + 1, "")
    return written


def write_outputs(results: Sequence[str | Path], output_dir: str | Path) -> list[Path]:
    """Figures and report of recorded results, read whole before anything is written."""
    rows = [row for path in results for row in read_rows(path)]
    require_matplotlib()
    written = draw_files(rows, writable_directory(output_dir))
    print("\n".join(str(path) for path in written))
    return written
