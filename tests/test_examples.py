"""The examples: what they write and print, how they resume, and how they refuse."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

from moe_gpu.training import MoELanguageModel, TrainConfig
from tests.training_cases import ROOT, one_thread  # noqa: F401

# Examples


@pytest.fixture
def run_example(monkeypatch, capsys):
    """`run_example(name, *arguments)` runs examples/name here and returns its exit status, stdout and stderr."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.syspath_prepend(str(ROOT / "examples"))
        monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return caught.value.code, *capsys.readouterr()

    return run


def test_simple_example_runs_as_a_script_and_draws_its_loss(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    command = [
        sys.executable,
        "examples/train_moe.py",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--output-dir",
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out loss: " in done.stdout


def test_advanced_example_writes_what_it_promises_and_resumes(tmp_path, run_example):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    status, _, errors = run_example("train_advanced_moe.py", "--steps", 3, "--output-dir", tmp_path)
    assert status == 0, errors
    state = torch.load(tmp_path / "advanced_moe_model.pth", weights_only=True)
    MoELanguageModel(TrainConfig.for_device("cpu")).load_state_dict(state)
    stats = json.loads((tmp_path / "training_stats.json").read_text())
    assert stats["config"]["steps"] == 3
    assert [sum(counts) for counts in stats["routes_per_layer_and_expert"]] == [3 * 16 * 96 * 2] * 2
    assert (tmp_path / "training_results.png").read_bytes().startswith(b"\x89PNG")
    status, _, errors = run_example("train_advanced_moe.py", "--steps", 5, "--resume", "--output-dir", tmp_path)
    assert status == 0, errors
    steps = [row["step"] for row in json.loads((tmp_path / "training_stats.json").read_text())["rows"] if "step" in row]
    assert steps == [1, 3, 5]


def test_transformers_example_reports_what_it_serves_and_changes_no_logit(run_example):
    pytest.importorskip("transformers.integrations.moe", reason="transformers has no experts interface here")
    status, output, errors = run_example("enable_transformers.py")
    assert status == 0, errors
    assert "3 of 3 modules with experts are served" in output
    assert float(output.split("difference of the logits: ")[1].split()[0]) < 1e-5
    assert output.count("routes per expert") == 3
    assert output.splitlines()[-1] == "experts implementation afterwards: grouped_mm"


def test_transformers_example_names_what_it_needs(run_example, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, output, errors = run_example("enable_transformers.py")
    assert (status, output) == (2, "")
    assert errors == ("enable_transformers.py: error: this example needs transformers; pip install 'moe-gpu[hf]'\n")


def test_ctrl_c_in_an_example_is_one_line_and_status_130(tmp_path, run_example, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt("interrupted at step 7 of 9")

    monkeypatch.setattr("moe_gpu.training.train", interrupted)
    status, _, errors = run_example("train_advanced_moe.py", "--output-dir", tmp_path)
    assert (status, errors) == (130, "train_advanced_moe.py: interrupted at step 7 of 9\n")


@pytest.mark.parametrize("example", ["train_moe.py", "train_advanced_moe.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "-1"], "steps=-1 must be an integer of at least 1"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--data", "no-such-file.txt"], "cannot read data file no-such-file.txt: No such file or directory"),
        (["--output-dir", f"{__file__}/out"], "Not a directory; choose another"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, run_example, example, arguments, message):
    status, output, errors = run_example(example, "--output-dir", tmp_path / "out", *arguments)
    assert (status, output) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.rglob("*.*"))
