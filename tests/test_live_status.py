"""The file of a published job: states, damage, which files are kept, and how jobs are found."""

from __future__ import annotations

import json
import os
import time

import pytest

from moe_gpu import publish
from moe_gpu.live import publisher as publishing
from moe_gpu.live.figures import summary
from moe_gpu.live.status import Energy, LayerLoad, StatusError, choose_job, find_jobs, live_directory, read_status
from tests.live_cases import (
    a_status,
    folder_of_jobs,  # noqa: F401 a fixture
    make_model,
)


def test_states():
    now = time.time()
    assert a_status().state == "running"
    assert a_status(ended=True).state == "ended"
    assert a_status(written_at=now - 60).state == "silent"
    assert a_status(written_at=now - 60, interval_s=30.0).state == "running"
    assert a_status(process_ticks=1).state == "ended", "the pid belongs to another process now"
    assert a_status(host="elsewhere", pid=2**30).state == "running"
    assert a_status(pid=2**22 + 1).state == "ended"


def test_old_files_of_ended_jobs_are_removed_and_others_kept(own_folder):
    own_folder.mkdir()
    old = time.time() - 2 * publishing.KEPT_S
    files = {
        "old": a_status(ended=True, written_at=old),
        "silent": a_status(written_at=old),
        "fresh": a_status(ended=True),
        "elsewhere": a_status(ended=True, written_at=old, host="elsewhere"),
    }
    for name, status in files.items():
        (own_folder / f"{name}.json").write_text(status.to_json())
    (own_folder / "damaged.json").write_text("{")
    with publish(make_model()):
        left = {path.stem for path in own_folder.iterdir()}
    assert left == {"silent", "fresh", "elsewhere", "damaged", str(os.getpid())}


def test_a_status_comes_back_as_it_was_written(tmp_path):
    layer = LayerLoad("a", 2, 1, "triton", [1, 2], [1, 1], 2.5, 3, 0, 0.1)
    status = a_status(layers=[layer, LayerLoad("b", reason="none")], energy=Energy(12.5, 3.0, 100), slices=[])
    path = tmp_path / "job.json"
    path.write_text(status.to_json())
    assert read_status(path) == status
    told = json.loads(json.dumps(summary(status)))
    assert told["energy"]["j_per_1000_tokens"] == 125
    assert told["layers"][0]["figures"]["load_E"] == [1, 1]
    assert told["layers"][0]["tokens_per_s"] == told["tokens_per_s"] == 2 / 2.5
    assert told["layers"][1]["figures"] is None
    assert Energy(12.5, 3.0, 0).j_per_1000_tokens is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no JSON"),
        (b"\xff\xfe", "holds no JSON"),
        (b"[" * 100000, "holds no JSON"),
        (b"[]", "does not hold moe_gpu.live/1"),
        (b'{"format": "moe_gpu.live/2"}', "does not hold moe_gpu.live/1"),
        (b'{"format": "moe_gpu.live/1"}', "damaged"),
    ],
)
def test_a_file_that_is_no_status_is_refused_in_one_line(content, said, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(StatusError, match=said) as caught:
        read_status(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"pid": "7"},
        {"pid": True},
        {"layers": {}},
        {"layers": [{"name": 3}]},
        {"layers": [{"name": "a", "counts_E": [1, None]}]},
        {"gpu": []},
        {"mood": 1},
        {"progress": {"step": 1.5}},
    ],
)
def test_a_field_of_a_wrong_type_is_refused(damage, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**json.loads(a_status().to_json()), **damage}))
    with pytest.raises(StatusError, match="damaged"):
        read_status(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(StatusError, match="No such file"):
        read_status(tmp_path / "none.json")
    with pytest.raises(StatusError, match="no file of a job"):
        read_status(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(StatusError, match="no file of a job"):
        read_status(tmp_path / "pipe.json")


def test_jobs_are_listed_running_first_and_chosen_by_pid(own_folder):
    own_folder.mkdir()
    for name, status in {"a": a_status(ended=True), "b": a_status(name="runs")}.items():
        (own_folder / f"{name}.json").write_text(status.to_json())
    (own_folder / "c.json").write_text("?")
    jobs, remarks = find_jobs()
    assert [job.state for job in jobs] == ["running", "ended"]
    assert len(remarks) == 1
    assert choose_job(jobs).name == "runs"
    assert choose_job([]) is None
    with pytest.raises(StatusError, match=f"no job with pid 1 .*{os.getpid()}"):
        choose_job(jobs, 1)


def test_without_a_runtime_folder_jobs_publish_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path / "cache"))
    with publish(make_model()) as publisher:
        assert publisher.path.parent == live_directory() == tmp_path / "cache" / "live"
        assert publisher.path.parent.stat().st_mode & 0o777 == 0o700
