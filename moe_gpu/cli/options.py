"""What the commands share: parsers, options of one meaning everywhere, and how output and Ctrl-C behave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moe_gpu.results import Row


MOST = 2**63 - 1  # what a seed may be, and more than any count


def whole_number(minimum: int) -> Callable[[Any], int]:
    """A parser of whole numbers of at least `minimum`, that fit in 64 bits."""

    def parse(value: Any) -> int:
        try:
            number = int(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not a whole number; give one of at least {minimum}") from None
        if number < minimum:
            raise typer.BadParameter(f"{number} is below the limit; give a whole number of at least {minimum}")
        if number > MOST:
            raise typer.BadParameter(f"{number} is above the limit; give a whole number of at most {MOST}")
        return number

    return parse


def above(minimum: float) -> Callable[[Any], float]:
    """A parser of numbers above `minimum`."""

    def parse(value: Any) -> float:
        try:
            number = float(value)
        except ValueError:
            raise typer.BadParameter(f"{value!r} is not a number; give one above {minimum:g}") from None
        if not minimum < number < float("inf"):
            raise typer.BadParameter(f"{value} is not above {minimum:g}; give a number that is")
        return number

    return parse


def one_of(*choices: str) -> Callable[[Any], str]:
    """A parser of one word out of `choices`."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}; give one of these")
        return value

    parse.choices = choices  # type: ignore[attr-defined]  # for shell completion
    return parse


def each(parse: Callable[[Any], Any]) -> Callable[[list[str] | None], list[Any]]:
    """A callback for an option that may be repeated and may hold several values divided by commas."""

    def parse_each(values: list[str] | None) -> list[Any]:
        return [parse(part.strip()) for value in values or [] for part in value.split(",")]

    parse_each.choices = getattr(parse, "choices", ())  # type: ignore[attr-defined]
    return parse_each


def whole(values: Any) -> list[int] | None:
    """What an option of whole numbers holds once parsed; None for nothing."""
    return values or None


def count(flag: str, text: str, minimum: int = 1) -> Any:
    return typer.Option(flag, parser=whole_number(minimum), metavar="N", help=text)


def many(flag: str, parse: Callable[[Any], Any], metavar: str, text: str) -> Any:
    return typer.Option(flag, callback=each(parse), metavar=metavar, help=f"{text} (repeat, or divide by commas)")


PASSES = ("forward", "backward", "forward+backward")
LAUNCHES = ("eager", "graph")
DTYPES = ("fp32", "fp16", "bf16")
DEVICES = one_of("cpu", "cuda")
KINDS = ("up", "down", "grad_act", "grad_x", "grad_w", "grad_w_gather", "decode")

OutputDir = Annotated[Path, typer.Option("--output-dir", metavar="DIR", help="Folder for everything written.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, all else on stderr.")]
Seed = Annotated[int, count("--seed", "Seed of weights, data order and routing.", 0)]
Device = Annotated[
    str | None, typer.Option("--device", parser=DEVICES, metavar="cpu|cuda", help="Default: the GPU if there is one.")
]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="FILE", help="Text to train on (repeat). Default: prose that ships with Python."),
]
Publish = Annotated[bool, typer.Option("--publish", help="Let `moe-gpu top` watch the training.")]
Experts = Annotated[int | None, count("--experts", "Experts.")]
TopK = Annotated[int | None, count("--top-k", "Experts that each token visits.")]


def print_rows(rows: Sequence[Row]) -> None:
    from moe_gpu.results import to_json

    for row in rows:
        print(to_json(row))


class Interrupted(Exception):
    """Ctrl-C ended a command; the text says what is kept."""


@contextmanager
def interruptible(kept: str) -> Iterator[None]:
    """Ctrl-C raises Interrupted with one line: what the library kept, or else `kept`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(str(stop) or f"interrupted; {kept}") from None


@contextmanager
def stdout_for_json(as_json: bool) -> Iterator[None]:
    """With --json, tables and remarks go to stderr, so that stdout holds JSON and nothing else."""
    stdout = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stdout
