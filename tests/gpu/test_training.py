"""Training on the GPU: the Triton backend learns as the reference does, and a step leaves the device alone."""

from dataclasses import replace

import pytest
import torch

from moe_gpu.results import TrainingRow, select
from moe_gpu.training import TrainConfig, load_checkpoint, load_text, train
from moe_gpu.training.loop import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs an NVIDIA GPU of compute capability 8.0 or newer",
    ),
]
SMALL = replace(TrainConfig.for_device("cpu"), device="cuda", steps=80, eval_every=80, checkpoint_every=80)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_learns_inside_the_spread_of_the_reference(tmp_path, dtype):
    """Mean loss over three seeds, at every logged step, within what a change of seed makes of the reference."""

    def curves(use_triton: bool) -> torch.Tensor:
        losses = []
        for seed in range(3):
            result = train(replace(SMALL, seed=seed, dtype=dtype, use_triton=use_triton), tmp_path)
            assert result.model.backend == ("triton" if use_triton else "reference")
            losses.append([row.loss for row in select(result.rows, TrainingRow)] + [result.eval_loss])
        return torch.tensor(losses, dtype=torch.float64)

    reference, triton = curves(use_triton=False), curves(use_triton=True)
    spread = reference.max(0).values - reference.min(0).values
    difference = (triton.mean(0) - reference.mean(0)).abs()
    assert (difference <= spread).all(), f"differences {difference.tolist()}, spreads {spread.tolist()}"
    assert triton[:, -1].max() < 3.0, "it learned"


def test_a_step_never_waits_for_the_device():
    config = replace(SMALL, dtype="bf16", balancing="loss_free", balance_coefficient=1e-3)
    trainer = Trainer(config, load_text(config.data, "cuda", config.context))
    for _ in range(3):  # compiles the kernels
        trainer.advance()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_resume_on_the_gpu(tmp_path):
    def interrupt(step: int, row: TrainingRow | None) -> None:
        if step == 10:
            raise KeyboardInterrupt

    config = replace(SMALL, steps=20, dtype="bf16")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "halves", on_step=interrupt)
    halves = train(config, tmp_path / "halves", resume=True)
    whole = train(config, tmp_path / "whole")
    assert load_checkpoint(tmp_path / "halves").step == 20
    assert halves.eval_loss == pytest.approx(whole.eval_loss, rel=1e-2)
