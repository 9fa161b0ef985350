"""Training on real text: the loss falls, a resumed run equals an uninterrupted one, and no kill loses a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_gpu.results import ExpertLoadRow, TrainingRow, select
from moe_gpu.training import (
    CheckpointError,
    MoELanguageModel,
    TrainConfig,
    evaluate,
    load_checkpoint,
    load_model,
    load_text,
    record_trace,
    train,
)
from moe_gpu.training import checkpoint as checkpoint_module
from tests.training_cases import ROOT, TINY, interrupt_at, one_thread  # noqa: F401


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A folder with the checkpoint of a TINY run that was interrupted after 10 of its 20 steps."""
    directory = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt, match="step 10 of 20; the checkpoint is in"):
        train(TINY, directory, on_step=interrupt_at(10))
    return directory


@pytest.fixture
def checkpointed(interrupted, tmp_path) -> Path:
    for path in interrupted.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def tensor_file(directory: Path) -> Path:
    return max(directory.glob("checkpoint-*.safetensors"))


def index_file(directory: Path) -> Path:
    return max(directory.glob("checkpoint-*.json"))


# Learning


def test_loss_falls_on_the_default_text(tmp_path):
    config = replace(TrainConfig.for_device("cpu"), steps=45, eval_every=45)
    result = train(config, tmp_path)
    losses = [row.loss for row in select(result.rows, TrainingRow)]
    assert 5.4 < losses[0] < 5.8  # ln 256 = 5.55: nothing is known before the first step
    assert losses[-1] < 3.3
    assert result.eval_loss < 3.3
    assert result.eval_loss == evaluate(result.model, result.text), "an evaluation is repeatable"


@pytest.mark.parametrize("balancing", ["aux", "loss_free"])
def test_balancing_evens_the_load(tmp_path, balancing):
    """A router that starts out sending everything to two experts is evened out, and is not without balancing."""

    def share_of_the_busiest(balancing: str) -> float:
        coefficient = {"aux": 0.1, "loss_free": 0.02, "none": 0.0}[balancing]
        config = replace(
            TINY, steps=40, num_layers=1, balancing=balancing, balance_coefficient=coefficient, num_experts=8
        )
        rows = train(config, tmp_path / balancing).rows
        shares = [row.max_expert_share for row in select(rows, TrainingRow)]
        return sum(shares[-4:]) / 4

    assert share_of_the_busiest(balancing) < share_of_the_busiest("none") - 0.03


def test_rows_say_what_happened(tmp_path):
    result = train(TINY, tmp_path)
    rows, loads = select(result.rows, TrainingRow), select(result.rows, ExpertLoadRow)
    assert [row.step for row in rows] == [1, 5, 10, 15, 20]
    assert [row.eval_loss is None for row in rows] == [True, True, False, True, False]
    assert rows[-1].eval_loss == result.eval_loss
    assert rows[-1].tokens_seen == 20 * 4 * 32
    assert {row.backend for row in rows} == {"reference"}
    assert [row.elapsed_s for row in rows] == sorted(row.elapsed_s for row in rows)
    assert [(load.window, load.layer) for load in loads] == [(w, layer) for w in range(5) for layer in range(2)]
    for load in loads:  # evaluations are not counted
        assert sum(load.counts) == load.num_tokens * TINY.top_k
    last = [load for load in loads if load.window == 4]
    shares = torch.tensor([load.counts for load in last]).double()
    shares /= shares.sum(1, keepdim=True)
    assert rows[-1].max_expert_share == shares.max().item()
    entropy = -(shares * shares.log()).sum(1) / torch.tensor(4.0).log().double()
    assert rows[-1].normalised_entropy == pytest.approx(entropy.mean().item(), rel=1e-6)


