"""A pool of judging processes that survives whatever an answer does to one of them.

A job goes to a worker (``scope_opd.verify.worker``) and comes back as a ``Verdict``. An answer that ends its process
(the CPU limit, the memory limit, a crash, a kill) has no verdict and says why; the others of its batch are judged
again elsewhere. Nothing here belongs to an event loop: results are ``concurrent.futures`` futures, and jobs may come
from any thread. Processes start when there are jobs for them, wait without cost, and end with ``close``, with the last
reference to the pool, at the interpreter's exit, and when this process dies in any other way.

Not covered: Windows (there is no fork), order of results (futures say which is which).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scope_opd
from scope_opd.errors import ScopeError
from scope_opd.gold import MathGold
from scope_opd.types import Verdict
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.worker import DEFAULT_JUDGE, encode_job, no_verdict

MAX_DEFAULT_WORKERS = 16
"""Workers at most where no number is given: judging is rarely what a run waits for."""
MAX_BATCH = 8
"""Jobs sent to a worker at once: enough to hide the pipe, few enough that a slow answer holds up few others."""
START_ATTEMPTS = 3
CLOSED = "the verifier is closed"
START_LIMIT_S = 120.0
"""Wall time for a worker to load math-verify, on a machine that does much else."""
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
"""What workers see of the environment, besides what they are given: no tokens, no keys."""


class _WorkerLost(Exception):
    """The worker as a whole is gone."""


@dataclass(slots=True)
class _Job:
    values: dict[str, Any]
    future: Future[Verdict] = field(default_factory=Future)
    running: bool = False

    def begin(self) -> bool:
        """Whether the job is still wanted."""
        self.running = self.running or self.future.set_running_or_notify_cancel()
        return self.running


class WorkerPool:
    """Judges in worker processes.

    Args:
        cpu_s: CPU seconds an answer at most.
        workers: processes at most; None: one for each core that this process may use, up to ``MAX_DEFAULT_WORKERS``.
        wall_s: wall seconds without an answer after which a worker counts as hung; None: ten times ``cpu_s`` and 10 s,
            so that a machine that is merely busy does not change verdicts.
        judge: ``MODULE:FUNCTION``, importable by the workers.

    Raises:
        ValueError: a limit or number that is not positive.
    """

    def __init__(
        self,
        *,
        cpu_s: float = 5.0,
        workers: int | None = None,
        wall_s: float | None = None,
        judge: str = DEFAULT_JUDGE,
    ) -> None:
        if not cpu_s > 0 or (workers is not None and workers < 1):
            raise ValueError(f"cpu_s = {cpu_s}, workers = {workers}; expected positive numbers")
        self.cpu_s = cpu_s
        self.workers = workers or min(usable_cores(), MAX_DEFAULT_WORKERS)
        self._settings = (cpu_s, 10 * cpu_s + 10 if wall_s is None else wall_s, judge, self.workers)
        self._adopt()

    def _adopt(self) -> None:
        """Take up work in this process: a pool that came over a fork has neither threads nor workers here."""
        self._process = os.getpid()
        self._state = _State(*self._settings)
        self._finalizer = weakref.finalize(self, self._state.close)

    def submit(self, prediction: str, gold: MathGold, problem: str | None, settings: MathSettings) -> Future[Verdict]:
        """Queue one answer.

        Returns:
            Its verdict to come. It raises ScopeError where no worker can be started.

        Raises:
            RuntimeError: the pool is closed.
        """
        if os.getpid() != self._process:
            self._finalizer.detach()
            self._adopt()
        return self._state.submit(_Job(encode_job(prediction, gold, problem, settings)))

    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return self._state.pids()

    def close(self) -> None:
        """End the workers; waiting jobs are cancelled. May be called twice, and from a fork, which owns none."""
        self._state.close()


class _State:
    """What the threads of a pool share. They hold no reference to the pool, so that it can be collected."""

    def __init__(self, cpu_s: float, wall_s: float, judge: str, size: int) -> None:
        self.cpu_s, self.wall_s, self.judge, self.size = cpu_s, wall_s, judge, size
        self.process = os.getpid()
        self.changed = threading.Condition()
        self.queue: deque[_Job] = deque()
        self.threads: set[threading.Thread] = set()
        self.running: set[_Worker] = set()
        self.free: set[threading.Thread] = set()
        """Threads that wait for jobs, or will when their worker is ready."""
        self.closed = False

    def submit(self, job: _Job) -> Future[Verdict]:
        with self.changed:
            if self.closed:
                raise RuntimeError(CLOSED)
            self.queue.append(job)
            if len(self.free) < len(self.queue) and len(self.threads) < self.size:
                # A worker is ended by the kernel with the thread that started it: each thread keeps its own.
                thread = threading.Thread(target=self._work, name="verifier", daemon=True)
                self.threads.add(thread)
                self.free.add(thread)
                thread.start()
            self.changed.notify()
        return job.future

    def pids(self) -> list[int]:
        with self.changed:
            return sorted(worker.process.pid for worker in self.running)

    def close(self) -> None:
        if os.getpid() != self.process:
            return
        with self.changed:
            self.closed = True
            waiting, threads = list(self.queue), list(self.threads)
            self.queue.clear()
            for worker in self.running:
                worker.kill()
            self.changed.notify_all()
        for job in waiting:
            if not job.future.cancel():
                job.future.set_exception(RuntimeError(CLOSED))
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def _work(self) -> None:
        worker: _Worker | None = None
        try:
            while True:
                # Started before a job is taken: one that can be judged elsewhere does not wait for it.
                if worker is None and (worker := self._start()) is None:
                    return
                if not (batch := self._take()):
                    return
                if worker.lost():
                    self._put_back(batch)
                    self._discard(worker)
                    worker = None
                    continue
                try:
                    self._put_back(worker.judge(batch))
                except _WorkerLost as loss:
                    self._discard(worker)
                    worker = None
                    waiting = [job for job in batch if not job.future.done()]
                    if waiting:
                        self._finish(waiting[0], no_verdict(str(loss)))
                    self._put_back(waiting[1:])
        finally:
            self._discard(worker)
            self._leave()

    def _leave(self) -> None:
        """The calling thread takes no more jobs."""
        with self.changed:
            self.threads.discard(threading.current_thread())
            self.free.discard(threading.current_thread())

    def _take(self) -> list[_Job]:
        """The next jobs, fairly shared; empty once the pool is closed."""
        while True:
            with self.changed:
                self.free.add(threading.current_thread())
                while not self.queue and not self.closed:
                    self.changed.wait()
                if self.closed:
                    return []
                self.free.discard(threading.current_thread())
                count = min(MAX_BATCH, -(-len(self.queue) // self.size))
                batch = [self.queue.popleft() for _ in range(count)]
            if batch := [job for job in batch if job.begin()]:
                return batch

    def _put_back(self, jobs: Sequence[_Job]) -> None:
        with self.changed:
            if not self.closed:
                self.queue.extendleft(reversed(jobs))
                self.changed.notify(len(jobs))
                return
        for job in jobs:
            job.future.set_exception(RuntimeError(CLOSED))

    def _finish(self, job: _Job, verdict: Verdict) -> None:
        if self.closed and verdict.correct is None:
            job.future.set_exception(RuntimeError(CLOSED))
        else:
            job.future.set_result(verdict)

    def _start(self) -> _Worker | None:
        """A worker that is ready. Where there can be none, those that run go on alone, or all that wait are told."""
        reason = ""
        for _ in range(START_ATTEMPTS):
            worker = None
            try:
                worker = _Worker(self)
                with self.changed:
                    self.running.add(worker)
                    if self.closed:
                        worker.kill()
                worker.wait_until_ready()
                return worker
            except (_StartFailed, _WorkerLost, OSError) as failure:
                self._discard(worker)
                reason = str(failure)
                if self.closed or isinstance(failure, _StartFailed):
                    break
        error = ScopeError(
            f"no verifier process could be started: {reason}",
            "a Python that can import math-verify",
            "install scope-opd with its dependencies, and check limits on processes and memory",
        )
        with self.changed:
            self._leave()
            if self.running and not self.closed:
                self.size = len(self.threads)
                return None
            waiting = list(self.queue)
            self.queue.clear()
        for job in waiting:
            if job.begin():
                job.future.set_exception(RuntimeError(CLOSED) if self.closed else error)
        return None

    def _discard(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.end()
            with self.changed:
                self.running.discard(worker)


class _StartFailed(Exception):
    """The worker said why it cannot work: trying again would not help."""


class _Worker:
    """One worker process and the pipes to it. Used by one thread; ``kill`` by any."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.batch = 0
        self.unread = b""
        command = [sys.executable, "-P", "-m", "scope_opd.verify.worker"]
        options = ["--judge", state.judge, "--cpu-s", repr(state.cpu_s), "--parent", str(os.getpid())]
        self.process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=worker_environment(),
            start_new_session=True,  # a Ctrl-C is the run's business; and kill() reaches the forked process too
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.jobs, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.jobs, False)
        os.set_blocking(self.replies, False)

    def wait_until_ready(self) -> None:
        message = self._receive(time.monotonic() + START_LIMIT_S, f"was not ready after {START_LIMIT_S:g} s")
        if "failed" in message:
            raise _StartFailed(message["failed"])

    def lost(self) -> bool:
        """Whether the process ended while it had nothing to do. Also clears what it said meanwhile."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.replies, 65536):
                del data
            return True
        self.unread = b""
        return False

    def judge(self, jobs: Sequence[_Job]) -> list[_Job]:
        """Judge a batch; returns jobs that are to be sent again because another of them ended the process.

        Raises:
            _WorkerLost: with the reason for the first job that has no result yet.
        """
        state = self.state
        self.batch += 1
        late = f"took more than {state.wall_s:g} s"
        line = json.dumps({"batch": self.batch, "jobs": [job.values for job in jobs]}).encode() + b"\n"
        self._send(line, time.monotonic() + state.wall_s, late)
        waiting = dict(enumerate(jobs))
        while True:
            message = self._receive(time.monotonic() + state.wall_s, late)
            if "job" in message and (job := waiting.pop(message["job"], None)):
                job.future.set_result(Verdict(*message["verdict"]))
            elif message.get("done") == self.batch:
                return list(waiting.values())
            elif "ended" in message:
                first = waiting.pop(min(waiting), None) if waiting else None
                if first is not None:
                    state._finish(first, no_verdict(describe_end(message["ended"], state.cpu_s)))
                return list(waiting.values())

    def _send(self, data: bytes, deadline: float, late: str) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self.jobs, view) :]
            except BlockingIOError:
                self._wait(self.jobs, select.POLLOUT, deadline, late)
            except BrokenPipeError:
                raise _WorkerLost(self._how_it_ended()) from None

    def _receive(self, deadline: float, late: str) -> dict[str, Any]:
        """The next message."""
        while True:
            while b"\n" in self.unread:
                line, _, self.unread = self.unread.partition(b"\n")
                with contextlib.suppress(ValueError):  # a line that a process did not live to finish
                    message = json.loads(line)
                    if isinstance(message, dict):
                        return message
            try:
                data = os.read(self.replies, 65536)
            except BlockingIOError:
                self._wait(self.replies, select.POLLIN, deadline, late)
                continue
            if not data:
                raise _WorkerLost(self._how_it_ended())
            self.unread += data

    def _wait(self, descriptor: int, event: int, deadline: float, late: str) -> None:
        poll = select.poll()  # select() knows only descriptors below 1024
        poll.register(descriptor, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _WorkerLost(late)

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its verifier process closed its pipe"
        return _ended(code)

    def kill(self) -> None:
        """End the process and what it forked, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill, reap, close."""
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def describe_end(status: int, cpu_s: float) -> str:
    """Why a judging process ended, from its wait status."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGPROF:
        return f"took more than {cpu_s:g} s of CPU time"
    return _ended(code)


def _ended(code: int) -> str:
    if code >= 0:
        return f"its verifier process ended with exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"its verifier process was ended by {name}"


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def worker_environment() -> dict[str, str]:
    """The environment of a worker: one thread, a fixed hash seed, this package, and no secrets."""
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    root = str(Path(scope_opd.__file__).resolve().parents[1])
    if Path(root).name not in ("site-packages", "dist-packages"):  # those must stay behind the standard library
        paths.append(root)
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    return environment | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
