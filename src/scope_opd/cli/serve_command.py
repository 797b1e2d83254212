"""``scope serve``: the vLLM server that a config describes, started with the flags that training needs, or printed.

Not covered: several servers at once (one command each), restarting one that died, other machines (run it there).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from scope_opd.errors import ConfigError, ScopeError

if TYPE_CHECKING:
    from scope_opd.config import Config
    from scope_opd.serving.launch import Launch, Served
    from scope_opd.serving.secrets import Secret

EXAMPLES = """Examples:
  scope serve teacher configs/vllm_cpu.toml --temperature 0.6
  scope serve student configs/vllm_cpu.toml
  scope serve teacher my.toml --replica 1 --print       the same as a command, to be run elsewhere
  scope serve teacher my.toml --route math --set teacher.path=models/math-teacher
"""


def serve(
    kind: Literal["teacher", "student"],
    config: Path,
    /,
    *,
    overrides: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    replica: int = 0,
    route: str | None = None,
    temperature: float | None = None,
    copy_dir: Path | None = None,
    show: Annotated[bool, Parameter(name="--print", negative="")] = False,
) -> int:
    """Start the vLLM server of a config's teacher or student, with the flags that training needs.

    It runs in the foreground until Ctrl-C; its log goes to stderr. Address,
    name and key are those of [teacher] or [rollout], flags those of
    [serving]; serving.python is an interpreter with vLLM. A model that fits
    on one GPU is served best by one server a GPU (--replica 0, 1 ...).

    Parameters
    ----------
    kind
        Whom to serve.
    config
        The TOML file of the run.
    overrides
        TABLE.KEY=VALUE in place of what the file says; may be repeated.
    replica
        Which of base_urls to serve at, counted from 0.
    route
        Of the teachers in [teacher.routes], the one to serve.
    temperature
        Serve a copy of the teacher whose logits are divided by this; the config then
        needs teacher.served_temperature with the same value.
    copy_dir
        Where that copy is; without it a folder under served/ beside the run folder.
    show
        Print the command for a shell instead of running it. The key is not in it.
    """
    from scope_opd.config import load_config
    from scope_opd.serving.launch import plan_launch

    settings = load_config(config, overrides or [])
    if kind == "student":
        for option, value in (("--temperature", temperature), ("--copy-dir", copy_dir)):
            if value is not None:
                raise ConfigError(f"{option} for the student", "a teacher", f"leave {option} out")
    if copy_dir is not None and temperature is None:
        raise ConfigError("--copy-dir without --temperature", "both", "add --temperature")
    python, on_cpu = interpreter(settings, show)

    def launch(served: Served) -> Launch:
        return plan_launch(
            settings, kind, served, python=python, on_cpu=on_cpu, shell=os.environ, cores=usable_cores(),
            replica=replica, route=route,
        )  # fmt: skip

    served = describe(settings, kind)
    plan = launch(served)  # what is wrong with addresses and flags is known before a model is copied
    for line in plan.warnings:
        _say(f"warning: {line}")
    reminder = None
    if kind == "teacher":
        folder, reminder = tempered(settings, served, temperature, copy_dir)
        if folder is not None:
            plan = launch(describe(settings, kind, folder))
    if show:
        print(plan.shell())
        return 0
    from scope_opd.serving.process import check_port
    from scope_opd.serving.secrets import load_secret

    section = "rollout" if kind == "student" else f"teacher.routes.{route}" if route else "teacher"
    key = load_secret(env=plan.key_env, file=plan.key_file, setting=f"{section}.api_key")
    check_port(plan)
    return run(plan, key, settings.serving.start_timeout_s, reminder)


def run(plan: Launch, key: Secret | None, start_timeout_s: float, reminder: str | None = None) -> int:
    """Start a server and stay with it until it ends or a signal asks to stop; nothing of it is left behind.

    Returns:
        0 where it was stopped on demand, 130 where that was before it was ready.

    Raises:
        RunFailed: it ended by itself.
    """
    from scope_opd.serving.process import ServerProcess, stop_signals

    with stop_signals() as asked:
        server = ServerProcess(plan, key, sys.stderr)
        try:
            if not server.wait_ready(start_timeout_s, asked):
                _say("interrupted")
                return 130
            print(f"ready: {plan.model} at {plan.url} (process {server.pid}); Ctrl-C stops it", flush=True)
            if reminder is not None:  # said before, and scrolled away by the server's log since
                _say(reminder)
            while not asked.wait(0.5):
                if server.ended():
                    raise server.failure("by itself")
            _say("stopping")
            return 0
        finally:
            server.stop(lambda: asked.count)


def describe(config: Config, kind: str, folder: Path | None = None) -> Served:
    """What a config says of the model to be served; sizes as far as its config.json tells.

    Args:
        config: names it.
        kind: "teacher" or "student".
        folder: of a copy to be served in its place.

    Raises:
        ModelError: its folder is not there.
    """
    from scope_opd.models.places import resolve_path
    from scope_opd.serving.launch import Served

    table = config.model if kind == "student" else config.teacher
    target = resolve_path(str(folder or table.path))
    local = Path(target).is_dir()
    sizes = _sizes(target, None if local else table.revision, table.trust_remote_code)
    tokenizer = resolve_path(config.model.tokenizer) if kind == "student" and config.model.tokenizer else None
    return Served(
        target, None if local else table.revision, tokenizer, table.trust_remote_code, sizes.get("vocab_size"),
        _context(sizes),
    )  # fmt: skip


def _sizes(target: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """The text model's config as plain values; empty where it cannot be read, which vLLM explains better."""
    try:
        if Path(target).is_dir():
            values = json.loads((Path(target) / "config.json").read_text(encoding="utf-8"))
        else:
            from transformers import AutoConfig

            found = AutoConfig.from_pretrained(target, revision=revision, trust_remote_code=trust_remote_code)
            values = found.to_dict()
    except (OSError, ValueError, KeyError):
        return {}
    text = values.get("text_config") if isinstance(values, dict) else None
    return text if isinstance(text, dict) else values if isinstance(values, dict) else {}


