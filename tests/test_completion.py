"""Shell completion, as the shells themselves complete."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import typer.main

from moe_gpu.cli import app, main
from moe_gpu.cli.completion import commands_of, script
from moe_gpu.config import PRESETS


def needs(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


def in_bash(line: str, folder) -> set[str]:
    """What bash offers at the end of a line."""
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"{script('bash')}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
        '_moe_gpu\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    command = [needs("bash"), "--norc", "-euc", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def in_fish(line: str, folder) -> set[str]:
    code = f"{script('fish')}\ncomplete -C {line!r}"
    done = subprocess.run([needs("fish"), "--no-config", "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return {offered.split("\t")[0] for offered in done.stdout.splitlines()}


CASES = [
    ("moe-gpu ", {"bench", "train", "top", "energy", "slices"}, {"measure", "--json"}),
    ("moe-gpu be", {"bench"}, {"train"}),
    ("moe-gpu bench --pre", {"--preset"}, {"--experts"}),
    ("moe-gpu bench --preset ", set(PRESETS), {"--json", "bench"}),
    ("moe-gpu bench --preset mix", {"mixtral-8x7b"}, {"small"}),
    ("moe-gpu bench --quick --mode back", {"backward"}, {"forward"}),
    ("moe-gpu energy ", {"measure", "calibrate", "report", "watch"}, {"bench"}),
    ("moe-gpu energy measure --d", {"--dtype", "--device"}, {"--preset"}),
    ("moe-gpu energy measure --dtype ", {"fp32", "fp16", "bf16"}, {"measure"}),
    ("moe-gpu slices plan --backend ", {"cta", "green_context", "device"}, {"plan"}),
]


@pytest.mark.parametrize(("line", "offered", "not_offered"), CASES)
@pytest.mark.parametrize("complete", [in_bash, in_fish])
def test_a_shell_offers_what_may_follow(complete, line, offered, not_offered, tmp_path):
    found = complete(line, tmp_path)
    assert offered <= found
    assert not not_offered & found


@pytest.mark.parametrize("complete", [in_bash, in_fish])
def test_files_are_left_to_the_shell(complete, tmp_path):
    (tmp_path / "notes.txt").touch()
    found = complete("moe-gpu train --data no", tmp_path)
    assert found <= {"notes.txt"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_valid(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert printed == script(shell)
    assert main(["completion", shell, "--output", str(tmp_path / "script")]) == 0
    assert (tmp_path / "script").read_text() == printed
    done = subprocess.run([needs(shell), "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_zsh_loads_it(tmp_path):
    code = f"{script('zsh')}\nwhence -w _moe_gpu"
    command = [needs("zsh"), "-f", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})
    assert done.stdout.strip().endswith("_moe_gpu: function"), done.stderr


def test_an_unknown_shell_is_refused(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "'tcsh' is not one of bash, zsh, fish" in capsys.readouterr().err


def test_every_command_and_option_is_completed():
    listed = {one.path: set(one.options) for one in commands_of(app)}

    def visit(command, path=()):
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        flags = {flag for flag in flags if flag.startswith("--")}
        assert flags <= listed[path] | {"--help"}, path
        for name, inner in getattr(command, "commands", {}).items():
            visit(inner, (*path, name))

    visit(typer.main.get_command(app))
