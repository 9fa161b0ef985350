"""`moe-gpu top`: the figures that running jobs publish, as a dashboard (`app.py`), as text or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from moe_gpu.extras import require
from moe_gpu.live.figures import summary
from moe_gpu.live.gpu import Meter, read_gpu
from moe_gpu.live.status import GpuReading, JobStatus, StatusError, choose_job, find_jobs, live_directory, read_status
from moe_gpu.nvml import Device, NvmlUnavailableError


@dataclass(frozen=True)
class View:
    """What there is to show: the chosen job, how many others there are, and the first GPU where no job has one."""

    job: JobStatus | None
    jobs: list[JobStatus]
    gpu: GpuReading | None
    gpu_reason: str | None
    remarks: list[str]


class Source:
    """Where the figures come from: one file, or the folder in which this user's jobs publish; `pid` picks one.

    A job that was chosen stays so after its end. Raises StatusError for a file or pid that is not there at first.
    """

    def __init__(self, file: str | Path | None = None, pid: int | None = None) -> None:
        if file is not None and pid is not None:
            raise ValueError(f"--file {file} and --pid {pid} both name a job; give one of them")
        self.file, self.pid = file, pid
        self._meter: Meter | None = None
        self._meter_reason: str | None = None
        self._last: JobStatus | None = None
        self.read()

    def choose(self, job: JobStatus) -> None:
        """Look at this job from now on."""
        self.pid, self._last = job.pid, job

    def read(self) -> View:
        """The figures of now; where the chosen job's file has gone, those that it left."""
        if self.file is not None:
            jobs, remarks = self._read_file(self.file)
        else:
            jobs, remarks = find_jobs()
        try:
            self._last = choose_job(jobs, self.pid) or self._last
        except StatusError:
            if self._last is None:
                raise
        job = self._last
        if job is not None and job.gpu is not None:
            return View(job, jobs, job.gpu, None, remarks)
        if job is not None:  # its GPU is not this machine's first
            return View(job, jobs, None, job.gpu_reason, remarks)
        gpu, reason = self._read_gpu()
        return View(None, jobs, gpu, reason, remarks)

    def _read_file(self, file: str | Path) -> tuple[list[JobStatus], list[str]]:
        try:
            return [read_status(file)], []
        except StatusError as error:
            if self._last is None:
                raise
            return [self._last], [str(error)]

    def _read_gpu(self) -> tuple[GpuReading | None, str | None]:
        if self._meter is None and self._meter_reason is None:
            try:
                self._meter = Device()
            except NvmlUnavailableError as error:
                self._meter_reason = str(error)
        return (None if self._meter is None else read_gpu(self._meter)), self._meter_reason


def run_top(
    *,
    file: str | Path | None = None,
    pid: int | None = None,
    interval_s: float = 1.0,
    once: bool = False,
    as_json: bool = False,
    metrics_port: int | None = None,
) -> bool:
    """Show a job until q or Ctrl-C; `once` prints it and ends, `as_json` prints lines. False where there is no job.

    metrics_port: also serve its figures for Prometheus at 127.0.0.1, meanwhile; 0 takes a free port.
    Raises StatusError for a file or pid without a job, MissingExtraError for the dashboard without textual.
    """
    if once and metrics_port is not None:
        raise ValueError(f"--once ends at once and --metrics-port {metrics_port} serves; leave out one of them")
    source = Source(file, pid)
    with nullcontext() if metrics_port is None else _served(source, metrics_port):
        return _show(source, interval_s, once, as_json)


@contextmanager
def _served(source: Source, port: int) -> Iterator[None]:
    from moe_gpu.metrics import JobCollector, MetricsServer

    server = MetricsServer([JobCollector(lambda: source.read().job)], port)
    print(f"metrics: {server.url}", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        server.close()


def _show(source: Source, interval_s: float, once: bool, as_json: bool) -> bool:
    if as_json:
        found = False
        for view in _views(source, interval_s, once):
            if view.job is not None:
                found = True
                print(json.dumps(summary(view.job)), flush=True)
        if not found:
            print(f"moe-gpu: {no_job()}", file=sys.stderr)
        return found
    if once:
        from rich.console import Console

        from moe_gpu.top.view import render

        view = source.read()
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
        console.print(render(view, console.width))
        return view.job is not None
    require("textual", "live", "the dashboard needs")
    from moe_gpu.top.app import TopApp

    TopApp(source, interval_s).run()
    return True


def _views(source: Source, interval_s: float, once: bool) -> Iterator[View]:
    while True:
        yield source.read()
        if once:
            return
        time.sleep(interval_s)


def no_job() -> str:
    """What to say where no job publishes."""
    return f"no job publishes in {live_directory()}: call moe_gpu.publish(model) in it, or `moe-gpu train --publish`"
