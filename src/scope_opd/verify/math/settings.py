"""What a maths verdict depends on besides the prediction, the gold answer and the problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scope_opd.gold import Tolerance


@dataclass(frozen=True, slots=True)
class MathSettings:
    """Settings of the maths verifier; two equal ones give equal verdicts.

    Attributes:
        form: "response": the final answer must be found in a text; "answer": the text is the answer.
        scope: "after_think": only what follows a closed thinking block counts, and nothing of an unfinished one; "all".
        fallback: without a box, what follows "answer is" (and its kind), else the last number.
        tolerance: for numbers; a gold answer's own wins. None: exact, but for rounding that is stated in the rules.
    """

    form: Literal["response", "answer"] = "response"
    scope: Literal["after_think", "all"] = "after_think"
    fallback: bool = True
    tolerance: Tolerance | None = None
