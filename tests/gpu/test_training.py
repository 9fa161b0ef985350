"""Training on the GPU: the Triton backend learns as the reference does, and a step leaves the device alone."""

from dataclasses import replace

import pytest
import torch

from moe_gpu.results import ExpertLoadRow, TrainingRow, select
from moe_gpu.training import TrainConfig, load_checkpoint, load_text, train
from moe_gpu.training.loop import Trainer
from moe_gpu.training.utilisation import peak_bf16_flops

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


@pytest.mark.parametrize("balancing", ["aux", "loss_free"])
def test_a_deterministic_run_resumes_bitwise(tmp_path, balancing):
    config = replace(SMALL, steps=12, checkpoint_every=6, dtype="bf16", deterministic=True, balancing=balancing)

    def interrupt(step: int, row: TrainingRow | None) -> None:
        if step == 6:
            raise KeyboardInterrupt

    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "halves", on_step=interrupt)
    train(config, tmp_path / "halves", resume=True)
    expected, found = (load_checkpoint(tmp_path / name).tensors for name in ("whole", "halves"))
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_bf16_parts_and_recomputed_blocks_learn_as_the_whole_batch_does(tmp_path):
    """Within 0.05 nats at the end of 40 steps: rounding differs, the mean of the gradient does not."""
    config = replace(SMALL, steps=40, eval_every=40, dtype="bf16", balancing="loss_free", balance_coefficient=1e-3)
    whole = train(config, tmp_path / "whole")
    parted = train(replace(config, accumulation_steps=4, gradient_checkpointing=True), tmp_path / "parts")
    assert parted.model.backend == "triton"
    assert parted.eval_loss == pytest.approx(whole.eval_loss, abs=0.05)
    first, second = (sum(sum(row.counts) for row in select(r.rows, ExpertLoadRow)) for r in (whole, parted))
    assert first == second == 40 * config.tokens_per_step * config.top_k * config.num_layers


def test_mfu_and_memory_are_measured_where_the_gpus_peak_is_known(tmp_path):
    result = train(replace(SMALL, steps=20, dtype="bf16"), tmp_path)
    row = select(result.rows, TrainingRow)[-1]
    assert row.peak_memory_bytes > 16 * 1e5
    if peak_bf16_flops(torch.cuda.get_device_name()) is None:
        assert row.mfu is None
    else:
        assert 0 < row.mfu < 1
        flops = result.config.flops_per_token * row.tokens_per_s
        assert row.mfu == pytest.approx(flops / peak_bf16_flops(torch.cuda.get_device_name()))
    in_fp32 = train(replace(SMALL, steps=2, dtype="fp32"), tmp_path / "fp32")
    assert all(row.mfu is None for row in select(in_fp32.rows, TrainingRow))
