"""Runs: accumulation, recomputation, BPE, kept checkpoints, damage, kills, full disks, samples and what logs hold."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_gpu.results import ExpertLoadRow, ResultsError, TrainingRow, read_rows, select
from moe_gpu.training import (
    CheckpointError,
    ExpertLoads,
    MoELanguageModel,
    TrainConfig,
    Trainer,
    evaluate,
    generate,
    load_checkpoint,
    load_model,
    load_text,
    read_config,
    train,
)
from moe_gpu.training.checkpoint import Saved, to_keep
from moe_gpu.training.tokenizer import BPETokenizer, ByteTokenizer, build_tokenizer
from moe_gpu.training.utilisation import peak_bf16_flops
from tests.training_cases import ROOT, TINY


@pytest.fixture(autouse=True)
def one_thread():
    """Small products are faster on one thread, and the machine may be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def book(tmp_path) -> Path:
    """A text that BPE finds pairs in, with characters of two to four bytes."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {n}: the naïve café — 数 🎲 — has {n * n} seats.\r\n" for n in range(400)), "utf-8")
    return path


def interrupt_at(step):
    def on_step(done, row):
        if done == step:
            raise KeyboardInterrupt

    return on_step


def gradients(config: TrainConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor], MoELanguageModel]:
    trainer = Trainer(config, load_text(context=config.context))
    losses = trainer.compute_gradients()
    return losses, {name: p.grad for name, p in trainer.model.named_parameters()}, trainer.model


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (found[name] - gradient).abs().max() <= 1e-5 * scale, name


# Computing a step


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_parts_are_the_whole_batch(parts):
    """Loss, z-loss, gradients, the counted routes and the selection bias; `aux` alone is defined by parts."""
    config = replace(TINY, balancing="loss_free", z_loss_coefficient=0.1)
    losses, expected, whole = gradients(config)
    parted, found, model = gradients(replace(config, accumulation_steps=parts))
    assert parted[[0, 2]].tolist() == pytest.approx(losses[[0, 2]].tolist(), rel=1e-6)
    assert_same_gradients(found, expected)
    whole.profiler.flush()
    model.profiler.flush()
    assert torch.equal(model.profiler.counts_LE(), whole.profiler.counts_LE())
    for one, other in zip(model.moe_layers, whole.moe_layers, strict=True):
        assert torch.equal(one.selection_bias_E, other.selection_bias_E)
        assert one.selection_bias_E.abs().max() > 0


def test_a_part_left_out_would_be_seen():
    config = replace(TINY, balancing="none")
    _, expected, _ = gradients(config)
    trainer = Trainer(replace(config, accumulation_steps=2), load_text(context=config.context))
    batch = trainer.text.batch
    object.__setattr__(trainer.text, "batch", lambda *a: tuple(x[:2].repeat(2, 1) for x in batch(*a)))
    trainer.compute_gradients()
    with pytest.raises(AssertionError):
        assert_same_gradients({name: p.grad for name, p in trainer.model.named_parameters()}, expected)


def test_accumulated_training_has_the_same_losses(tmp_path):
    config = replace(TINY, balancing="loss_free", balance_coefficient=0.01)
    whole = train(config, tmp_path / "whole")
    parted = train(replace(config, accumulation_steps=4), tmp_path / "parts")
    for one, other in zip(select(whole.rows, TrainingRow), select(parted.rows, TrainingRow), strict=True):
        assert other.loss == pytest.approx(one.loss, abs=2e-3)
    assert parted.eval_loss == pytest.approx(whole.eval_loss, abs=5e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputed_blocks_change_nothing_and_count_once(dtype):
    config = replace(TINY, dtype=dtype)
    losses, expected, kept = gradients(config)
    recomputed_losses, found, model = gradients(replace(config, gradient_checkpointing=True))
    assert torch.equal(losses, recomputed_losses)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    kept.profiler.flush()
    model.profiler.flush()
    counts_LE = model.profiler.counts_LE()
    assert counts_LE.sum(1).tolist() == [4 * 32 * 2] * 2
    assert torch.equal(counts_LE, kept.profiler.counts_LE())


def test_recomputation_keeps_fewer_activations():
    def saved_bytes(config: TrainConfig) -> int:
        sizes = []
        trainer = Trainer(config, load_text(context=config.context))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            trainer.model(torch.zeros(4, 32, dtype=torch.long))
        return sum(sizes)

    assert saved_bytes(replace(TINY, gradient_checkpointing=True)) < 0.5 * saved_bytes(TINY)


def test_bf16_learns_and_keeps_parameters_in_fp32(tmp_path):
    result = train(replace(TINY, dtype="bf16"), tmp_path)
    losses = [row.loss for row in select(result.rows, TrainingRow)]
    assert losses[-1] < losses[0] - 0.5
    checkpoint = load_checkpoint(tmp_path)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32}
    assert all(row.mfu is None for row in select(result.rows, TrainingRow)), "a CPU's run has no MFU"


def test_weight_decay_is_on_matrices_alone():
    model = Trainer(replace(TINY, weight_decay=0.3), load_text(context=32))
    decayed, plain = model.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert len(plain["params"]) == 2 * 2 + 1 + 1  # two norms a block, the last norm, the embedding
    assert any(p is model.model.embedding.weight for p in plain["params"])


def test_the_gradient_is_clipped(tmp_path):
    result = train(replace(TINY, grad_clip=1e-9, steps=3, weight_decay=0.0), tmp_path)
    row = select(result.rows, TrainingRow)[-1]
    assert row.grad_norm > 1e-3, "the norm before clipping"
    before = MoELanguageModel(TINY).state_dict()
    moments = load_checkpoint(tmp_path).optimizer_state()
    assert before.keys() == result.model.state_dict().keys()
    assert max(m.abs().max() for name, m in moments.items() if name.endswith("exp_avg")) < 1e-9


def test_flops_of_a_token_by_hand():
    """Two layers of width 32: attention 4 x 32^2, router 4 x 32, two experts of 3 x 32^2, half of 2 x 32 x 32."""
    per_layer = 4 * 32**2 + 4 * 32 + 2 * 3 * 32**2 + 32 * 32
    assert TINY.flops_per_token == 6 * (2 * per_layer + 256 * 32)


def test_peaks_are_of_whole_gpus_that_are_known():
    assert peak_bf16_flops("NVIDIA H200") == peak_bf16_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_bf16_flops("NVIDIA H100 PCIe") < 989e12
    assert peak_bf16_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_bf16_flops("NVIDIA Z9") is None


# Tokens


def test_bpe_gives_back_every_character_and_is_the_same_each_time(book):
    content = book.read_bytes()
    tokenizer, again = BPETokenizer.train(content, 400), BPETokenizer.train(content, 400)
    assert tokenizer.to_json() == again.to_json()
    tokens = tokenizer.encode(content)
    assert tokenizer.decode(tokens.tolist()).encode() == content
    assert tokens.numel() < len(content) / 2
    assert tokenizer.decode(tokenizer.encode("never seen: Ω\x00".encode()).tolist()) == "never seen: Ω\x00"
    loaded = BPETokenizer.from_json(tokenizer.to_json())
    assert torch.equal(loaded.encode(content), tokens)
    with pytest.raises(ValueError, match="not a tokenizer"):
        BPETokenizer.from_json("{}")


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab " * 3000 + "zqzqzqzq " * 111)
    seen = []
    config = replace(TINY, tokenizer="bpe", vocab_size=258)
    load_text([path], "cpu", 32, lambda text: seen.append(text) or build_tokenizer(config, text))
    assert b"ab" in seen[0]
    assert b"q" not in seen[0]


def test_no_character_is_cut_between_the_parts(tmp_path):
    for size in range(330, 346):
        path = tmp_path / "text.txt"
        path.write_text("数" * size, "utf-8")
        text = load_text([path], context=8)
        assert text.train.numel() % 3 == text.held_out.numel() % 3 == 0


def test_bits_a_byte_are_comparable_between_tokenizers(tmp_path, book):
    config = replace(TINY, data=(book,), steps=2)
    rows = {}
    for name, size in (("bytes", 256), ("bpe", 400)):
        result = train(replace(config, tokenizer=name, vocab_size=size), tmp_path / name)
        rows[name] = select(result.rows, TrainingRow)[-1]
    assert rows["bytes"].eval_bits_per_byte == pytest.approx(rows["bytes"].eval_loss / math.log(2))
    assert rows["bpe"].eval_bits_per_byte < 0.5 * rows["bpe"].eval_loss / math.log(2)


# Resuming


def assert_equal_runs(directory: Path, other: Path) -> None:
    """Bit by bit: every tensor, the loads, the samples, and every figure that is no time."""
    expected, found = load_checkpoint(directory), load_checkpoint(other)
    assert (expected.step, expected.tokenizer) == (found.step, found.tokenizer)
    assert expected.tensors.keys() == found.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, found.tensors[name]), name
    assert expected.samples == found.samples
    assert expected.loads.counts_WLE.sum(0).tolist() == found.loads.counts_WLE.sum(0).tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulation_steps": 2, "balancing": "loss_free"},
        {"tokenizer": "bpe", "vocab_size": 400},
        {"gradient_checkpointing": True, "dtype": "bf16"},
    ],
    ids=["accumulation", "bpe", "recomputed-bf16"],
)
def test_a_resumed_run_is_bitwise_equal(tmp_path, book, changes):
    config = replace(TINY, **changes, data=(book,), deterministic=True, sample_every=4, sample_tokens=5)
    train(config, tmp_path / "whole")
    assert not torch.are_deterministic_algorithms_enabled(), "the setting is put back"
    for step in (7, 13):  # between log points and checkpoints
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts", resume=step > 7, on_step=interrupt_at(step))
    (tmp_path / "parts" / "tokenizer.json").unlink(missing_ok=True)  # a copy for people: checkpoints have their own
    train(config, tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    assert load_checkpoint(tmp_path / "parts").samples[-1]["step"] == 20


KILLS = """
import json, os, random, signal, sys, time, torch
from pathlib import Path
from moe_gpu.training import TrainConfig, load_checkpoint, train
torch.set_num_threads(1)
config, directory, draw = TrainConfig.from_json(json.loads(sys.argv[1])), Path(sys.argv[2]), random.Random(0)
directory.mkdir()
torch.optim.AdamW([torch.zeros(1)])  # imports torch._dynamo once, not in every child
newest = lambda: max(directory.glob("checkpoint-*.json"), default=None)
for kill in range(int(sys.argv[3])):
    before = newest()
    child = os.fork()
    if child == 0:
        train(config, directory, resume=before is not None)
        os._exit(0)
    while newest() == before and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(load_checkpoint(directory).step, flush=True)
