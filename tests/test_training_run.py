"""Runs: accumulation, recomputation, precision, BPE, samples, and what rows, files and TensorBoard hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_gpu.results import ExpertLoadRow, ResultsError, TrainingRow, read_rows, select
from moe_gpu.runs import run_training
from moe_gpu.training import (
    ExpertLoads,
    MoELanguageModel,
    TrainConfig,
    Trainer,
    generate,
    load_checkpoint,
    load_text,
    read_config,
    train,
)
from moe_gpu.training.tokenizer import BPETokenizer, ByteTokenizer, build_tokenizer
from moe_gpu.training.utilisation import peak_bf16_flops
from tests.training_cases import ROOT, TINY, interrupt_at, one_thread, write_book  # noqa: F401


@pytest.fixture
def book(tmp_path) -> Path:
    return write_book(tmp_path / "book.txt")


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


@pytest.mark.parametrize(("dtype", "early_stop"), [("fp32", False), ("bf16", True)])
def test_recomputed_blocks_change_nothing_and_count_once(dtype, early_stop):
    """Also where the second pass runs to its end, past the profiler, instead of stopping at the last saved tensor."""
    config = replace(TINY, dtype=dtype)
    losses, expected, kept = gradients(config)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
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


def test_a_gradient_that_is_no_number_is_one_line():
    trainer = Trainer(TINY, load_text(context=32))
    trainer.advance()
    trainer._logged[-1][3] = float("inf")
    with pytest.raises(ValueError, match=r"the gradient's norm is inf at step 1: learning_rate=0.01 is too high"):
        trainer.log()
    assert trainer.rows == []


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
    long = content * 5 + b"no end of line " * 9000  # encoded in pieces
    assert tokenizer.decode(tokenizer.encode(long).tolist()).encode() == long
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


# What is logged


@pytest.mark.parametrize("run", [train, lambda config, folder: run_training(folder, config)], ids=["train", "command"])
def test_refused_data_leaves_no_folder(run, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    for name in ("missing.txt", "short.txt"):
        with pytest.raises(ValueError, match=name):
            run(replace(TINY, data=[str(tmp_path / name)]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    def second(step, row):
        with pytest.raises(ValueError, match=r"another run is writing to .*run; choose another --output-dir"):
            train(TINY, tmp_path / "run")
        train(TINY, tmp_path / "other")

    train(replace(TINY, steps=2), tmp_path / "run", on_step=second)
    train(replace(TINY, steps=3), tmp_path / "run", resume=True)  # the first has ended


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
    for temperature in (0, 1e-40, 1e-320):  # so cold that logits over it are no float32 any more
        assert generate(model, tokenizer, "abc", 1, temperature) == tokenizer.decode([expected])


def test_a_trained_model_repeats_what_it_read(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 500)
    result = train(replace(TINY, data=(path,), steps=60, learning_rate=2e-2), tmp_path / "run")
    assert generate(result.model, result.text.tokenizer, "abcdefghabc", 12, temperature=0) == "defghabcdefg"
