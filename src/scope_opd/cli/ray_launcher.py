"""``scope train --launcher ray``: the function that each rank runs, under Ray Train's TorchTrainer.

The driver waits, passes a Ctrl-C on, and says how the run ended. What the ranks compute, save and write is what they do
under every other launcher: Ray gets neither metrics nor checkpoints from them. When a worker dies, Ray ends the others
and starts the group anew; rank 0 then goes on from the newest sound checkpoint of the run folder, which all nodes must
see at the same path. A mistake of the user (a ``ScopeError``) ends the run at once, since it would come again.

Secrets: the settings that travel name environment variables and files, never what they hold; each worker reads those
of its own node. Nothing is put into Ray's job config or runtime environment.

Not covered: starting a cluster other than a local one, another number of workers while a run goes on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from scope_opd.cli.ray_worker import POLL_S, Desk, one_rank
from scope_opd.errors import ConfigError, RunFailed, ScopeError
from scope_opd.words import counted

if TYPE_CHECKING:
    from scope_opd.config import Config

LOCAL_OBJECTS = 2**27
"""Bytes of a local cluster's object store: no tensor of ours goes through it."""


def train_under_ray(
    settings: Config, *, resume: bool = False, allow_config_change: bool = False, address: str | None = None
) -> int:
    """Run ``train_rank`` on every worker of a group, and start the group again when one of them dies.

    Args:
        settings: the run; ``launch.ray`` says what each worker gets.
        resume, allow_config_change: as for ``scope train``.
        address: of a cluster ("auto": the one that this machine belongs to); None starts one here and ends it after.

    Raises:
        ConfigError: no Ray, no cluster at the address, or a local one that is too small.
        RunFailed: more deaths than ``launch.ray.max_failures``, or no worker within ``launch.ray.start_timeout_s``.
        ScopeError: whatever a rank ended with, with its exit code.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths of the config are the driver's
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else each line is there twice
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(settings.launch.ray.start_timeout_s))
    try:
        import ray
        import ray.train.torch
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--launcher ray, and {error.name} is not installed", "Ray", "pip install 'scope-opd[ray]'"
        ) from None
    with _cluster(address) as have:
        each = _resources(settings, have)
        if address is None:
            _refuse_too_small(settings, each, have)
        folder = Path(settings.run.dir).absolute()
        own = folder.parent / f".{folder.name}.ray-{secrets.token_hex(4)}"  # Ray Train wants a folder on shared storage
        here = ray.get_runtime_context().get_node_id()
        desk: Any = ray.remote(Desk).options(num_cpus=0, label_selector={"ray.io/node-id": here}).remote()
        try:
            with _signals() as received:
                fit = _Fit(settings, {"resume": resume, "allow_config_change": allow_config_change}, each, desk, own)
                failure, begun = _watch(fit, desk, received, settings, each)
            ended = ray.get(desk.outcome.remote())
        finally:
            shutil.rmtree(own, ignore_errors=True)
    if failure is not None:
        raise RunFailed(
            f"{_line(failure)}, after {counted(begun, 'start')} of the workers",
            f"no more deaths than launch.ray.max_failures = {settings.launch.ray.max_failures}",
            f"see the lines above; continue {settings.run.dir} with --resume",
        )
    if ended is None:
        raise RunFailed("the workers ended without a word", "rank 0's last line", "see Ray's logs")
    code, lines = ended
    if code:
        ending = ScopeError(lines[0])
        ending.exit_code = code
        raise ending
    print("\n".join(lines))
    return 0


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[dict[str, float]]:
    """A connection to a cluster, or a cluster; gives its resources."""
    import ray

    if address not in (None, "auto"):
        _knock(address)
    # What the ranks print comes by the desk; Ray's own lines are many, and stay in its log folder.
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": LOCAL_OBJECTS}
    try:
        ray.init(address=address or "local", **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"--address {address}: {_line(error)}" if address else f"a local Ray did not start: {_line(error)}",
            "the address of a running cluster, or 'auto' on one of its machines",
            "start it with `ray start --head`; without --address a local one is started for the run",
        ) from None
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ray itself tries for minutes to reach a cluster that is not there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"--address {address}: {getattr(error, 'strerror', None) or error}",
            "HOST:PORT of a cluster's head (6379 unless set), or 'auto' on one of its machines",
            "start it with `ray start --head`; from elsewhere `ray job submit` this command with --address auto",
        ) from None


def _resources(settings: Config, have: dict[str, float]) -> dict[str, float]:
    """What one worker takes, by Ray's names."""
    wanted = settings.launch.ray
    gpus: int | None = wanted.gpus_per_worker
    if gpus is None:
        gpus = int(settings.train.device != "cpu" and have.get("GPU", 0) > 0)
    return {"CPU": wanted.cpus_per_worker, **({"GPU": gpus} if gpus else {}), **wanted.resources}