"""


def test_kill_at_random_moments_leaves_a_whole_checkpoint_and_the_same_end(tmp_path, book):
    """A child that writes a checkpoint at every step is killed again and again; what is left loads and goes on."""
    config = replace(TINY, data=(book,), steps=60, checkpoint_every=1, eval_batches=1, keep_checkpoints=1)
    parts = tmp_path / "parts"
    command = [sys.executable, "-c", KILLS, json.dumps(config.to_json()), str(parts), "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "every newest checkpoint was whole"
    steps = [int(line) for line in done.stdout.split()]
    assert len(steps) == 8
    assert steps[0] < steps[-1]
    assert steps == sorted(steps), "each life went on from the last one's checkpoint"
    train(config, parts, resume=True)
    train(replace(config, checkpoint_every=1000), tmp_path / "whole")
    found, expected = load_checkpoint(parts).tensors, load_checkpoint(tmp_path / "whole").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not [path.name for path in parts.iterdir() if path.name.startswith(".")], "half files are cleared away"


@pytest.fixture
def two_checkpoints(tmp_path) -> Path:
    train(TINY, tmp_path)
    return tmp_path


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(two_checkpoints, caplog, suffix, share):
    newest = max(two_checkpoints.glob(f"checkpoint-*{suffix}"))
    whole = load_checkpoint(two_checkpoints).tensors
    os.truncate(newest, int(newest.stat().st_size * share))
    with caplog.at_level(logging.WARNING, "moe_gpu"):
        result = train(TINY, two_checkpoints, resume=True)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert newest.name in warning
    assert "damaged" in warning
    assert "going on from the checkpoint of step 10 instead" in warning
    assert "\n" not in warning
    assert result.checkpoint.name == "checkpoint-000020.json"
    again = load_checkpoint(two_checkpoints).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_the_command_says_which_checkpoint_it_fell_back_to(two_checkpoints):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    os.truncate(max(two_checkpoints.glob("checkpoint-*.safetensors")), 100)
    command = [sys.executable, "-m", "moe_gpu", "generate", str(two_checkpoints), "--tokens", "3", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "going on from the checkpoint of step 10 instead" in done.stderr


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    config = replace(TINY, steps=12, eval_every=2, checkpoint_every=2, keep_checkpoints=2, learning_rate=0.05)
    result = train(config, tmp_path)
    losses = {row.step: row.eval_loss for row in select(result.rows, TrainingRow) if row.eval_loss is not None}
    best = min(losses, key=losses.get)
    steps = {int(path.stem.split("-")[1]) for path in tmp_path.glob("checkpoint-*.json")}
    assert steps == {10, 12, best}
    assert len(list(tmp_path.glob("checkpoint-*.safetensors"))) == len(steps)
    assert evaluate(load_model(tmp_path, best=True), result.text) == losses[best]
    assert load_checkpoint(tmp_path).step == 12


@pytest.mark.parametrize(
    ("losses", "newest", "kept"),
    [
        ([3.0, 1.0, 2.0, 2.5], 1, [2, 4]),
        ([3.0, 1.0, 2.0, 2.5], 2, [2, 3, 4]),
        ([1.0, 1.0, 2.0], 1, [1, 3]),
        ([None, None, None], 2, [2, 3]),
        ([None, 2.0, None, 3.0], 1, [2, 4]),
        ([5.0], 3, [1]),
    ],
)
def test_which_checkpoints_are_kept(losses, newest, kept):
    saved = [Saved(step, loss) for step, loss in enumerate(losses, 1)]
    assert [one.step for one in to_keep(saved, newest)] == kept


def test_a_new_run_in_an_old_folder_leaves_none_of_its_checkpoints(two_checkpoints):
    train(replace(TINY, steps=5, seed=3), two_checkpoints)
    assert [path.name for path in two_checkpoints.glob("checkpoint-*.json")] == ["checkpoint-000005.json"]
    assert len(list(two_checkpoints.glob("checkpoint-*.safetensors"))) == 1


# Full disks


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """The kernel refuses the second checkpoint's bytes (a limit on file size stands for the disk)."""
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, on_step=interrupt_at(10))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoint-*")}
    limit = max(len(content) for content in before.values()) // 2
    code = (
        "import resource, sys, torch; torch.set_num_threads(1)\n"
        "from moe_gpu.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"sys.exit(main(['train', '--resume', '--device', 'cpu', '--output-dir', {str(tmp_path)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search(
        r"cannot write the checkpoint of step 20 in .*: File too large; make room .*step 10 is whole", last
    )
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*checkpoint-*")} == before
    assert train(TINY, tmp_path, resume=True).checkpoint.name == "checkpoint-000020.json"


@pytest.mark.parametrize(
    "name", ["checkpoint-000010.json", "training.jsonl", "expert_load.safetensors", "samples.jsonl"]
)
def test_no_space_for_any_file_keeps_every_whole_one(tmp_path, monkeypatch, name):
    config = replace(TINY, sample_every=6, sample_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, on_step=interrupt_at(7))
    replace_file, before = os.replace, load_checkpoint(tmp_path)

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises((CheckpointError, OSError), match="No space left on device") as caught:
        train(config, tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    left = load_checkpoint(tmp_path)
    assert left.step >= before.step
    assert train(config, tmp_path, resume=True).samples[-1]["step"] == 18
    assert read_rows(tmp_path / "training.jsonl")


# What is logged


def test_files_beside_the_checkpoint_hold_the_run(tmp_path):
    config = replace(TINY, sample_every=10, sample_tokens=7)
    result = train(config, tmp_path)
    assert read_config(tmp_path / "config.json") == config
    rows = read_rows(tmp_path / "training.jsonl")
    assert rows[1:] == result.rows
    assert rows[0].device_type == "cpu"
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(one["step"], one["prompt"]) for one in samples] == [(10, "The "), (20, "The ")]
    assert samples == result.samples
    loads = ExpertLoads.load(tmp_path / "expert_load.safetensors")
    assert loads.counts_WLE.shape == (5, 2, 4)
    assert loads.counts_WLE.sum((1, 2)).tolist() == [tokens * 2 * 2 for tokens in loads.tokens]
    assert loads.steps == [1, 5, 10, 15, 20]


def test_sampling_changes_nothing_of_the_training(tmp_path):
    plain, sampled = train(TINY, tmp_path / "a"), train(replace(TINY, sample_every=5, sample_tokens=3), tmp_path / "b")
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, sampled.model.state_dict()[name]), name
    assert [row.loss for row in select(plain.rows, TrainingRow)] == [r.loss for r in select(sampled.rows, TrainingRow)]


def test_rows_stay_bounded_and_the_file_is_whole():
    loads = ExpertLoads([], [], [])
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 1001):
        loads.add(step, 10, torch.randint(0, 9, (3, 5), generator=generator))
    rows = loads.rows("run")
    windows = {row.window for row in rows}
    assert len(windows) <= 64
    assert len(rows) == 3 * len(windows)
    for layer in range(3):
        total = torch.tensor([row.counts for row in rows if row.layer == layer]).sum(0)
        assert torch.equal(total, loads.counts_WLE[:, layer].sum(0))
    assert sum(row.num_tokens for row in rows if row.layer == 0) == 10_000
    assert ExpertLoads([], [], []).rows("run") == []


def test_damaged_expert_loads_are_one_line(tmp_path):
    path = tmp_path / "expert_load.safetensors"
    with pytest.raises(ResultsError, match="cannot read expert loads"):
        ExpertLoads.load(path)
    path.write_bytes(b"\x10\x00\x00")
    with pytest.raises(ResultsError, match="cannot read expert loads"):
        ExpertLoads.load(path)


def test_dead_and_busy_experts_are_named_by_layer(tmp_path):
    """Router weights that send everything to experts 0 and 1 leave two of four dead."""
    trainer = Trainer(replace(TINY, balancing="none", num_layers=1), load_text(context=32))
    trainer.model.moe_layers[0].selection_bias_E = torch.tensor([9.0, 9.0, 0.0, 0.0])
    trainer.advance()
    trainer.log()
    row = trainer.row
    assert (row.dead_experts, row.active_expert_share, row.max_expert_share) == ([2], 0.5, 0.5)
    assert row.normalised_entropy == pytest.approx(0.5)
    assert select(trainer.result_rows(), ExpertLoadRow)[0].counts == [128, 128, 0, 0]


def test_tensorboard_holds_the_rows(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra metrics)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(TINY, tensorboard=True, sample_every=10, sample_tokens=3)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, on_step=interrupt_at(12))
    result = train(config, tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss/train")}
    for row in select(result.rows, TrainingRow):
        if row.step in losses:
            assert losses[row.step] == pytest.approx(row.loss, rel=1e-6)
    assert set(losses) == {1, 5, 10, 15, 20}
    names = events.Tags()["scalars"]
    assert {f"experts/layer_0{i}/{what}" for i in (0, 1) for what in ("entropy", "max_share", "dead")} <= set(names)
    assert "speed/mfu" not in names, "what was not measured is left out"
    assert len([name for name in names if name.startswith("experts/")]) == 2 * 4, "no scalar an expert"


# Sampling


def test_generated_text_is_the_seeds_and_greedy_is_the_models():
    model, tokenizer = MoELanguageModel(TINY), ByteTokenizer()
    state = torch.random.get_rng_state()
    first = generate(model, tokenizer, "abc", 40, seed=1)
    assert first == generate(model, tokenizer, "abc", 40, seed=1)
    assert first != generate(model, tokenizer, "abc", 40, seed=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.profiler.counts_LE() is None, "samples are not training"
    with torch.no_grad():
        expected = model(torch.tensor([list(b"abc")]))[0][0, -1].argmax().item()
    assert generate(model, tokenizer, "abc", 1, temperature=0) == tokenizer.decode([expected])


def test_a_trained_model_repeats_what_it_read(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 500)
    result = train(replace(TINY, data=(path,), steps=60, learning_rate=2e-2), tmp_path / "run")
    assert generate(result.model, result.text.tokenizer, "abcdefghabc", 12, temperature=0) == "defghabcdefg"


def test_ctrl_c_leaves_rows_that_a_report_can_read(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, on_step=interrupt_at(7))
    rows = read_rows(tmp_path / "training.jsonl")
    assert [row.step for row in select(rows, TrainingRow)] == [1, 5, 7]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
