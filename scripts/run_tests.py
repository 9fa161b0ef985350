"""Lint, types and every test, each in a process of its own; closes with one line that sums them up.

The Triton interpreter must be chosen before Triton is imported and the ahead-of-time compile tests must not see it, so
`tests/interpreter` and `tests/aot` cannot share a process with the rest. `tests/aot` runs once more with the newest
Triton, where scripts/install.py has put it beside the one in use. Both runs of it keep one core busy for minutes, so
they go beside the rest and are shown after it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
        print(f"{name}: pytest ended with status {status}")
        tally.failed += 1
    return tally


def run_lint(name: str, arguments: list[str]) -> Tally:
    if find_spec(arguments[0]) is None:
        return Tally(skipped=1, skips=Counter({("checks", f"{arguments[0]} is not installed"): 1}))
    status = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT).returncode
    if status:
        print(f"{name}: ended with status {status}")
    return Tally(passed=status == 0, failed=status != 0)


def run_with_newest_triton(
    name: str, arguments: list[str], environment: dict[str, str], output: IO[str] | None = None
) -> Tally:
    if not (NEWEST_TRITON / "triton").exists():
        return Tally(skipped=1, skips=Counter({("checks", f"no newer Triton in {NEWEST_TRITON}"): 1}))
    path = os.pathsep.join([str(NEWEST_TRITON), *filter(None, [os.environ.get("PYTHONPATH")])])
    return run_pytest(name, arguments, {**environment, "PYTHONPATH": path, "MOE_GPU_OTHER_TRITON": "1"}, output)


def run_ahead_of_time(output: IO[str]) -> Tally:
    """`tests/aot` with the Triton in use, then with the newest."""
    total = Tally()
    plain = {"TRITON_INTERPRET": "0"}
    for name, run in (("ahead of time", run_pytest), ("ahead of time, newest Triton", run_with_newest_triton)):
        print(f"== {name}", file=output, flush=True)
        began = time.monotonic()
        total.add(run(name, ["tests/aot"], plain, output))
        output.seek(0, os.SEEK_END)
        print(f"   {time.monotonic() - began:.0f} s", file=output, flush=True)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["lint", "tests", "interpreter", "aot"], help="one part")
    only = parser.parse_args().only
    plain = {"TRITON_INTERPRET": "0"}
    sources = [source for source in SOURCES if (ROOT / source).exists()]
    tests = ["tests", "--ignore=tests/interpreter", "--ignore=tests/aot"]
    parts = [
        ("lint", "ruff check", lambda name: run_lint(name, ["ruff", "check", *sources])),
        ("lint", "ruff format", lambda name: run_lint(name, ["ruff", "format", "--check", *sources])),
        ("lint", "mypy", lambda name: run_lint(name, ["mypy", "moe_gpu"])),
        ("tests", "tests", lambda name: run_pytest(name, tests, plain)),
        ("interpreter", "interpreter", lambda name: run_pytest(name, ["tests/interpreter"], {"TRITON_INTERPRET": "1"})),
    ]
    total = Tally()
    with tempfile.TemporaryFile("w+") as output, ThreadPoolExecutor(1) as pool:
        beside = pool.submit(run_ahead_of_time, output) if only in (None, "aot") else None
        for part, name, run in parts:
            if only not in (None, part):
                continue
            print(f"== {name}", flush=True)
            began = time.monotonic()
            total.add(run(name))
            print(f"   {time.monotonic() - began:.0f} s", flush=True)
        if beside is not None:
            total.add(beside.result())
            output.seek(0)
            print(output.read())
    print()
    for (kind, reason), count in sorted(total.skips.items()):
        print(f"skipped: {count} {kind}: {reason}")
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped")
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main())
