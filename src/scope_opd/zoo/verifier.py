"""The zoo's verifier: the strict running-sum check behind the ``Verifier`` Protocol.

Not covered: truncation. A response cut off by max_tokens is judged by its text like any other.
"""

from __future__ import annotations

from scope_opd.types import Prompt, Rollout, Verdict
from scope_opd.zoo.task import check_work


class RunningSumVerifier:
    """Reward 1.0 if every item is used once, every running total and the final answer are right; otherwise 0.0.

    A right answer over wrong work earns nothing. No text can make it raise, and it always reaches a verdict; a
    malformed *problem* raises DataError, because then the data are not the zoo's.
    """

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        """Judge ``rollout.text`` against ``prompt.problem`` and ``prompt.answer``; takes microseconds."""
        correct, extracted, reason = check_work(prompt.problem, str(prompt.answer).strip(), rollout.text)
        return Verdict(correct=correct, reward=float(correct), extracted=extracted, reason=reason)
