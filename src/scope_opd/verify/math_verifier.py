"""The maths verifier: the fast rules in this process, everything else in worker processes with hard limits.

The verdict is a function of (prediction, gold, problem, settings): the two ways agree where both answer, and neither
depends on order or on the number of workers. One thing is not in that function's power: an answer whose cost lies at
its limit may be judged on one machine and have no verdict on another.

Not covered: the rules themselves (``scope_opd.verify.math``), code (``scope_opd.verify.code``).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from scope_opd.errors import DataError
from scope_opd.gold import MathGold, is_code, parse_math_gold
from scope_opd.types import Prompt, Rollout, Verdict
from scope_opd.verify.math.extract import opened_by
from scope_opd.verify.math.fast import judge_fast
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.workers import WorkerPool

FAST_CHARACTERS = 200_000
"""Longer texts are read by a worker, under its limit: nothing that a model wrote may hold up this process."""


class MathVerifier:
    """Judges maths answers.

    Args:
        settings: how (scope, fall-back, tolerance); None: the defaults.
        timeout_s: CPU seconds an answer at most; beyond it there is no verdict.
        workers: judging processes at most; None: one for each core. They start when the first answer needs them.
    """

    def __init__(
        self, settings: MathSettings | None = None, *, timeout_s: float = 5.0, workers: int | None = None
    ) -> None:
        self.settings = settings or MathSettings()
        self.pool = WorkerPool(cpu_s=timeout_s, workers=workers)

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        """Judge ``rollout.text`` against ``prompt.answer``; a thinking block that the prompt opened counts as opened.

        Raises:
            DataError: a gold answer that is not one, with the prompt's id.
            ScopeError: no judging process could be started.
        """
        where = f"prompt {prompt.id!r}"
        text = opened_by(prompt.text) + rollout.text
        verdict = self.submit(text, prompt.answer, prompt.problem, where=where)
        return verdict.result() if verdict.done() else await asyncio.wrap_future(verdict)

    def judge(
        self, prediction: str, answer: Any, problem: str | None = None, settings: MathSettings | None = None
    ) -> Verdict:
        """Judge one text, and wait for it. Arguments and errors as for ``submit``."""
        return self.submit(prediction, answer, problem, settings).result()

    def submit(
        self,
        prediction: str,
        answer: Any,
        problem: str | None = None,
        settings: MathSettings | None = None,
        *,
        where: str = "an answer",
    ) -> Future[Verdict]:
        """Start to judge one text.

        Args:
            prediction: the response, or with ``settings.form = "answer"`` the answer itself.
            answer: the gold answer in any of the maths forms of ``scope_opd.gold``.
            problem: its text, which may hold the choices that an answer's letter names.
            settings: in place of the verifier's own.
            where: what to call the gold answer in a complaint.

        Returns:
            The verdict to come; it is there already where the fast rules know it.

        Raises:
            DataError: a gold answer that is none.
        """
        gold = read_gold(answer, where)
        chosen = settings or self.settings
        short = len(prediction) <= FAST_CHARACTERS
        known = judge_fast(prediction, gold, problem, chosen) if short else None
        if known is None:
            return self.pool.submit(prediction, gold, problem, chosen)
        future: Future[Verdict] = Future()
        future.set_result(known)
        return future

    def close(self) -> None:
        """End the judging processes; may be called twice."""
        self.pool.close()


def read_gold(answer: Any, where: str) -> MathGold:
    """A maths answer, read.

    Raises:
        DataError: it is none, or code; ``where`` names it.
    """
    if is_code(answer):
        found = f"{where}: the answer is code (format {answer['format']!r})"
        raise DataError(found, "a maths answer", "use the verifier for code, or auto")
    try:
        return parse_math_gold(answer)
    except ValueError as error:
        raise DataError(f"{where}: {error}", remedy="mend the data") from None
