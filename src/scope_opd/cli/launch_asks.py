"""What ``[launch]`` asks for, for commands that start nothing: ``scope plan`` and ``scope doctor``.

Both see the run as ``scope launch`` would start it: servers that the config names no addresses for are served ones.

Not covered: finding addresses and starting (``launch_plan``), servers that something else starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope_opd.config import Config, load_config, read_values
from scope_opd.errors import ConfigError, ScopeError
from scope_opd.words import counted

if TYPE_CHECKING:
    from scope_opd.cli.checks import Finding
    from scope_opd.cli.launch_plan import Completed
    from scope_opd.serving.layout import Group

PARTS = ("trainer", "samplers", "teachers")
GPUS = 1024
"""GPUs of the machine that a plan imagines: what matters is how many are taken, not how many are there."""
PORT = 20000
"""The first port of addresses that nobody asks."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a config asks ``scope launch`` for.

    Attributes:
        completed: see there.
        given: the overrides that the user gave.
        path: of the config.
        written: its [launch] as it is written.
    """

    completed: Completed
    given: tuple[str, ...]
    path: Path
    written: dict[str, Any]

    def config(self, samplers: int = 1, teachers: int = 1) -> Config:
        """As the trainer of a launch gets it, with so many addresses where the config names none."""
        from scope_opd.cli.launch_plan import KINDS, address_override

        counts, port = {"samplers": samplers, "teachers": teachers}, PORT
        more = [*self.given, *self.completed.more]
        for _, table, setting, _ in KINDS:
            if setting in self.completed.invented:
                more.append(address_override(table, range(port, port + counts[setting])))
                port += counts[setting]
        return load_config(self.path, more)


def asked_of(path: Path | None, given: Sequence[str]) -> Asked | None:
    """What is asked for; None where [launch] names no devices and nothing is to be colocated without an address.

    Raises:
        ConfigError: the config is wrong.
    """
    if path is None:
        return None
    from scope_opd.cli.launch_plan import complete

    values = read_values(path, given)
    written = values.get("launch", {})
    if not isinstance(written, dict):
        return None  # validation explains it
    rollout = values.get("rollout", {})
    colocated = isinstance(rollout, dict) and rollout.get("colocated") is True and not rollout.get("base_urls")
    if not colocated and not any(name in written for name in PARTS):
        return None
    return Asked(complete(path, given), tuple(given), path, written)


def planned(path: Path, given: Sequence[str], gpus: int | None) -> tuple[Config, int, list[str]]:
    """The config of a run, and how many ranks train.

    Args:
        path: of the config.
        given: its overrides.
        gpus: ``--gpus``, None where it was not given.

    Returns:
        The config with an address for each server, the ranks, lines worth showing.

    Raises:
        ConfigError: the config is wrong, it cannot be launched on any machine, or ``gpus`` says otherwise.
    """
    from scope_opd.cli.launch_plan import Machine, lay_out

    asked = asked_of(path, given)
    if asked is None:
        config = load_config(path, given)
        ray = read_values(path, given).get("launch", {}).get("ray", {})
        return config, gpus or (config.launch.ray.workers if "workers" in ray else 1), []
    config = asked.completed.config
    own, lines = _count(config.launch.trainer), list[str]()
    if own is not None and gpus not in (None, own):
        raise ConfigError(
            f"--gpus {gpus} and launch.trainer = {config.launch.trainer}", "the same number of GPUs that train",
            "leave --gpus out, or change launch.trainer",
        )  # fmt: skip
    ranks = own if own is not None else gpus or 1
    if own is None and gpus is None:
        lines.append("launch.trainer is left out, which is every GPU that servers leave: planned with 1, see --gpus")
    launch = config.launch.model_copy(update={} if own is not None else {"trainer": ranks})
    named = any(isinstance(getattr(launch, part), list) for part in PARTS)
    machine = Machine(tuple(map(str, range(GPUS))), 1, {})
    layout = lay_out(
        config.model_copy(update={"launch": launch}), machine, asked.completed.invented,
        on_cpu=config.train.device == "cpu" and not named,
    )  # fmt: skip
    return asked.config(len(layout.samplers), len(layout.teachers)), ranks, lines


def findings(asked: Asked) -> Iterator[Finding]:
    """Whether this machine has what is asked for."""
    import os

    import torch

    from scope_opd.cli.checks import Finding
    from scope_opd.cli.launch_plan import Machine, lay_out, visible_gpus
    from scope_opd.cli.serve_command import interpreter, usable_cores

    config = asked.completed.config
    cores = usable_cores()
    try:
        on_cpu = interpreter(config, False)[1] if asked.completed.serves else True
        names = visible_gpus(torch.cuda.device_count() if torch.cuda.is_available() else 0, os.environ)
        if config.train.device == "cpu" and on_cpu:
            names = ()
        machine = Machine(names, cores, dict(os.environ))
        layout = lay_out(config, machine, asked.completed.invented, on_cpu=on_cpu)
    except ScopeError as error:
        found = error.found + (f"; expected {error.expected}" if error.expected else "")
        yield Finding("launch", "FAIL", found, error.remedy)
        return
    parts = dict(zip(PARTS, (layout.trainer, layout.samplers, layout.teachers), strict=True))
    shown = ", ".join(_devices(name, groups, names) for name, groups in parts.items() if groups)
    on_cores = sum(not group for groups in parts.values() for group in groups)
    if on_cores > cores:
        found = f"{shown}: {on_cores} processes on {counted(cores, 'core')}"
        yield Finding("launch", "warn", found, "expect them to be slow, or lower [launch]'s numbers")
    else:
        yield Finding("launch", "ok", shown)


def without(config: Config, to_start: frozenset[str]) -> Config:
    """The config without servers that are still to be started.

    Args:
        config: with their addresses.
        to_start: ``Completed.invented``.
    """
    gone = {table for part, table in (("samplers", "rollout"), ("teachers", "teacher")) if part in to_start}
    return config.model_copy(
        update={table: getattr(config, table).model_copy(update={"base_urls": []}) for table in gone}
    )


def _devices(name: str, groups: Sequence[Group], names: Sequence[str]) -> str:
    """ "samplers on GPU 2, 3", "2 teachers on the CPU" """
    gpus = [names[gpu] for group in groups for gpu in group]
    kind = "rank" if name == "trainer" else name.removesuffix("s")
    return f"{name} on GPU {', '.join(gpus)}" if gpus else f"{counted(len(groups), kind)} on the CPU"


def _count(devices: int | Sequence[int] | None) -> int | None:
    return devices if devices is None or isinstance(devices, int) else len(devices)
