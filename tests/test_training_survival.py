"""Runs that are interrupted, killed, damaged or out of disk: what is left is whole and ends where it would have."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_gpu.results import TrainingRow, read_rows, select
from moe_gpu.training import CheckpointError, evaluate, load_checkpoint, load_model, train
from moe_gpu.training.checkpoint import Saved, to_keep
from tests.training_cases import ROOT, TINY, interrupt_at, one_thread, write_book  # noqa: F401


@pytest.fixture
def book(tmp_path) -> Path:
    return write_book(tmp_path / "book.txt")


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


def test_ctrl_c_leaves_rows_that_a_report_can_read(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, on_step=interrupt_at(7))
    rows = read_rows(tmp_path / "training.jsonl")
    assert [row.step for row in select(rows, TrainingRow)] == [1, 5, 7]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