def test_a_step_reads_nothing_from_the_device(tmp_path, monkeypatch):
    """Between log points no tensor is read on the host (the reference backend itself does, so it is not counted)."""
    from moe_gpu.training.loop import Trainer
    from moe_gpu.triton_kernels.ops import TritonExpertOps

    monkeypatch.setattr(TritonExpertOps, "experts", lambda self, x, routing, weights, activation: x * 1.0)
    trainer = Trainer(TINY, load_text(context=TINY.context))
    trainer.advance()

    def forbidden(*arguments):
        raise AssertionError("a step read a tensor on the host")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    trainer.advance()


# Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be an integer of at least 1"),
        ({"context": 1.5}, "context=1.5 must be"),
        ({"num_experts": 8, "top_k": 9}, "top_k=9 exceeds num_experts=8"),
        ({"num_heads": 5}, "model_dim=32 is not a multiple of 2"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be a finite number above 0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan must be"),
        ({"warmup_share": 1.5}, "warmup_share=1.5 must be between 0 and 1"),
        ({"balancing": "magic"}, "'magic' is not one of aux, loss_free, none"),
        ({"dtype": "fp7"}, "'fp7' is not one of fp32, bf16"),
        ({"device": "tpu9"}, "'tpu9' is not one of cpu, cuda"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"data": "book.txt"}, "data='book.txt' must be a tuple of paths"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_memory_is_estimated_before_it_is_taken(tmp_path):
    with pytest.raises(ValueError, match=r"needs \d+\.\d GiB .* lower num_experts=100000000"):
        train(replace(TINY, num_experts=100_000_000), tmp_path)


def test_memory_estimate_counts_every_parameter():
    for config in (TINY, TrainConfig.for_device("cpu")):
        parameters = sum(parameter.numel() for parameter in MoELanguageModel(config).parameters())
        assert config.state_bytes == pytest.approx(16 * parameters, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="PyTorch sees 0 NVIDIA GPUs here; use device='cpu'"):
        train(replace(TINY, device="cuda"), tmp_path)


def test_learning_rate_warms_up_and_falls():
    config = replace(TINY, steps=100, warmup_share=0.1, final_lr_share=0.1, learning_rate=1.0)
    assert config.learning_rate_at(1) == pytest.approx(0.1)
    assert config.learning_rate_at(10) == 1.0
    assert config.learning_rate_at(55) == pytest.approx(0.55)
    assert config.learning_rate_at(100) == pytest.approx(0.1)
    assert replace(config, steps=1).learning_rate_at(1) == pytest.approx(0.1)


def test_configuration_survives_json():
    config = replace(TrainConfig.for_device("cuda"), data=(Path("a"), "b"))
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == replace(config, data=("a", "b"))


def test_a_loss_that_is_no_number_keeps_the_old_checkpoint(checkpointed):
    checkpoint = load_checkpoint(checkpointed)
    checkpoint.tensors["model.norm.weight"][0] = float("nan")
    checkpoint_module.save_checkpoint(checkpointed, checkpoint)
    before = tensor_file(checkpointed).read_bytes()
    with pytest.raises(ValueError, match=r"loss is nan at step 15: learning_rate=0.01 is too high"):
        train(TINY, checkpointed, resume=True)
    assert tensor_file(checkpointed).read_bytes() == before


# Checkpoints


@pytest.mark.parametrize("balancing", ["aux", "loss_free"])
def test_resume_is_bitwise_equal(tmp_path, balancing):
    config = replace(TINY, balancing=balancing, balance_coefficient=0.01)
    whole = train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "halves", on_step=interrupt_at(10))
    halves = train(config, tmp_path / "halves", resume=True)
    expected, found = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "halves")
    assert expected.step == found.step == 20
    assert expected.tensors.keys() == found.tensors.keys()
    assert sum(name.startswith("optimizer.") for name in found.tensors) == 3 * len(list(whole.model.parameters()))
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, found.tensors[name]), name
    if balancing == "loss_free":
        assert found.tensors["model.blocks.0.moe.selection_bias_E"].abs().max() > 0

    def timeless(rows):
        return [replace(row, elapsed_s=0.0, tokens_per_s=None) if isinstance(row, TrainingRow) else row for row in rows]

    assert timeless(whole.rows) == timeless(halves.rows)
    assert whole.eval_loss == halves.eval_loss


