"""From a config to what ``scope launch`` starts: the devices, addresses, keys and commands of servers and ranks.

The trainer reads the same config with the addresses as further overrides. Keys reach it, and the servers, through the
environment alone.

Not covered: the trainer's processes (``launch_ranks``), starting and watching (``serving.supervise``), which GPU is
whose (``serving.layout``), teachers of [teacher.routes] (a config does not say which models they are: ``scope serve``
starts them).
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from scope_opd.addresses import parse_base_url
from scope_opd.cli.launch_ranks import rank_processes, shell_command, trainer_environment
from scope_opd.config import Config, load_config, read_values
from scope_opd.errors import ConfigError

if TYPE_CHECKING:
    from scope_opd.serving.launch import Launch
    from scope_opd.serving.layout import Group, Layout
    from scope_opd.serving.secrets import Secret
    from scope_opd.serving.supervise import Rank, Server

KINDS: tuple[tuple[Literal["student", "teacher"], str, str, str], ...] = (
    ("student", "rollout", "samplers", "sampler"),
    ("teacher", "teacher", "teachers", "teacher"),
)
"""What is served, its table, its key in [launch], and what a server of it is called."""
KEY_VARIABLES = {"rollout": "SCOPE_SAMPLER_KEY", "teacher": "SCOPE_TEACHER_KEY"}
"""Where a key is found, or put, that the config names no place for."""
_PLACEHOLDER = "http://127.0.0.1:9/v1"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a launch takes place.

    Attributes:
        gpus: the visible ones, as CUDA_VISIBLE_DEVICES names them.
        cores: that may be used.
        shell: the environment.
    """

    gpus: tuple[str, ...]
    cores: int
    shell: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Planned:
    """A launch.

    Attributes:
        config: with the addresses.
        layout: whose GPU is which.
        machine: on which.
        servers, ranks: in the layout's order.
        trainer: the command of all ranks together, for a shell.
        hide: every key.
        copy: a line on the copy of the teacher that is served in its place; None where it is served itself.
        warnings: lines worth showing before the start.
    """

    config: Config
    layout: Layout
    machine: Machine
    servers: tuple[Server, ...]
    ranks: tuple[Rank, ...]
    trainer: str
    hide: tuple[Secret, ...]
    copy: str | None
    warnings: tuple[str, ...]

    def visible(self, group: Group) -> str:
        """A process's GPUs, as CUDA_VISIBLE_DEVICES names them."""
        return ",".join(self.machine.gpus[gpu] for gpu in group)


@dataclass(frozen=True, slots=True)
class Completed:
    """A config with what the servers that are started here need and it leaves open.

    Attributes:
        config: the whole, with placeholders for addresses that are still to be found.
        more: overrides that complete it, without those addresses.
        invented: the keys of [launch] whose servers have no addresses yet.
        serves: whether any server is started here.
    """

    config: Config
    more: tuple[str, ...]
    invented: frozenset[str]
    serves: bool


def complete(path: Path, given: Sequence[str]) -> Completed:
    """Find out which servers a config wants started, and name what it does not: model names, keys, a tokenizer.

    Raises:
        ConfigError: the config is wrong.
    """
    values = read_values(path, given)
    launch = values.get("launch", {})
    more, invented, placeholders = list[str](), set[str](), list[str]()
    serves = False
    for _, name, setting, _ in KINDS:
        table = values.get(name, {})
        if not isinstance(launch, dict) or not isinstance(table, dict):
            continue  # validation explains it
        devices, urls = launch.get(setting), table.get("base_urls")
        shared = setting == "samplers" and table.get("colocated") is True and devices is None
        if not urls and (shared or devices not in (None, 0, [])):
            invented.add(setting)
            placeholders.append(_override(f"{name}.base_urls", [_PLACEHOLDER]))
            if not table.get("model"):
                more.append(_override(f"{name}.model", "student" if name == "rollout" else "teacher"))
        elif not urls or devices in (0, []) or not _any_local(urls):
            continue
        serves = True
        if not table.get("api_key_env") and not table.get("api_key_file"):
            more.append(_override(f"{name}.api_key_env", KEY_VARIABLES[name]))
        if name == "teacher" and not table.get("tokenizer"):
            more.append(_override("teacher.tokenizer", table.get("path", "zoo:teacher")))
    config = load_config(path, [*given, *more, *placeholders])
    if "teachers" in invented and "served_temperature" not in values.get("teacher", {}):
        wanted = _teacher_temperature(config)
        if wanted != 1.0:
            more.append(_override("teacher.served_temperature", wanted))
    return Completed(config, tuple(more), frozenset(invented), serves)


