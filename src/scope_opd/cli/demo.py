"""``scope demo``: SCOPE and its rivals on the embedded task, side by side from the same start, and a report.

Every training and evaluation is a job; up to two worker processes with one torch thread each take jobs from a list.
Jobs tell of themselves through their run folders, which is also where progress is read from.

Not covered: other tasks (``scope train``), tuning of any method: all share one config.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from scope_opd.errors import RunFailed, RunFolderError

if TYPE_CHECKING:
    from scope_opd.cli.demo_jobs import Job

METHODS = ("scope", "dual_path", "opd", "grpo")
MARKER = ".demo"
"""Names what a demo makes in its folder, one a line: that and nothing else may a later demo remove."""
SUMMARY, REPORT = "summary.json", "report.html"
QUICK = {"steps": 5, "problems": 20, "samples": 8}

EXAMPLES = """Examples:
  scope demo
  scope demo --out /tmp/demo --seeds 6
  scope demo --quick
  scope demo --method scope --method opd --set objective.distill=full_kl --out runs/exact
"""


def demo(
    *,
    out: Path = Path("runs/demo"),
    seeds: int = 3,
    steps: int | None = None,
    quick: Annotated[bool, Parameter(negative="")] = False,
    methods: Annotated[list[str] | None, Parameter(name="--method", negative="")] = None,
    overrides: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
) -> int:
    """Train SCOPE and its rivals on the embedded task and write a report (about 3 minutes on 2 cores).

    A student of 86k parameters learns the running sum modulo 23 from a
    teacher of 0.5M by scope, dual_path, opd and grpo, from the same start
    and with equal rollouts. Start, teacher and results are evaluated on 200
    held-out problems. Leaves run folders, report.html and summary.json.

    Parameters
    ----------
    out
        Where everything goes. What a former demo made there is replaced; a folder
        with anything else in it is refused.
    seeds
        Trainings of each method: seeds 0, 1 ...
    steps
        Optimiser steps of each training, in place of the config's 50.
    quick
        A few steps and problems: shows that it runs, says nothing about the methods.
    methods
        In place of the four; may be repeated.
    overrides
        TABLE.KEY=VALUE for all methods alike; may be repeated.
    """
    from scope_opd.cli.demo_jobs import build_jobs, demo_config, print_table, summarise_demo
    from scope_opd.cli.inputs import build_configured_method
    from scope_opd.errors import ConfigError

    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}", "at least 1", "leave it out for 3")
    given = list(overrides or [])
    if quick:
        given = [
            f"train.steps={QUICK['steps']}",
            f"eval.problems={QUICK['problems']}",
            f"eval.n={QUICK['samples']}",
            *given,
        ]
    if steps is not None:
        given.append(f"train.steps={steps}")
    base = demo_config(given)
    chosen = tuple(dict.fromkeys(methods or METHODS))
    for name in chosen:
        build_configured_method(demo_config([*given, f"objective.method={name}"]))  # a typo costs no training
    out = out.expanduser()
    jobs = build_jobs(base, out, chosen, seeds)
    prepare_folder(out, [*(job.folder.name for job in jobs), "logs", REPORT, SUMMARY])
    begin = time.perf_counter()
    workers = max(1, min(2, _cores(), len(jobs)))
    print(f"{len(jobs)} jobs on {workers} process{'es' * (workers > 1)}, into {out}", flush=True)
    run_jobs(jobs, workers)
    seconds = time.perf_counter() - begin

    from scope_opd.report import build_report

    report = out / REPORT
    build_report([job.folder for job in jobs], report)
    summary = summarise_demo(base, jobs, seconds=seconds, workers=workers)
    (out / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    print_table(summary)
    print(f"summary: {out / SUMMARY}\nreport:  {report.absolute()}")
    return 0


def prepare_folder(out: Path, names: Sequence[str]) -> None:
    """A folder at ``out`` with nothing in it but the list of what this demo will make there.

    What a former demo's list names is removed. Where anything else is found, nothing is.

    Args:
        out: the folder.
        names: what this demo will make in it.

    Raises:
        RunFolderError: a file, files that no demo made, or no right to write.
    """
    try:
        if out.is_file():
            raise RunFolderError(f"{out} is a file", "a folder", "choose another --out")
        present = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
        former = set((out / MARKER).read_text(encoding="utf-8").splitlines()) if MARKER in present else set()
        others = sorted(present - former - {MARKER})
        if others:
            raise RunFolderError(
                f"{out} is not empty: no demo made {others[0]}", "a new or empty folder, or a former demo's alone",
                "choose another --out",
            )  # fmt: skip
        for name in sorted(present & former - {MARKER}):
            entry = out / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    except UnicodeDecodeError:
        raise RunFolderError(f"{out / MARKER} is no demo's list", "UTF-8 text", "choose another --out") from None
    except OSError as error:
        raise RunFolderError(
            f"{out}: {error.strerror}", "a folder that can be written", "choose another --out"
        ) from None


def run_jobs(jobs: Sequence[Job], workers: int) -> None:
    """Run all jobs, longest first as listed, showing how far each is.

    Raises:
        RunFailed: of the first job that failed; the others are ended.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from scope_opd.cli.demo_jobs import begin_worker, run_job

    context = multiprocessing.get_context("spawn")
    with _environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MKL_NUM_THREADS="1"):
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker)
        try:
            _watch(jobs, [pool.submit(run_job, job) for job in jobs])
        except BaseException as error:
            processes = list((pool._processes or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            if isinstance(error, BrokenExecutor):  # of submit: no job has begun
                raise RunFailed("a worker process died at its start", "workers that live", "try scope doctor") from None
            raise
        pool.shutdown()


def _watch(jobs: Sequence[Job], futures: Sequence[Future[str | None]]) -> None:
    """Show progress until all are done or one has failed: bars on a terminal, else a line when a job ends.

    Raises:
        RunFailed: as soon as a job has failed, with that job's own line.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    live = console.is_terminal
    bars = Progress(
        TextColumn("{task.description:<14}"), BarColumn(bar_width=30), TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(), console=console, disable=not live,
    )  # fmt: skip
    begin = time.perf_counter()
    said: set[str] = set()
    with bars:
        tasks = {job.name: bars.add_task(job.name, total=1.0, state="waits", start=False) for job in jobs}
        while True:
            # Looked at once a round, and the finished first: a job that fails meanwhile is met in the next round.
            ended = [future.done() for future in futures]
            failures = {
                job.name: line
                for job, future, over in zip(jobs, futures, ended, strict=True)
                if over and (line := _failure(future)) is not None
            }
            for job, future, over in zip(jobs, futures, ended, strict=True):
                share, state = job.progress()
                if over:
                    share, state = (share, "failed") if job.name in failures else (1.0, "done")
                elif future.running() and state == "waits":
                    state = "starts"
                if state != "waits" and not bars.tasks[tasks[job.name]].started:
                    bars.start_task(tasks[job.name])
                bars.update(tasks[job.name], completed=share, state=state)
                if over and job.name not in said and state == "done":
                    said.add(job.name)
                    bars.stop_task(tasks[job.name])
                    if not live:
                        took = time.perf_counter() - begin
                        print(f"[{took:5.0f} s] {job.name} done ({len(said)}/{len(jobs)})", flush=True)
            for job in jobs:
                if job.name in failures:
                    if not live:
                        print(f"[{time.perf_counter() - begin:5.0f} s] {job.name} failed", flush=True)
                    raise RunFailed(f"{job.name}: {failures[job.name]}", remedy=f"see {job.log}")
            if all(ended):
                return
            time.sleep(0.25)


def _failure(future: Future[str | None]) -> str | None:
    """Why a finished job failed, None if it did not."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenExecutor):
        return "its worker process died (killed, or short of memory)"
    return f"{type(error).__name__}: {error}"


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for the processes started inside; they must be set before torch is imported there."""
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
