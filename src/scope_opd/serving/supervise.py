"""The processes of ``scope launch``: servers until they are ready, then the ranks of the trainer, then all are ended.

- A server that dies before the trainer starts ends the launch. One that dies later is started again, up to ``restarts``
  times; meanwhile the trainer gets by as it does with any server that is down, and gives it the weights when it is
  back. Where no server of a kind is left, the trainer is asked to save and end.
- The first signal goes to rank 0 alone, which leads: it saves and ends, and the others with it. Servers stay until
  then. A second signal kills everything.
- Every process has a group and a guard of its own (``guarded``): what is killed outright leaves nothing behind.

Not covered: where processes run and what their commands are; restarting ranks (``scope launch --resume``).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import httpx

from scope_opd.errors import RunFailed
from scope_opd.serving.guarded import GuardedProcess
from scope_opd.serving.labelled import Logs
from scope_opd.serving.launch import Launch
from scope_opd.serving.process import ServerProcess, StopAsked
from scope_opd.serving.secrets import Secret

PERIOD_S = 0.2
"""How often processes are looked at."""
HEALTH_S = 5.0
"""What a server has to answer /health."""
OTHERS_S = 60.0
"""How long the other ranks have to end after one of them failed; they do so by themselves, within seconds."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server to be started.

    Attributes:
        kind: "sampler" or "teacher".
        label: its name in the log ("sampler 0").
        launch: its command.
        key: its key.
    """

    kind: str
    label: str
    launch: Launch
    key: Secret | None


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank of the trainer.

    Attributes:
        label: its name in the log ("rank 0").
        argv: its command.
        env: the whole of its environment.
    """

    label: str
    argv: tuple[str, ...]
    env: Mapping[str, str]


class _Served:
    """A server's process, and what became of those before it."""

    def __init__(self, server: Server, process: ServerProcess) -> None:
        self.server = server
        self.process: ServerProcess | None = process
        self.since = time.monotonic()
        self.ready = False
        self.deaths = 0