def test_a_finished_run_resumes_to_its_end_and_further(tmp_path):
    first = train(TINY, tmp_path)
    again = train(TINY, tmp_path, resume=True)
    assert again.eval_loss == first.eval_loss
    assert again.rows == first.rows
    longer = train(replace(TINY, steps=24), tmp_path, resume=True)
    assert select(longer.rows, TrainingRow)[-1].step == 24


def test_interrupt_between_log_points_keeps_every_step(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, on_step=interrupt_at(7))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.step == 7
    assert checkpoint.loads.steps == [1, 5, 7]
    assert sum(checkpoint.loads.tokens) == 7 * 4 * 32
    assert (checkpoint.loads.counts_WLE.sum((0, 2)) == 7 * 4 * 32 * TINY.top_k).all()
    assert evaluate(load_model(tmp_path), load_text(context=32)) > 0


def test_ctrl_c_stops_a_running_program_between_two_steps(tmp_path):
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from dataclasses import replace\n"
        "from moe_gpu.training import train\n"
        "from tests.test_training import TINY\n"
        "config = replace(TINY, steps=100000, checkpoint_every=100000)\n"
        "train(config, sys.argv[1], on_step=lambda step, row: step == 3 and print('ready', flush=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert "KeyboardInterrupt: interrupted at step" in errors
    assert load_checkpoint(tmp_path).step >= 3


def test_ctrl_c_is_handled_as_before_once_training_is_over(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    train(replace(TINY, steps=1), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("killed_at", ["tensors", "index"])
def test_kill_while_a_checkpoint_is_written_keeps_the_old_one(checkpointed, killed_at):
    """A child of this process dies, as by kill -9, in the middle of its second checkpoint."""
    suffix = {"tensors": ".safetensors", "index": "-000020.json"}[killed_at]
    code = (
        "import os, sys, torch; torch.set_num_threads(1)\n"
        "from moe_gpu.training import train\n"
        "from tests.test_training import TINY\n"
        "replace = os.replace\n"
        "def die(source, target):\n"
        f"    if str(target).endswith({suffix!r}):\n"
        "        os.truncate(source, os.path.getsize(source) // 2)\n"
        "        os.kill(os.getpid(), 9)\n"
        "    replace(source, target)\n"
        "os.replace = die\n"
        "train(TINY, sys.argv[1], resume=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(checkpointed)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.name.startswith(".checkpoint") for path in checkpointed.iterdir()), "half a file was left"
    assert load_checkpoint(checkpointed).step == 10
    assert load_model(checkpointed).config == TINY
    train(TINY, checkpointed, resume=True)
    left = {path.name for path in checkpointed.iterdir() if "checkpoint" in path.name}
    assert len(left) == 4, f"two checkpoints of two files each; the killed process's halves are cleared away: {left}"
    assert load_checkpoint(checkpointed).step == 20


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: truncate(tensor_file(d), 0.5), "is damaged .*wrong checksum"),
        (lambda d: truncate(tensor_file(d), 0), "is damaged .*0 bytes"),
        (lambda d: flip(tensor_file(d)), "is damaged .*wrong checksum"),
        (lambda d: tensor_file(d).unlink(), "there is no checkpoint .*safetensors"),
        (lambda d: truncate(index_file(d), 0.5), "checkpoint-000010.json is damaged"),
        (lambda d: index_file(d).write_bytes(b"\xff\xfe"), "checkpoint-000010.json is damaged"),
        (lambda d: index_file(d).write_text("[]"), "is not a checkpoint of this version"),
        (lambda d: index_file(d).write_text('{"format": "moe_gpu.checkpoint/2"}'), "no 'config'"),
        (lambda d: index_file(d).unlink(), "there is no checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(checkpointed, damage, message):
    damage(checkpointed)
    before = {path.name: path.read_bytes() for path in checkpointed.iterdir()}
    with pytest.raises(CheckpointError, match=message) as caught:
        train(TINY, checkpointed, resume=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in checkpointed.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 16}, "has num_experts=4, this run num_experts=16; give the same value"),
        ({"model_dim": 64}, "has model_dim=32, this run model_dim=64"),
        ({"learning_rate": 2e-2}, "has learning_rate=0.01, this run learning_rate=0.02"),
        ({"seed": 1}, "has seed=0, this run seed=1"),
        ({"steps": 5}, "is at step 10, beyond steps=5; give more steps"),
        ({"data": (__file__,)}, "was trained on another text"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(checkpointed, changes, message):
    before = {path.name: path.read_bytes() for path in checkpointed.iterdir()}
    with pytest.raises(CheckpointError, match=message) as caught:
        train(replace(TINY, **changes), checkpointed, resume=True)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in checkpointed.iterdir()} == before


def test_tensors_of_another_shape_are_refused_by_name(checkpointed):
    state = load_checkpoint(checkpointed).model_state()
    model = MoELanguageModel(replace(TINY, hidden_dim=64))
    with pytest.raises(
        CheckpointError, match=r"blocks.0.moe.down_proj has shape \(4, 32, 32\), this model \(4, 32, 64\)"
    ):
        checkpoint_module.load_state(model, state, checkpointed)
    del state["norm.weight"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor norm.weight"):
        checkpoint_module.load_state(MoELanguageModel(TINY), state, checkpointed)


def test_a_folder_that_cannot_be_written_is_known_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file/out: Not a directory"):
        train(TINY, tmp_path / "file" / "out", on_step=interrupt_at(1))


# Model and trace


def test_a_token_sees_nothing_of_what_follows():
    model = MoELanguageModel(TINY)
    tokens = torch.randint(256, (2, 32))
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 256
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-5)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-2)
    assert torch.allclose(model(tokens[:, :9])[0], before[:, :9], atol=1e-5)


def test_order_of_the_past_matters():
    model = MoELanguageModel(replace(TINY, num_layers=1))  # one layer has no other way to tell than the rotation
    tokens = torch.randint(256, (1, 32))
    swapped = tokens[:, [1, 0, *range(2, 32)]]
    assert not torch.allclose(model(tokens)[0][:, -1], model(swapped)[0][:, -1], atol=1e-4)


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="sequence of 33 tokens exceeds context=32"):
        MoELanguageModel(TINY)(torch.zeros(1, 33, dtype=torch.long))


