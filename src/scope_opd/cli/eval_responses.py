"""``scope eval --responses``: from a file of stored responses to what ``eval_command`` runs; no model is loaded.

Not covered: reading the rows (``evaluate.responses``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scope_opd.cli.eval_command import Prepared
from scope_opd.cli.eval_settings import verify_options
from scope_opd.config import Config
from scope_opd.data.dataset import file_sha256
from scope_opd.data.mapping import parse_map
from scope_opd.errors import ConfigError
from scope_opd.evaluate.loading import content_sha256
from scope_opd.evaluate.responses import FIELDS, StoredSampler, read_responses
from scope_opd.evaluate.session import Task
from scope_opd.types import SamplingParams
from scope_opd.verify.answers import build_answer_verifier
from scope_opd.words import counted

_JUDGED_TOGETHER = 64
"""Problems a batch where nothing is sampled."""


def responses_name(path: Path, named: Sequence[str]) -> str:
    """What the results call a file of responses: two models' files are compared under one name."""
    if len(named) > 1 or any("=" in name or not name.strip() for name in named):
        raise ConfigError(
            f"--benchmark {' --benchmark '.join(named)} with --responses", "one name without a path", "mend it"
        )
    return named[0].strip() if named else path.name.split(".")[0] or "responses"


def from_responses(path: Path, name: str, mapped: Sequence[str], config: Config) -> Prepared:
    """Everything that judging a file of responses needs.

    Raises:
        ScopeError: anything that is wrong with the file, its rows or the settings.
    """
    source = path.expanduser()
    columns = parse_map(mapped, FIELDS)
    found = read_responses(source, columns, name=name)
    sha256 = file_sha256(source)
    verifier = build_answer_verifier(config.verify)
    try:
        verifier.prepare(found.prompts)
    except BaseException:
        verifier.close()
        raise
    counts = {prompt: len(rollouts) for prompt, rollouts in found.rollouts.items()}
    params = SamplingParams(n=max(counts.values()), temperature=1.0, max_tokens=1, stop_token_ids=(), seed=0)
    settings = {
        "source": {"kind": "responses", "responses": str(path), "sha256": sha256, "benchmark": name},
        "columns": columns,
        "verifier": verify_options(config.verify),
    }
    rows = sum(counts.values())
    data = {
        "source": str(path),
        "sha256": sha256,
        "revision": None,
        "content_sha256": content_sha256((prompt.id, prompt.problem, prompt.answer) for prompt in found.prompts),
        "rows": len(found.prompts),
        "partial": False,
    }
    lines = [f"{counted(rows, 'response')} to {counted(len(found.prompts), 'problem')}"]
    if not found.grouped:
        lines.append("note: no problem_id, so each row is a problem of its own (--map problem_id=COLUMN names it)")
    task = Task(name, found.prompts, counts, params, verifier, batch_problems=_JUDGED_TOGETHER)
    return Prepared([task], settings, {name: data}, lambda: StoredSampler(found.rollouts), verifier.close, lines)
