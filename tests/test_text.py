"""Text: the default corpus, own files, batches, and what is held out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_gpu.training import load_text, train
from tests.training_cases import TINY

# Text


def test_default_text_holds_nothing_out_that_it_trains_on():
    text = load_text(context=96)
    trained, held_out = bytes(text.train.numpy()), bytes(text.held_out.numpy())
    assert len(trained) > 200_000
    assert len(held_out) == pytest.approx(len(trained) / 9, abs=1)
    repeated = [start for start in range(0, len(held_out) - 150, 50) if held_out[start : start + 150] in trained]
    assert not repeated


def test_batches_depend_on_seed_and_step_alone():
    text = load_text()
    inputs, targets = text.batch(7, 4, 16, seed=1)
    again, _ = text.batch(7, 4, 16, seed=1)
    assert torch.equal(inputs, again)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert bytes(inputs[0].tolist()) in bytes(text.train.numpy())
    assert not torch.equal(inputs, text.batch(8, 4, 16, seed=1)[0])
    assert not torch.equal(inputs, text.batch(7, 4, 16, seed=2)[0])


def test_held_out_batches_reach_both_ends(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100)) * 10)  # held out: 0 .. 99
    text = load_text([path], context=8)
    batches = [inputs for inputs, _ in text.held_out_batches(2, 8, 100)]
    starts = [sequence[0].item() for inputs in batches for sequence in inputs]
    assert starts[0] == 0
    assert starts[-1] == 100 - 9
    assert len(starts) == 12


def test_own_text_is_used_as_it_is(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.bin"
    first.write_text("naïve " * 100, encoding="utf-8")
    second.write_bytes(b"\xff\x00" * 100)
    text = load_text([first, second])
    content = first.read_bytes() + b"\n" + second.read_bytes()
    assert bytes(torch.cat([text.train, text.held_out]).numpy()) == content
    assert text.source == "a.txt, b.bin"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "cannot read data file .*missing.txt: No such file"),
        ("folder", "data file .*folder is a folder; name the text files"),
        ("empty.txt", "data file .*empty.txt is empty"),
        ("short.txt", "short.txt: 11 bytes are too short for context=32; give at least 330 bytes"),
    ],
)
def test_bad_data_is_one_line(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("hello world")
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=message) as caught:
        train(replace(TINY, data=(tmp_path / name,)), output)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_the_shortest_text_that_is_promised_to_do_does(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 330)
    assert load_text([path], context=32).held_out.numel() == 33
    assert train(replace(TINY, steps=1, data=(path,)), tmp_path).eval_loss > 0
