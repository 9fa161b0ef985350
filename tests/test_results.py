import json
import os
import re
from pathlib import Path

import pytest
import torch

from moe_gpu.files import write_atomically
from moe_gpu.machine import describe_machine
from moe_gpu.results import (
    BenchmarkRow,
    Ceiling,
    ExpertLoadRow,
    Machine,
    ResultsError,
    SliceRow,
    TrainingRow,
    from_json,
    percentile,
    read_rows,
    select,
    to_json,
    write_rows,
)

ROWS = [
    Machine("a CPU", "cpu", "3.11", "2.13", "Linux", "2026-11-01T00:00:00+00:00"),
    Ceiling("matmul", "float32", 1e11, "FLOP/s", "a product"),
    BenchmarkRow(
        "torch_loop", "ok", "small", 64, 8, 16, 8, 4, 2, "float32", "uniform", "forward", samples=3, p50_ms=1.5
    ),
    BenchmarkRow(
        "moe_gpu", "unavailable", "small", 64, 8, 16, 8, 4, 2, "float32", "uniform", "forward", reason="no GPU"
    ),
    TrainingRow("demo", 10, 3.25, 1000, 1.5),
    ExpertLoadRow("training", 0, 0, 4, [1, 2, 3, 2]),
    SliceRow("rate", "green_context", "matmul", asked_sms=60, got_sms=64, samples=5, value=4e14, unit="FLOP/s"),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "results.jsonl"
    write_rows(path, ROWS)
    return path


def test_rows_survive_the_file(saved):
    assert read_rows(saved) == ROWS
    assert [json.loads(line)["kind"] for line in saved.read_text().splitlines()] == [row.kind for row in ROWS]


def test_what_was_not_measured_is_null(saved):
    loop = json.loads(saved.read_text().splitlines()[2])
    assert loop["energy_j_per_token"] is None
    assert loop["p50_ms"] == 1.5


def test_nan_is_refused_rather_than_written():
    with pytest.raises(ValueError, match="JSON"):
        to_json(TrainingRow("demo", 1, float("nan"), 1, 1.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "benchm', "not JSON"),
        ("[1, 2]", "not a result row"),
        ('{"kind": "weather"}', "'kind' must be one of machine, ceiling, benchmark, training, expert_load"),
        ('{"kind": "ceiling", "name": "copy"}', "incomplete ceiling row"),
        ('{"kind": "training", "mood": 1}', "unknown field 'mood' in a training row"),
        ("17", "not a result row"),
    ],
)
def test_a_damaged_line_is_refused_by_name(text, message, saved):
    with pytest.raises(ResultsError) as caught:
        from_json(text)
    assert message in str(caught.value)
    saved.write_text(saved.read_text() + text)
    with pytest.raises(ResultsError) as caught:
        read_rows(saved)
    assert f"{saved}:{len(ROWS) + 1}: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short_is_refused(saved):
    content = saved.read_bytes()
    saved.write_bytes(content[: len(content) - 20])
    with pytest.raises(ResultsError, match=f":{len(ROWS)}: not JSON"):
        read_rows(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "holds no rows"), (b"\n\n", "holds no rows"), (b"\x80\x81PK\x00", "is not text")],
)
def test_a_file_that_is_missing_empty_or_binary_is_refused(content, message, tmp_path):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ResultsError, match=message):
        read_rows(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="directory"):
        read_rows(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(saved, b"new")
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_an_unserialisable_row_leaves_the_old_file(saved):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_rows(saved, [TrainingRow("demo", 1, float("inf"), 1, 1.0)])
    assert saved.read_bytes() == before


def test_select_keeps_one_class_in_order():
    assert select(ROWS, BenchmarkRow) == ROWS[2:4]


def test_percentile_interpolates_between_order_statistics():
    samples = [4.0, 1.0, 3.0, 2.0]
    assert percentile(samples, 0) == 1.0
    assert percentile(samples, 1) == 4.0
    assert percentile(samples, 0.5) == 2.5
    assert percentile(samples, 0.2) == pytest.approx(1.6)
    assert percentile([7.0], 0.95) == 7.0


def test_the_machine_is_described_as_it_is():
    machine = describe_machine(torch.device("cpu"))
    assert machine.device_type == "cpu"
    assert machine.device
    assert machine.torch == torch.__version__
    assert machine.driver is None
    assert machine.num_sms is None
    assert machine.memory_bytes is None or machine.memory_bytes > 1 << 28


def test_the_commit_can_be_named_from_outside(monkeypatch):
    monkeypatch.setenv("MOE_GPU_COMMIT", "abc123")
    assert describe_machine(torch.device("cpu")).commit == "abc123"


@pytest.mark.parametrize(
    ("index", "name", "value", "said"),
    [
        (2, "p50_ms", '"fast"', "p50_ms='fast' of a benchmark row is no float | None"),
        (2, "p50_ms", "NaN", "NaN is no number"),
        (2, "p50_ms", "-Infinity", "-Infinity is no number"),
        (2, "num_tokens", "0", "num_tokens=0 of a benchmark row must be at least 1"),
        (2, "num_tokens", "1.5", "num_tokens=1.5 of a benchmark row is no int"),
        (2, "model", "null", "model=None of a benchmark row is no str"),
        (0, "recorded_at", "7", "recorded_at=7 of a machine row is no str"),
        (5, "counts", '"abc"', "counts='abc' of a expert_load row is no list[int]"),
        (5, "counts", "[1, null]", "counts=[1, None] of a expert_load row is no list[int]"),
    ],
)
def test_a_value_of_another_type_is_refused_where_it_is_read(index, name, value, said, tmp_path):
    fields = json.loads(to_json(ROWS[index]))
    text = json.dumps({**fields, name: "HERE"}).replace('"HERE"', value)
    (tmp_path / "r.jsonl").write_text(f"{to_json(ROWS[0])}\n{text}\n")
    with pytest.raises(ResultsError, match=re.escape(f"r.jsonl:2: {said}")):
        read_rows(tmp_path / "r.jsonl")


def test_an_error_in_writing_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "nowhere" / "file"):
        with pytest.raises(OSError, match="directory") as caught:
            write_atomically(path, b"x")
        assert caught.value.filename == str(path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