def _context(sizes: dict[str, Any]) -> int | None:
    """The longest sequence that vLLM would allow; None where that is not this number alone (a stretched rotation)."""
    length = sizes.get("max_position_embeddings")
    rope = sizes.get("rope_scaling") or sizes.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    return length if isinstance(length, int) and kind in ("default", "llama3") else None


def interpreter(config: Config, show: bool) -> tuple[str, bool]:
    """The Python that has vLLM, and whether its vLLM computes on the CPU.

    Args:
        config: ``serving.python``.
        show: nothing is to be started: one that is not there is taken for one that computes on GPUs.

    Raises:
        ConfigError: there is none.
    """
    from scope_opd.serving.process import find_interpreter

    try:
        found = find_interpreter(config.serving.python, config.serving.env)
    except ScopeError as error:
        if not show:
            raise
        # The command may be meant for another machine, which has what this one lacks.
        _say(f"warning: {error}; taken for one that computes on GPUs")
        return config.serving.python or sys.executable, False
    return found.path, found.on_cpu


def tempered(
    config: Config, served: Served, temperature: float | None, copy_dir: Path | None = None, *, write: bool = True
) -> tuple[Path | None, str | None]:
    """The folder of the copy that is to be served, None for the model itself; and a warning, which it has given, where
    the config differs. Without ``write`` the copy is not made, and may not be there."""
    from scope_opd.models.tempered_copy import copy_folder, served_temperature, tempered_copy

    wanted = config.teacher.served_temperature
    if temperature is None or temperature == 1.0:
        given = served_temperature(served.model)
        if given == wanted:
            return None, None
        warning = (
            f"warning: teacher.served_temperature = {wanted:g} and {config.teacher.path} is served at temperature "
            f"{given:g}; expected the same; add --temperature {wanted:g}, or change the config"
        )
        _say(warning)
        return None, warning
    cache = Path(config.run.dir).absolute().parent / "served"
    folder = copy_dir.expanduser() if copy_dir is not None else copy_folder(cache, served.model, temperature)
    if not write:
        return folder, None
    fresh = tempered_copy(served.model, temperature, folder, revision=served.revision)
    _say(f"{'wrote' if fresh else 'found'} the copy of {config.teacher.path} at temperature {temperature:g}: {folder}")
    if wanted == temperature:
        _say(f"teacher.served_temperature = {temperature:g}, as the config says")
        return folder, None
    warning = (
        f"warning: the config says teacher.served_temperature = {wanted:g} and the copy is served at {temperature:g}; "
        f"expected the same; give --temperature {wanted:g}, or set teacher.served_temperature = {temperature:g}"
    )
    _say(warning)
    return folder, warning


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
