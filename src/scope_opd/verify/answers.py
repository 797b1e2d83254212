"""Maths and code behind one ``Verifier``: each answer goes where its shape says (``scope_opd.gold``).

Not covered: the zoo's task and the comparison of boxes as text, which a config names by themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from scope_opd.config import VerifyConfig
from scope_opd.errors import ConfigError, DataError
from scope_opd.gold import is_code, parse_tolerance
from scope_opd.types import Prompt, Rollout, Verdict
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.math_verifier import MathVerifier

if TYPE_CHECKING:
    from scope_opd.verify.code.verifier import CodeVerifier

AUTO = 'set data.verifier = "auto", which judges both'


def math_settings(settings: VerifyConfig) -> MathSettings:
    """What ``[verify]`` says of maths answers.

    Raises:
        ConfigError: a tolerance that is none.
    """
    try:
        tolerance = None if settings.tolerance is None else parse_tolerance(settings.tolerance)
    except ValueError as error:
        raise ConfigError(f"verify.{error}", remedy="mend it, or leave it out") from None
    return MathSettings(scope=settings.scope, fallback=settings.fallback, tolerance=tolerance)


def build_answer_verifier(settings: VerifyConfig, kind: Literal["auto", "math", "code"] = "auto") -> AnswerVerifier:
    """The verifier of ``[verify]``; no process starts before an answer needs one.

    Raises:
        ConfigError: a setting that is wrong.
    """
    maths = math_settings(settings)

    def code() -> CodeVerifier:
        from scope_opd.verify.code.verifier import CodeLimits, CodeVerifier

        limits = CodeLimits(timeout_s=settings.code_timeout_s, memory_mb=settings.code_memory_mb)
        return CodeVerifier(
            limits, workers=settings.workers, allow_unsandboxed=settings.allow_unsandboxed, scope=settings.scope
        )

    return AnswerVerifier(
        None if kind == "code" else MathVerifier(maths, timeout_s=settings.timeout_s, workers=settings.workers),
        None if kind == "math" else code,
    )


class AnswerVerifier:
    """Dispatches on the form of the gold answer.

    Args:
        maths: judges maths; None refuses maths answers.
        code: builds what judges code, when the first such answer comes; None refuses code.
    """

    def __init__(self, maths: MathVerifier | None, code: Callable[[], CodeVerifier] | None) -> None:
        self.maths = maths
        self._build_code = code
        self._code: CodeVerifier | None = None
        self._lock = threading.Lock()

    def prepare(self, prompts: Iterable[Prompt]) -> None:
        """Look at the prompts that will come, so that what cannot be judged here is known before anything is loaded.

        Raises:
            DataError: an answer of a kind that this verifier refuses, or code whose tests cannot be read.
            ScopeError: code, and nothing to run it in.
        """
        for prompt in prompts:
            where = f"prompt {prompt.id!r}"
            self._for(prompt.answer, where)
            if is_code(prompt.answer):
                from scope_opd.verify.code.formats import parse_code_answer

                try:
                    parse_code_answer(prompt.answer)
                except ValueError as error:
                    raise DataError(f"{where}: {error}", remedy="mend or drop the row") from None

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        """Judge ``rollout.text`` against ``prompt.answer``.

        Raises:
            DataError: an answer of a kind that is refused, or that is none; with the prompt's id.
        """
        return await self._for(prompt.answer, f"prompt {prompt.id!r}").verify(rollout, prompt)

    @property
    def code(self) -> CodeVerifier:
        """What judges code, built at the first use.

        Raises:
            ScopeError: there is nothing to run it in.
        """
        with self._lock:
            if self._code is None:
                assert self._build_code is not None
                self._code = self._build_code()
            return self._code

    def _for(self, answer: Any, where: str) -> MathVerifier | CodeVerifier:
        if is_code(answer):
            if self._build_code is None:
                raise DataError(f"{where}: the answer is code", "maths (the verifier is math)", AUTO)
            return self.code
        if self.maths is None:
            raise DataError(f"{where}: the answer is not code", "code (the verifier is code)", AUTO)
        return self.maths

    def close(self) -> None:
        """End all processes; may be called twice."""
        if self.maths is not None:
            self.maths.close()
        with self._lock:
            if self._code is not None:
                self._code.close()