def find_gpus(shell: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that torch sees, as CUDA_VISIBLE_DEVICES names them. A process of its own asks: this one stays light."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    words = answer.stdout.split()
    count = int(words[-1]) if answer.returncode == 0 and words and words[-1].isdigit() else 0
    return visible_gpus(count, shell)


def visible_gpus(count: int, shell: Mapping[str, str]) -> tuple[str, ...]:
    """Names for that many GPUs: those of the shell's CUDA_VISIBLE_DEVICES, else their numbers."""
    named = [name.strip() for name in shell.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(named[:count] if named else map(str, range(count)))


def plan(
    path: Path,
    given: Sequence[str],
    completed: Completed,
    machine: Machine,
    *,
    python: str,
    on_cpu: bool,
    options: Sequence[str] = (),
    write: bool = True,
) -> Planned:
    """Everything of a launch, before anything starts.

    Args:
        path: of the config.
        given: its overrides.
        completed: by ``complete``.
        machine: where.
        python: the interpreter that has vLLM.
        on_cpu: its vLLM computes on the CPU.
        options: of ``scope train``, besides the overrides.
        write: make the copy of the teacher that is to be served at another temperature, if it is not there.

    Raises:
        ScopeError: what is asked for cannot be had.
    """
    from scope_opd.serving.process import free_ports

    first, more, invented = completed.config, [*completed.more], completed.invented
    layout = lay_out(first, machine, invented, on_cpu=on_cpu)
    groups = {"samplers": layout.samplers, "teachers": layout.teachers}
    port = first.launch.ports if isinstance(first.launch.ports, int) else None
    taken = {urlsplit(url).port for _, table, _, _ in KINDS for url in getattr(first, table).base_urls}
    for _, table, setting, _ in KINDS:
        if setting in invented:
            ports = free_ports(len(groups[setting]), port, taken={number for number in taken if number is not None})
            port = port + len(ports) if port is not None else None
            taken |= {*ports}
            more.append(address_override(table, ports))
    overrides = [*given, *more]
    config = load_config(path, overrides)
    _check_ipc(config, layout)
    threads = config.launch.threads or max(1, machine.cores // layout.processes)
    servers, keys, copy, warnings = _servers(
        config, layout, machine, threads, python=python, on_cpu=on_cpu, write=write
    )
    words = [sys.executable, "-m", "scope_opd", "train", str(path)]
    words += [word for override in overrides for word in ("--set", override)] + [*options]
    shared = trainer_environment(config, layout, machine, threads)
    ranks = rank_processes(
        words, {**machine.shell, **shared, **{name: key.reveal() for name, key in keys.items()}}, layout, taken
    )
    used = {gpu for group in (*layout.trainer, *layout.samplers, *layout.teachers) for gpu in group}
    idle = [name for number, name in enumerate(machine.gpus) if number not in used]
    if used and idle:
        warnings.append(f"not used: GPU {', '.join(idle)}")
    if config.teacher.routes:
        warnings.append(
            f"the teachers of teacher.routes ({', '.join(config.teacher.routes)}) are not started here, since a config "
            f"does not say which models they are; expected them at their base_urls; start each with "
            f"scope serve teacher {path} --route NAME --set teacher.path=MODEL"
        )
    hide = tuple(keys.values()) + tuple(server.key for server in servers if server.key is not None)
    trainer = shell_command(words, shared, layout)
    return Planned(config, layout, machine, servers, ranks, trainer, hide, copy, tuple(warnings))


def _teacher_temperature(config: Config) -> float:
    """What the served teacher's logits must be divided by."""
    if config.objective.temperature != "matched" or config.rollout.temperature == 1.0:
        return 1.0
    from scope_opd.cli.inputs import build_configured_method

    method = build_configured_method(config)
    return config.rollout.temperature if method.needs_teacher(True) or method.needs_teacher(False) else 1.0


def lay_out(config: Config, machine: Machine, invented: Set[str], *, on_cpu: bool) -> Layout:
    """Whose GPU is which. Args: as for ``plan``; ``invented`` is that of ``Completed``.

    Raises:
        ConfigError: it cannot be done.
    """
    from scope_opd.serving.layout import Part, assign

    device, asked = config.train.device, config.launch
    if device.startswith("cuda:"):
        raise ConfigError(
            f"train.device = {device!r} with scope launch", "'auto', 'cuda' or 'cpu'",
            f"set launch.trainer = [{device.removeprefix('cuda:')}] in its place",
        )  # fmt: skip
    on_gpu = device == "cuda" or (device == "auto" and bool(machine.gpus))
    parts = []
    for kind, table, setting, _ in KINDS:
        flags = config.serving.student if kind == "student" else config.serving.teacher
        devices, urls = getattr(asked, setting), getattr(config, table).base_urls
        local = [] if setting in invented or devices in (0, []) else _local(urls)
        if urls and not local and setting not in invented and devices not in (None, 0, []):
            raise ConfigError(
                f"launch.{setting} = {devices} and {table}.base_urls names servers that are not on this machine's "
                "loopback interface", "one of the two", f"remove {table}.base_urls, or set launch.{setting} = 0",
            )  # fmt: skip
        each = 1 if on_cpu else flags.tensor_parallel_size
        parts.append(Part(setting, devices, each, len(local), on_gpu=not on_cpu))
    wanting = [part for part in parts if part.on_gpu and (part.devices or part.addresses or part.name in invented)]
    if (device == "cuda" or wanting) and not machine.gpus:
        who = "train.device = 'cuda'" if device == "cuda" else "servers that compute on GPUs"
        raise ConfigError(
            f"{who} and no GPU is visible", "a GPU",
            "see CUDA_VISIBLE_DEVICES, set serving.python to a vLLM for CPUs, or plan for N GPUs with --print --gpus N",
        )  # fmt: skip
    colocated = config.rollout.colocated and ("samplers" in invented or parts[0].addresses > 0)
    trainer = Part("trainer", asked.trainer, on_gpu=on_gpu)
    return assign(trainer, *parts, gpus=len(machine.gpus), colocated=colocated)


def _check_ipc(config: Config, layout: Layout) -> None:
    """Rank 0 alone has the weights that are published, and a handle is of use on its own GPU only."""
    elsewhere = sorted({gpu for group in layout.samplers for gpu in group} - {*layout.trainer[0]})
    if config.rollout.sync == "ipc" and layout.samplers and elsewhere:
        raise ConfigError(
            f"rollout.sync = 'ipc' with a sampler on GPU {elsewhere[0]}",
            f"samplers on GPU {layout.trainer[0][0] if layout.trainer[0] else '0'} alone, where rank 0 is",
            "set rollout.sync = 'files'",
        )


def _servers(
    config: Config, layout: Layout, machine: Machine, threads: int, *, python: str, on_cpu: bool, write: bool
) -> tuple[tuple[Server, ...], dict[str, Secret], str | None, list[str]]:
    """The servers; the keys that the trainer finds in its environment; on the teacher's copy; warnings."""
    from scope_opd.cli.serve_command import describe, tempered
    from scope_opd.serving.launch import plan_launch
    from scope_opd.serving.supervise import Server

    found: list[Server] = []
    keys: dict[str, Secret] = {}
    copy: str | None = None
    warnings: list[str] = []
    for kind, name, setting, label in KINDS:
        groups = layout.samplers if setting == "samplers" else layout.teachers
        if not groups:
            continue
        table = getattr(config, name)
        key = _key(table.api_key_env, table.api_key_file, f"{name}.api_key", machine.shell)
        if table.api_key_env is not None:
            keys[table.api_key_env] = key
        served = describe(config, kind)
        if kind == "teacher":
            folder, _ = tempered(config, served, _copy_temperature(config, served.model), write=write)
            if folder is not None:
                copy = _about_copy(config, folder)
                served = replace(served, model=str(folder), revision=None)
        urls = [url for url in table.base_urls if url in _local(table.base_urls)]
        for number, (group, url) in enumerate(zip(groups, urls, strict=True)):
            launch = plan_launch(
                config, kind, served, python=python, on_cpu=on_cpu, shell=machine.shell, cores=threads,
                replica=table.base_urls.index(url),
            )  # fmt: skip
            warnings += [line for line in launch.warnings if line not in warnings]
            found.append(Server(label, f"{label} {number}", _on(launch, group, machine), key))
    return tuple(found), keys, copy, warnings


def _copy_temperature(config: Config, folder: str) -> float | None:
    """Of the copy of the teacher that is to be served; None where its folder is one already, or none is needed."""
    from scope_opd.models.tempered_copy import served_temperature

    wanted = config.teacher.served_temperature
    return None if wanted == served_temperature(folder) else wanted


def _about_copy(config: Config, folder: Path) -> str:
    """What the folder is that a teacher's server is given, and who makes it."""
    made, wanted = folder.is_dir(), config.teacher.served_temperature
    about = f"{folder} is {'the' if made else 'to be a'} copy of {config.teacher.path}, logits divided by {wanted:g}"
    if made:
        return about
    return (
        f"{about}: not there yet; scope launch makes it before it starts, and so does scope serve teacher --temperature"
    )


def _on(launch: Launch, group: Group, machine: Machine) -> Launch:
    if not group:
        return launch
    if "CUDA_VISIBLE_DEVICES" in launch.env:
        raise ConfigError("serving.env sets CUDA_VISIBLE_DEVICES", "GPUs from [launch]", "remove it")
    return replace(launch, env={**launch.env, "CUDA_VISIBLE_DEVICES": ",".join(machine.gpus[gpu] for gpu in group)})


def _key(env: str | None, file: str | None, setting: str, shell: Mapping[str, str]) -> Secret:
    """The key that the config names a place of; where nobody put one into the variable, one for this launch."""
    from scope_opd.serving.secrets import Secret, load_secret

    if file is None and env is not None and env not in shell:
        return Secret(secrets.token_urlsafe(32))
    key = load_secret(env=env, file=file, setting=setting)
    assert key is not None, "a place for it was found"
    return key


def _local(urls: Sequence[str]) -> list[str]:
    return [url for url in urls if parse_base_url(url).loopback]


def _any_local(urls: Any) -> bool:
    """The same of what a config may say, before it is known to be right."""
    try:
        return bool(_local([urls] if isinstance(urls, str) else urls))
    except (TypeError, AttributeError, ValueError):
        return False


def address_override(table: str, ports: Sequence[int]) -> str:
    """Servers of this machine as an override."""
    return _override(f"{table}.base_urls", [f"http://127.0.0.1:{port}/v1" for port in ports])


def _override(name: str, value: Any) -> str:
    return f"{name}={json.dumps(value, ensure_ascii=False)}"
