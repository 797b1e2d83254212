"""Which GPUs of one machine the ranks and the servers of a run get, from what ``[launch]`` says. Pure.

Not covered: how many GPUs there are (the caller says), whether models fit them (``scope plan``), several machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from scope_opd.errors import ConfigError
from scope_opd.words import counted

Group: TypeAlias = tuple[int, ...]
"""The GPUs of one process, counted among those that are visible; none for a process that computes on the CPU."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a config asks for one kind of process.

    Attributes:
        name: of the setting, "trainer", "samplers" or "teachers".
        devices: how many GPUs, which, or None; on a CPU how many processes.
        each: devices that one process has.
        addresses: servers that ``base_urls`` name on this machine.
        on_gpu: whether they compute on GPUs.
    """

    name: str
    devices: int | Sequence[int] | None = None
    each: int = 1
    addresses: int = 0
    on_gpu: bool = True

    @property
    def shown(self) -> str:
        devices = self.devices if self.devices is None or isinstance(self.devices, int) else [*self.devices]
        return f"launch.{self.name} = {devices}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The devices of every process, in the order of ranks and of addresses."""

    trainer: tuple[Group, ...]
    samplers: tuple[Group, ...]
    teachers: tuple[Group, ...]

    @property
    def processes(self) -> int:
        return len(self.trainer) + len(self.samplers) + len(self.teachers)


def assign(trainer: Part, samplers: Part, teachers: Part, *, gpus: int, colocated: bool = False) -> Layout:
    """Give every process its GPUs: each GPU once, but for samplers that share the trainer's where they are colocated.

    GPUs that are named are given as they are named, the others in ascending order: first to the trainer, then to
    samplers, then to teachers. Those of one server are neighbours.

    Args:
        trainer, samplers, teachers: what is asked for.
        gpus: how many are visible.
        colocated: samplers are on GPUs of the trainer.

    Raises:
        ConfigError: it cannot be done.
    """
    for part in (trainer, samplers, teachers):
        _check(part, gpus)
    if colocated and samplers.on_gpu != trainer.on_gpu:
        where = {True: "GPUs", False: "the CPU"}
        raise ConfigError(
            f"rollout.colocated with a trainer on {where[trainer.on_gpu]} and samplers on {where[samplers.on_gpu]}",
            "both on GPUs", "change train.device, serving.python or rollout.colocated",
        )  # fmt: skip
    _check_named(trainer, samplers, teachers, colocated)
    own = [trainer, teachers] if colocated else [trainer, samplers, teachers]
    pool = sorted({*range(gpus)} - {gpu for part in own for gpu in _named(part)})
    ranks = _ranks(trainer, own, pool)
    given = {trainer.name: ranks}
    pool = [gpu for gpu in pool if gpu not in {gpu for group in ranks for gpu in group}]
    for part in own[1:]:
        given[part.name] = _servers(part, pool)
    if colocated:
        given[samplers.name] = _share(samplers, ranks)
    return Layout(given[trainer.name], given[samplers.name], given[teachers.name])


def _check(part: Part, gpus: int) -> None:
    """What is wrong with a part taken by itself."""
    count = _count(part)
    if not part.on_gpu and not (part.devices is None or isinstance(part.devices, int)):
        raise ConfigError(f"{part.shown} names GPUs and they compute on the CPU", "a number", "say how many")
    if part.name == "trainer" and count == 0:
        raise ConfigError(part.shown, "at least one", "leave it out for all that servers leave")
    named = _named(part)
    if len({*named}) < len(named):
        twice = next(gpu for gpu in named if named.count(gpu) > 1)
        raise ConfigError(f"{part.shown} names GPU {twice} twice", "each GPU once", "remove one")
    beyond = [gpu for gpu in named if gpu >= gpus]
    if beyond:
        seen = f"0 to {gpus - 1}" if gpus else "none"
        raise ConfigError(
            f"{part.shown}: GPU {beyond[0]} is not visible", f"GPUs of this machine ({seen})", "change it"
        )
    if count is not None and count % part.each:
        raise ConfigError(
            f"{part.shown} with a tensor_parallel_size of {part.each}", f"a multiple of {part.each}",
            "change one of them",
        )  # fmt: skip
    if part.addresses and count not in (None, 0, part.addresses * part.each):
        table = "rollout" if part.name == "samplers" else "teacher"
        raise ConfigError(
            f"{part.shown} and {table}.base_urls names {counted(part.addresses, 'server')} of this machine",
            f"{part.addresses * part.each}, {part.each} for each",
            f"leave launch.{part.name} out, or remove {table}.base_urls: free ports are found then",
        )


