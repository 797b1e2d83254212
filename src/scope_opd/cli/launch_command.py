"""``scope launch``: on one machine, a config's servers and the ranks of its trainer, from start to end.

Not covered: several machines (``scope serve`` on each, torchrun or Ray for the trainer).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from scope_opd.errors import ConfigError
from scope_opd.words import counted

if TYPE_CHECKING:
    from scope_opd.cli.launch_plan import Completed, Machine, Planned
    from scope_opd.config import Config
    from scope_opd.serving.layout import Group

EXAMPLES = """Examples:
  scope launch configs/vllm_cpu.toml
  scope launch my.toml --set launch.samplers=2 --set launch.teachers=2
  scope launch my.toml --resume
  scope launch my.toml --print --gpus 8         whose each GPU is, and commands
"""


def launch(
    config: Path,
    /,
    *,
    overrides: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    allow_config_change: Annotated[bool, Parameter(negative="")] = False,
    run_dir: Path | None = None,
    show: Annotated[bool, Parameter(name="--print", negative="")] = False,
    gpus: int | None = None,
) -> int:
    """Start a run with all its servers on this machine, and end them with it.

    The GPUs go to trainer, samplers and teachers as [launch] says, or the
    cores where there are none. Once every server answers, the trainer starts.
    All that they print is shown behind labels, and kept beside the run folder
    (runs/a.logs). The first Ctrl-C has the trainer save and end, and then the
    servers; a second one ends everything at once. The exit code is the
    trainer's.

    Parameters
    ----------
    config
        The TOML file of the run.
    overrides
        TABLE.KEY=VALUE in place of what the file says; may be repeated.
    resume
        Continue the run in the run folder from its newest sound checkpoint.
    allow_config_change
        With --resume: go on with other settings than the run had.
    run_dir
        The run folder, in place of run.dir.
    show
        Print the devices of each process and its command; start nothing. No key is in it.
    gpus
        With --print: as it would be on a machine with that many GPUs.
    """
    from scope_opd.cli.early import check_early, check_run_folder, eval_source
    from scope_opd.cli.launch_plan import complete, plan

    if gpus is not None and (not show or gpus < 0):
        raise ConfigError(f"--gpus {gpus}", "--print with it, and a number from 0", "add --print, or leave --gpus out")
    given = list(overrides or [])
    if run_dir is not None:
        given.append(f"run.dir={json.dumps(str(run_dir), ensure_ascii=False)}")
    completed = complete(config, given)
    settings = completed.config
    if not show:
        check_early(settings, [settings.data.train, eval_source(settings)])
        check_run_folder(Path(settings.run.dir), resume=resume)
        check_routes(settings, config)
    python, on_cpu = _interpreter(completed, show, gpus)
    planned = plan(
        config, given, completed, _machine(completed, on_cpu, gpus), python=python, on_cpu=on_cpu,
        options=["--resume"] * resume + ["--allow-config-change"] * allow_config_change, write=not show,
    )  # fmt: skip
    for line in planned.warnings:
        print(f"warning: {line}", file=sys.stderr)
    if show:
        _show(planned)
        return 0
    return _run(planned)


def check_routes(config: Config, path: Path) -> None:
    """Nobody starts the teachers of [teacher.routes] here: those on this machine must be there already.

    Raises:
        ConfigError: one is not, and the run would only end once every other server has started.
    """
    import socket
    from urllib.parse import urlsplit

    from scope_opd.addresses import parse_base_url

    for name, route in config.teacher.routes.items():
        for url in filter(lambda each: parse_base_url(each).loopback, route.base_urls):
            parts = urlsplit(url)
            try:
                socket.create_connection((parts.hostname or "", parts.port or 80), timeout=3).close()
            except OSError:
                raise ConfigError(
                    f"teacher.routes.{name}: nothing answers at {url}",
                    "its server, which scope launch does not start, since a config does not say which model it is",
                    f"start it first: scope serve teacher {path} --route {name} --set teacher.path=MODEL",
                ) from None


def _interpreter(completed: Completed, show: bool, gpus: int | None) -> tuple[str, bool]:
    """The Python with vLLM, and whether its servers compute on the CPU. Without servers it is not looked for."""
    if not completed.serves:
        return sys.executable, True
    from scope_opd.cli.serve_command import interpreter

    if gpus is not None:
        return completed.config.serving.python or sys.executable, gpus == 0
    return interpreter(completed.config, show)


def _machine(completed: Completed, on_cpu: bool, gpus: int | None) -> Machine:
    """This machine; its GPUs are looked for where something could compute on them."""
    from scope_opd.cli.launch_plan import Machine, find_gpus, visible_gpus
    from scope_opd.cli.serve_command import usable_cores

    shell = dict(os.environ)
    if gpus is not None:
        names = visible_gpus(gpus, {})
    elif completed.config.train.device == "cpu" and on_cpu:
        names = ()
    else:
        names = find_gpus(shell)
    return Machine(names, usable_cores(), shell)


def _run(planned: Planned) -> int:
    """Start everything and stay with it until it has ended."""
    from scope_opd.serving.labelled import Logs
    from scope_opd.serving.process import check_port, stop_signals
    from scope_opd.serving.supervise import Supervisor

    settings = planned.config
    for server in planned.servers:
        check_port(server.launch)
    folder = Path(settings.run.dir)
    labels = [server.label for server in planned.servers] + [rank.label for rank in planned.ranks]
    with stop_signals() as asked:
        logs = Logs(folder.with_name(f"{folder.name}.logs"), labels, sys.stdout)
        try:
            logs.say(_summary(planned))
            supervisor = Supervisor(
                planned.servers, planned.ranks, logs, hide=planned.hide,
                start_timeout_s=settings.serving.start_timeout_s, stop_timeout_s=settings.launch.stop_timeout_s,
                restarts=settings.launch.restarts,
            )  # fmt: skip
            return supervisor.run(asked)
        finally:
            logs.close()


def _rows(planned: Planned) -> list[list[str]]:
    """Each process, its devices and its address."""
    layout, rows = planned.layout, []
    for server, group in zip(planned.servers, (*layout.samplers, *layout.teachers), strict=True):
        rows.append([server.label, _devices(planned, group), str(server.launch.url)])
    for rank, group in zip(planned.ranks, layout.trainer, strict=True):
        rows.append([rank.label, _devices(planned, group), ""])
    return rows


def _devices(planned: Planned, group: Group) -> str:
    return f"GPU {planned.visible(group)}" if group else "CPU"


def _summary(planned: Planned) -> str:
    shown = ", ".join(f"{label} on {devices}" for label, devices, _ in _rows(planned))
    return f"{counted(len(planned.servers), 'server')}, {counted(len(planned.ranks), 'rank')}: {shown}"


def _show(planned: Planned) -> None:
    from scope_opd.cli.show import show_table

    show_table(["process", "devices", "address"], _rows(planned), labels=1)
    for server in planned.servers:
        print(f"\n# {server.label}")
        if server.kind == "teacher" and planned.copy is not None:
            print(f"# {planned.copy}")
        print(server.launch.shell())
    world = len(planned.ranks)
    print(f"\n# {'trainer' if world == 1 else f'trainer, {world} ranks'}\n{planned.trainer}")