def test_the_seed_decides_the_weights_and_leaves_the_generator_alone():
    state = torch.random.get_rng_state()
    first, second = MoELanguageModel(TINY).state_dict(), MoELanguageModel(TINY).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = MoELanguageModel(replace(TINY, seed=1)).state_dict()
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("max_tokens", [1, 32, 32 * 4 + 7, 10_000])
def test_trace_holds_the_routers_own_choices_in_text_order(max_tokens):
    model = MoELanguageModel(TINY)
    text = load_text(context=32).held_out[:300]
    trace = record_trace(model, text, max_tokens)
    count = min(max_tokens, 300)
    assert trace.topk_ids_LTK.shape == (2, count, 2)
    assert trace.num_experts == 4
    assert model.profiler.counts_LE() is None, "a trace is not training"
    for start in range(0, count, 32):
        _, stats = model(text[start : min(start + 32, count)].long().unsqueeze(0))
        for layer in range(2):
            # Of two experts with nearly the same logit, another batch size may choose the other.
            top = stats[layer].router_logits_TE.topk(3)
            clear = (top.values.diff(dim=1).abs() > 1e-4).all(1)
            assert clear.float().mean() > 0.9
            chosen = trace.topk_ids_LTK[layer, start : start + 32].long()
            assert torch.equal(chosen[clear], top.indices[clear, :2])


def test_trace_of_nothing_is_refused():
    with pytest.raises(ValueError, match="a trace needs a 1-D text and one token"):
        record_trace(MoELanguageModel(TINY), torch.zeros(0, dtype=torch.uint8), 10)