def _check_named(trainer: Part, samplers: Part, teachers: Part, colocated: bool) -> None:
    """What is wrong between the parts that name their GPUs."""
    for one, other in ((trainer, samplers), (trainer, teachers), (samplers, teachers)):
        both = sorted({*_named(one)} & {*_named(other)})
        if both and not (colocated and other is samplers):
            remedy = "give each its own" + (", or set rollout.colocated" if other is samplers else "")
            raise ConfigError(f"{one.shown} and {other.shown} share GPU {both[0]}", "each GPU once", remedy)
    outside = sorted({*_named(samplers)} - {*_named(trainer)})
    if colocated and _named(trainer) and outside:
        raise ConfigError(
            f"{samplers.shown} with rollout.colocated: GPU {outside[0]} is not the trainer's",
            f"GPUs of {trainer.shown}", "change one of them",
        )  # fmt: skip


def _ranks(trainer: Part, own: Sequence[Part], pool: Sequence[int]) -> tuple[Group, ...]:
    """One GPU a rank; checks on the way that what is asked for in numbers is there."""
    wanted = {part.name: _count(part) or 0 for part in own if part.on_gpu and not _named(part)}
    if trainer.on_gpu and trainer.devices is None:
        wanted[trainer.name] = max(1, len(pool) - sum(wanted.values()))
    if sum(wanted.values()) > len(pool):
        shown = ", ".join(f"{name} {count}" for name, count in wanted.items() if count)
        others = any(_named(part) for part in own)
        raise ConfigError(
            f"[launch] wants {counted(sum(wanted.values()), 'GPU')} ({shown}) and {len(pool)} "
            f"{'are left beside those that are named' if others else 'are visible'}",
            "enough of them", "lower one, set rollout.colocated, or compute on the CPU",
        )  # fmt: skip
    if not trainer.on_gpu:
        return ((),) * (_count(trainer) or 1)
    named = _named(trainer)
    return tuple((gpu,) for gpu in (named or pool[: wanted[trainer.name]]))


def _servers(part: Part, pool: list[int]) -> tuple[Group, ...]:
    """The groups of a part's servers. What is taken leaves ``pool``."""
    count = _count(part) or 0
    if not part.on_gpu:
        return ((),) * (count // part.each)
    named = _named(part)
    if named:
        return tuple(tuple(named[place : place + part.each]) for place in range(0, len(named), part.each))
    groups = []
    for _ in range(count // part.each):
        groups.append(_neighbours(part, pool))
        pool[:] = [gpu for gpu in pool if gpu not in groups[-1]]
    return tuple(groups)


def _share(samplers: Part, ranks: Sequence[Group]) -> tuple[Group, ...]:
    """The groups of servers on GPUs of the trainer."""
    if not samplers.on_gpu:
        count = _count(samplers)
        return ((),) * (len(ranks) if count is None else count // samplers.each)
    pool = [gpu for group in ranks for gpu in group]
    outside = [gpu for gpu in _named(samplers) if gpu not in pool]
    count = _count(samplers)
    count = len(pool) if count is None else count
    if outside or count > len(pool) or count % samplers.each:
        raise ConfigError(
            f"{samplers.shown} with rollout.colocated, {counted(len(pool), 'GPU')} of the trainer and a "
            f"tensor_parallel_size of {samplers.each}",
            f"GPUs of the trainer, a multiple of {samplers.each}", "change launch.samplers or launch.trainer",
        )  # fmt: skip
    return _servers(Part(samplers.name, samplers.devices or count, samplers.each), pool)


def _neighbours(part: Part, pool: Sequence[int]) -> Group:
    for place in range(len(pool) - part.each + 1):
        if pool[place + part.each - 1] - pool[place] == part.each - 1:
            return tuple(pool[place : place + part.each])
    left = ", ".join(map(str, pool)) or "none"
    raise ConfigError(
        f"{part.shown}: of the GPUs that are left ({left}) no {part.each} are neighbours",
        "a server's GPUs side by side", f"name them in launch.{part.name}",
    )  # fmt: skip


def _named(part: Part) -> Sequence[int]:
    return () if part.devices is None or isinstance(part.devices, int) else part.devices


def _count(part: Part) -> int | None:
    """Devices that are asked for, None where nothing says how many."""
    if isinstance(part.devices, int):
        return part.devices
    if part.devices is not None:
        return len(part.devices)
    return part.addresses * part.each or None
