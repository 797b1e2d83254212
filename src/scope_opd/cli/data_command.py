"""``scope data``: look at a data set before training on it (``check``), cut it to what can be learnt (``filter``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

CHECK_EXAMPLES = """Examples:
  scope data check train.jsonl
  scope data check train.parquet --against aime24.jsonl math500.jsonl
  scope data check train.jsonl --against test.jsonl --write-clean clean.jsonl
"""
FILTER_EXAMPLES = """Examples:
  scope data filter my.toml --out kept.jsonl
  scope data filter my.toml --samples 16 --pass-rate 0.2..0.8 --out kept.jsonl
  scope train my.toml --set data.train=kept.jsonl
"""
app = App(name="data", help="Check a training set, and filter it by pass rate.", help_format="plaintext")


@app.command(help_epilogue=CHECK_EXAMPLES)
def check(
    train: str,
    /,
    *,
    against: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    ngram: int = 13,
    overlap: float = 0.5,
    problem_column: str = "problem",
    answer_column: str = "answer",
    id_column: str = "id",
    against_problem_column: str = "problem",
    json: Path | None = None,
    write_clean: Path | None = None,
    show: int = 10,
) -> int:
    """Look for bad rows, duplicates and held-out problems in a training set.

    Lists what no verifier could judge, problems that occur twice, and pairs
    of a held-out and a training problem that are the same or share word
    n-grams. Pairs that differ in numbers alone are listed too, as neighbours.
    Exit code 1 where rows are bad or held-out problems are found, unless
    --write-clean wrote the rest.

    Parameters
    ----------
    train
        A file, zoo:train, or hf:OWNER/NAME?split=..
    against
        Held-out sets, as many as you like.
    ngram
        Words in an n-gram.
    overlap
        Share of a held-out problem's n-grams from which a pair counts.
    problem_column
        Of TRAIN; it may hold chat messages.
    answer_column
        Of TRAIN.
    id_column
        Of TRAIN; without it rows are numbered.
    against_problem_column
        Of the held-out sets, whose answers are not read.
    json
        Write all that was found to this file.
    write_clean
        Write TRAIN as JSON lines, less bad rows, repeats and contaminated rows.
    show
        Pairs shown of each kind; --json has them all.
    """
    from scope_opd.cli.data_check import CheckOptions, run_check

    return run_check(
        CheckOptions(
            train=train,
            against=tuple(against or ()),
            ngram=ngram,
            overlap=overlap,
            columns=(problem_column, answer_column, id_column),
            against_problem_column=against_problem_column,
            json=json,
            write_clean=write_clean,
            show=show,
        )
    )


@app.command(name="filter", help_epilogue=FILTER_EXAMPLES)
def filter_(
    config: Path,
    /,
    *,
    out: Path,
    pass_rate: str = "0.1..0.9",
    samples: int = 8,
    overrides: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
) -> int:
    """Keep the prompts that the student solves sometimes.

    Samples each prompt of data.train with the student, judges with the run's
    verifier, and keeps those whose share of correct answers is in the range.
    Progress lies beside OUT: a filter that was killed goes on where it was
    when started again, and ends with the same file.

    Parameters
    ----------
    config
        The TOML file of the run: its data, chat, model, verifier, [rollout].
    out
        JSON lines: the kept rows with all their columns, and pass_rate.
    pass_rate
        LOW..HIGH, both included.
    samples
        Rollouts a prompt, in place of rollout.n.
    overrides
        TABLE.KEY=VALUE in place of what the file says; may be repeated.
    """
    from scope_opd.cli.data_filter import run_filter

    return run_filter(config, list(overrides or []), out=out, pass_rate=pass_rate, samples=samples)