def _refuse_too_small(settings: Config, each: dict[str, float], have: dict[str, float]) -> None:
    workers = settings.launch.ray.workers
    for name, amount in each.items():
        if workers * amount > have.get(name, 0):
            raise ConfigError(
                f"launch.ray: {workers} workers x {amount:g} {name}, and this machine has {have.get(name, 0):g}",
                "no more than there is",
                "lower launch.ray.workers or what each takes, or name a larger cluster with --address",
            )


class _Fit(threading.Thread):
    """TorchTrainer.fit, apart: in the main thread it would turn Ctrl-C into the end of all workers, unsaved."""

    def __init__(
        self, settings: Config, options: dict[str, bool], each: dict[str, float], desk: Any, own: Path
    ) -> None:
        super().__init__(name="ray-train", daemon=True)
        self.failure: BaseException | None = None
        self._settings, self._options, self._each, self._desk, self._own = settings, options, each, desk, own

    def run(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        wanted = self._settings.launch.ray
        values, options, desk = self._settings.model_dump(mode="json"), self._options, self._desk
        where = str(Path.cwd())

        def rank() -> None:  # a closure: what it holds travels with it, and is in no config that Ray shows or logs
            one_rank(values, options, desk, where)

        try:
            TorchTrainer(
                rank,
                torch_config=TorchConfig(
                    "cpu:gloo,cuda:nccl" if "GPU" in self._each else "cpu:gloo",
                    timeout_s=max(1, int(self._settings.train.collective_timeout_s)),
                ),
                scaling_config=ScalingConfig(
                    num_workers=wanted.workers,
                    use_gpu="GPU" in self._each,
                    resources_per_worker=self._each,
                    placement_strategy=wanted.placement.upper(),
                ),
                run_config=RunConfig(
                    name="state",
                    storage_path=str(self._own),
                    failure_config=FailureConfig(max_failures=wanted.max_failures),
                ),
            ).fit()
        except BaseException as error:
            self.failure = error


def _watch(
    fit: _Fit, desk: Any, received: list[int], settings: Config, each: dict[str, float]
) -> tuple[BaseException | None, int]:
    """Wait for the end, showing what the ranks print; pass the first signal on; give up where no worker ever starts.

    Returns:
        What Ray Train ended with, None where every worker ended by itself; and how often they were started.
    """
    import ray

    wanted = settings.launch.ray
    until = time.monotonic() + wanted.start_timeout_s
    begun, passed_on, over = 0, False, False
    fit.start()
    while not over:
        fit.join(POLL_S)
        over = not fit.is_alive()
        before = begun
        begun, said = ray.get(desk.news.remote())
        for rank, line in said:
            _say(line if rank == 0 else f"[rank {rank}] {line}")
        if begun > max(before, 1):
            _say(f"a worker failed: all start again from the last checkpoint (start {begun})")
        if received and not passed_on:
            passed_on = True
            _say(f"{signal.Signals(received[0]).name}: the run saves and stops (a second one ends it at once)")
            ray.get(desk.stop.remote(received[0]))
            if not begun:
                raise KeyboardInterrupt
        if not begun and time.monotonic() > until:
            has = ", ".join(f"{ray.cluster_resources().get(name, 0):g} {name}" for name in each)
            needs = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
            raise RunFailed(
                f"the cluster has started no worker within {wanted.start_timeout_s:g} s (it has {has})",
                f"{wanted.workers} x ({needs})",
                "add nodes, lower launch.ray.workers or what each takes, or raise launch.ray.start_timeout_s",
            )
    return fit.failure, begun


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted; a second one ends this process, and with it the workers, on the spot."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _line(error: BaseException) -> str:
    """What went wrong, from an error of Ray's: of the first worker's, what it died of or its own error."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        said = [line.strip() for line in str(failure).splitlines() if line.strip()] or [type(failure).__name__]
        died = next((line for line in said if "died" in line or "is dead" in line), None)
        return f"rank {rank}: {died or said[-1]}"[:300].rstrip(".")
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
