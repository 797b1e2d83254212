r"""The benchmarks and training sets by name: where they come from, how many rows they have, how they are judged.

One entry of ``TABLE`` a data set; what its fields mean stands with ``Benchmark``, how a row becomes a problem and a
gold answer in ``adapters``. Row counts and revisions were compared with the sources named in ``checked``: "card", the
data set's card, viewer or commit page on the hub; "projects", public projects that pin this revision or count these
rows; "copy", the local copy whose bytes have the hash given.

Not covered: reading the data (``loading``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scope_opd.evaluate import adapters
from scope_opd.evaluate.adapters import Adapted

MATH_SUFFIX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
"""Appended to every maths problem unless another suffix is asked for: the form that the verifier looks for first."""
CODE_SUFFIX = "\n\nThink it through, then give the whole solution in Python in one ```python code block."
MAX_TOKENS = 4096
"""Response tokens where neither an option nor the preset says."""
ZOO_MAX_TOKENS = 64
"""The longest gold response of the zoo's task has 63 tokens."""

Role = Literal["benchmark", "training"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A data set by name.

    Attributes:
        name: what ``--benchmark`` says.
        hub, subset, split: the data set on the hub; ``hub`` None: not from the hub.
        revision: a commit of the hub's repository; None where none is known, and then what it resolves to is recorded.
        rows: of that split; None where not known, and then any number is taken.
        adapt: from a row of the hub's layout or of the local copy's to id, problem and gold answer.
        sha256: of the bytes of the local copy that the tests read; None where there is none.
        copy_rows: of the local copy, where it differs from ``rows``.
        suffix: appended to each problem.
        max_tokens: response tokens unless an option or a preset says otherwise.
        verifier: "answers" (maths or code by the shape of the gold answer) or "zoo".
        role: what it is for: "training" sets are named in configs and data commands, not evaluated by default.
        checked: what the rows and the revision were compared with.
    """

    name: str
    hub: str | None
    subset: str | None
    split: str
    revision: str | None
    rows: int | None
    adapt: Callable[[Mapping[str, Any], int], Adapted]
    sha256: str | None = None
    copy_rows: int | None = None
    suffix: str = MATH_SUFFIX
    max_tokens: int = MAX_TOKENS
    verifier: Literal["answers", "zoo"] = "answers"
    role: Role = "benchmark"
    checked: str = ""

    @property
    def source(self) -> str:
        """The hub's data set as ``scope_opd.data`` names it: ``hf:OWNER/NAME?subset=..&split=..&revision=..``."""
        parts = {"subset": self.subset, "split": self.split, "revision": self.revision}
        query = "&".join(f"{key}={value}" for key, value in parts.items() if value is not None)
        return f"hf:{self.hub}?{query}"


# fmt: off
_ENTRIES = (
    Benchmark("aime24", "HuggingFaceH4/aime_2024", None, "train", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
              30, adapters.aime, "5126362d4a3c5339019c2be15c54e3aae880b278005bd61829bcbbd8af18001c",
              checked="rows: card, copy; revision: card, projects"),
    Benchmark("aime25", "math-ai/aime25", None, "test", "563bb8404243c5f09de6ec262f2db674fe5bce9b",
              30, adapters.aime, "a064406e4f5426e8003803dc346bdf89427cf4c30650dfdd541b34825fe76c42",
              checked="rows: projects, copy; revision: projects"),
    Benchmark("amc23", "math-ai/amc23", None, "test", "80815d37005feb82cd7f8fbc6901d5d3eff43057",
              40, adapters.plain, "75fea9eb33521673fa291cc97c6072361fb96d87c5b10f097f95c62600cfebec",
              checked="rows: projects, copy; revision: projects"),
    Benchmark("math500", "HuggingFaceH4/MATH-500", None, "test", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
              500, adapters.plain, "cbba8b1aec8b4f3f9118d75ede1a69b219333da6f64b8f823383244d14cd2779",
              checked="rows: projects, copy; revision: projects"),
    Benchmark("minerva", "math-ai/minervamath", None, "test", "ee46ddc498933b1977577953250ca5c66be64f96",
              272, adapters.plain, "40821c2b604cb018f6ded396285d776ad7e09ee4ad8919554b24729a70b1ebf2",
              checked="rows: card, copy; revision: card, projects"),
    # The copy that most projects use (from Qwen2.5-Math) has one row more than the authors' own on the hub.
    Benchmark("olympiadbench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", None,
              674, adapters.olympiadbench, "fe1a34850514bf55ca806d1fb45e7d33685a70b813b7192f35b4f58aaa17d861", 675,
              checked="rows: card, copy; revision: none known"),
    Benchmark("gsm8k", "openai/gsm8k", "main", "test", "740312add88f781978c0658806c59bc2815b9866",
              1319, adapters.gsm8k, "ea2761bdef811604c7abbec2efc4147faa17ee931ebc7bf1475271cf9ae57f07",
              checked="rows: projects, copy; revision: projects"),
    Benchmark("humaneval", "openai/openai_humaneval", None, "test", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
              164, adapters.humaneval, "f72980f4b77d5b986a517c9ecd8c788b962901c1f9ff5506cb87711443bbff98",
              suffix=CODE_SUFFIX, checked="rows: card, copy; revision: card, projects"),
    # The original repository needs its own loading script, which `datasets` no longer runs; this is its parquet copy.
    Benchmark("livecodebench", "lighteval/code_generation_lite", "release_v6", "test", None,
              1055, adapters.livecodebench, suffix=CODE_SUFFIX, checked="rows: card; revision: none known"),
    # Problems of late 2024 and early 2025 with tests; those that need a checker of their own are left out and counted.
    Benchmark("codeforces", "open-r1/codeforces", "verifiable", "test", "fbe3f6e903ee854eec2e69e9d96d0306cde59baf",
              None, adapters.codeforces, suffix=CODE_SUFFIX, checked="rows: not known; revision: card, one project"),
    Benchmark("zoo", None, None, "heldout", None, 400, adapters.plain, suffix="", max_tokens=ZOO_MAX_TOKENS,
              verifier="zoo", checked="rows: shipped with the package"),
    # Later versions of the card say 103022 rows.
    Benchmark("deepmath", "zwhe99/DeepMath-103K", None, "train", "0406dc9d807ab2bfe11423c84468a234c8be18c1",
              103110, adapters.deepmath, role="training", checked="rows: card at that revision"),
    Benchmark("taco", "BAAI/TACO", "ALL", "train", None, 25443, adapters.taco, suffix=CODE_SUFFIX, role="training",
              checked="rows: card; subset: one project; revision: none known"),
)
# fmt: on
TABLE: Mapping[str, Benchmark] = {entry.name: entry for entry in _ENTRIES}


def custom(name: str) -> Benchmark:
    """A benchmark of the user's own: columns problem and answer (and id), maths or code by each answer's shape."""
    return Benchmark(name, None, None, "", None, None, adapters.as_it_is)


def is_own(benchmark: Benchmark) -> bool:
    """Whether a benchmark is the user's own rather than one of the table."""
    return benchmark.name not in TABLE
