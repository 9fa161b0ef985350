"""Train a small MoE language model on text, with the loop in plain sight, and plot its loss.

    python examples/train_moe.py --steps 100 --output-dir moe-gpu-output

Writes training_loss.png. `train_advanced_moe.py` adds checkpoints, statistics and resume.
"""

from __future__ import annotations

from pathlib import Path

import torch
from command_line import run, training_config, training_options

from moe_gpu.console import progress_bar
from moe_gpu.files import writable_directory
from moe_gpu.plots import require_matplotlib
from moe_gpu.training import MoELanguageModel, evaluate, load_text, next_token_loss

READ_EVERY = 10  # reading a loss waits for the device


def main() -> None:
    options = training_options(__doc__.splitlines()[0]).parse_args()
    config = training_config(options)
    require_matplotlib()  # before a minute of training, not after it
    config.check_machine()
    text = load_text(config.data, config.device, config.context)
    directory = writable_directory(options.output_dir)

    model = MoELanguageModel(config)  # every feed-forward layer is an AdvancedMoELayer
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; experts on the {model.backend} backend")
    print(f"text: {text.source}")

    losses = []
    with progress_bar("training") as progress:
        for step in range(1, config.steps + 1):
            inputs, targets = text.batch(step, config.batch_size, config.context, config.seed)
            logits, stats = model(inputs)
            loss = next_token_loss(logits, targets)
            balance = sum(layer.load_balancing_loss for layer in stats) / len(stats)

            optimizer.zero_grad()
            (loss + config.balance_coefficient * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            optimizer.step()

            losses.append(loss.detach())
            if step % READ_EVERY == 0 or step == config.steps:
                progress(step, config.steps, f"loss {losses[-1].item():.3f}")

    held_out = evaluate(model, text)
    path = plot_loss(torch.stack(losses).tolist(), held_out, directory / "training_loss.png")
    print(f"held-out loss: {held_out:.3f} nats a byte\nplot: {path}")


def plot_loss(losses: list[float], held_out: float, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color="#D1380F", linewidth=1)
    axes.axhline(held_out, color="#6B7280", linestyle="--", linewidth=1)
    axes.annotate(f"held-out text, at the end: {held_out:.3f}", (1, held_out), (0, 4), textcoords="offset points")
    axes.set(xlabel="step", ylabel="loss, nats a byte", title="Training loss")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    run(main)
