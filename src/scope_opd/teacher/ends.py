"""The token that ends a response, where the teacher ends its own with another one.

Qwen3-1.7B-Base ends with ``<|endoftext|>`` and Qwen3-8B with ``<|im_end|>``: to such a teacher the student's end token
is an odd word in mid-sentence, and its log-prob there says nothing of whether the response should end. Under ``map``
the teacher is asked for the log-prob of its own end token in that place; under ``exclude`` the place is masked besides,
so that nothing uses that number. Not covered: which tokens these are (``cli.ends``), end tokens in mid-response.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from scope_opd.types import Rollout


class EndTokens:
    """What a teacher makes of the last token of a finished response.

    Args:
        rule: "map" or "exclude".
        student: the tokens that end a response of the student's.
        teacher: those that end one of the teacher's, at least one.
        own: the one of ``teacher`` that takes the place of an end token of the student's alone.
    """

    def __init__(
        self, rule: Literal["map", "exclude"], student: Collection[int], teacher: Collection[int], own: int
    ) -> None:
        assert own in teacher, "the teacher's own end token is one of its end tokens"
        self.rule, self.own = rule, own
        self.foreign = frozenset(student) - frozenset(teacher)

    def applies(self, rollout: Rollout) -> bool:
        """Whether a response is finished and its last token ends one for the student and not for the teacher."""
        return rollout.finish_reason == "stop" and bool(rollout.token_ids) and rollout.token_ids[-1] in self.foreign

    def scored(self, rollout: Rollout) -> list[int]:
        """The response as the teacher is asked to score it, of the same length."""
        return [*rollout.token_ids[:-1], self.own] if self.applies(rollout) else rollout.token_ids

    def mask(self, rollout: Rollout) -> list[int] | None:
        """See ``Rollout.teacher_mask``."""
        if self.rule == "map" or not self.applies(rollout):
            return None
        return [1] * (len(rollout.token_ids) - 1) + [0]
