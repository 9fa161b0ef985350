"""Which tile serves a product: from tables measured on the device, else by the rules of tuning.py. Never timed here.

A table is a JSON file for one GPU model. `moe-gpu tune` writes the user's, which comes before the one that ships with
the package (`tiles/`). A product asks by kind, bits of its numbers, rows per expert (a power of two: the end of its
bucket), shape (N, K) and SMs. Inference of few rows asks as the kind `decode`, with an expert's hidden and input width
for N and K, whether up and down projection are one launch, and by which tile. Kind, bits and bucket must be in a table;
of those entries the nearest shape serves, if it is near, and the nearest number of SMs. Files are read once a process;
an answer is remembered.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moe_gpu.files import device_cache_path, device_file_name, write_atomically
from moe_gpu.results import Ceiling, Machine
from moe_gpu.triton_kernels.tuning import (
    HOPPER_DECODE_MOST_ROWS,
    HOPPER_DECODE_MOST_TOKENS,
    HOPPER_MIN_ROWS_PER_EXPERT,
    TUNED,
    GemmConfig,
    HopperConfig,
    HopperDecodeConfig,
    TwoProducts,
    cdiv,
    gemm_config,
    hopper_decode_config,
    hopper_decode_serves,
    next_power_of_2,
    row_classes_fit,
)

logger = logging.getLogger("moe_gpu")

SCHEMA = 1
MAX_ROWS_PER_EXPERT = 4096  # the last bucket holds all beyond
# A shape serves for another whose N and K differ by no more than this factor, multiplied together.
NEAR = 4.0
Tile = GemmConfig | HopperConfig
AnyTile = Tile | HopperDecodeConfig | TwoProducts  # the last two are of the kind `decode`
PATHS: dict[str, type[AnyTile]] = {
    "triton": GemmConfig,
    "hopper": HopperConfig,
    "one launch": HopperDecodeConfig,
    "two products": TwoProducts,
}


class TableError(ValueError):
    """A table cannot be used; the message says why."""


@dataclass(frozen=True)
class Cell:
    """What an entry was measured for; `rows_per_expert` is the end of its bucket, n and k are a weight's axes."""

    kind: str
    bits: int
    rows_per_expert: int
    n: int
    k: int
    sms: int


@dataclass(frozen=True)
class Entry:
    """The tiles of a cell with their milliseconds, the chosen first, one a path; `machine` numbers the table's rows."""

    cell: Cell
    tiles: tuple[tuple[AnyTile, float], ...]
    machine: int = 0


@dataclass(frozen=True)
class Table:
    """A device's entries, the machines that they were measured on, and the newest run's ceilings."""

    machines: tuple[Machine, ...]
    entries: tuple[Entry, ...]
    ceilings: tuple[Ceiling, ...] = ()

    @functools.cached_property
    def _buckets(self) -> dict[tuple[str, int, int], list[Entry]]:
        buckets = defaultdict(list)
        for entry in self.entries:
            buckets[entry.cell.kind, entry.cell.bits, entry.cell.rows_per_expert].append(entry)
        return buckets

    def find(self, cell: Cell, hopper: bool) -> tuple[Entry, AnyTile, float] | None:
        """The entry nearest to a cell, the tile of it that may serve, and its milliseconds; None without a near one."""
        best, best_distance = None, (math.log2(NEAR), math.inf)
        for entry in self._buckets.get((cell.kind, cell.bits, cell.rows_per_expert), ()):
            have = entry.cell
            shape = abs(math.log2(cell.n / have.n)) + abs(math.log2(cell.k / have.k))
            distance = (shape, abs(math.log2(cell.sms / have.sms)))
            if distance < best_distance:
                usable = [item for item in entry.tiles if hopper or not isinstance(item[0], HopperConfig)]
                if usable:
                    best, best_distance = (entry, *usable[0]), distance
        return best

    def merged(self, machine: Machine, entries: Iterable[Entry], ceilings: tuple[Ceiling, ...]) -> Table:
        """This table with the entries of a new run in place of its own for the same cells."""
        new = {entry.cell: entry for entry in entries}
        kept = [entry for entry in self.entries if entry.cell not in new]
        used = sorted({entry.machine for entry in kept})
        machines = (*(self.machines[number] for number in used), machine)
        renumbered = [Entry(entry.cell, entry.tiles, used.index(entry.machine)) for entry in kept]
        renumbered += [Entry(entry.cell, entry.tiles, len(used)) for entry in new.values()]
        order = {kind: place for place, kind in enumerate(TUNED)}
        renumbered.sort(key=lambda entry: (order[entry.cell.kind], *tuple(asdict(entry.cell).values())[1:]))
        return Table(machines, tuple(renumbered), ceilings)


