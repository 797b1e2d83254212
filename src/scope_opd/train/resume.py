"""What a run folder must hold before ``--resume`` may go on with it, or start it over. Everything here only reads."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scope_opd.config import Config, validate_config
from scope_opd.errors import RunFolderError
from scope_opd.records import iter_jsonl
from scope_opd.train.checkpoint import read_json

_NEW_RUN = "start a new run.dir"
_FREE = {("verify", "workers"), ("train", "shard"), ("train", "collective_timeout_s")}
"""Settings on which no number of a run depends, but for its last bits."""
_WHERE = {
    "base_urls", "api_key_env", "api_key_file", "ca_bundle", "connect_timeout_s", "read_timeout_s", "deadline_s",
    "max_concurrency", "allow_unprotected_routes", "sync", "sync_dir", "sync_host", "colocated",
}  # fmt: skip
"""Of [teacher] and [rollout]: where servers are and how they are reached. Servers may move; that they still serve the
same teacher is what fingerprints are for."""


def config_hash(config: Config) -> str:
    """SHA-256 of what a resumed run must keep of its config."""
    return hashlib.sha256(json.dumps(_fixed(config.model_dump(mode="json")), sort_keys=True).encode()).hexdigest()


_NEEDED = ("model.", "train.optimizer", "train.param_dtype")
"""Settings without which weights or states of a checkpoint fit nothing: they stay, whatever is allowed."""


def refuse_other_config(config: Config, saved: dict[str, Any], step: int, *, allow: bool = False) -> list[str]:
    """A resumed run keeps its config, but for ``run.*`` (the seed excepted), ``verify.workers``, the addresses of its
    servers and how they are started and, if lr does not depend on it, steps.

    A key that the saved config does not know (written by an older version) counts as its default.

    Args:
        config: of the run that wants to go on.
        saved: the config that it had.
        step: steps done.
        allow: accept other settings too, but for those that the checkpoint itself depends on.

    Returns:
        The differences that were accepted, "train.lr = 0.001 (was 0.01)".

    Raises:
        RunFolderError: the configs differ, naming every difference; or the run has done more steps than are asked for.
    """
    defaults = validate_config({}).model_dump(mode="json")
    filled = {table: {**values, **saved.get(table, {})} for table, values in defaults.items()}
    now, before = _fixed(config.model_dump(mode="json")), _fixed({**saved, **filled})
    names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    shown = {name: f"{name} = {now.get(name)!r} (was {before.get(name)!r})" for name in names}
    if names and not allow:
        raise RunFolderError(
            f"another config than that of the run: {', '.join(shown.values())}",
            "the same config",
            f"set them back, {_NEW_RUN}, or accept them with --allow-config-change",
        )
    if needed := [line for name, line in shown.items() if name.startswith(_NEEDED)]:
        raise RunFolderError(
            f"the checkpoint cannot be used with another {', '.join(needed)}",
            "what it was saved with",
            f"set it back, or {_NEW_RUN}",
        )
    if config.train.steps < step:
        raise RunFolderError(
            f"train.steps = {config.train.steps} but the run has done {step}", f"at least {step}", "raise train.steps"
        )
    return list(shown.values())


def refuse_other_models(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, tolerance: float, accepted: Sequence[str]
) -> None:
    """A resumed run goes on with the teacher, and from the student, that it began with, even under the same path.

    Args:
        saved: ``Engines.fingerprints`` of the checkpoint's run.
        now: those of the run that wants to go on.
        tolerance: nats a token by which the log-probs of one served model may differ.
        accepted: differences of the config that were accepted; with one of [teacher] the teacher may be another.

    Raises:
        RunFolderError: one of them is another; what either side does not know is not compared.
    """
    for role in ("student", "teacher"):
        was, found = saved.get(role), now.get(role)
        if not was or not found or any(line.startswith(f"{role}.") for line in accepted):
            continue
        if gap := _difference(was, found, tolerance):
            raise RunFolderError(
                f"the {role} is not the one that the run began with ({gap})",
                "the same weights",
                f"put them back, or {_NEW_RUN}",
            )


def _difference(was: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> str:
    """What tells two fingerprints of a model apart; "" where nothing does."""
    if was.keys() != now.keys():
        return "in process now" if "weights" in now else "behind servers now"
    if "weights" in was:
        return "" if was == now else f"digest {now['weights'][:12]}, at the start {was['weights'][:12]}"
    for route, before in was["served"].items():
        answer = now["served"].get(route)
        if answer is None or answer["tokens"] != before["tokens"]:
            continue  # another route, or another fixed text: nothing to compare
        pairs = list(zip(answer["logprobs"], before["logprobs"], strict=False))
        gap = sum(abs(a - b) for a, b in pairs) / max(len(pairs), 1)
        if gap > tolerance:
            return f"log-probs of a fixed text differ by {gap:.3g} a token in the mean"
    return ""


def refuse_other_data(folder: Path, data: Mapping[str, Mapping[str, Any]], *, accepted: Sequence[str] = ()) -> None:
    """A resumed run goes on with the very problems it began with, even where their file kept its name.

    Args:
        folder: the run folder.
        data: as ``Engines.data``.
        accepted: differences of the config that were accepted; a data set named there may be another.

    Raises:
        RunFolderError: the bytes of a data file, or the commit of a hub data set, are not those of run.json.
    """
    before = read_json(folder / "run.json").get("data")
    for name, found in data.items():
        if any(line.startswith(f"data.{name} = ") for line in accepted):
            continue
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
    before = read_json(folder / "run.json").get("data")
    found = {}
    for name, source in sources.items():
        known = before.get(name) if isinstance(before, dict) else None
        if isinstance(known, dict) and known.get("source") == source and isinstance(known.get("revision"), str):
            found[name] = known["revision"]
    return found


def refuse_to_start_over(folder: Path, config: Config, damage: Sequence[str], *, allow: bool = False) -> list[str]:
    """Without a checkpoint only a run that was cut before its first one may start at the beginning again.

    Args:
        folder: the run folder; nothing in it, or a run without a sound checkpoint.
        config: of the run that wants to go on.
        damage: one line for each checkpoint that is there and cannot be used.
        allow: as for ``refuse_other_config``.

    Returns:
        As ``refuse_other_config``.

    Raises:
        RunFolderError: starting over would erase something that no kill before the first checkpoint leaves.
    """
    aside = sorted(path.name for path in (folder / "checkpoints").glob("damaged-*"))
    if damage or aside:
        found = "; ".join(damage) or f"only damaged checkpoints are left ({', '.join(aside)})"
        raise RunFolderError(f"{folder}: {found}", "a sound checkpoint", f"restore one from a copy, or {_NEW_RUN}")
    info, status = read_json(folder / "run.json"), read_json(folder / "status.json")
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
        return []  # a new folder
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{folder / 'config.toml'}: {error}", "the run's config", f"mend it, or {_NEW_RUN}"
        ) from None
    return refuse_other_config(config, saved, 0, allow=allow)


def _passed_a_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was there once: the event is written when it is."""
    path = folder / "events.jsonl"
    return path.exists() and any(row.get("kind") == "checkpoint" for _, row in iter_jsonl(path))


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
