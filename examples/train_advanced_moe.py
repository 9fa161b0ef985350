"""Train a small MoE language model on text: checkpoints, resume, expert statistics and a four-panel figure.

    python examples/train_advanced_moe.py --output-dir moe-gpu-output
    python examples/train_advanced_moe.py --output-dir moe-gpu-output --resume    # after Ctrl-C

Writes advanced_moe_model.pth (a plain state dict), training_stats.json and training_results.png beside the checkpoint.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import torch
from command_line import run, training_config, training_options

from moe_gpu.console import progress_bar
from moe_gpu.files import writable_directory, write_atomically
from moe_gpu.machine import describe_machine
from moe_gpu.plots import draw_training, require_matplotlib
from moe_gpu.results import ExpertLoadRow, TrainingRow, select, to_json
from moe_gpu.training import TrainResult, train


def main() -> None:
    parser = training_options(__doc__.splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output-dir")
    options = parser.parse_args()
    config = training_config(options)
    require_matplotlib()  # before a minute of training, not after it
    directory = writable_directory(options.output_dir)

    with progress_bar("training") as progress:

        def show(step: int, row: TrainingRow | None) -> None:
            progress(step, config.steps, "" if row is None else f"loss {row.loss:.3f}")

        result = train(config, directory, resume=options.resume, on_step=show)

    weights = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in result.model.state_dict().items()}, weights)
    write_atomically(directory / "advanced_moe_model.pth", weights.getvalue())
    write_atomically(directory / "training_stats.json", json.dumps(statistics(result), indent=1).encode())
    machine = describe_machine(torch.device(config.device))
    figure = draw_training([machine, *result.rows], directory / "training_results.png")

    print(f"text: {result.text.source}")
    print(f"held-out loss: {result.eval_loss:.3f} nats a byte after {config.steps} steps, {result.elapsed_s:.1f} s")
    print(f"figure: {figure}\nfiles: {directory}/advanced_moe_model.pth, training_stats.json, {result.checkpoint.name}")


def statistics(result: TrainResult) -> dict[str, object]:
    """Configuration, machine, outcome and every recorded row; JSON has no NaN here, unknown is null."""
    last = select(result.rows, TrainingRow)[-1]
    windows = select(result.rows, ExpertLoadRow)
    layers = range(result.config.num_layers)
    counts_LE = [torch.tensor([row.counts for row in windows if row.layer == i]).sum(0).tolist() for i in layers]
    return {
        "config": result.config.to_json(),
        "machine": asdict(describe_machine(torch.device(result.config.device))),
        "text": result.text.source,
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "backend": result.model.backend,
        "training_loss": last.loss,
        "held_out_loss": result.eval_loss,
        "elapsed_s": result.elapsed_s,
        "routes_per_layer_and_expert": counts_LE,
        "rows": [json.loads(to_json(row)) for row in result.rows],
    }


if __name__ == "__main__":
    run(main)