@dataclass(frozen=True)
class Choice:
    """A product's tile and why; `time_ms`: what it took where it was measured, None by the rules of tuning.py."""

    tile: Tile
    reason: str
    time_ms: float | None = None


@dataclass(frozen=True)
class DecodeChoice:
    """The tile of the launch for few rows and why; None where up and down projection are two products."""

    tile: HopperDecodeConfig | None
    reason: str
    time_ms: float | None = None


def rows_bucket(num_rows: int, num_experts: int) -> int:
    """The end of the bucket of rows per expert that a product falls into."""
    return min(MAX_ROWS_PER_EXPERT, next_power_of_2(cdiv(num_rows, num_experts)))


@functools.lru_cache(maxsize=4096)
def choose_tile(
    kind: str,
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    shape: tuple[int, int] | None,
    device_name: str | None,
    sms: int,
    shared_bytes: int,
    hopper: bool,
) -> Choice:
    """The tile of a product of `kind` over `num_rows` rows of all experts, and why.

    shape: (N, K) of one expert's weights as the product takes them; without it, or without a device name, no table is
    asked. hopper: whether the kernels for Hopper can serve; below HOPPER_MIN_ROWS_PER_EXPERT they do not, whatever a
    table says, since it holds the device's times and not the host's.
    """
    few = hopper and num_rows < HOPPER_MIN_ROWS_PER_EXPERT * num_experts
    hopper = hopper and not few
    if shape is not None and device_name is not None:
        cell = Cell(kind, dtype.itemsize * 8, rows_bucket(num_rows, num_experts), *shape, sms)
        for path, table in tables(device_name):
            found = table.find(cell, hopper)
            if found:
                entry, tile, time_ms = found
                assert isinstance(tile, GemmConfig | HopperConfig)  # as `_entry` has seen to
                if few and isinstance(entry.tiles[0][0], HopperConfig):
                    break  # its plain tile was measured for those that Gluon cannot serve: at the end of the bucket
                return Choice(tile, _reason(path, entry.cell), time_ms)
    return Choice(gemm_config(kind, dtype, num_rows, num_experts, shared_bytes, hopper), "heuristic (no table entry)")


@functools.lru_cache(maxsize=4096)
def choose_decode(
    dtype: torch.dtype,
    num_rows: int,
    num_tokens: int,
    num_experts: int,
    input_dim: int,
    hidden_dim: int,
    device_name: str | None,
    sms: int,
) -> DecodeChoice:
    """Whether inference of `num_rows` rows of all experts goes by one launch, by which tile, and why.

    Below a row for each second expert no table is asked: its first bucket holds the times of more.
    """
    if device_name is not None and 2 * num_rows > num_experts:
        cell = Cell("decode", dtype.itemsize * 8, rows_bucket(num_rows, num_experts), hidden_dim, input_dim, sms)
        for path, table in tables(device_name):
            found = table.find(cell, True)
            if found:
                entry, tile, time_ms = found
                launch = tile if isinstance(tile, HopperDecodeConfig) else None
                return DecodeChoice(launch, _reason(path, entry.cell), time_ms)
    most = f"{HOPPER_DECODE_MOST_ROWS} rows an expert and {HOPPER_DECODE_MOST_TOKENS} tokens"
    by_rule = None
    if hopper_decode_serves(num_rows, num_tokens, num_experts):
        by_rule = hopper_decode_config(num_rows, num_tokens, num_experts, input_dim, hidden_dim)
    return DecodeChoice(by_rule, f"heuristic (no table entry): up to {most}")


def _reason(path: Path, have: Cell) -> str:
    return f"{path}: up to {have.rows_per_expert} rows an expert, {have.n} x {have.k}, {have.sms} SMs"