class Supervisor:
    """Starts, watches and stops the processes of one launch. Main thread only.

    Args:
        servers: all are started at once.
        ranks: of the trainer, by rank; started once every server is ready.
        logs: where output goes.
        hide: keys that no output shows.
        start_timeout_s: what a server has until it is ready.
        stop_timeout_s: what the trainer has to save and end once it is asked to.
        restarts: of each server.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        ranks: Sequence[Rank],
        logs: Logs,
        *,
        hide: Sequence[Secret] = (),
        start_timeout_s: float,
        stop_timeout_s: float,
        restarts: int,
    ) -> None:
        self._plan, self._ranks_plan, self._logs, self._hide = servers, ranks, logs, hide
        self._start_timeout_s, self._stop_timeout_s, self._restarts = start_timeout_s, stop_timeout_s, restarts
        self._servers: list[_Served] = []
        self._ranks: list[GuardedProcess] = []
        self._lost: RunFailed | None = None
        self._at_once = False

    def run(self, asked: StopAsked) -> int:
        """From the start of the servers to the end of everything.

        Args:
            asked: counts the user's signals.

        Returns:
            The trainer's exit code; where a signal came before there was a trainer, or a second one, 128 + its number.

        Raises:
            RunFailed: a server was not to be had.
        """
        try:
            with httpx.Client(trust_env=False, timeout=HEALTH_S) as client:
                for server in self._plan:
                    self._servers.append(_Served(server, self._start(server)))
                while not asked.count and not self._all_ready(client):
                    asked.wait(PERIOD_S)
                if asked.count:
                    self._logs.say("stopping")
                    return _code(asked)
                for rank in self._ranks_plan:
                    self._ranks.append(
                        GuardedProcess(
                            rank.argv, rank.env, log=self._logs.of(rank.label), hide=self._hide,
                            grace_s=self._stop_timeout_s, saves=True,
                        )
                    )  # fmt: skip
                return self._watch(client, asked)
        finally:
            self._stop(lambda: asked.count)

    # --- servers -----------------------------------------------------------------------------------------------------

    def _start(self, server: Server) -> ServerProcess:
        process = ServerProcess(
            server.launch, server.key, self._logs.of(server.label), hide=self._hide, name=server.label
        )
        self._logs.say(f"{server.label} starts at {server.launch.url} (process {process.pid})")
        return process

    def _all_ready(self, client: httpx.Client) -> bool:
        """Before the trainer: every server answers; one that will not ends the launch."""
        for served in self._servers:
            assert served.process is not None
            if error := self._death(served, client):
                raise error
        return all(served.ready for served in self._servers)

    def _death(self, served: _Served, client: httpx.Client) -> RunFailed | None:
        """Why a server is of no use any more; None for one that is ready, or may yet be."""
        process = served.process
        assert process is not None
        remedy = f"see {self._logs.path(served.server.label)}"
        if process.ended():
            return process.failure("while it served" if served.ready else "before it was ready", remedy)
        if not served.ready and process.healthy(client):
            served.ready = True
            took = time.monotonic() - served.since
            self._logs.say(f"{served.server.label} is ready after {took:.0f} s: {served.server.launch.model}")
        if not served.ready and time.monotonic() - served.since > self._start_timeout_s:
            return process.late(self._start_timeout_s, remedy)
        return None

    def _mend(self, client: httpx.Client) -> None:
        """While the trainer runs: servers that died are started again, as often as they may be."""
        for served in self._servers:
            if served.process is None or (error := self._death(served, client)) is None:
                continue
            served.process.kill()
            served.process, served.deaths, served.ready = None, served.deaths + 1, False
            label = served.server.label
            if served.deaths <= self._restarts:
                self._logs.say(f"{error.found}; started again ({served.deaths} of {self._restarts})")
                served.process, served.since = self._start(served.server), time.monotonic()
                continue
            self._logs.say(f"{error.found}; given up")
            if not any(other.process for other in self._servers if other.server.kind == served.server.kind):
                self._lost = RunFailed(
                    f"no {served.server.kind} server is left; the last: {error.found}", "at least one",
                    f"see {self._logs.path(label)}, then go on with --resume",
                )  # fmt: skip

    # --- ranks -------------------------------------------------------------------------------------------------------

    def _watch(self, client: httpx.Client, asked: StopAsked) -> int:
        """Until every rank has ended."""
        until: float | None = None  # when ranks that are to end are killed
        told = False
        while True:
            codes = [rank.exit_code() if rank.ended() else None for rank in self._ranks]
            if None not in codes:
                break
            now = time.monotonic()
            if asked.count > 1:
                self._logs.say("ended at once")
                self._at_once = True
                return _code(asked)
            if not told and (asked.count or self._lost):
                told, until = True, now + self._stop_timeout_s
                number = asked.first if asked.count and asked.first == signal.SIGINT else signal.SIGTERM
                more = "" if self._lost else "; a second signal ends everything at once"
                self._logs.say(f"the trainer saves and ends, for which it has {self._stop_timeout_s:g} s{more}")
                self._ranks[0].signal(number)
            if until is None and any(codes):
                until = now + OTHERS_S
            if until is not None and now > until:
                self._logs.say("ranks that have not ended in time are killed")
                for rank in self._ranks:
                    if not rank.ended():
                        rank.signal(signal.SIGKILL)
                until = now + OTHERS_S
            if not told:
                self._mend(client)
            asked.wait(PERIOD_S) if not asked.count else time.sleep(PERIOD_S)
        code = next((code for code in codes if code), 0)
        if self._lost is not None and code:
            raise self._lost
        return code

    def _stop(self, asked: Callable[[], int]) -> None:
        """Nothing stays: ranks, then all servers at once."""
        servers = [served.process for served in self._servers if served.process is not None]
        if self._at_once:
            for process in [*self._ranks, *servers]:
                process.kill()
            return
        before = asked()
        for rank in self._ranks:
            rank.stop(asked)
        for server in servers:
            server.ask_to_stop()
        for server in servers:
            if asked() > before:
                server.kill()
            else:
                server.stop(asked)


def _code(asked: StopAsked) -> int:
    return 128 + (asked.first or signal.SIGINT)
