"""Benchmark a MoE layer against its peers: `python examples/run_benchmark.py` asks; flags answer for scripts.

python examples/run_benchmark.py --quick
python examples/run_benchmark.py --full --output results.jsonl
python examples/run_benchmark.py --tokens 64 512 --experts 16 --top-k 4 --hidden-dim 2048 --dtype bf16
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from moe_gpu.benchmark import MoEBenchmark, run_full_benchmark, run_quick_benchmark
from moe_gpu.benchmark.table import print_rows
from moe_gpu.console import progress_bar
from moe_gpu.results import Row, write_rows


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def whole_number(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one of at least 1") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below the limit; give a whole number of at least 1")
    return number


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Benchmark a MoE layer against its peers.", allow_abbrev=False)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="one layer, two sizes: under a minute")
    kind.add_argument("--full", action="store_true", help="every preset that fits, sizes, routings and passes")
    parser.add_argument("--tokens", type=whole_number, nargs="+", metavar="N", help="tokens a call")
    parser.add_argument("--experts", type=whole_number, metavar="N")
    parser.add_argument("--top-k", type=whole_number, metavar="N")
    parser.add_argument("--hidden-dim", type=whole_number, metavar="N", help="the experts' inner width")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"))
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there as JSON lines")
    return parser


def ask(question: str, default: str, allowed: tuple[str, ...] = ()) -> str:
    """An answer from the terminal; an empty line is the default."""
    while True:
        answer = input(f"{question} [{default}]: ").strip() or default
        if not allowed or answer in allowed:
            return answer
        print(f"{answer!r} is not one of {', '.join(allowed)}")


def ask_number(question: str, default: int) -> int:
    while True:
        try:
            return whole_number(ask(question, str(default)))
        except argparse.ArgumentTypeError as error:
            print(error)


def choose_by_menu(arguments: argparse.Namespace) -> None:
    """Fill in the arguments from a short dialogue."""
    kind = ask("Benchmark: quick, full or custom", "quick", ("quick", "full", "custom"))
    arguments.quick, arguments.full = kind == "quick", kind == "full"
    if kind == "custom":
        arguments.tokens = [ask_number("Tokens a call", 256)]
        arguments.experts = ask_number("Experts", 8)
        arguments.top_k = ask_number("Experts per token", 2)
        arguments.hidden_dim = ask_number("Inner width of an expert", 1024)
        arguments.dtype = ask("Data type", "fp32", ("fp32", "fp16", "bf16"))
    output = ask("Results file", "benchmark_results.jsonl")
    arguments.output = Path(output)


def run(arguments: argparse.Namespace) -> list[Row]:
    """The rows of the benchmark that was asked for; ValueError before any work for one that cannot run."""
    given: dict[str, Any] = {
        "batch_sizes": arguments.tokens,
        "num_experts": arguments.experts,
        "top_k": arguments.top_k,
        "hidden_dim": arguments.hidden_dim,
        "dtype": arguments.dtype,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.output is not None:
        if arguments.output.is_dir() or not os.access(arguments.output.parent, os.W_OK):
            raise ValueError(f"cannot write {arguments.output}; name a file in a folder that exists and is writable")
    if not arguments.quick and not arguments.full:
        benchmark = MoEBenchmark(**given)
    with progress_bar("benchmark") as progress:
        if arguments.quick:
            return run_quick_benchmark(on_progress=progress, **given)
        if arguments.full:
            return run_full_benchmark(on_progress=progress, **given)
        benchmark.on_progress = progress
        return benchmark.run_comparison()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        if not argv and sys.stdin.isatty():
            choose_by_menu(arguments)
        rows = run(arguments)
    except ValueError as error:
        parser.error(str(error))
    except (EOFError, KeyboardInterrupt):
        print(f"{parser.prog}: interrupted; no results were written", file=sys.stderr)
        return 130
    print_rows(rows)
    if arguments.output is not None:
        write_rows(arguments.output, rows)
        print(f"results: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