@functools.cache
def device_name(device: torch.device) -> str | None:
    """The GPU model that tables go by; None for a device that is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@functools.cache
def tables(device_name: str) -> tuple[tuple[Path, Table], ...]:
    """The tables for a GPU model with their files, the user's first; one that cannot be used is named in a warning."""
    found = []
    for path in (cache_path(device_name), shipped_path(device_name)):
        try:
            found.append((path, read_table(path, device_name)))
        except FileNotFoundError:
            continue
        except (TableError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning("tiles: %s is not used: %s; `moe-gpu tune` writes a new one", path, reason)
    return tuple(found)


def forget_tables() -> None:
    """Read the files again when a tile is next asked for."""
    tables.cache_clear()
    choose_tile.cache_clear()
    choose_decode.cache_clear()


def cache_path(device_name: str) -> Path:
    """The user's table for a GPU model."""
    return device_cache_path("tiles", device_name)


def shipped_path(device_name: str) -> Path:
    return Path(__file__).parent / "tiles" / device_file_name(device_name)


def read_table(path: Path, device_name: str) -> Table:
    """The table in a file; TableError for one of another GPU, of a newer format, or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except NotADirectoryError as error:
        raise FileNotFoundError(path) from error
    except ValueError as error:
        raise TableError(f"it is not JSON ({error})") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise TableError(f"its schema is {schema!r}, this version reads {SCHEMA}")
    try:
        machines = tuple(Machine(**machine) for machine in values["machines"])
        ceilings = tuple(Ceiling(**ceiling) for ceiling in values["ceilings"])
        entries = tuple(_entry(entry) for entry in values["entries"])
    except TableError:
        raise
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise TableError(f"it is damaged ({type(error).__name__}: {error})") from error
    foreign = {machine.device for machine in machines} - {device_name}
    if foreign or not machines:
        raise TableError(f"it is of {', '.join(sorted(foreign)) or 'no machine'}, not of {device_name}")
    if any(not 0 <= entry.machine < len(machines) for entry in entries):
        raise TableError("it is damaged (an entry of no machine)")
    return Table(machines, entries, ceilings)


def _entry(values: dict[str, Any]) -> Entry:
    values = dict(values)
    tiles = tuple(_tile(tile) for tile in values.pop("tiles"))
    machine = values.pop("machine")
    cell = Cell(**values)
    sizes = tuple(asdict(cell).values())[1:]
    if cell.kind not in TUNED or not all(_whole(size) and size > 0 for size in sizes) or not tiles:
        raise TableError(f"it is damaged (no such entry: {values})")
    if not _whole(machine):
        raise TableError(f"it is damaged (machine {machine!r})")
    for tile, _ in tiles:
        if isinstance(tile, HopperDecodeConfig | TwoProducts) != (cell.kind == "decode"):
            raise TableError(f"it is damaged ({cell.kind} by {path_of(tile)})")
    return Entry(cell, tiles, machine)


def _tile(values: dict[str, Any]) -> tuple[AnyTile, float]:
    values = dict(values)
    path, time_ms = values.pop("path"), values.pop("time_ms")
    if path not in PATHS or not isinstance(time_ms, (int, float)):
        raise TableError(f"it is damaged (path {path!r}, time {time_ms!r})")
    if isinstance(values.get("smaller_ms"), list):
        values["smaller_ms"] = tuple(values["smaller_ms"])
    tile = PATHS[path](**values)
    if isinstance(tile, GemmConfig) and not row_classes_fit(tile):
        raise TableError(f"it is damaged (smaller_ms={tile.smaller_ms!r} beside block_m={tile.block_m!r})")
    for field in fields(tile):
        if field.name == "smaller_ms":
            continue
        value = getattr(tile, field.name)
        power = field.name.startswith("block") or field.name.endswith(("num_warps", "fold"))
        right = isinstance(value, bool) if field.name == "claimed" else _whole(value) and value >= 0
        allowed: dict[str, tuple[int, ...]] = {"rows": (128, 192)}
        if isinstance(tile, HopperDecodeConfig):
            allowed = {"rows": (8, 16, 32, 64), "height": (64, 128) if tile.columns == tile.rows else (64,)}
        if not right or (power and value.bit_count() != 1) or value not in allowed.get(field.name, (value,)):
            raise TableError(f"it is damaged ({field.name}={value!r})")
    return tile, float(time_ms)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def path_of(tile: AnyTile) -> str:
    """`triton`, `hopper` and so on: what runs the tile."""
    return next(path for path, config in PATHS.items() if isinstance(tile, config))


def write_table(path: Path, table: Table) -> None:
    """Write a table whole or not at all, an entry a line."""
    lines = []
    for entry in table.entries:
        tiles = [{"path": path_of(tile), **asdict(tile), "time_ms": round(ms, 5)} for tile, ms in entry.tiles]
        lines.append(json.dumps({**asdict(entry.cell), "machine": entry.machine, "tiles": tiles}))
    head = {name: [asdict(row) for row in getattr(table, name)] for name in ("machines", "ceilings")}
    parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
    text = f'{{\n"schema": {SCHEMA},\n' + ",\n".join(parts) + ',\n"entries": [\n' + ",\n".join(lines) + "\n]\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
