"""The trainer's processes of ``scope launch``: their environment, their command, and that command for a shell.

Not covered: servers (``launch_plan``), starting and watching (``serving.supervise``).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from scope_opd.config import Config

if TYPE_CHECKING:
    from scope_opd.cli.launch_plan import Machine
    from scope_opd.serving.layout import Layout
    from scope_opd.serving.supervise import Rank

OF_RANKS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip
"""What torchrun tells its processes. Another launcher's would mislead ours."""


def trainer_environment(config: Config, layout: Layout, machine: Machine, threads: int) -> dict[str, str]:
    """What every rank's environment has besides the shell's, without keys."""
    values = {"PYTHONUNBUFFERED": "1"}
    if config.launch.threads or config.train.threads or "OMP_NUM_THREADS" not in machine.shell:
        values["OMP_NUM_THREADS"] = str(config.train.threads or threads)
    if layout.trainer[0]:
        values["CUDA_VISIBLE_DEVICES"] = ",".join(machine.gpus[gpu] for group in layout.trainer for gpu in group)
    if len(layout.trainer) > 1 and sys.platform.startswith("linux") and "GLOO_SOCKET_IFNAME" not in machine.shell:
        values["GLOO_SOCKET_IFNAME"] = "lo"  # all ranks are here: nothing of theirs is to be heard elsewhere
    return values


def rank_processes(
    words: Sequence[str], environment: dict[str, str], layout: Layout, taken: Collection[int | None]
) -> tuple[Rank, ...]:
    """The ranks' processes, told what torchrun would tell them. torchrun itself would end with 1 whatever they end
    with, and kill them half a minute after a Ctrl-C, in the midst of a checkpoint."""
    from scope_opd.serving.process import free_ports
    from scope_opd.serving.supervise import Rank

    world = len(layout.trainer)
    environment = {name: value for name, value in environment.items() if name not in OF_RANKS}
    if world == 1:
        return (Rank("trainer", tuple(words), environment),)
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_ports(1, taken={port for port in taken if port is not None})[0])
    return tuple(
        Rank(f"rank {rank}", tuple(words), {**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    )


def shell_command(words: Sequence[str], environment: Mapping[str, str], layout: Layout) -> str:
    """The trainer as a command for a shell: several ranks as torchrun starts them."""
    start = [words[0], "-m"]
    if len(layout.trainer) > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(len(layout.trainer)), "-m"]
    lines = [" ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())]
    lines.append(shlex.join([*start, *words[2:5]]))
    rest = list(words[5:])
    while rest:  # an option and its value share a line
        count = 2 if rest[0] == "--set" else 1
        lines.append(shlex.join(rest[:count]))
        del rest[:count]
    return " \\\n  ".join(lines)
