"""What a run folder must hold before ``--resume`` may go on with it, or start it over. Everything here only reads."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scope_opd.config import Config, validate_config
from scope_opd.errors import RunFolderError
from scope_opd.records import iter_jsonl

_NEW_RUN = "start a new run.dir"
_FREE = {("verify", "workers")}
"""Settings on which no number of a run depends."""
_WHERE = {
    "base_urls", "api_key_env", "api_key_file", "ca_bundle", "connect_timeout_s", "read_timeout_s", "deadline_s",
    "max_concurrency", "allow_unprotected_routes", "sync", "sync_dir", "sync_host", "colocated",
}  # fmt: skip
"""Of [teacher] and [rollout]: where servers are and how they are reached. Servers may move; that they still serve the
same teacher is what fingerprints are for."""


def refuse_other_config(config: Config, saved: dict[str, Any], step: int) -> None:
    """A resumed run keeps its config, but for ``run.*`` (the seed excepted), ``verify.workers``, the addresses of its
    servers and how they are started and, if lr does not depend on it, steps.

    A key that the saved config does not know (written by an older version) counts as its default.

    Raises:
        RunFolderError: the configs differ, naming every difference; or the run has done more steps than are asked for.
    """
    defaults = validate_config({}).model_dump(mode="json")
    filled = {table: {**values, **saved.get(table, {})} for table, values in defaults.items()}
    now, before = _fixed(config.model_dump(mode="json")), _fixed({**saved, **filled})
    names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if names:
        shown = ", ".join(f"{name} = {now.get(name)!r} (was {before.get(name)!r})" for name in names)
        raise RunFolderError(
            f"another config than that of the run: {shown}", "the same config", f"set them back, or {_NEW_RUN}"
        )
    if config.train.steps < step:
        raise RunFolderError(
            f"train.steps = {config.train.steps} but the run has done {step}", f"at least {step}", "raise train.steps"
        )


def refuse_other_data(folder: Path, data: Mapping[str, Mapping[str, Any]]) -> None:
    """A resumed run goes on with the very problems it began with, even where their file kept its name.

    Raises:
        RunFolderError: the bytes of a data file, or the commit of a hub data set, are not those of run.json.
    """
    before = _object(folder / "run.json").get("data")
    for name, found in data.items():
        known = before.get(name) if isinstance(before, dict) else None
        for key in ("sha256", "revision"):
            was, now = (known or {}).get(key), found.get(key)
            if was is not None and now != was:
                raise RunFolderError(
                    f"data.{name} = {found.get('source')!r} has the {key} {now}, at the run's start {was}",
                    "the same data",
                    f"put it back, or {_NEW_RUN}",
                )


def recorded_revisions(folder: Path, sources: Mapping[str, str | None]) -> dict[str, str]:
    """The commits of the hub data sets that a run began with, so that a branch that moved since does not end it.

    Args:
        folder: the run folder.
        sources: the data sets of the run that goes on, "train" and perhaps "eval", by what the config calls them.

    Returns:
        Commits by the same names, for the sources that run.json knows with one.
    """
    before = _object(folder / "run.json").get("data")
    found = {}
    for name, source in sources.items():
        known = before.get(name) if isinstance(before, dict) else None
        if isinstance(known, dict) and known.get("source") == source and isinstance(known.get("revision"), str):
            found[name] = known["revision"]
    return found


def refuse_to_start_over(folder: Path, config: Config, damage: Sequence[str]) -> None:
    """Without a checkpoint only a run that was cut before its first one may start at the beginning again.

    Args:
        folder: the run folder; nothing in it, or a run without a sound checkpoint.
        config: of the run that wants to go on.
        damage: one line for each checkpoint that is there and cannot be used.

    Raises:
        RunFolderError: starting over would erase something that no kill before the first checkpoint leaves.
    """
    aside = sorted(path.name for path in (folder / "checkpoints").glob("damaged-*"))
    if damage or aside:
        found = "; ".join(damage) or f"only damaged checkpoints are left ({', '.join(aside)})"
        raise RunFolderError(f"{folder}: {found}", "a sound checkpoint", f"restore one from a copy, or {_NEW_RUN}")
    info, status = _object(folder / "run.json"), _object(folder / "status.json")
    if info.get("kind") == "evaluation":
        raise RunFolderError(f"{folder} holds an evaluation, not a training run", "a training run", "check run.dir")
    if status.get("phase") == "done" or _passed_a_checkpoint(folder):
        state = "is finished" if status.get("phase") == "done" else "had saved checkpoints"
        raise RunFolderError(
            f"the run in {folder} {state} and has none now", "its checkpoints", f"restore checkpoints/, or {_NEW_RUN}"
        )
    try:
        saved = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if info:
            raise RunFolderError(
                f"{folder} has run.json and neither config.toml nor a checkpoint", "a run's folder", "check run.dir"
            ) from None
        return  # a new folder
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{folder / 'config.toml'}: {error}", "the run's config", f"mend it, or {_NEW_RUN}"
        ) from None
    refuse_other_config(config, saved, 0)


def _passed_a_checkpoint(folder: Path) -> bool:
    """Whether the run went on after a save: a save that was cut, or that failed, is followed by no later step."""

    def steps(name: str, **wanted: str) -> list[int]:
        path = folder / f"{name}.jsonl"
        rows = [row for _, row in iter_jsonl(path)] if path.exists() else []
        return [row["step"] for row in rows if all(row.get(key) == value for key, value in wanted.items())]

    saves = steps("events", kind="checkpoint")
    return bool(saves) and max(steps("metrics"), default=-1) >= min(saves)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of what a resumed run must keep; what is None counts as not there."""
    flat = {name: value for name, value in _flat(config, ()) if not _free(name)}
    if flat.get(("train", "schedule")) == "constant":
        flat.pop(("train", "steps"), None)
    return {".".join(name): value for name, value in flat.items()}


def _flat(values: dict[str, Any], place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, (*place, key))
        elif value is not None:
            yield (*place, key), value


def _free(name: tuple[str, ...]) -> bool:
    table = name[0]
    if table in ("teacher", "rollout"):
        return name[-1] in _WHERE
    return table in ("serving", "launch") or (table == "run" and name != ("run", "seed")) or name in _FREE
