"""The report's tables of rows that no chart shows: parts of a layer, slices, the expert cache and kernel tiles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from moe_gpu.plots.data import measured, short, speed_ratio, split_runs, tabulate_ablation, times
from moe_gpu.report.tables import Cell, number, row, table
from moe_gpu.results import ExpertCacheRow, Row, SliceRow, TileRow, select

BARE = "baseline"  # the variant of an ablation that has none of the parts


def parts(rows: Sequence[Row]) -> str:
    """Every variant of one layer with more or fewer of its parts, and its speed over the one that has none."""
    lines = []
    for facet, variants in tabulate_ablation(rows).items():
        bare = {
            tokens: one for series, line in variants.items() if series.provider == BARE for tokens, one in line.items()
        }
        for series, line in variants.items():
            for num_tokens, one in sorted(line.items()):
                ok, over = measured(one), bare.get(num_tokens)
                ratio = speed_ratio(one, over) if ok and over and measured(over) else None
                cells = [
                    Cell(series.provider),
                    Cell(facet.model, facet.shape),
                    Cell(facet.mode),
                    Cell(facet.routing),
                    Cell(facet.dtype),
                    number(num_tokens, f"{num_tokens:,}"),
                    Cell(series.launch),
                    number(one.p50_ms if ok else None),
                    number(ratio, None if ratio is None else times(ratio)),
                    Cell((one.backend or "") if ok else f"{one.status}: {one.reason}", look="wide"),
                ]
                lines.append(row(cells, "" if ok else "gap"))
    if not lines:
        return ""
    note = '"+" adds a part to those above it; "all but" leaves one out of all. Median times.'
    head = ["Variant", "Model", "Pass", "Routing", "Type", "#Tokens", "Launch", "#ms", f"#Speed over {BARE}"]
    return f'<p class="note">{escape(note)}</p>' + table([*head, "Served by, or why not measured"], lines)


def slice_tables(rows: Sequence[Row]) -> str:
    """A table of each kind of measurement of slices, graphs and streams, in the columns that hold anything."""
    found: dict[str, list[SliceRow]] = {}
    for one in select(rows, SliceRow):
        found.setdefault(one.table, []).append(one)
    return "".join(
        f"<h3>{escape(name)}</h3>{_full_columns(_SLICE_HEAD, map(_slice_cells, group))}"
        for name, group in found.items()
    )


_SLICE_HEAD = (
    "Arm",
    "What",
    "#Asked SMs",
    "#Got SMs",
    "#Background SMs",
    "#Samples",
    "#p50 ms",
    "#p99 ms",
    "#max ms",
    "#Value",
    "Unit",
    "Not measured because",
)


def _slice_cells(one: SliceRow) -> list[Cell]:
    counts = (one.asked_sms, one.got_sms, one.background_sms, one.samples)
    return [
        Cell(one.arm),
        Cell(one.what),
        *(number(count, None if count is None else str(count)) for count in counts),
        *map(number, (one.p50_ms, one.p99_ms, one.max_ms, one.value)),
        Cell(one.unit or ""),
        Cell("" if one.status == "ok" else f"{one.status}: {one.reason}", look="wide"),
    ]


_CACHE_HEAD = (
    "Policy",
    "#Tokens a step",
    "#Slots",
    "#Hit rate",
    "#Copies",
    "#Prefetched",
    "#Unused",
    "#Copied",
    "#p50 ms",
    "#p95 ms",
    "Output",
    "Not measured because",
)


def expert_cache(rows: Sequence[Row]) -> str:
    """What every policy of the expert cache did on each trace; simulated ones have no times."""
    found: dict[tuple[str, bool], list[ExpertCacheRow]] = {}
    for one in select(rows, ExpertCacheRow):
        found.setdefault((one.source, one.simulated), []).append(one)
    return "".join(
        f"<h3>{escape(source)}{', simulated' if simulated else ''}</h3>"
        f"{_full_columns(_CACHE_HEAD, map(_cache_cells, group))}"
        for (source, simulated), group in found.items()
    )


def _cache_cells(one: ExpertCacheRow) -> list[Cell]:
    rate, copied = one.hit_rate, one.bytes_copied
    exact = {True: "same bits", False: "other bits", None: ""}[one.bit_exact]
    return [
        Cell(one.policy, one.serving and f"{one.serving} serves at the end"),
        number(one.tokens_per_step, str(one.tokens_per_step)),
        number(one.slots_per_layer, f"{one.slots_per_layer} of {one.num_experts}"),
        number(rate, None if rate is None else f"{rate:.1%}"),
        *(
            number(count, None if count is None else f"{count:,}")
            for count in (one.copies, one.copies_prefetched, one.copies_wasted)
        ),
        number(copied, None if copied is None else f"{short(copied)}B"),
        *map(number, (one.p50_ms, one.p95_ms)),
        Cell(exact),
        Cell("" if one.status == "ok" else f"{one.status}: {one.reason}", look="wide"),
    ]


def tiles(rows: Sequence[Row]) -> str:
    """The fastest tile of each product, and how many were tried."""
    lines = []
    for run in split_runs(rows):
        found: dict[tuple[str, str], list[TileRow]] = {}
        for one in select(run.rows, TileRow):
            found.setdefault((one.kernel, one.problem), []).append(one)
        for (kernel, problem), group in found.items():
            best = min((one for one in group if one.time_ms), key=lambda one: one.time_ms or 0.0, default=None)
            failed = sum(one.time_ms is None for one in group)
            cells = [
                Cell(kernel),
                Cell(problem, run.device),
                number(best.time_ms if best else None),
                number(best.tflops if best else None),
                Cell(
                    _config(best.config) if best else next((one.error for one in group if one.error), ""), look="wide"
                ),
                number(len(group), str(len(group))),
                number(failed, str(failed)),
            ]
            lines.append(row(cells, "" if best else "gap"))
    if not lines:
        return ""
    note = "The fastest of the tiles tried for each product; the file has them all."
    head = ["Kernel", "Product", "#ms", "#TFLOP/s", "Fastest tile", "#Tried", "#Could not run"]
    return f'<p class="note">{note}</p>' + table(head, lines)


def _config(config: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in config.items())


def _full_columns(head: Sequence[str], cells: Iterable[list[Cell]]) -> str:
    """A table without the columns in which no row holds anything."""
    lines = list(cells)
    full = [index for index in range(len(head)) if any(_holds(line[index]) for line in lines)]
    return table([head[index] for index in full], [row(line[index] for index in full) for line in lines])


def _holds(cell: Cell) -> bool:
    return cell.value is not None if cell.numeric else bool(cell.text)
