"""A run from a JSON or YAML file: fields, overrides, refusals in one line, and the commands that take it."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import fields, replace

import pytest
import torch

from moe_gpu.cli import main
from moe_gpu.training import TrainConfig, assignments, config_reference, read_config, with_fields
from moe_gpu.training.config import WHAT
from tests.training_cases import ROOT, SMALL_FIELDS, TINY, one_thread  # noqa: F401

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra train)")
DOCUMENT = ROOT / "docs" / "training.md"
EXAMPLE = ROOT / "examples" / "train_config.yaml"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def test_every_field_goes_through_json_yaml_and_text(tmp_path):
    """No field is lost, whichever way it is given."""
    other = {bool: lambda v: not v, int: lambda v: v * 2, float: lambda v: v / 2, str: lambda v: v}
    values = {f.name: other[type(v)](v) for f in fields(TrainConfig) if type(v := f.default) in other}
    values |= {"tokenizer": "bpe", "vocab_size": 512, "balancing": "none", "dtype": "bf16", "data": ["a", "b"]}
    values |= {"sample_prompt": "x: y", "sample_every": 3, "seed": 7, "tensorboard": True, "device": "cuda:1"}
    changed = [f.name for f in fields(TrainConfig) if f.name != "data" and values[f.name] == f.default]
    assert not changed, f"the test changes every field but {changed}"
    expected = TrainConfig(**{**values, "data": ("a", "b")})
    (tmp_path / "run.json").write_text(json.dumps(values))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert read_config(tmp_path / "run.json") == read_config(tmp_path / "run.yaml") == expected
    pairs = [f"{name}={json.dumps(value) if value in (True, False) else value}" for name, value in values.items()]
    pairs = [pair for pair in pairs if not pair.startswith("data=")]
    assert with_fields(TrainConfig(data=("a", "b")), assignments(pairs)) == expected


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-3\nweight_decay: 0\nsteps: 7\n")  # YAML reads 1e-3 as text
    config = read_config(tmp_path / "run.yaml")
    assert (config.learning_rate, config.weight_decay, config.steps) == (1e-3, 0.0, 7)
    assert read_config(tmp_path / "run.yaml", TINY, {"steps": "9"}) == replace(
        TINY, learning_rate=1e-3, weight_decay=0.0, steps=9
    )


def test_an_empty_yaml_file_is_the_default_run(tmp_path):
    (tmp_path / "run.yml").write_text("# nothing yet\n")
    assert read_config(tmp_path / "run.yml") == TrainConfig()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.toml", "steps = 3", ["run.toml", "must end in .json, .yaml or .yml"]),
        ("run.json", "{", ["run.json:1", "not JSON"]),
        ("run.json", "[1]", ["run.json", "holds list"]),
        ("run.yaml", "a: [1\nb: 2", ["run.yaml:2", "not YAML"]),
        ("run.yaml", "- 1", ["run.yaml", "holds list"]),
        ("run.yaml", b"\xff\xfe\x00", ["run.yaml", "is not text"]),
        ("run.yaml", "steps: !!python/object/apply:os.system ['touch owned']", ["run.yaml:1", "not YAML"]),
        ("run.yaml", "num_expert: 4", ["'num_expert'", "value 4", "did you mean num_experts?"]),
        ("run.yaml", "zzz: 1", ["'zzz'", "--print-config"]),
        ("run.yaml", "steps: 0", ["steps=0", "at least 1"]),
        ("run.yaml", "steps: many", ["steps='many'", "an integer"]),
        ("run.yaml", "steps: 2.5", ["steps=2.5", "an integer"]),
        ("run.yaml", "steps: null", ["steps=None", "an integer"]),
        ("run.yaml", "steps: true", ["steps=True", "an integer"]),
        ("run.yaml", "learning_rate: fast", ["learning_rate='fast'", "a number"]),
        ("run.yaml", "learning_rate: null", ["learning_rate=None", "finite number above 0"]),
        ("run.yaml", "weight_decay: .inf", ["weight_decay=inf", "finite"]),
        ("run.yaml", "warmup_share: [1]", ["warmup_share=[1]", "between 0 and 1"]),
        ("run.yaml", "tensorboard: 1", ["tensorboard=1", "true or false"]),
        ("run.yaml", "balancing: 3", ["balancing=3", "aux, loss_free, none"]),
        ("run.yaml", "tokenizer: words", ["'words'", "bytes, bpe"]),
        ("run.yaml", "tokenizer: bpe", ["vocab_size=256", "257 and 65536"]),
        ("run.yaml", "vocab_size: 500", ["vocab_size=500", "must be 256"]),
        ("run.yaml", "accumulation_steps: 3", ["accumulation_steps=3", "batch_size=16"]),
        ("run.yaml", "keep_checkpoints: 0", ["keep_checkpoints=0", "at least 1"]),
        ("run.yaml", "sample_every: -1", ["sample_every=-1", "at least 0"]),
        ("run.yaml", "sample_prompt: ''", ["sample_prompt=''", "at least one character"]),
        ("run.yaml", "data: 7", ["data=7", "list of files"]),
        ("run.yaml", "device: tpu", ["'tpu'", "cpu, cuda"]),
        ("run.yaml", "device: null", ["device=None", "cpu, cuda"]),
        ("run.yaml", "device: yes", ["device=True", "cpu, cuda"]),
        ("run.json", '{"device": ["cpu"]}', ["device=['cpu']", "cpu, cuda"]),
        ("run.yaml", "seed: true", ["seed=True", "an integer"]),
        ("run.yaml", f"learning_rate: 1{'0' * 400}", ["learning_rate=1000", "a finite number"]),
        ("run.yaml", f"batch_size: 1{'0' * 23}", ["batch_size=1000", "below 2**31"]),
        ("run.yaml", r'sample_prompt: "\uDCE9"', ["sample_prompt='\\udce9'", "not UTF-8"]),
    ],
)
def test_a_bad_file_is_one_line_and_status_2(name, content, said, here, capsys):
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["train", "--config", name, "--output-dir", "out"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    for part in [name, *said]:
        assert part in line
    assert [path.name for path in here.iterdir()] == [name], "nothing was made, and no tag was obeyed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "missing.yaml"], ["missing.yaml", "No such file"]),
        (["--set", "steps"], ["'steps' is not NAME=VALUE"]),
        (["--set", "stepz=4"], ["'stepz'", "did you mean steps?"]),
        (["--set", "num_experts=2", "--set", "top_k=3"], ["top_k=3", "num_experts=2"]),
        (["--set", "device=cuda:3"], ["cuda:3", "0 NVIDIA GPUs"]),
        (["--set", "tokenizer=bpe", "--set", "vocab_size=9000", "--data", "tiny.txt"], ["vocab_size=9000", "lower"]),
        (["--set", "tokenizer=bpe", "--set", "vocab_size=300", "--data", "latin.txt"], ["latin.txt", "not UTF-8"]),
    ],
)
def test_a_bad_override_is_one_line_and_status_2(arguments, said, here, capsys):
    (here / "tiny.txt").write_text("the cat sat on the mat. " * 200)
    (here / "latin.txt").write_bytes("naïve café ".encode("latin-1") * 200)
    assert main(["train", *arguments, "--output-dir", "out"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    for part in said:
        assert part in line
    assert not list((here / "out").glob("*")) if (here / "out").exists() else True


def test_print_config_is_the_whole_effective_run_and_trains_nothing(here, capsys):
    (here / "run.yaml").write_text("steps: 50\nnum_experts: 4\n")
    arguments = ["train", "--config", "run.yaml", "--set", "top_k=1", "--set", "steps=60", "--steps", "70"]
    assert main([*arguments, "--print-config"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert TrainConfig.from_json(printed) == TrainConfig(steps=70, num_experts=4, top_k=1)
    assert [path.name for path in here.iterdir()] == ["run.yaml"]


def small(*more: str) -> list[str]:
    return [part for pair in (*SMALL_FIELDS, *more) for part in ("--set", pair)]


def test_the_effective_configuration_is_saved_and_resumed_without_naming_it(here, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["train", *small("steps=4"), "--output-dir", "out"]) == 0
    saved = read_config(here / "out" / "config.json")
    assert (saved.steps, saved.model_dim) == (4, 32)
    assert main(["train", "--resume", "--steps", "6", "--output-dir", "out"]) == 0
    assert read_config(here / "out" / "config.json") == replace(saved, steps=6)
    assert main(["train", "--config", "out/config.json", "--output-dir", "again"]) == 0
    assert "held-out loss" in capsys.readouterr().out
    assert main(["report", "out/training.jsonl", "--output-dir", "report"]) == 0
    page = (here / "report" / "report.html").read_text()
    assert "training loss" in page
    assert "dead experts" in page.lower()


def test_generate_goes_on_from_a_prompt(here, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["train", *small("steps=3"), "--output-dir", "out"]) == 0
    capsys.readouterr()
    assert main(["generate", "out", "--prompt", "Hello", "--tokens", "20", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["prompt"], first["step"]) == ("Hello", 3)
    assert main(["generate", "out", "--prompt", "Hello", "--tokens", "20", "--best"]) == 0
    assert capsys.readouterr().out == f"Hello{first['text']}\n"
    for arguments, said in (
        (["--prompt", ""], "prompt=''"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--tokens", "0"], "at least 1"),
        (["--tokens", "1000000"], "num_tokens=1000000"),
        (["--prompt", "caf\udce9"], "prompt='caf\\udce9' is not UTF-8"),
        (["--seed", str(2**64)], "'--seed': 18446744073709551616 is above the limit"),
    ):
        assert main(["generate", "out", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert main(["generate", "nowhere"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


def test_names_of_files_that_are_not_utf_8_do_not_end_a_run(here, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    data, output = "caf\udce9.txt", "r\udce9sum"
    (here / data).write_bytes(b"the cat sat on the mat. " * 200)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as on a terminal: refuses what is not text
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["train", *small("steps=2"), "--data", data, "--output-dir", output]) == 0
    stdout.flush()
    assert r"caf\udce9.txt" in stdout.buffer.getvalue().decode()
    assert read_config(here / output / "config.json").data == (data,)


def _allocate_too_much(*_: object, **__: object) -> None:
    torch.empty(1 << 50)


def _allocate_too_much_by_python(*_: object, **__: object) -> None:
    bytearray(1 << 60)


def _allocate_too_much_on_a_gpu(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


@pytest.mark.parametrize(
    "allocate",
    [_allocate_too_much, _allocate_too_much_by_python, _allocate_too_much_on_a_gpu],
    ids=["cpu", "py", "gpu"],
)
def test_no_memory_is_one_line_and_status_1(allocate, here, capsys, monkeypatch):
    monkeypatch.setattr("moe_gpu.runs.train", allocate)
    assert main(["train", *small("steps=2"), "--output-dir", "out"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert "out of memory (" in line
    assert "smaller sizes" in line


@pytest.mark.parametrize(
    ("blocked", "arguments", "extra"),
    [
        ("yaml", ["--config", "run.yaml"], "moe-gpu[train]"),
        ("tokenizers", ["--set", "tokenizer=bpe", "--set", "vocab_size=300"], "moe-gpu[train]"),
        ("tensorboard", ["--set", "tensorboard=true"], "moe-gpu[metrics]"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(blocked, arguments, extra, here, capsys, monkeypatch):
    (here / "run.yaml").write_text("steps: 1\n")
    monkeypatch.setitem(sys.modules, blocked, None)
    assert main(["train", *small("steps=1"), *arguments, "--output-dir", "out"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    assert extra in line
    assert blocked in line.lower()
    assert not list(here.rglob("checkpoint*"))


# Documents


def test_the_example_configuration_trains(here, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra train)")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra metrics)")
    command = ["train", "--config", str(EXAMPLE), "--steps", "2", "--set", "eval_batches=1"]
    assert main([*command, "--set", "sample_every=2", "--set", "sample_tokens=5", "--output-dir", "out"]) == 0
    assert "bits a byte" in capsys.readouterr().out
    names = {path.name for path in (here / "out").iterdir()}
    assert names >= {"config.json", "tokenizer.json", "samples.jsonl", "training.jsonl", "expert_load.safetensors"}


def test_the_configuration_reference_is_the_dataclass():
    assert list(WHAT) == [field.name for field in fields(TrainConfig)]
    assert config_reference() in DOCUMENT.read_text(), "paste the output of config_reference() into docs/training.md"


def test_configurations_in_the_document_are_read(tmp_path):
    blocks = re.findall(r"```(yaml|json)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert blocks
    for kind, block in blocks:
        path = tmp_path / f"run.{kind}"
        path.write_text(block)
        assert read_config(path) != TrainConfig()


def test_python_in_the_document_runs(here, capsys):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/training.md", "exec"), {})
    assert "torch.Size([2, 2, 4])" in capsys.readouterr().out
