"""The command line: every mistake is one line and status 2, nothing is overwritten, and the documents' examples run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from moe_gpu import __version__
from moe_gpu.cli import app, main, options
from moe_gpu.cli import commands as commands_module
from moe_gpu.cli.cache import CACHE_POLICIES
from moe_gpu.config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "README.md",
    "QUICKSTART.md",
    "docs/energy.md",
    "docs/expert_cache.md",
    "docs/graphs.md",
    "docs/slicing.md",
    "docs/top.md",
]
COMMANDS = ["demo", "bench", "train", "generate", "report", "profile", "tune", "doctor", "top", "completion"]
GROUPS = {"energy": ["measure", "calibrate", "report", "watch"], "cache": ["simulate"]}
KEPT = "an earlier run's file\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, so that a default output folder would be seen."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def refused(capsys, *arguments: str | Path) -> str:
    """The one line that the command answers a mistake with."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("moe-gpu: error: ")
    assert printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--experts", "8", "--top-k", "9"], ["top_k=9", "num_experts=8"]),
        (["bench", "--dtype", "fp7"], ["'fp7'", "fp32, fp16, bf16"]),
        (["bench", "--tokens", "-1"], ["-1", "at least 1"]),
        (["bench", "--tokens", "64,0"], ["0 is below", "at least 1"]),
        (["bench", "--tokens", "many"], ["'many' is not a whole number"]),
        (["bench", "--token", "5"], ["No such option: --token"]),
        (["bench", "--experts", "0"], ["0 is below", "at least 1"]),
        (["bench", "--iterations", "0"], ["0 is below", "at least 1"]),
        (["bench", "--seed", "-3"], ["-3 is below", "at least 0"]),
        (["bench", "--seed", str(2**64)], [f"{2**64} is above", "at most"]),
        (["bench", "--preset", "gpt-9"], ["'gpt-9'", "qwen3-30b-a3b"]),
        (["bench", "--routing", "zipf-x"], ["'zipf-x'", "zipf-1.2"]),
        (["bench", "--routing", "zipf--1"], ["'zipf--1'", "above 0"]),
        (["bench", "--routing", "trace"], ["--trace"]),
        (["bench", "--mode", "sideways"], ["'sideways'", "forward+backward"]),
        (["bench", "--launch", "rocket"], ["'rocket'", "eager, graph"]),
        (["bench", "--provider", "nobody"], ["nobody", "moe_gpu"]),
        (["bench", "--device", "tpu"], ["'--device'", "'tpu'", "cpu, cuda"]),
        (["bench", "--device", "cuda"], ["cuda", "choose cpu"]),
        (["bench", "--device", "NVIDIA H200"], ["'NVIDIA H200'", "cpu, cuda"]),
        (["bench", "--sm-budget", "66"], ["--sm-budget 66", "--explain"]),
        (["bench", "--explain", "--device", "NVIDIA Z9"], ["'NVIDIA Z9'", "NVIDIA H200"]),
        (["bench", "--explain", "--device", "cuda"], ["needs a GPU", "moe-gpu doctor"]),
        (["tune"], ["needs a GPU", "moe-gpu doctor"]),
        (["tune", "--dry-run"], ["needs a GPU", "moe-gpu doctor"]),
        (["tune", "--kind", "sideways"], ["'sideways'", "grad_w_gather"]),
        (["tune", "--preset", "gpt-9"], ["'gpt-9'", "qwen3-30b-a3b"]),
        (["tune", "--seconds", "0"], ["0 is below", "at least 1"]),
        (["bench", "--ablation", "--launch", "graph"], ["--ablation", "--launch", "leave one"]),
        (["bench", "--ablation", "--quick", "--energy"], ["--ablation", "--quick and --energy"]),
        (["bench", "--ablation", "--routing", "zipf-x"], ["'zipf-x'", "zipf-1.2"]),
        (["bench", "--quick", "--full"], ["--quick", "--full"]),
        (["bench", "--quick", "--preset", "large"], ["--quick", "--preset large"]),
        (["bench", "--output-dir"], ["--output-dir", "requires an argument"]),
        (["bench", "--preset", "deepseek-v3", "--experts", "9"], ["num_experts=9", "n_group=8"]),
        (["bench", "--tokens", "10000000", "--preset", "mixtral-8x7b"], ["10000000", "GiB"]),
        (["bench", "--trace", "missing.safetensors", "--routing", "trace"], ["missing.safetensors"]),
        (["train", "--steps", "0"], ["0 is below", "at least 1"]),
        (["train", "--experts", "4", "--top-k", "5"], ["top_k=5", "num_experts=4"]),
        (["train", "--data", "missing.txt"], ["missing.txt", "No such file"]),
        (["demo", "--data", "missing.txt"], ["missing.txt", "No such file"]),
        (["train", "--resume"], ["moe-gpu-output"]),
        (["report"], ["RESULTS.jsonl"]),
        (["report", "missing.jsonl"], ["missing.jsonl", "No such file"]),
        (["doctor", "now"], ["unexpected extra argument"]),
        (["cache", "simulate"], ["TRACE"]),
        (["cache", "simulate", "missing.safetensors"], ["missing.safetensors", "No such file"]),
        (["cache", "simulate", "t", "--policy", "fifo"], ["'fifo'", "on-demand"]),
        (["cache", "simulate", "t", "--tokens", "0"], ["0 is below", "at least 1"]),
        (["slices", "plan", "--load", "1e308,1e308"], ["1e308 is not", "at most 1e+15"]),
        (["slices", "plan", "--load", "1,2", "--output", "/nowhere/plan.json"], ["error: /nowhere/plan.json: No such"]),
        (["profile", "--layer", "9"], ["layer=9 is outside the 2 layers"]),
        (["profile", "--tile", "7"], ["tile=7 is not one of 16"]),
        (["profile", "--output-dir", f"{__file__}/out"], ["Not a directory; choose another"]),
        (["frobnicate"], ["No such command 'frobnicate'"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, said, here, capsys):
    line = refused(capsys, *arguments)
    for part in said:
        assert part in line
    written = [path for path in here.rglob("*") if path.is_file()]
    assert written == []


@pytest.mark.parametrize("content", [b"", b"   \n", b"\xff\xfe\x00\x01" * 64])
@pytest.mark.parametrize("command", ["train", "demo"])
def test_a_data_file_without_text_is_refused_by_name(command, content, here, capsys):
    (here / "data.txt").write_bytes(content)
    assert "data.txt" in refused(capsys, command, "--data", "data.txt", "--output-dir", here / "out")


@pytest.mark.parametrize("command", ["demo", "bench", "train", "report"])
def test_an_output_folder_that_cannot_be_written_is_refused_first(command, here, capsys, results_file):
    (here / "file").write_text(KEPT)
    arguments = [results_file] if command == "report" else []
    line = refused(capsys, command, *arguments, "--output-dir", here / "file" / "out")
    assert str(here / "file" / "out") in line
    assert "--output-dir" in line
    assert (here / "file").read_text() == KEPT


@pytest.fixture
def results_file(tmp_path):
    from moe_gpu.results import BenchmarkRow, Machine, TrainingRow, write_rows

    path = tmp_path / "recorded.jsonl"
    shape = ("small", 64, 8, 16, 8, 4, 2, "float32", "uniform", "forward")
    write_rows(
        path,
        [
            Machine("a CPU", "cpu", "3.11", "2.13", "Linux", "2026-11-01T00:00:00+00:00"),
            BenchmarkRow("torch_loop", "ok", *shape, samples=3, mean_ms=2.0, p50_ms=2.0, tokens_per_s=32000.0),
            BenchmarkRow("moe_gpu", "ok", *shape, samples=3, mean_ms=1.0, p50_ms=1.0, tokens_per_s=64000.0),
            TrainingRow("demo", 1, 4.0, 64, 0.5),
            TrainingRow("demo", 2, 3.5, 128, 1.0),
        ],
    )
    return path


@pytest.mark.parametrize("damage", ["empty", "cut", "not JSON", "binary", "unknown field", "other type"])
def test_a_damaged_results_file_is_refused_and_the_old_report_kept(damage, here, capsys, results_file):
    content = results_file.read_bytes()
    results_file.write_bytes(
        {
            "empty": b"",
            "cut": content[:-30],
            "not JSON": content + b"hello\n",
            "binary": b"PK\x03\x04\xff\xfe",
            "unknown field": content + b'{"kind": "training", "mood": 3}\n',
            "other type": content.replace(b'"p50_ms": 1.0', b'"p50_ms": "fast"'),
        }[damage]
    )
    (here / "report.html").write_text(KEPT)
    line = refused(capsys, "report", results_file, "--output-dir", here)
    assert str(results_file) in line
    assert (here / "report.html").read_text() == KEPT
    assert sorted(path.name for path in here.iterdir()) == ["recorded.jsonl", "report.html"]


def test_a_damaged_trace_is_refused_and_the_old_results_kept(here, capsys):
    (here / "trace.safetensors").write_bytes(b"\x10\x00\x00")
    (here / "results.jsonl").write_text(KEPT)
    arguments = ["--routing", "trace", "--trace", "trace.safetensors", "--output-dir", "."]
    assert "trace.safetensors" in refused(capsys, "bench", *arguments)
    assert (here / "results.jsonl").read_text() == KEPT


def test_a_trace_of_another_layer_is_refused(here, capsys):
    import torch

    from moe_gpu.profiler import RoutingTrace

    RoutingTrace.from_steps([[torch.tensor([[0, 1]])]], 64, "test").save(here / "trace.safetensors")
    line = refused(capsys, "bench", "--preset", "small", "--routing", "trace", "--trace", "trace.safetensors")
    assert "64" in line
    assert "8" in line


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moe-gpu {__version__}\n"
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(command in shown for command in [*COMMANDS, *GROUPS])


@pytest.mark.parametrize("command", [*COMMANDS, *(f"{group} {name}" for group in GROUPS for name in GROUPS[group])])
def test_every_command_has_help_and_json(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert ("--json" in shown) == (command != "completion"), "a script is no JSON"
    alone = ("tune", "doctor", "top", "completion", "generate", "cache simulate")
    alone += ("energy calibrate", "energy report", "energy watch")
    assert ("--output-dir" in shown) == (command not in alone), "these leave one file or none"


@pytest.mark.parametrize("arguments", [[], ["slices"], ["energy"], ["cache"]])
def test_a_list_of_commands_cuts_no_sentence(arguments, capsys):
    assert main([*arguments, "--help"]) == 0
    assert "..." not in capsys.readouterr().out.split("Commands:")[1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_of_commands_lists_them(group, capsys):
    for arguments in ([group], [group, "--help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in GROUPS[group])


def test_help_names_every_preset(capsys):
    main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert all(preset in shown for preset in PRESETS)


def test_doctor_as_text_and_json(capsys):
    assert main(["doctor"]) == 0
    assert "Triton" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["can_run"] is True


def test_doctor_fails_where_the_main_job_cannot_run(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    assert "cannot run here" in capsys.readouterr().out


def test_report_writes_the_page_and_the_plots(here, capsys, results_file):
    assert main(["report", str(results_file), "--output-dir", str(here / "out"), "--json"]) == 0
    written = [Path(name) for name in json.loads(capsys.readouterr().out)]
    assert {path.name for path in written} >= {"report.html", "throughput_comparison.png", "training_results.png"}
    assert all(path.stat().st_size > 1000 for path in written)


def test_bench_writes_rows_and_prints_them_as_json(here, capsys):
    from moe_gpu.results import BenchmarkRow, Machine, from_json, read_rows

    sizes = "--input-dim 16 --hidden-dim 32 --experts 4 --top-k 2 --tokens 8,16 --mode forward --iterations 3"
    chosen = "--provider moe_gpu --provider torch_loop --routing uniform --launch eager"
    assert main(["bench", *sizes.split(), *chosen.split(), "--output-dir", "out", "--json"]) == 0
    printed = [from_json(line) for line in capsys.readouterr().out.splitlines()]
    rows = read_rows(here / "out" / "results.jsonl")
    assert printed == rows
    assert isinstance(rows[0], Machine)
    timed = [row for row in rows if isinstance(row, BenchmarkRow)]
    assert {(row.provider, row.num_tokens, row.status) for row in timed} == {
        (provider, tokens, "ok") for provider in ("moe_gpu", "torch_loop") for tokens in (8, 16)
    }
    assert all((row.input_dim, row.expert_dim, row.num_experts) == (16, 16, 4) for row in timed)


def test_a_cache_is_simulated_on_a_trace(here, capsys):
    import torch

    from moe_gpu.expert_cache.simulate import SIMULATED
    from moe_gpu.profiler import RoutingTrace
    from moe_gpu.results import ExpertCacheRow, from_json

    assert set(CACHE_POLICIES) == set(SIMULATED)
    RoutingTrace(torch.rand(2, 40, 8).topk(2).indices.to(torch.int16), 8, "test").save(here / "trace.safetensors")
    assert "1 to the trace's 8 experts" in refused(capsys, "cache", "simulate", "trace.safetensors", "--budget", "9")
    arguments = ["cache", "simulate", "trace.safetensors", "--budget", "2,50%", "--policy", "lru,auto", "--no-prefetch"]
    assert main(arguments) == 0
    assert "hit rate" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    rows = [from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert all(isinstance(row, ExpertCacheRow) and row.simulated for row in rows)
    assert [(row.slots_per_layer, row.policy) for row in rows] == [(2, "lru"), (2, "auto"), (4, "lru"), (4, "auto")]


def test_explain_of_a_described_gpu_runs_nothing_and_says_so(here, capsys, monkeypatch):
    monkeypatch.setenv("MOE_GPU_CACHE", str(here / "cache"))
    described = ["bench", "--explain", "--preset", "qwen3-30b-a3b", "--tokens", "64,4096", "--device", "NVIDIA H200"]
    assert main(described) == 0
    shown = capsys.readouterr().out
    assert shown.count("no GPU was used") == 2
    assert "triton" in shown
    assert "gluon" in shown
    assert main([*described, "--json"]) == 0
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [step["num_tokens"] for step in steps] == [64] * 11 + [4096] * 9  # few rows in one launch, too
    inference = ["up (inference)", "down (inference)"]
    assert [step["step"] for step in steps][:6] == ["route", *inference, "up", "down", "combine"]
    assert steps[-8]["flops"] == 2 * 4096 * 8 * 1536 * 2048
    assert list(here.iterdir()) == []


def test_explain_without_a_gpu_says_that_the_reference_serves(here, capsys):
    assert main(["bench", "--explain"]) == 0
    assert "plain PyTorch" in capsys.readouterr().out


def test_the_kinds_to_tune_are_the_kernels():
    from moe_gpu.triton_kernels.tuning import TUNED

    assert options.KINDS == TUNED


def test_train_resumes_and_refuses_a_checkpoint_of_another_shape(here, capsys):
    arguments = ["train", "--output-dir", "out", "--experts", "4", "--top-k", "2"]
    assert main([*arguments, "--steps", "2"]) == 0
    assert main([*arguments, "--steps", "3", "--resume"]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (here / "out").iterdir()}
    line = refused(capsys, "train", "--output-dir", "out", "--experts", "8", "--steps", "4", "--resume")
    assert "8" in line
    assert {path: path.read_bytes() for path in (here / "out").iterdir()} == before


def test_ctrl_c_is_status_130_and_says_what_is_kept(here, capsys, monkeypatch):
    from moe_gpu import runs

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_bench", interrupted)
    assert main(["bench"]) == 130
    printed = capsys.readouterr()
    assert printed.err == "moe-gpu: interrupted; no results were written\n"


def test_ctrl_c_in_training_leaves_a_checkpoint_that_resumes(here, capsys):
    command = [sys.executable, "-m", "moe_gpu", "train", "--output-dir", "out", "--experts", "4", "--steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stderr.readline().startswith("training: 1/100000")
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == 130
    assert said.splitlines()[-1].startswith("moe-gpu: interrupted at step ")
    assert "Traceback" not in said
    step = int(re.search(r"at step (\d+) of", said).group(1))
    assert main(["train", "--output-dir", "out", "--experts", "4", "--steps", str(step + 1), "--resume"]) == 0
    assert "held-out loss" in capsys.readouterr().out


def test_a_traceback_can_be_asked_for(here, monkeypatch):
    monkeypatch.setenv("MOE_GPU_TRACEBACK", "1")
    with pytest.raises(ValueError, match="top_k=9"):
        main(["bench", "--experts", "8", "--top-k", "9"])


def test_the_module_is_the_command_and_keeps_its_status():
    command = [sys.executable, "-m", "moe_gpu"]
    assert subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=ROOT).stdout.startswith(
        "moe-gpu"
    )
    wrong = subprocess.run([*command, "bench", "--dtype", "fp7"], capture_output=True, text=True, cwd=ROOT)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)


def test_a_reader_that_leaves_early_is_no_error():
    code = "import sys; from moe_gpu.cli import main; sys.exit(main(['doctor', '--json']))"
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | true", shell=True, capture_output=True, cwd=ROOT
    )
    assert done.stderr == b""


def test_a_reader_that_leaves_before_the_output_is_no_failure():
    """The status too: click's own is 1. A pipe without a reader stands for `head` that has gone."""
    code = (
        "import os, sys; from moe_gpu.cli import main; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        "sys.stdout = open(1, 'w', buffering=1, closefd=False); sys.exit(main(['completion', 'bash']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_in_a_command_that_keeps_nothing_is_a_line_too(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_gpu.doctor.diagnose", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "moe-gpu: interrupted\n"


def shell_lines(document: str) -> list[str]:
    """Every `moe-gpu ...` and `make ...` of a document, in blocks and in running text."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:moe-gpu|make|python -m moe_gpu) [^`\n]*)`", text)
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


PAGES = [*DOCUMENTS, "CONTRIBUTING.md", "docs/training.md", "docs/user_guide.md", "docs/troubleshooting.md"]
EXAMPLES = sorted({(document, line) for document in PAGES for line in shell_lines(document)})


@pytest.mark.parametrize(("document", "line"), EXAMPLES)
def test_every_example_in_the_documents_parses(document, line):
    words = shlex.split(line.replace("python -m moe_gpu", "moe-gpu"))
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    else:
        assert words[0] == "moe-gpu", f"an example of a command that is not checked: {line}"
        command, rest = typer.main.get_command(app), words[1:]
        while rest and hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        if rest:
            command.make_context(words[1], rest)


def commands(command, name=()):
    """The words of every command, those of groups' commands too."""
    if not hasattr(command, "commands"):
        return [" ".join(name)]
    return [words for part, inner in command.commands.items() for words in commands(inner, (*name, part))]


def test_there_are_examples_of_every_command():
    shown = [f"{line} " for _, line in EXAMPLES if line.startswith("moe-gpu")]
    names = commands(typer.main.get_command(app))
    missing = [name for name in names if not any(line.startswith(f"moe-gpu {name} ") for line in shown)]
    assert len(names) > 5
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_in_the_documents_run(document, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, document, "exec"), {})


# What the guide's examples end with on a machine without a GPU and without a running job; else 0.
STATUSES = {"tune": 2, "energy": 1, "top": 1}


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="on a GPU tuning takes minutes")
def test_the_examples_of_the_user_guide_run(here, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(here))
    monkeypatch.setenv("MOE_GPU_CACHE", str(here / "cache"))
    (here / "notes.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    table = re.findall(r"^\| `(moe-gpu [^`]*)` \|", (ROOT / "docs/user_guide.md").read_text(), re.MULTILINE)
    assert len(table) > 10
    for line in table:
        quick = line.replace("--steps 500", "--steps 2").replace("cache simulate", "cache simulate --tokens 256")
        words = shlex.split(quick)[1:]
        assert main(words) == STATUSES.get(words[0], 0), f"{line}: {capsys.readouterr().err}"
    left = {path.name for path in here.iterdir()}
    assert left == {"notes.txt", "demo", "run", "bench"}


def test_the_user_guide_has_every_command_and_exit_status():
    guide = (ROOT / "docs/user_guide.md").read_text()
    for name in typer.main.get_command(app).commands:
        assert f"`moe-gpu {name}" in guide
    said = commands_module.__doc__.split("Exit status: ")[1].split("MOE_GPU")[0]
    assert re.findall(r"^\| (\d+) \|", guide, re.MULTILINE) == re.findall(r"(?:^|; )(\d+) ", " ".join(said.split()))


@pytest.mark.parametrize("document", [*PAGES, "docs/architecture.md"])
def test_links_and_files_named_in_the_documents_exist(document):
    path = ROOT / document
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (path.parent / link).exists(), f"{document} links to {link}"
    for name in re.findall(r"`((?:moe_gpu|tests|docs|scripts|examples)/[\w./]+)`", text):
        assert (ROOT / name).exists(), f"{document} names {name}"
