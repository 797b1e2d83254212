"""The training loop, on one page. What surrounds it (resuming, signals, alarms, files) is ``session.Session``.

With several ranks the first runs the loop, and the others ``follow`` it.
"""

from __future__ import annotations

import torch

from scope_opd.config import Config
from scope_opd.train.early import Gathering
from scope_opd.train.engines import Engines, Follower, TrainResult
from scope_opd.train.session import Session
from scope_opd.train.step import Learner


def train(
    config: Config,
    engines: Engines,
    *,
    resume: bool = False,
    progress: bool | None = None,
    allow_config_change: bool = False,
) -> TrainResult:
    """Run ``config.train.steps`` steps and leave a run folder at ``config.run.dir``.

    Args:
        config: the resolved config. The trainer acts on ``train``, ``run`` and ``eval.every / at_start / at_end``;
            everything else reached it through ``engines`` and is only put on record.
        engines: see ``Engines``.
        resume: continue from the newest sound checkpoint of the run folder (from the beginning when it has none).
            Without it a run folder that is not empty is refused.
        allow_config_change: resume with other settings than the run had, but for those that its checkpoint depends on.
        progress: True a live display, False plain lines, None live on a terminal and plain lines elsewhere.

    Raises:
        RunFolderError: the folder is occupied, not writable, or belongs to another config.
        RunFailed: an alarm set to "stop", a full disk (exit code 1); state was saved where possible.
        RunInterrupted: SIGINT or SIGTERM; saved at the last completed step (exit code 130 or 143).
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    learner = Learner(engines, config.train)

    with Session(
        config, engines, learner, resume=resume, progress=progress, allow_config_change=allow_config_change
    ) as run:
        run.boundary()
        while run.step < config.train.steps:
            with run.one_step():
                run.publish()
                prompts = engines.schedule.batch(run.step)
                gathering = Gathering(engines, learner, config.train, prompts)
                collected = engines.pipeline.collect(
                    prompts,
                    engines.sampling,
                    step=run.step,
                    policy_version=run.policy_version,
                    on_phase=run.phase,
                    on_progress=run.inside,
                    on_groups=run.early(gathering.early),
                    on_note=run.note,
                )
                with run.update():
                    verdicts, batch = gathering.complete(collected.rollouts)
                    outcome = learner.update(
                        batch,
                        run.lr,
                        begun=gathering.begun,
                        on_phase=run.phase,
                        on_progress=run.inside,
                        before_change=run.before_change,
                    )
                run.log(collected, verdicts, batch, outcome)
            run.boundary()
        return run.finish()


def follow(config: Config, engines: Follower) -> None:
    """What every rank but the first does of a run: its share of whatever rank 0 asks, until that has ended.

    Args:
        config: rank 0's own.
        engines: see ``Follower``.

    Raises:
        RunFailed: rank 0, or another rank, failed; the line says which and why.
        Exception: what this rank's own work raised.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.run.seed)
    learner = Learner(engines, config.train)
    learner.ranks.follow()
