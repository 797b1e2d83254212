"""Everything around the algorithm: the run folder, resuming, signals, alarms, trackers, what is shown and saved.

A step is *half done* from the first change of its weights until its row is logged; signals wait for the end of that
stretch, and no checkpoint is ever taken inside it. So what is saved is always a step boundary, and what was in flight
is done again. Evaluation belongs to a boundary, not to a step: a run killed while evaluating evaluates again.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any

import torch
import transformers

from scope_opd.config import Config
from scope_opd.errors import DataError, RunFailed
from scope_opd.pipeline import Collected, GroupsHook
from scope_opd.tracking import Tracker, open_trackers
from scope_opd.tracking.base import RunDescription, numbers
from scope_opd.train.alarms import Alarms
from scope_opd.train.batch import Batch
from scope_opd.train.checkpoint import Checkpoint, checkpoint_name
from scope_opd.train.engines import Engines, TrainResult
from scope_opd.train.export import export_model
from scope_opd.train.metrics import rollout_rows, step_metrics, timeline_row
from scope_opd.train.optim import lr_at
from scope_opd.train.progress import Display, open_display
from scope_opd.train.runfolder import RunFolder
from scope_opd.train.saving import Saving
from scope_opd.train.shards import rng_state
from scope_opd.train.signals import Interrupted, RunInterrupted, Signals
from scope_opd.train.step import Learner, Outcome
from scope_opd.types import Rollout

# Entries of an evaluation's row that say how it was taken, not how it came out.
_NO_FIGURES = {"step", "policy_version", "temperature", "problems", "n", "sampling"}


class Session:
    """One sitting of a run, as a context manager around the loop.

    Attributes:
        step: steps completed.
        policy_version: optimiser steps taken (a step left out by NaN takes none, several updates a batch several).
    """

    def __init__(
        self,
        config: Config,
        engines: Engines,
        learner: Learner,
        *,
        resume: bool,
        progress: bool | None,
        allow_config_change: bool = False,
    ) -> None:
        self.config, self.engines, self.learner = config, engines, learner
        self.step = self.policy_version = 0
        self.timeline = engines.pipeline.timeline
        self._evaluated = -1
        self._sync_s = 0.0
        self._asleep = False
        self._half_done = False
        self._resume, self._allow = resume, allow_config_change
        self._alarms = Alarms(config.run.alarms, weights_use_tau=engines.weights_use_tau)
        self._signals = Signals()
        self._trackers: list[Tracker] = []
        self._last_row: dict[str, Any] = {}
        self._rng: dict[str, Any] = {}
        self._display: Display = open_display(progress, steps=config.train.steps)
        self._folder: RunFolder
        self._saving: Saving

    # --- opening and closing -----------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        self._folder = RunFolder.open(self.config.run.dir, resume=self._resume)
        self._saving = Saving(self.config, self.engines, self.learner.shards, self._folder)
        try:
            self._start()
        except BaseException:
            self._close()
            raise
        self._signals.__enter__()
        self.learner.ranks.shield = self._signals.shielded
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Interrupted):
                self._display.note(f"{error}: saving step {self.step} (a second one ends the process at once)")
                self._save(wait=True)
                raise RunInterrupted(error.number, self.step, self.config.run.dir) from None
            if isinstance(error, Exception):
                with suppress(RunFailed):  # the error at hand is the one to tell; the checkpoint before it stands
                    self._saving.settle(wait=True)
                with suppress(RunFailed):
                    if not self._half_done and self.step > max(self._saving.step, 0):
                        self._save(wait=True)
        finally:
            self._saving.abandon()
            self.learner.ranks.shield = nullcontext
            self._signals.__exit__(None, None, None)
            self._close()

    def _close(self) -> None:
        try:
            self.engines.pipeline.close()
            for tracker in self._trackers:
                try:
                    tracker.close()
                except Exception as error:  # another's library; the run's own files are complete without it
                    with suppress(RunFailed):
                        self._say("warning", f"tracker {tracker.name} did not close: {type(error).__name__}: {error}")
        finally:
            self._display.close()
            self._folder.close()

    def _start(self) -> None:
        config, folder, damage = self.config, self._folder, list[str]()
        found, changes = self._saving.find(damage.append, allow=self._allow) if self._resume else (None, [])
        best = self._saving.best.found
        folder.cut(found.trainer["offsets"] if found is not None else {})
        first = self.engines.schedule.batch(0)
        folder.begin(
            config,
            {
                "method": config.objective.method,
                "seed": config.run.seed,
                "model": config.model.path,
                "teacher": config.teacher.shown,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": str(self.learner.device),
                "data": self.engines.data,
                "first_prompt": first[0].text if first else "",
                **({} if best is None else {"best": best}),
            },
            run_id=found.trainer["run_id"] if found is not None else None,
        )
        torch.manual_seed(config.run.seed)  # nothing of ours draws from it, but a model's own code might
        if found is not None:
            self._restore(found)
        self._rng = rng_state()
        self._display.begin(self.step)
        for line in damage:
            self._say("warning", line)
        if found is not None:
            self._saving.note()  # what was told of it was cut off with all that came after it
        if changes:
            self._say("config_change", f"accepted: {', '.join(changes)}")
        if self._resume:
            whence = f"step {self.step}" if found is not None else "the beginning (no checkpoint yet)"
            self._say("resume", f"resumed from {whence}")
        for line in self._saving.changes(found) if found is not None else ():
            self._say("warning", line)
        self._trackers = open_trackers(
            config.run.trackers,
            RunDescription(
                folder=folder.path,
                project=config.run.project,
                name=folder.path.name,
                run_id=folder.info["run_id"],
                config=config.model_dump(mode="json"),
                step=self.step,
            ),
        )
        # Trackers drop what an earlier sitting logged from this step on: of that, this boundary's evaluation stays.
        self._track_evaluation([row for row in folder.rows("eval") if row["step"] == self.step])

    def _restore(self, found: Checkpoint) -> None:
        self._saving.load(found)
        trainer = found.trainer
        self._alarms.load_state(trainer["alarms"])
        self.step, self.policy_version = found.step, trainer["policy_version"]
        self._evaluated, self._last_row = trainer["evaluated"], trainer["last_row"]

    # --- inside a step -----------------------------------------------------------------------------------------------

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """The stretch of one step. Weights that change inside it are logged before a signal is heeded."""
        self._began = self.timeline.now()
        with _wrong_data_fails_the_run(), ExitStack() as self._stretch:
            yield
            assert not self._half_done, "a step whose weights changed was not logged"

    def publish(self) -> None:
        """Samplers that hold a copy of the student's weights get them as they are now, plain copies on ranks first.

        Raises:
            RunFailed: none of them could be brought there.
        """
        if not self._copied:
            return
        self.phase("sync")
        began = self.timeline.now()
        with self.timeline.busy("sync", self.step):
            self.learner.refresh(self.policy_version)
            if self.engines.publisher is not None:
                self.engines.publisher.publish(self.policy_version)
        self._sync_s += self.timeline.now() - began
        self._asleep = False

    @property
    def _copied(self) -> bool:
        """Whether samplers decode with a copy of what is trained."""
        return self.engines.publisher is not None or self.learner.ranks.world > 1

    @contextmanager
    def update(self) -> Iterator[None]:
        """A stretch of the update's own work. Generation is over: samplers on the trainer's device make room."""
        if self.engines.publisher is not None and not self._asleep:
            self.engines.publisher.release()
            self._asleep = True
        with self.timeline.busy("update", self.step):
            yield

    def early(self, hook: GroupsHook | None) -> GroupsHook | None:
        """A hook for groups that are complete while the teacher still works; its time is the update's."""
        if hook is None:
            return None

        def begin(groups: Sequence[Sequence[Rollout]]) -> None:
            with self.update():
                hook(groups)

        return begin

    def phase(self, name: str) -> None:
        """A new phase begins: status.json and the display learn of it."""
        self._signals.poll()
        self._folder.phase(self.step, name)
        self._display.phase(self.step, name)

    def note(self, line: str) -> None:
        """Something worth knowing at once: a line and an event."""
        self._say("warning", line)

    def inside(self, done: int, total: int) -> None:
        """Progress inside the phase."""
        self._signals.poll()
        self._display.inside(done, total)

    @property
    def lr(self) -> float:
        return lr_at(self.step, self.config.train)

    def before_change(self) -> None:
        """From here to the end of ``log`` the step is half done."""
        self._stretch.enter_context(self._signals.shielded())
        self._half_done = True

    def log(
        self,
        collected: Collected,
        verdicts: Sequence[bool | None],
        batch: Batch,
        outcome: Outcome,
    ) -> None:
        """Write the step's rows and complete it; then let the alarms ring.

        Raises:
            RunFailed: an alarm set to "stop", or a row that could not be written.
        """
        if not self._half_done:
            self.before_change()
        rollouts, now = collected.rollouts, self.timeline.now()
        row = step_metrics(
            step=self.step, policy_version=self.policy_version, lr=self.lr, rollouts=rollouts, verdicts=verdicts,
            stats=collected.stats, batch=batch, outcome=outcome,
            update_s=self.timeline.busy_s("update", self._began, now),
            sampled_by_student=self.engines.surrogate.sampled_by == "student",
            step_s=now - self._began, sync_s=self._sync_s if self._copied else None,
            teacher_exposed_s=self.timeline.exposed("teacher", self._began, now),
            teacher_busy_s=self.timeline.busy_s("teacher", self._began, now),
        )  # fmt: skip
        dumped = rollout_rows(
            rollouts, outcome, step=self.step, limit=self.config.run.rollouts_logged, tokenizer=self.engines.tokenizer
        )
        culprit = None if outcome.broken is None else rollouts[outcome.broken].id
        rings = self._alarms.check(
            row,
            broken="the gradient is not finite, though every loss is" if culprit is None
            else f"the loss of rollout {culprit!r} is not finite",
        )  # fmt: skip
        self._folder.append("rollouts", dumped)
        for line in collected.stats.notes:
            self._say("warning", line)
        for alarm in rings:
            more = {"rollout": culprit} if alarm.name == "nan" else {}
            self._say("alarm", alarm.message, name=alarm.name, action=alarm.action, **more)
        self._folder.append("timeline", [timeline_row(self.timeline, self.step, self._began, now)])
        self._folder.append("metrics", [row])
        self.timeline.forget(self.step)
        self._sync_s = 0.0
        self.step += 1
        self.policy_version += outcome.updates
        self._last_row, self._rng = row, rng_state()
        self._half_done = False
        self._display.step(row)
        for tracker in self._trackers:
            tracker.log({key: value for key, value in numbers(row).items() if key != "step"}, row["step"])
        for alarm in rings:
            if alarm.action == "stop":
                raise RunFailed(
                    f"alarm {alarm.name} at step {row['step']}: {alarm.message}",
                    "",
                    f'saved; change the config, or set run.alarms.{alarm.name} = "warn" and continue with --resume',
                )

    # --- at a step boundary ------------------------------------------------------------------------------------------

    def boundary(self) -> None:
        """Evaluate and save where the config says so after ``step`` steps.

        Raises:
            RunFailed: the checkpoint that was being written meanwhile could not be.
        """
        self._saving.settle(wait=False)
        if self._evaluation_due() and self._evaluated < self.step:
            self.publish()
            self.phase("evaluation")
            self._evaluate()
        if self._saving.due(self.step):
            self._save()

    def finish(self) -> TrainResult:
        """The last checkpoint and the export."""
        folder, run = self._folder, self.config.run
        with self._signals.shielded():
            self._save(wait=True)
            exported = folder.path / "export" if run.export else None
            if exported is not None:
                self.phase("saving")
                export_model(
                    exported, self.learner.model, self.engines.tokenizer, config=self.config, steps=self.step,
                    metrics=self._last_row, evaluations=folder.rows("eval"), weights=self.learner.whole(),
                )  # fmt: skip
            self.phase("done")
        return TrainResult(
            folder=folder.path,
            steps=self.step,
            metrics=self._last_row,
            evaluations=folder.rows("eval"),
            checkpoint=folder.path / "checkpoints" / checkpoint_name(self.step),
            export=exported,
        )

    def _evaluation_due(self) -> bool:
        evaluation = self.config.eval
        if self.engines.evaluator is None:
            return False
        at_start = self.step == 0 and evaluation.at_start
        at_end = self.step == self.config.train.steps and evaluation.at_end
        regular = bool(evaluation.every) and self.step > 0 and self.step % evaluation.every == 0
        return at_start or at_end or regular

    def _evaluate(self) -> None:
        assert self.engines.evaluator is not None
        with _wrong_data_fails_the_run() if self.step else nullcontext():
            answer = self.engines.evaluator(self.step, self.policy_version)
            if inspect.isawaitable(answer):
                answer = asyncio.run(_wait(answer))
        rows = [{"step": self.step, **row} for row in answer]
        with self._signals.shielded():
            self._folder.append("eval", rows)
            self._evaluated = self.step
            self._rng = rng_state()
            self._saving.look(self.step, rows)
            self._track_evaluation(rows)

    def _track_evaluation(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            figures = numbers({key: value for key, value in row.items() if key not in _NO_FIGURES})
            values = {f"eval/T{row.get('temperature', 0):g}/{key}": value for key, value in figures.items()}
            for tracker in self._trackers:
                tracker.log(values, self.step)

    def _save(self, *, wait: bool = False) -> None:
        """A checkpoint of the boundary at hand, unless it is there already or on its way.

        Args:
            wait: until it is there, as without ``run.async_checkpoints``.

        Raises:
            RunFailed: it, or the one before it, could not be written.
        """
        assert not self._half_done, "no checkpoint of a half-done step"
        saving = self._saving
        with self._signals.shielded():
            saving.settle(wait=wait or saving.step != self.step)
            if saving.step == self.step:
                return
            self.phase("saving")
            facts = {
                "policy_version": self.policy_version,
                "evaluated": self._evaluated,
                "alarms": self._alarms.state(),
                "last_row": self._last_row,
            }
            saving.save(self.step, facts, self._rng)
            saving.settle(wait=wait or not self.config.run.async_checkpoints)

    def _say(self, kind: str, message: str, **more: Any) -> None:
        self._folder.event(self.step, kind, message, **more)
        self._display.note(f"{kind}: {message}")


@contextmanager
def _wrong_data_fails_the_run() -> Iterator[None]:
    """What a verifier or a method finds wrong once training goes on is the run's failure, not the user's."""
    try:
        yield
    except DataError as error:
        raise RunFailed(error.found, error.expected, error.remedy) from error


async def _wait(answer: Any) -> Any:
    return await answer
