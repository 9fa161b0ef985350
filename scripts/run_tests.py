"""Lint, types and every test, each in a process of its own; closes with one line that sums them up.

The Triton interpreter must be chosen before Triton is imported and the ahead-of-time compile tests must not see it, so
`tests/interpreter` and `tests/aot` cannot share a process with the rest. `tests/aot` runs once more with the newest
Triton, where scripts/install.py has put it beside the one in use. Where there is no GPU, two processes run at a time,
the long ones first, and each one's output is shown when it is done.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["moe_gpu", "tests", "examples", "scripts"]
NEWEST_TRITON = Path(sys.prefix) / "newest-triton"  # scripts/install.py's NEWEST_TRITON_FOLDER


@dataclass
class Tally:
    """Counts of tests; `skips` maps (kind, reason) to how many."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    skips: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.skips.update(other.skips)


def read_junit(path: Path) -> Tally:
    """The counts of one pytest process; expected failures count as skipped."""
    tally = Tally()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            tally.failed += 1
        elif skip is not None:
            tally.skipped += 1
            kind = "GPU tests" if "tests.gpu" in case.get("classname", "") else "tests"
            tally.skips[kind, " ".join(skip.get("message", "no reason given").split())] += 1
        else:
            tally.passed += 1
    return tally


def run_pytest(name: str, arguments: list[str], environment: dict[str, str], output: IO[str] | None = None) -> Tally:
    """One pytest process, shown here or kept in `output`. One that dies, or runs no test, counts as one failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        errors = None if output is None else subprocess.STDOUT
        full = {**os.environ, **environment}
        status = subprocess.run(command, cwd=ROOT, env=full, stdout=output, stderr=errors).returncode
        tally = read_junit(report) if report.exists() else Tally()
    if status and not tally.failed:
        if output is not None:
            output.seek(0, os.SEEK_END)
        print(f"{name}: pytest ended with status {status}", file=output, flush=True)
        tally.failed += 1
    return tally


def run_lint(name: str, arguments: list[str], output: IO[str] | None = None) -> Tally:
    if find_spec(arguments[0]) is None:
        return Tally(skipped=1, skips=Counter({("checks", f"{arguments[0]} is not installed"): 1}))
    errors = None if output is None else subprocess.STDOUT
    status = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, stdout=output, stderr=errors).returncode
    if status:
        print(f"{name}: ended with status {status}", flush=True)
    return Tally(passed=status == 0, failed=status != 0)


def run_with_newest_triton(
    name: str, arguments: list[str], environment: dict[str, str], output: IO[str] | None = None
) -> Tally:
    if not (NEWEST_TRITON / "triton").exists():
        return Tally(skipped=1, skips=Counter({("checks", f"no newer Triton in {NEWEST_TRITON}"): 1}))
    path = os.pathsep.join([str(NEWEST_TRITON), *filter(None, [os.environ.get("PYTHONPATH")])])
    return run_pytest(name, arguments, {**environment, "PYTHONPATH": path, "MOE_GPU_OTHER_TRITON": "1"}, output)


# Name, what it is part of, and what runs it; the longest first.
Part = tuple[str, str, Callable[[str, IO[str] | None], Tally]]
PLAIN, INTERPRETED = {"TRITON_INTERPRET": "0"}, {"TRITON_INTERPRET": "1"}
APART = ("interpreter", "aot", "emulator")  # folders of tests/ with a process of their own


def test_parts() -> list[Part]:
    rest = ["tests", *(f"--ignore=tests/{folder}" for folder in APART)]

    def pytest(arguments: list[str], environment: dict[str, str]) -> Callable[[str, IO[str] | None], Tally]:
        return lambda name, output: run_pytest(name, arguments, environment, output)

    return [
        ("tests", "tests", pytest(rest, PLAIN)),
        ("ahead of time", "aot", pytest(["tests/aot"], PLAIN)),
        ("interpreter", "interpreter", pytest(["tests/interpreter"], INTERPRETED)),
        (
            "ahead of time, newest Triton",
            "aot",
            lambda name, output: run_with_newest_triton(name, ["tests/aot"], PLAIN, output),
        ),
        ("emulator", "emulator", pytest(["tests/emulator"], PLAIN)),
    ]


def lint_parts() -> list[Part]:
    sources = [source for source in SOURCES if (ROOT / source).exists()]

    def lint(*arguments: str) -> Callable[[str, IO[str] | None], Tally]:
        return lambda name, output: run_lint(name, list(arguments), output)

    return [
        ("mypy", "lint", lint("mypy", "moe_gpu")),
        ("ruff check", "lint", lint("ruff", "check", *sources)),
        ("ruff format", "lint", lint("ruff", "format", "--check", *sources)),
    ]


def run_beside_others(name: str, run: Callable[[str, IO[str] | None], Tally], shown: threading.Lock) -> Tally:
    """Run a part with its output kept, and show that as a whole; a remark when it starts."""
    print(f"== {name}: started", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        tally = run(name, output)
        output.seek(0)
        with shown:
            print(f"== {name}\n{output.read().rstrip()}\n   {time.monotonic() - began:.0f} s", flush=True)
    return tally


def run_parts(parts: list[tuple[str, Callable[[str, IO[str] | None], Tally]]]) -> Tally:
    """One after the other beside a GPU, else two at a time."""
    total = Tally()
    # GPU tests measure and fill the GPU's memory: nothing else may run beside them.
    workers = 1 if shutil.which("nvidia-smi") else min(2, os.cpu_count() or 1)
    if workers == 1 or len(parts) == 1:
        for name, run in parts:
            print(f"== {name}", flush=True)
            began = time.monotonic()
            total.add(run(name, None))
            print(f"   {time.monotonic() - began:.0f} s", flush=True)
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores
        shown = threading.Lock()
        with ThreadPoolExecutor(workers) as pool:
            for tally in pool.map(lambda part: run_beside_others(*part, shown), parts):
                total.add(tally)
    return total


@contextmanager
def bytecode_kept_aside() -> Iterator[None]:
    """Where Python is told to leave no bytecode, it lies in a folder for as long as the tests run.

    Most of them share it: without it each of the hundred processes that they start compiles this package anew.
    """
    if not sys.dont_write_bytecode:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        told = os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        try:
            yield
        finally:
            del os.environ["PYTHONPYCACHEPREFIX"]
            if told is not None:
                os.environ["PYTHONDONTWRITEBYTECODE"] = told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["lint", "tests", *APART], help="one part")
    only = parser.parse_args().only
    parts = [*test_parts(), *lint_parts()]
    with bytecode_kept_aside():
        total = run_parts([(name, run) for name, part, run in parts if only in (None, part)])
    print()
    for (kind, reason), count in sorted(total.skips.items()):
        print(f"skipped: {count} {kind}: {reason}")
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main())
