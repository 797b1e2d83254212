"""``scope train``: a config to a run folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from scope_opd.errors import ConfigError, RunFailed
from scope_opd.words import counted

if TYPE_CHECKING:
    from scope_opd.config import Config
    from scope_opd.train.engines import TrainResult

EXAMPLES = """Examples:
  scope train configs/debug.toml
  scope train configs/demo.toml --set objective.tau=0.5 --set train.steps=20
  scope train my.toml --run-dir runs/second --set run.seed=1
  scope train my.toml --resume
  torchrun --nproc-per-node 8 -m scope_opd train my.toml
  scope train my.toml --launcher ray --address auto --set launch.ray.workers=16
"""


def train(
    config: Path,
    /,
    *,
    overrides: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    allow_config_change: Annotated[bool, Parameter(negative="")] = False,
    run_dir: Path | None = None,
    launcher: Literal["ray"] | None = None,
    address: str | None = None,
) -> int:
    """Train a student by the method that a TOML config names.

    Leaves a run folder: the resolved config, metrics.jsonl, rollouts.jsonl,
    eval.jsonl, checkpoints, and export/, the final student in Hugging Face
    layout. Ctrl-C saves and exits; --resume goes on from there, and ends as
    an uninterrupted run would have.

    Parameters
    ----------
    config
        The TOML file; configs/local_pair.toml is one to start from.
    overrides
        TABLE.KEY=VALUE in place of what the file says; may be repeated.
    resume
        Continue the run in the run folder from its newest sound checkpoint.
    allow_config_change
        With --resume: go on with other settings than the run had. The
        differences become an event. Model, optimizer and dtype must stay.
    run_dir
        The run folder, in place of run.dir.
    launcher
        ray: run on workers of a Ray cluster, as [launch.ray] says.
    address
        With --launcher ray: of the cluster, or auto on one of its machines. Without
        it a Ray of this machine alone is started for the run.
    """
    from scope_opd.cli.early import check_early, check_run_folder, eval_source
    from scope_opd.config import load_config

    given = list(overrides or [])
    if run_dir is not None:
        given.append(f'run.dir="{_toml_text(run_dir)}"')
    settings = load_config(config, given)
    if address is not None and launcher is None:
        raise ConfigError(f"--address {address} without --launcher", "both or none", "add --launcher ray")
    if allow_config_change and not resume:
        raise ConfigError("--allow-config-change without --resume", "both or none", "add --resume")
    check_early(settings, [settings.data.train, eval_source(settings)])
    if launcher == "ray":
        from scope_opd.cli.ray_launcher import train_under_ray

        check_run_folder(Path(settings.run.dir), resume=resume)
        return train_under_ray(settings, resume=resume, allow_config_change=allow_config_change, address=address)
    lines = train_rank(settings, resume, allow_config_change=allow_config_change)
    if lines:
        print("\n".join(lines))
    return 0


def train_rank(settings: Config, resume: bool = False, *, allow_config_change: bool = False) -> list[str]:
    """A run, or this process's part of one that several ranks do together (torchrun's, or Ray's environment).

    Args:
        settings: the same on every rank, its names and paths checked already (``check_early``).
        resume, allow_config_change: as for ``train``; rank 0's count.

    Returns:
        What a finished run has to say; nothing on the other ranks.

    Raises:
        ScopeError: of this rank, or the first of another's, which it then names.
    """
    from scope_opd.cli.early import check_run_folder, eval_source

    several = os.environ.get("WORLD_SIZE", "1") != "1"
    folder = Path(settings.run.dir)
    if not several:
        check_run_folder(folder, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        print("loading torch, data and models ...", file=sys.stderr, flush=True)

    from scope_opd.cli.engines import build_engines
    from scope_opd.cli.followers import build_follower
    from scope_opd.cli.inputs import shown_prompt
    from scope_opd.cli.ranks import open_ranks
    from scope_opd.train import loop
    from scope_opd.train.resume import recorded_revisions

    with open_ranks(settings) as ranks, memory_in_one_line():
        if not ranks.leads:
            loop.follow(settings, build_follower(settings, ranks))
            return []
        if several:
            check_run_folder(folder, resume=resume)  # now that the others would hear of it
        sources = {"train": settings.data.train, "eval": eval_source(settings)}
        built = build_engines(settings, recorded_revisions(folder, sources) if resume else None, ranks)
        for warning in built.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        print(f"first prompt: {shown_prompt(built.engines.schedule.batch(0)[0].text)}", file=sys.stderr, flush=True)
        try:
            result = loop.train(settings, built.engines, resume=resume, allow_config_change=allow_config_change)
        finally:
            built.close()
    return outcome(result)


@contextmanager
def memory_in_one_line() -> Iterator[None]:
    """Turns "out of memory", of a GPU or of the machine, into a line with what to lower.

    Raises:
        RunFailed: in place of torch's or Python's own error.
    """
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
        if not known:
            raise
        raise RunFailed(
            f"out of memory: {text[:160] or type(error).__name__}",
            "a step that fits",
            "lower train.max_tokens_per_microbatch, rollout.max_rows or rollout.max_tokens, or set "
            "train.activation_checkpointing; scope doctor estimates",
        ) from None


def outcome(result: TrainResult) -> list[str]:
    """What a finished run has to say."""
    lines = [f"done: {counted(result.steps, 'step')} in {result.folder}"]
    for row in result.evaluations:
        if row.get("step") == result.steps:
            passes = ", ".join(f"Pass@{k} {100 * value:.1f}" for k, value in row["pass@k"].items() if k != "1")
            lines.append(
                f"held out, T={row['temperature']:g}: Avg@{row['n']} {100 * row['avg@k']:.1f}"
                + (f", {passes}" if passes else "")
            )
    if result.export is not None:
        lines.append(f"model: {result.export}")
    lines.append(f"look at it: scope report {result.folder} --out {result.folder}/report.html")
    return lines


def _toml_text(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace('"', '\\"')
