"""`moe-gpu top`: arguments only, as in commands.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_gpu.cli.options import Json, above, count, interruptible


def top(
    pid: Annotated[int | None, count("--pid", "Process id of the job; by default the newest that runs.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="The file that moe_gpu.publish(path=...) writes.")
    ] = None,
    interval: Annotated[
        float, typer.Option("--interval", parser=above(0), metavar="S", help="Seconds between two readings.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print what there is now and end.")] = False,
    metrics_port: Annotated[
        int | None, count("--metrics-port", "Also serve Prometheus at 127.0.0.1 on this port; 0 takes a free one.", 0)
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch a running job: GPU, experts, slices, hits and energy.

    Jobs call moe_gpu.publish(model), or run as `moe-gpu train --publish`. With --json a line each interval, without a
    terminal. Exit status 1 where --once or --json find no job.
    """
    from moe_gpu.top import run_top

    with interruptible("nothing was written"):
        found = run_top(file=file, pid=pid, interval_s=interval, once=once, as_json=as_json, metrics_port=metrics_port)
    if not found:
        raise typer.Exit(1)
